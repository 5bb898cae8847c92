"""How the encoded replay grows with the number of logged frames, and what 50 million would take.

  python -m benchmarks.replay_growth pong=/tmp/pong_logs enduro=/tmp/enduro_logs

For each directory of logs: bytes a row, all columns and dictionaries counted, when so many rows
have been encoded. The projection continues each dictionary's growth between a third of the rows
and all of them as a power of the number of rows: an extrapolation over a factor of 50, of play by
one policy, and no more than that.
"""

import argparse
import pathlib
from collections.abc import Iterator

import numpy as np

from offline_zoo import logs
from offline_zoo.encoding import frame_encoder, frame_store

MARKS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
PROJECTED_ROWS = 50_000_000
OTHER_COLUMNS = 3  # bytes a row: action, reward, terminal
DEVICES = (8, 24, 40, 80, 141)  # GB


def num_bytes(num_items, num_rows: int) -> float:
  """Of the replay with so many tiles, blocks, bands and rows."""
  sizes = (4, *map(frame_store.id_bytes, num_items))  # of a word, and of each level's ids
  pieces = zip((*num_items, num_rows), (*frame_store.ITEM_SIZES, 7), sizes, strict=True)
  return sum(number * size * of for number, size, of in pieces) + OTHER_COLUMNS * num_rows


def frames(replay_dir: pathlib.Path, max_rows: int) -> Iterator[np.ndarray]:
  """Usable frames, in pieces that end at the marks."""
  done = 0
  for shard in logs.open_shards(replay_dir):
    logged = shard.read_small_files(None)
    rest = len(logged.action)
    for pixels in shard.read_frames(logged.num_frames):
      pixels = pixels[: min(rest, max_rows - done)]
      if not len(pixels):
        break
      yield from np.split(pixels, [mark - done for mark in MARKS if 0 < mark - done < len(pixels)])
      rest -= len(pixels)
      done += len(pixels)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('logs', nargs='+', metavar='game=replay_dir')
  parser.add_argument('--max_rows', type=int, default=1_000_000)
  args = parser.parse_args()

  marks = [mark for mark in MARKS if mark <= args.max_rows]
  print('| game | ' + ' | '.join(f'{mark:,}' for mark in marks) + ' | 50 million | fits in |')
  print('|---' * (len(marks) + 3) + '|', flush=True)
  for game, replay_dir in (argument.split('=', 1) for argument in args.logs):
    encoder = frame_encoder.Encoder()
    done, cells, sizes = 0, [], {}
    for pixels in frames(pathlib.Path(replay_dir), args.max_rows):
      encoder.encode(pixels)
      done += len(pixels)
      if done in marks:
        sizes[done] = np.array(encoder.num_items)
        cells.append(f'{num_bytes(encoder.num_items, done) / done:.1f}')
    (before, few), (last, many) = sorted(sizes.items())[-2:]
    exponents = np.log(many / few) / np.log(last / before)
    projected = many * (PROJECTED_ROWS / last) ** exponents
    total = num_bytes([int(number) for number in projected], PROJECTED_ROWS)
    fits = next((f'{device} GB' for device in DEVICES if total < 1e9 * device), 'none')
    cells += ['-'] * (len(marks) - len(cells))
    print(
      f'| {game} | ' + ' | '.join(cells) + f' | {total / PROJECTED_ROWS:.0f}, {total / 1e9:.1f} GB '
      f'(exponents {", ".join(f"{e:.2f}" for e in exponents)}) | {fits} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
