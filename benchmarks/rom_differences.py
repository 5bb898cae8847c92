"""What differs in play between today's ROMs and those that the public datasets were logged with.

  python -m benchmarks.rom_differences --rom_dir=<as python -m offline_zoo.roms fetch made it>

For each of the DQN Replay Dataset's 60 games, the same random agent steps are played in today's
emulator on both ROMs, ale-py's and atari-py 0.2.5's, with the same seed and sticky actions. An
episode that ends on either is begun anew on both. Prints, for each game whose ROMs are different
files: how many rows the screen has; from which step on frames differ, as they are logged and as
networks see them (84x84), how many do, and in how much of their pixels; from which step on rewards
differ, and their sums. Then the games whose ROMs are the same files.
"""

import argparse

import dm_env
import numpy as np

from offline_zoo import atari_data, atari_env, processors


class Player:
  """An emulator whose frames are processed."""

  def __init__(self, game: str, rom_dir: str | None):
    self.environment = atari_env.AtariEnv(game, rom_dir=rom_dir, seed=0)
    self._processor = processors.AtariProcessor()

  def reset(self) -> dm_env.TimeStep:
    return self._processor(self.environment.reset())

  def step(self, action: int) -> dm_env.TimeStep:
    while (timestep := self._processor(self.environment.step(action))) is None:
      pass
    return timestep


def play(players: list[Player], num_steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Plays the same on two ROMs.

  Returns:
    Of each step, the share of pixels that differ [T] and both rewards [T, 2].
  """
  rng = np.random.default_rng(0)
  num_actions = players[0].environment.action_spec().num_values
  shares, rewards = [], []
  timesteps = [player.reset() for player in players]
  for action in rng.integers(num_actions, size=num_steps):
    if any(timestep.last() for timestep in timesteps):
      timesteps = [player.reset() for player in players]
    timesteps = [player.step(int(action)) for player in players]
    old, new = (timestep.observation[..., -1] for timestep in timesteps)
    shares.append(np.mean(old != new))
    rewards.append([timestep.reward for timestep in timesteps])
  return np.array(shares), np.array(rewards)


def first(differs: np.ndarray) -> str:
  return f'{1 + np.argmax(differs):,}' if differs.any() else 'none'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rom_dir', required=True)
  parser.add_argument('--steps', type=int, default=1000)
  args = parser.parse_args()
  same = []
  print(
    '| game | rows: ale-py | atari-py | frames differ from step | in steps | in pixels ', end=''
  )
  print('| rewards differ from step | sum: ale-py | atari-py |')
  print('|---' * 9 + '|', flush=True)
  for name in atari_data.DQN_REPLAY_GAMES:
    players = [Player(name, rom_dir) for rom_dir in (None, args.rom_dir)]
    meanings = [player.environment.action_meanings for player in players]
    assert meanings[0] == meanings[1], f'{name}: action sets {meanings}'
    shares, rewards = play(players, args.steps)
    frames, unequal = shares > 0, rewards[:, 0] != rewards[:, 1]
    game = atari_data.game(name)
    if game.rom_md5 == game.logged_rom_md5:
      assert not frames.any() and not unequal.any(), name
      same.append(name)
      continue
    cells = [name, *(str(player.environment.observation_spec().shape[0]) for player in players)]
    pixels = f'{shares[frames].mean():.1%}' if frames.any() else ''
    cells += [first(frames), f'{frames.mean():.0%}', pixels]
    cells += [first(unequal), *(f'{total:,.0f}' for total in rewards.sum(axis=0))]
    print(f'| {" | ".join(cells)} |', flush=True)
  print(f'\nThe same file, hence the same play: {", ".join(same)}.')


if __name__ == '__main__':
  main()
