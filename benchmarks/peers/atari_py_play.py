"""Plays games at random in the emulator of atari-py 0.2.5, without sticky actions.

Runs in atari-py's environment, see README.md; `benchmarks.emulator_differences` starts it. Prints a
line of JSON for each game: the minimal action set, and of each raw frame a checksum, the reward and
whether the game ended with it. A game that has ended is begun anew, on a frame without a reward.
"""

import argparse
import json
import zlib

import atari_py
import numpy as np

NUM_ACTION_REPEATS = 4


def play(game: str, num_steps: int) -> dict:
  """Plays agent steps of four frames."""
  emulator = atari_py.ALEInterface()
  emulator.setInt(b'random_seed', 1)
  emulator.setFloat(b'repeat_action_probability', 0.0)
  emulator.loadROM(atari_py.get_game_path(game))
  emulator.reset_game()
  actions = [int(action) for action in emulator.getMinimalActionSet()]
  frames, rewards, ends = [], [], []
  for index in np.random.default_rng(0).integers(len(actions), size=num_steps):
    for _ in range(NUM_ACTION_REPEATS):
      if emulator.game_over():
        emulator.reset_game()
        rewards.append(0)
      else:
        rewards.append(int(emulator.act(actions[index])))
      frames.append(zlib.crc32(emulator.getScreenGrayscale().tobytes()))
      ends.append(bool(emulator.game_over()))
  return {'actions': actions, 'frames': frames, 'rewards': rewards, 'ends': ends}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('games', nargs='+')
  parser.add_argument('--steps', type=int, required=True)
  args = parser.parse_args()
  for game in args.games:
    print(json.dumps(play(game, args.steps)), flush=True)


if __name__ == '__main__':
  main()
