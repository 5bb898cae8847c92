"""Shards of logs, encoded: from the files of a replay directory, or from the cache."""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from absl import logging
from isal import isal_zlib

from offline_zoo import logs, program
from offline_zoo.encoding import frame_store, replay_cache


@dataclasses.dataclass(frozen=True)
class EncodedLogs:
  """The chosen shards of a replay directory.

  Attributes:
    numbers: of the shards.
    shards: the encoded ones, in the same order.
    chain: all encoded shards whose pieces these may refer to, in the order they were encoded.
  """

  numbers: list[int]
  shards: list[replay_cache.EncodedShard]
  chain: list[replay_cache.EncodedShard]

  @property
  def checksum(self) -> int:
    """A CRC-32 that tells logs apart."""
    return isal_zlib.crc32(np.array([shard.checksum for shard in self.shards]).data)

  def take(self, positions: Sequence[int]) -> 'EncodedLogs':
    """The same with only the shards at these positions."""
    return EncodedLogs(
      [self.numbers[i] for i in positions], [self.shards[i] for i in positions], self.chain
    )

  def occurring(self, positions: Sequence[int]) -> list[np.ndarray]:
    """For each tile, block and band of the chain, whether frames of these shards contain it."""
    counts = [sum(len(shard.pieces(level)) for shard in self.chain) for level in range(3)]
    if len(positions) == len(self.chain):
      return [np.ones(count, bool) for count in counts]
    occurs = [np.zeros(count, bool) for count in counts]
    for position in positions:
      occurs[2][frame_store.unpack(self.shards[position].frames)] = True
    for level in (2, 1):
      for packed in self.pieces(level, occurs[level]):
        occurs[level - 1][frame_store.unpack(packed)] = True
    return occurs

  def pieces(self, level: int, occurs: np.ndarray) -> list[np.ndarray]:
    """Those pieces of a level that occur, as they are in each shard of the chain."""
    pieces, first = [], 0
    for shard in self.chain:
      in_shard = shard.pieces(level)
      which = occurs[first : first + len(in_shard)]
      pieces.append(in_shard if which.all() else in_shard[which])
      first += len(in_shard)
    return pieces

  def decode(self, position: int, rows: np.ndarray) -> np.ndarray:
    """The frames [K, 84, 84] uint8 in rows [K] of the shard at a position, on the host."""
    ids = frame_store.unpack(self.shards[position].frames[rows])
    for level in (2, 1, 0):
      used, places = np.unique(ids, return_inverse=True)
      occurs = np.zeros(sum(len(shard.pieces(level)) for shard in self.chain), bool)
      occurs[used] = True
      items = self.pieces(level, occurs)
      found = np.concatenate([frame_store.unpack(x) for x in items] if level else items)
      ids = found[places.reshape(ids.shape)]
    return np.asarray(frame_store.to_pixels(jnp.asarray(ids)))

  @functools.cached_property
  def num_used(self) -> list[int]:
    """How many tiles, blocks and bands the frames of all shards are made of."""
    return [int(occurs.sum()) for occurs in self.occurring(range(len(self.shards)))]

  @functools.cached_property
  def num_used_by_each(self) -> np.ndarray:
    """The same of each shard alone: [shards, 3]."""
    return np.array(
      [
        [np.count_nonzero(occurs) for occurs in self.occurring([position])]
        for position in range(len(self.shards))
      ]
    )


def _episode_returns(is_blank: bool, reward: np.ndarray, terminal: np.ndarray) -> np.ndarray:
  """Sums of logged rewards [E] of the episodes that lie whole within a shard's usable rows.

  Args:
    is_blank: whether the first frame is all zeros.
    reward: [n], as logged.
    terminal: [n] uint8.
  """
  ends = np.flatnonzero(terminal)
  is_whole = terminal[ends] == logs.shard.TERMINAL
  returns = np.diff(np.cumsum(reward, dtype=np.float64)[ends], prepend=0.0)
  # The first end closes an episode that begins in this shard only if the shard opens with padding.
  begins_here = len(reward) > 0 and is_blank and reward[0] == 0 and not terminal[0]
  is_whole[:1] &= begins_here
  return returns[is_whole]


def _smallest(rewards: np.ndarray) -> np.ndarray:
  """The rewards [n] as int8, int16 or float32: the smallest that holds them exactly."""
  for dtype in (np.int8, np.int16):
    bounds = np.iinfo(dtype)
    whole = np.clip(rewards, bounds.min, bounds.max).astype(dtype)
    if (whole == rewards).all():
      return whole
  return rewards


def _encode_shard(
  encoder, log_shard: logs.shard.LogShard, rows: logs.shard.Rows, bar
) -> replay_cache.EncodedShard:
  """Encodes a shard.

  Args:
    encoder: of the shards before.
    log_shard: whose frames are read.
    rows: those to encode.
    bar: is told of each frame that is read.
  """
  num_rows = len(rows.action)
  ids = np.empty((num_rows, frame_store.NUM_BANDS), np.uint32)
  checksum, is_blank, start = 0, False, 0
  for pixels in log_shard.read_frames(rows.num_frames):
    used = pixels[: max(num_rows - start, 0)]
    if len(used):
      if start == 0:
        is_blank = not used[0].any()
      ids[start : start + len(used)] = encoder.encode(used)
      checksum = isal_zlib.crc32(used.data, checksum)
    start += len(pixels)
    bar.update(len(pixels))

  num_items = encoder.num_items
  new = encoder.take_new()
  actions = rows.action.astype(np.uint8)
  for column in (actions, rows.reward, rows.terminal, rows.probability):
    checksum = isal_zlib.crc32(column.data, checksum)
  return replay_cache.EncodedShard(
    tiles=new.tiles,
    blocks=frame_store.pack(new.blocks, num_items[0]),
    bands=frame_store.pack(new.bands, num_items[1]),
    frames=frame_store.pack(ids, num_items[2]),
    actions=actions,
    rewards=_smallest(rows.reward),
    terminals=rows.terminal,
    probabilities=rows.probability,
    episode_returns=_episode_returns(is_blank, rows.reward, rows.terminal),
    checksum=np.array(checksum, np.uint32),
  )


def load(
  replay_dir: str | os.PathLike,
  numbers: Sequence[int] | None,
  num_actions: int | None,
  max_rows_per_shard: int | None,
  cache_dir: str | os.PathLike | None,
  with_probabilities: bool = False,
) -> EncodedLogs:
  """Finds shards in the cache, or encodes them and puts them there.

  Args:
    replay_dir: the directory with the shards.
    numbers: of the shards, in this order; all of them if None.
    num_actions: the size of the game's action set, to check the logged actions against.
    max_rows_per_shard: encodes only the first rows of each shard.
    cache_dir: where encoded shards are kept for the next time; None keeps none.
    with_probabilities: whether the shards must have probabilities of the logged actions.

  Raises:
    OSError: the directory, a shard, or a shard's file is missing, or cannot be read.
    ValueError: a bad file, see `logs.shard.LogShard`, or the same shard twice.
  """
  found = logs.open_shards(replay_dir)
  logging.info('%s: %d %s', replay_dir, len(found), found[0].kind)
  there = {log_shard.number: log_shard for log_shard in found}
  numbers = list(there) if numbers is None else list(numbers)
  if missing := sorted(set(numbers) - set(there)):
    raise FileNotFoundError(f'{replay_dir}: no shards {missing}; there are {list(there)}')
  if not numbers or len(set(numbers)) < len(numbers):
    raise ValueError(f'--shards: expected one or more different ones, got {numbers}')
  for log_shard in (there[number] for number in numbers if with_probabilities):
    if not log_shard.has_probabilities():
      raise FileNotFoundError(
        f'{log_shard.path("prob")}: expected the probabilities of the logged actions, which this '
        'agent needs; there are none (the public datasets have none, our own logs do)'
      )
  directory = None
  if cache_dir is not None:
    directory = replay_cache.directory_for(cache_dir, replay_dir, max_rows_per_shard)
  chain = _chain(there, numbers, num_actions, max_rows_per_shard, directory)
  encoded = EncodedLogs(numbers, [chain[number] for number in numbers], list(chain.values()))
  for number, encoded_shard in zip(numbers, encoded.shards, strict=True):
    # Those that were in the cache have not been checked against this game.
    logs.shard.check_actions(there[number], encoded_shard.actions, num_actions)
  return encoded


def _chain(
  there: Mapping[int, logs.shard.LogShard],
  chosen: Sequence[int],
  num_actions: int | None,
  max_rows_per_shard: int | None,
  directory: pathlib.Path | None,
) -> dict[int, replay_cache.EncodedShard]:
  """Encodes the chosen shards, those in the cache excepted; returns the whole chain."""
  fingerprints = {number: log_shard.fingerprint() for number, log_shard in there.items()}
  with replay_cache.Cache(directory) as cache:
    cache.read(fingerprints)
    missing = [number for number in chosen if number not in cache.shards]
    if not missing:
      return cache.shards
    # The small files of all shards first: most bad input is then found within seconds.
    small_files = {}
    with program.progress_bar(len(missing), 'checking', 'shard') as bar:
      for number in missing:
        small_files[number] = there[number].read_small_files(num_actions, max_rows_per_shard)
        bar.update()
    from offline_zoo.encoding import frame_encoder  # which imports Numba

    encoder = frame_encoder.Encoder([encoded.dictionaries for encoded in cache.shards.values()])
    total = sum(rows.num_frames for rows in small_files.values())
    started = time.monotonic()
    with program.progress_bar(total, 'encoding', 'row') as bar:
      done = 0
      for number in missing:
        rows = small_files.pop(number)
        encoded = _encode_shard(encoder, there[number], rows, bar)
        cache.append(number, fingerprints[number], encoded)
        done += rows.num_frames
        seconds = time.monotonic() - started
        logging.info(
          'Encoded shard %d, %d of %d rows: %.0f MB of frames a second, %.0f s left',
          number, done, total, done * math.prod(frame_store.FRAME_SHAPE) / 1e6 / seconds,
          seconds * (total - done) / done,
        )  # fmt: skip
    return cache.shards
