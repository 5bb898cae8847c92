"""Bytes a frame of several hierarchies of tiles, over many games: why frame_store.py has its own.

  python -m benchmarks.frame_layouts --logs_dir=/tmp/random_logs

A layout is a sequence of factors: first the pixels of a tile, then how many pieces of one level,
each way, make a piece of the next. A frame is the ids of its largest pieces. Everything is counted:
distinct tiles, distinct pieces of each level, the frames' ids, ids in as few whole bytes as hold
them. Logs are 50,000 frames of uniformly random play of each game, seed 0, and are made if missing.
"""

import argparse
import pathlib

import numpy as np

from benchmarks import games
from offline_zoo.encoding import frame_encoder, frame_store
from offline_zoo.logs import dqn_replay

LAYOUTS = {
  '12x12': ((12, 12),),
  '6x6, rows of 14': ((6, 6), (1, 14)),
  '6x6, 2x2': ((6, 6), (2, 2)),
  '6x6, 2x2, rows of 7': ((6, 6), (2, 2), (1, 7)),
  '6x6, 2x2, columns of 7': ((6, 6), (2, 2), (7, 1)),
  '6x6, 2x2, rows of 7, all 7': ((6, 6), (2, 2), (1, 7), (7, 1)),
  '6x4, 2x3, rows of 7': ((6, 4), (2, 3), (1, 7)),
  '3x4, 2x3, rows of 7': ((3, 4), (2, 3), (1, 7)),
  '4x4, 3x3, rows of 7': ((4, 4), (3, 3), (1, 7)),
  '7x4, 2x3, rows of 7': ((7, 4), (2, 3), (1, 7)),
  '3x4, 2x1, 2x3, rows of 7': ((3, 4), (2, 1), (2, 3), (1, 7)),
  '3x4, 1x7, 1x3, 2x1': ((3, 4), (1, 7), (1, 3), (2, 1)),
}


def regroup(ids: np.ndarray, factor: tuple[int, int]) -> np.ndarray:
  """Ids or pixels [N, Y, X] as items [N, Y / h, X / w, h * w]."""
  (n, height, width), (h, w) = ids.shape, factor
  items = ids.reshape(n, height // h, h, width // w, w).swapaxes(2, 3)
  return items.reshape(n, height // h, width // w, h * w)


def number_all(items: np.ndarray) -> tuple[np.ndarray, int]:
  """Ids [...] uint32 of items [..., W] uint32, by first appearance, and how many are distinct."""
  flat = np.ascontiguousarray(items.reshape(-1, items.shape[-1]))
  table = frame_encoder._Table.make(flat[:0], capacity=len(flat))
  ids = np.empty(len(flat), np.uint32)
  frame_encoder._intern_all(table, flat, ids)
  return ids.reshape(items.shape[:-1]), int(table.num_items[0])


def bytes_per_frame(observation: np.ndarray, layout: tuple[tuple[int, int], ...]) -> float:
  """Of frames [N, 84, 84] encoded in a layout, dictionaries included."""
  total = 0
  pixels = np.ascontiguousarray(regroup(observation, layout[0]))
  tile_bytes = pixels.shape[-1]
  ids, num_items = number_all(pixels.view(np.uint32))
  total += num_items * tile_bytes
  for factor in layout[1:]:
    below = frame_store.id_bytes(num_items)
    items = regroup(ids, factor)
    ids, num_items = number_all(items)
    total += num_items * items.shape[-1] * below
  return (total + ids.size * frame_store.id_bytes(num_items)) / len(observation)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--logs_dir', type=pathlib.Path, required=True)
  parser.add_argument('--num_frames', type=int, default=20_000)
  args = parser.parse_args()

  ratios: dict[str, list[float]] = {name: [] for name in LAYOUTS}
  for game in games.NAMES:
    replay_dir = games.random_logs(args.logs_dir, game)
    observation = dqn_replay.ShardFiles(replay_dir, 0).read().observation[: args.num_frames]
    for name, layout in LAYOUTS.items():
      ratios[name].append(84 * 84 / bytes_per_frame(observation, layout))
  print(f'Ratio of raw to encoded size, {args.num_frames:,} frames of random play a game\n')
  print('| layout | ' + ' | '.join(games.NAMES) + ' | median |')
  print('|---' * (len(games.NAMES) + 2) + '|')
  for name, values in ratios.items():
    print(f'| {name} | ' + ' | '.join(f'{v:.0f}' for v in values) + f' | {np.median(values):.0f} |')


if __name__ == '__main__':
  main()
