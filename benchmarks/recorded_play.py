"""Bytes a transition of recorded play, and how fast it becomes shards again.

  python -m benchmarks.recorded_play [--paths runs/online_dqn/pong/1/recorded.play ...]
  python -m benchmarks.recorded_play --games=freeway,ms_pacman --num_transitions=100000

Of each recording, by default those of the miniature DQN replay, or with --games of what
`logs/demo.py` plays, by its policy for the game or at random: bytes a transition with and without
the policy's own choices, which the actions' probabilities need; of the replay on the device, and of
the shards' files; transitions a second expanded to shards, and verified. Beside it are those of the
emulator alone, with the screens that are pooled but nothing done to them, of one process, times the
number of processes: the bound. Raw frames are 7,056 bytes.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time

import jax
import numpy as np

from offline_zoo import replay
from offline_zoo.logs import bundled, demo, play, recorded

COLUMNS = (
  'game', 'transitions', 'kB', 'bytes a transition', 'without choices', 'encoded replay', 'shards',
  'seconds to expand', 'expanded a second', 'verified a second', 'emulator alone',
)  # fmt: skip


def emulator_rate(path: pathlib.Path, num_steps: int) -> float:
  """Agent steps a second of the emulator that plays the recorded actions, and nothing else."""
  header, episodes = recorded.read(path)
  game = play.game(header.environment_name, header.sticky_action_probability)
  emulator, done, seconds = game.emulator, 0, 0.0
  actions = emulator.getMinimalActionSet()
  for episode in episodes:
    game.start(episode.seed)
    start = time.perf_counter()
    for action in episode.actions:
      for repeat in range(4):
        emulator.act(actions[action])
        emulator.game_over(with_truncation=False)
        if repeat >= 2:
          emulator.getScreenGrayscale(game.screens[repeat - 2])
    seconds += time.perf_counter() - start
    done += len(episode.actions)
    if done >= num_steps:
      break
  return done / seconds


def size_without_choices(path: pathlib.Path) -> int:
  header, episodes = recorded.read(path)
  recording = recorded.Recording(dataclasses.replace(header, has_choices=False))
  *before, last = (e._replace(choices=np.zeros_like(e.choices)) for e in episodes)
  for episode in before:
    recording.add(episode)
  return len(recording.content(last))


def measure(path: pathlib.Path, num_processes: int) -> list[str]:
  """Makes a recording's row of the table."""
  header, episodes = recorded.read(path)
  num_steps = sum(len(episode.actions) for episode in episodes)
  size = path.stat().st_size
  with tempfile.TemporaryDirectory() as directory:
    logs = pathlib.Path(directory, 'logs')
    start = time.perf_counter()
    recorded.expand(path, logs, 25_000, num_processes)
    seconds = time.perf_counter() - start
    files = sum(file.stat().st_size for file in logs.iterdir())
    data = replay.load(logs, num_actions=header.num_actions)
    encoded = sum(x.nbytes for x in jax.tree.leaves(data))
  start = time.perf_counter()
  recorded.verify(path, num_processes)
  verified = time.perf_counter() - start
  a_transition = [
    f'{number / num_steps:.{digits}f}'
    for number, digits in ((size, 3), (size_without_choices(path), 3), (encoded, 0), (files, 0))
  ]
  return [
    header.environment_name, f'{num_steps:,}', f'{size / 1000:.0f}', *a_transition,
    f'{seconds:.0f}', f'{num_steps / seconds:,.0f}', f'{num_steps / verified:,.0f}',
    f'{num_processes * emulator_rate(path, 10_000):,.0f}',
  ]  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--paths', nargs='+', type=pathlib.Path, help='of recordings')
  parser.add_argument('--games', help='to record instead')
  parser.add_argument('--num_transitions', type=int, default=100_000, help='of each of --games')
  parser.add_argument('--num_processes', type=int, default=2)
  args = parser.parse_args()

  print(f'{args.num_processes} processes\n\n| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}')
  with tempfile.TemporaryDirectory() as directory:
    paths = args.paths or sorted(bundled.RECORDINGS.glob('*.play'))
    if args.games:
      paths = [pathlib.Path(directory, f'{name}.play') for name in args.games.split(',')]
    for path in paths:
      if args.games:
        config = demo.Config(
          environment_name=path.stem,
          num_transitions=args.num_transitions,
          num_processes=args.num_processes,
        )
        demo.record(config, path)
      print(f'| {" | ".join(measure(path, args.num_processes))} |', flush=True)


if __name__ == '__main__':
  main()
