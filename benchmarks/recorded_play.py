"""Bytes a transition of recorded play, and how fast it becomes shards again.

  python -m benchmarks.recorded_play [--games=freeway,pong] [--num_transitions=100000]

For each game: what `logs/demo.py` plays, by its policy for the game or at random, is recorded, with
and without the policy's own choices, which the actions' probabilities need; expanded to shards; and
verified. Beside it are transitions a second of the emulator alone, with the screens that are pooled
but nothing done to them, of one process, times the number of processes: the bound.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time

import numpy as np

from offline_zoo.logs import demo, play, recorded

GAMES = 'freeway,pong,breakout,ms_pacman'


def emulator_rate(config: demo.Config, path: pathlib.Path, num_steps: int) -> float:
  """Agent steps a second of the emulator that plays the recorded actions, and nothing else."""
  game = play.game(config.environment_name, config.sticky_action_probability)
  emulator, done, seconds = game.emulator, 0, 0.0
  actions = emulator.getMinimalActionSet()
  for episode in recorded.read(path)[1]:
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
  for episode in episodes:
    recording.add(episode._replace(choices=np.zeros_like(episode.choices)))
  return len(recording.content())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--games', default=GAMES)
  parser.add_argument('--num_transitions', type=int, default=100_000)
  parser.add_argument('--num_processes', type=int, default=2)
  args = parser.parse_args()

  print(
    f'{args.num_transitions:,} transitions of each game or more, {args.num_processes} processes\n'
  )
  print(
    '| game | bytes a transition | with choices | expanded a second | verified a second | '
    'emulator alone |\n|---|---|---|---|---|---|',
    flush=True,
  )
  for name in args.games.split(','):
    config = demo.Config(
      environment_name=name,
      num_transitions=args.num_transitions,
      num_processes=args.num_processes,
    )
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory, f'{name}.play')
      recorded_steps = demo.record(config, path).num_steps
      start = time.perf_counter()
      number = recorded.expand(path, path.with_name('logs'), 25_000, args.num_processes)
      expanded = number / (time.perf_counter() - start)
      start = time.perf_counter()
      _, number = recorded.verify(path, args.num_processes)
      verified = number / (time.perf_counter() - start)
      bound = args.num_processes * emulator_rate(config, path, 10_000)
      sizes = [size / recorded_steps for size in (size_without_choices(path), path.stat().st_size)]
    print(
      f'| {name} | {sizes[0]:.3f} | {sizes[1]:.3f} | {expanded:,.0f} | {verified:,.0f} | '
      f'{bound:,.0f} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
