"""Encodes frames, one after the other, into the dictionaries that frame_store.py decodes from.

Numba compiles what is here when it is first used, in seconds, and keeps the result on disk.
"""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
from absl import logging

from offline_zoo import program
from offline_zoo.encoding import frame_store


def _keeps_compiled() -> bool:
  """Tells whether there is a place to keep what Numba compiles; logs it if there is none."""
  try:
    # Without a home directory, Numba would make one that is called "~".
    if program.user_cache_dir() is not None or os.environ.get('NUMBA_CACHE_DIR'):
      numba.njit(cache=True)(_keeps_compiled)
      return True
  except RuntimeError:  # Numba finds no directory that it can write to
    pass
  logging.warning(
    'No place to keep the compiled frame encoder, neither beside the code nor in a home directory: '
    'it is compiled in every run, for some seconds; NUMBA_CACHE_DIR can name one'
  )
  return False


_jit = functools.partial(numba.njit, nogil=True, cache=_keeps_compiled())
# Random odd factors of a multilinear hash: as many as the longest item has words, here 9, and 36 in
# benchmarks/frame_layouts.py.
_FACTORS = np.random.default_rng(0).integers(2**64, size=36, dtype=np.uint64) | np.uint64(1)
# Numba takes these for constants: rows and columns of tiles, rows of pixels in a band.
_TILE, _BLOCK, _NUM_BLOCKS = frame_store.TILE, frame_store.BLOCK, frame_store.NUM_BLOCKS
_NUM_BANDS = frame_store.NUM_BANDS
_TILE_ROWS, _TILE_COLUMNS = _BLOCK * _NUM_BANDS, _BLOCK * _NUM_BLOCKS
_BAND_HEIGHT = _TILE * _BLOCK
# The tables grow between calls of the kernel, so that they can take whatever it may find.
_FRAMES_PER_CALL = 500
_ITEMS_PER_FRAME = tuple(
  frame_store.NUM_BANDS * n
  for n in (frame_store.NUM_BLOCKS * frame_store.BLOCK**2, frame_store.NUM_BLOCKS, 1)
)


class _Table(NamedTuple):
  """A dictionary, and a hash table to find its items in: open addressing, linear probing.

  Attributes:
    items: [capacity, W] uint32.
    num_items: [1] int64, how many items there are.
    slots: [a power of two, 2] uint32: an item's id plus one, or zero if the slot is empty, and 32
      bits of its hash that did not choose the slot.
  """

  items: np.ndarray
  num_items: np.ndarray
  slots: np.ndarray

  @classmethod
  def make(cls, items: np.ndarray, capacity: int) -> '_Table':
    """A table with room for so many items, of which these [M, W], all distinct, are the first."""
    table = cls(
      np.zeros((capacity, items.shape[1]), np.uint32),
      np.zeros(1, np.int64),
      np.zeros((2 ** (2 * capacity - 1).bit_length(), 2), np.uint32),
    )
    _intern_all(table, items, np.empty(len(items), np.uint32))
    return table


# Inlined where the number of words is known, its loops are unrolled: that is twice as fast.
@_jit(inline='always')
def _intern(table, item, num_words):
  """The id of an item [W] of so many words, which is added if it is new."""
  value = np.uint64(0)
  for i in range(num_words):
    value += np.uint64(item[i]) * _FACTORS[i]
  value = (value ^ (value >> np.uint64(32))) * _FACTORS[0]
  tag = np.uint32(value)
  mask = np.uint64(len(table.slots) - 1)
  slot = (value >> np.uint64(32)) & mask
  while table.slots[slot, 0] != 0:
    if table.slots[slot, 1] == tag:
      known = table.slots[slot, 0] - np.uint32(1)
      equal = True  # which equal hashes do not prove
      for i in range(num_words):
        equal &= table.items[known, i] == item[i]
      if equal:
        return known
    slot = (slot + np.uint64(1)) & mask
  new = np.uint32(table.num_items[0])
  for i in range(num_words):
    table.items[new, i] = item[i]
  table.slots[slot, 0] = new + np.uint32(1)
  table.slots[slot, 1] = tag
  table.num_items[0] += 1
  return new


@_jit()
def _intern_all(table, items, ids):
  for i in range(len(items)):
    ids[i] = _intern(table, items[i], items.shape[1])


@_jit()
def _encode(words, last, ids, tables, out):
  """Encodes frames; a piece that is what it was in the frame before keeps its id.

  Args:
    words: [K, 84, 21] uint32, frames, four pixels to a word.
    last: [84, 21] uint32, the frame before.
    ids: of the tiles [21, 21], blocks [7, 7] and bands [7] of `last`, uint32; updated.
    tables: of tiles, blocks and bands; updated.
    out: [K, 7] uint32, the frames' band ids.
  """
  tile_ids, block_ids, band_ids = ids
  tiles, blocks, bands = tables
  tile = np.empty(_TILE, np.uint32)
  block = np.empty(_BLOCK * _BLOCK, np.uint32)
  changed = np.empty(_NUM_BLOCKS, np.bool_)
  for k in range(len(words)):
    new = words[k]
    old = words[k - 1] if k else last
    for band in range(_NUM_BANDS):
      difference = np.uint32(0)
      for y in range(_BAND_HEIGHT * band, _BAND_HEIGHT * (band + 1)):
        for x in range(_TILE_COLUMNS):
          difference |= new[y, x] ^ old[y, x]
      if difference != 0:
        changed[:] = False
        for i in range(_BLOCK * band, _BLOCK * (band + 1)):
          for j in range(_TILE_COLUMNS):
            difference = np.uint32(0)
            for y in range(_TILE):
              difference |= new[_TILE * i + y, j] ^ old[_TILE * i + y, j]
            if difference != 0:
              for y in range(_TILE):
                tile[y] = new[_TILE * i + y, j]
              tile_ids[i, j] = _intern(tiles, tile, _TILE)
              changed[j // _BLOCK] = True
        for c in range(_NUM_BLOCKS):
          if changed[c]:
            for i in range(_BLOCK):
              for j in range(_BLOCK):
                block[_BLOCK * i + j] = tile_ids[_BLOCK * band + i, _BLOCK * c + j]
            block_ids[band, c] = _intern(blocks, block, _BLOCK * _BLOCK)
        band_ids[band] = _intern(bands, block_ids[band], _NUM_BLOCKS)
      out[k, band] = band_ids[band]


class Encoder:
  """Dictionaries that grow with the frames that are encoded.

  Black is known from the beginning: tile, block and band 0.
  """

  def __init__(self, dictionaries: Sequence[frame_store.Dictionaries] = ()):
    """Begins with the pieces of these, one after the other, if there are any."""
    black = [
      np.zeros((0 if dictionaries else 1, size), np.uint32) for size in frame_store.ITEM_SIZES
    ]
    self._tables = []
    for level, nothing in enumerate(black):
      items = np.concatenate([nothing, *(dictionary[level] for dictionary in dictionaries)])
      room = _FRAMES_PER_CALL * _ITEMS_PER_FRAME[level]
      self._tables.append(_Table.make(items, capacity=2 * (len(items) + room)))
    self._num_taken = self.num_items if dictionaries else (0, 0, 0)
    self._last = np.zeros((frame_store.FRAME_SHAPE[0], _TILE_COLUMNS), np.uint32)
    shapes = ((_TILE_ROWS, _TILE_COLUMNS), (_NUM_BANDS, _NUM_BLOCKS), (_NUM_BANDS,))
    self._ids = tuple(np.zeros(shape, np.uint32) for shape in shapes)

  @property
  def num_items(self) -> tuple[int, int, int]:
    """How many tiles, blocks and bands there are."""
    tiles, blocks, bands = (int(table.num_items[0]) for table in self._tables)
    return tiles, blocks, bands

  def take_new(self) -> frame_store.Dictionaries:
    """A copy of the pieces that were not given at the beginning nor taken since."""
    start, self._num_taken = self._num_taken, self.num_items
    return frame_store.Dictionaries(
      *(
        table.items[first:end].copy()
        for table, first, end in zip(self._tables, start, self._num_taken, strict=True)
      )
    )

  def encode(self, pixels: np.ndarray) -> np.ndarray:
    """The band ids [K, 7] uint32 of frames [K, 84, 84] uint8; fastest if each is like the last."""
    ids = np.empty((len(pixels), _NUM_BANDS), np.uint32)
    for start in range(0, len(pixels), _FRAMES_PER_CALL):
      words = pixels[start : start + _FRAMES_PER_CALL].view(np.uint32)
      self._make_room(len(words))
      out = ids[start : start + len(words)]
      _encode(words, self._last, self._ids, tuple(self._tables), out)
      self._last[:] = words[-1]
    return ids

  def _make_room(self, num_frames: int) -> None:
    for level, per_frame in enumerate(_ITEMS_PER_FRAME):
      table = self._tables[level]
      count = int(table.num_items[0])
      needed = count + num_frames * per_frame
      if needed > len(table.items):
        self._tables[level] = _Table.make(table.items[:count], capacity=2 * needed)
