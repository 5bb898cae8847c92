"""Bytes a transition of the resident replay, everything counted, and that no frame was changed.

  python -m benchmarks.replay_memory --logs_dir=/tmp/random_logs

does so for 15 games, 50,000 frames of uniformly random play each, seed 0, which are logged first if
they are missing;

  python -m benchmarks.replay_memory --replay_dir=/tmp/pong_logs

for one directory of logs. Counted are dictionaries, ids, actions, rewards, terminals and runs of
valid rows, as they are on the device, over the rows that are not padding. Every frame is decoded
and compared with the logs.
"""

import argparse
import pathlib

import jax
import numpy as np

from benchmarks import games
from offline_zoo import atari_data, logs, replay
from offline_zoo.encoding import frame_store


def count_rows(replay_dir: pathlib.Path) -> int:
  """Rows that are usable and not blank ones before an episode."""
  num_rows = 0
  for shard in logs.open_shards(replay_dir):
    terminal = shard.read_small_files(None).terminal
    num_rows += len(terminal) - (atari_data.STACK_SIZE - 1) * int(terminal[:-1].sum())
  return num_rows


def check_frames(replay_dir: pathlib.Path, data: replay.ReplayData) -> None:
  """Decodes all frames and compares them with the logged ones.

  Raises:
    AssertionError: one differs.
  """
  decode = jax.jit(frame_store.decode)
  first = 0
  for shard in logs.open_shards(replay_dir):
    logged = shard.read_small_files(None)
    end = first + len(logged.action)
    row = first
    for pixels in shard.read_frames(logged.num_frames):
      wanted = pixels[: end - row]
      # Always as many, so that it is compiled once.
      rows = np.minimum(np.arange(row, row + len(pixels)), len(data.actions) - 1)
      decoded = np.asarray(decode(data.frames, rows))[: len(wanted)]
      same = np.array_equal(decoded, wanted)
      assert same, f'{shard.path("observation")}: frames from row {row - first} on differ'
      row += len(wanted)
    first = end
  assert first == len(data.actions)


def measure(replay_dir: pathlib.Path) -> tuple[int, int]:
  """Bytes on the device, and transitions."""
  data = replay.load(replay_dir)
  check_frames(replay_dir, data)
  return sum(array.nbytes for array in jax.tree.leaves(data)), count_rows(replay_dir)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  group = parser.add_mutually_exclusive_group(required=True)
  group.add_argument('--logs_dir', type=pathlib.Path)
  group.add_argument('--replay_dir', type=pathlib.Path)
  args = parser.parse_args()

  if args.replay_dir:
    num_bytes, num_rows = measure(args.replay_dir)
    print(
      f'{num_rows:,} transitions, {num_bytes / 1e9:.3f} GB, {num_bytes / num_rows:.1f} bytes a '
      'transition; all frames decoded equal the logged ones'
    )
    return
  print('| game | bytes a transition | raw frame is larger by |\n|---|---|---|', flush=True)
  ratios = []
  for game in games.NAMES:
    num_bytes, num_rows = measure(games.random_logs(args.logs_dir, game))
    ratios.append(84 * 84 * num_rows / num_bytes)
    print(f'| {game} | {num_bytes / num_rows:.1f} | {ratios[-1]:.1f} |', flush=True)
  print(f'\nmedian {np.median(ratios):.1f}, worst {min(ratios):.1f}; all frames equal the logs')


if __name__ == '__main__':
  main()
