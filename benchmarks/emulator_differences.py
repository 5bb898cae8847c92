"""Where today's emulator plays otherwise than atari-py 0.2.5's, which logged the public datasets.

  python -m benchmarks.emulator_differences --rom_dir=<ROMs> --peer_python=<venv>/bin/python

`python -m offline_zoo.roms fetch` makes the one, peers/README.md says how to make the other. Both
emulators play the same random agent steps on the same ROMs, without sticky actions, since their
random numbers differ. Prints a row for each game in which anything differs: the first raw frame
that does, how many frames and rewards do, and the sums of rewards.
"""

import argparse
import json
import pathlib
import subprocess
import zlib

import numpy as np

from offline_zoo import atari_data, atari_env


def play(game: str, rom_dir: str, num_steps: int) -> dict:
  """Plays what `peers/atari_py_play.py` plays, in today's emulator."""
  environment = atari_env.AtariEnv(game, sticky_action_probability=0.0, rom_dir=rom_dir, seed=0)
  timestep = environment.reset()
  frames, rewards, ends = [], [], []
  num_actions = environment.action_spec().num_values
  for action in np.random.default_rng(0).integers(num_actions, size=num_steps):
    for _ in range(atari_data.NUM_ACTION_REPEATS):
      timestep = environment.step(int(action))
      frames.append(zlib.crc32(timestep.observation.tobytes()))
      rewards.append(timestep.reward or 0)
      ends.append(timestep.last())
  return {'actions': num_actions, 'frames': frames, 'rewards': rewards, 'ends': ends}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rom_dir', required=True)
  parser.add_argument('--peer_python', required=True)
  parser.add_argument('--steps', type=int, default=1000)
  args = parser.parse_args()
  script = pathlib.Path(__file__).parent / 'peers' / 'atari_py_play.py'
  games = atari_data.DQN_REPLAY_GAMES
  peer = subprocess.Popen(
    [args.peer_python, str(script), *games, f'--steps={args.steps}'],
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
  )  # fmt: skip
  assert peer.stdout
  num_equal = 0
  print('| game | first raw frame | frames | rewards | sum: ale-py | atari-py |')
  print('|---' * 6 + '|', flush=True)
  for game, line in zip(games, peer.stdout, strict=True):
    theirs, ours = json.loads(line), play(game, args.rom_dir, args.steps)
    assert ours['actions'] == len(theirs['actions']), game
    names = ('frames', 'rewards', 'ends')
    frames, rewards, ends = (np.array(ours[name]) != np.array(theirs[name]) for name in names)
    if not (frames.any() or rewards.any() or ends.any()):
      num_equal += 1
      continue
    sums = ' | '.join(f'{sum(played["rewards"]):,.0f}' for played in (ours, theirs))
    first = f'{1 + np.argmax(frames):,}' if frames.any() else 'none'
    print(f'| {game} | {first} | {frames.mean():.0%} | {rewards.sum()} | {sums} |', flush=True)
  print(f'\n{num_equal} of {len(games)} games are the same in every frame, reward and end.')


if __name__ == '__main__':
  main()
