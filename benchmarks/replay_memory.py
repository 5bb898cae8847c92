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
from offline_zoo import replay
from offline_zoo.encoding import frame_store
from offline_zoo.logs import dqn_replay


def count_rows(replay_dir: pathlib.Path) -> int:
  """Rows that are usable and not blank ones before an episode."""
  num_rows = 0
  for index in dqn_replay.list_shards(replay_dir):
    columns = dqn_replay.read_small_files(replay_dir, index, None)
    terminal = columns['terminal'][: columns['add_count'] % len(columns['terminal'])]
    num_rows += len(terminal) - dqn_replay.NUM_PADDING_ROWS * int(terminal[:-1].sum())
  return num_rows


def check_frames(replay_dir: pathlib.Path, data: replay.ReplayData) -> None:
  """Decodes all frames and compares them with the logged ones.

  Raises:
    AssertionError: one differs.
  """
  decode = jax.jit(frame_store.decode)
  first = 0
  for index in dqn_replay.list_shards(replay_dir):
    columns = dqn_replay.read_small_files(replay_dir, index, None)
    capacity = len(columns['terminal'])
    end = first + columns['add_count'] % capacity
    path = dqn_replay.shard_path(replay_dir, 'observation', index)
    row = first
    for pixels in dqn_replay.read_frames(path, capacity):
      wanted = pixels[: end - row]
      # Always as many, so that it is compiled once.
      rows = np.minimum(np.arange(row, row + len(pixels)), len(data.actions) - 1)
      decoded = np.asarray(decode(data.frames, rows))[: len(wanted)]
      assert np.array_equal(decoded, wanted), f'{path}: frames from row {row - first} on differ'
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
