"""Where the time of a first load goes, and what encoding shards in two processes could give.

  python -m benchmarks.load_phases seaquest=/tmp/seaquest_logs enduro=/tmp/enduro_logs

In seconds of processor time, medians of rounds in turns: Python's gzip with np.load, of all
columns; decompressing and checking the frames; encoding all of them; encoding the first and the
second half of the shards, each with a dictionary of its own, as two processes would; and putting
what the second found into the dictionary of the first, which gives its pieces and frames other ids.

From these follows how much faster than gzip and np.load a load could be on two cores where nothing
else took time and no core ever waited: as it is, where one core decompresses and the other encodes;
and with two processes, each for half of the shards, and then the merge.
"""

import argparse
import pathlib
import time

import numpy as np

from benchmarks import replay_load
from offline_zoo.encoding import frame_encoder
from offline_zoo.logs import dqn_replay


def merge(
  encoder: frame_encoder.Encoder, other: frame_encoder.Encoder, frames: list[np.ndarray]
) -> list[np.ndarray]:
  """Adds another encoder's pieces to one's own; returns its frames' ids among these."""
  ids = np.zeros(0, np.uint32)
  tables = zip(encoder._tables, other.take_new(), strict=True)
  for level, (table, items) in enumerate(tables):
    items = ids[items] if level else items
    ids = np.empty(len(items), np.uint32)
    grown = frame_encoder._Table.make(
      table.items[: int(table.num_items[0])], int(table.num_items[0]) + len(items)
    )
    frame_encoder._intern_all(grown, items, ids)
    encoder._tables[level] = grown
  return [ids[of_piece] for of_piece in frames]


def measure(replay_dir: pathlib.Path) -> list[float]:
  """Seconds of each phase."""
  start = time.process_time()
  replay_load.gzip_and_numpy(replay_dir)
  seconds = [time.process_time() - start]
  shards = dqn_replay.open_shards(replay_dir)
  nums_frames = [shard.read_small_files(None).num_frames for shard in shards]
  start = time.process_time()
  for shard, num_frames in zip(shards, nums_frames, strict=True):
    for _ in shard.read_frames(num_frames):
      pass
  seconds.append(time.process_time() - start)

  pieces = [
    [pixels.copy() for pixels in shard.read_frames(num_frames)]
    for shard, num_frames in zip(shards, nums_frames, strict=True)
  ]
  half = len(pieces) // 2
  one, first, second = (frame_encoder.Encoder() for _ in range(3))
  for encoder, some in ((one, pieces), (first, pieces[:half]), (second, pieces[half:])):
    start = time.process_time()
    ids = [encoder.encode(pixels) for of_shard in some for pixels in of_shard]
    seconds.append(time.process_time() - start)
  start = time.process_time()
  merge(first, second, ids)
  seconds.append(time.process_time() - start)
  assert first.num_items == one.num_items
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('logs', nargs='+', metavar='game=replay_dir')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()

  names = ('gzip and np.load', 'decompress', 'encode', 'first half', 'second half', 'merge')
  print(f'| game | {" | ".join(names)} | faster by at most | two processes, at most |')
  print('|---' * (len(names) + 3) + '|', flush=True)
  for game, replay_dir in (argument.split('=', 1) for argument in args.logs):
    medians = np.median([measure(pathlib.Path(replay_dir)) for _ in range(args.rounds)], axis=0)
    reference, decompress, encode, first, second, merging = medians
    today = max(decompress, encode)
    two = decompress / 2 + max(first, second) + merging
    cells = ' | '.join(f'{x:.2f}' for x in (*medians, reference / today, reference / two))
    print(f'| {game} | {cells} |', flush=True)


if __name__ == '__main__':
  main()
