"""Frames as a hierarchy of dictionaries: lossless, small, decoded inside jit.

Atari frames repeat themselves at every scale, so each distinct piece of one is stored once:

  tile    4x4 pixels, as four 32-bit words
  block   3x3 tiles, 12x12 pixels: nine tile ids
  band    seven blocks side by side, 12x84 pixels: seven block ids
  frame   seven bands, one below the other: seven band ids

Decoding is a chain of four gathers, for any rows in any order. Of the layouts that
`python -m benchmarks.frame_layouts` compares, this one is the smallest with three levels; a fourth
level saves 5% more. Ids take as many bytes, one to four, as the largest needs: see `pack`.

`frame_encoder.py` is the way in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offline_zoo.atari_data import FRAME_SHAPE

TILE = 4  # pixels, each way; a row of them is a word
BLOCK = 3  # tiles, each way
NUM_BLOCKS = FRAME_SHAPE[1] // (TILE * BLOCK)  # in a band: 7
NUM_BANDS = FRAME_SHAPE[0] // (TILE * BLOCK)  # in a frame: 7
# Words or ids that a piece of each level is made of: tiles, blocks, bands.
ITEM_SIZES = (TILE, BLOCK * BLOCK, NUM_BLOCKS)


class Dictionaries(NamedTuple):
  """Pieces of each level, with ids not packed: tiles [T, 4], blocks [B, 9], bands [S, 7] uint32."""

  tiles: np.ndarray
  blocks: np.ndarray
  bands: np.ndarray


class RawFrames(NamedTuple):
  """N frames as they are, [N, 84, 84] uint8, for a replay that is written to."""

  frames: jax.Array


class FrameStore(NamedTuple):
  """N frames and the dictionaries that they refer to, as arrays on the host or the device.

  Attributes:
    tiles: [T, 4] uint32, the rows of a tile, four pixels to a little-endian word.
    blocks: [B, 9, k] uint8, packed tile ids, row by row.
    bands: [S, 7, k] uint8, packed block ids, left to right.
    frames: [N, 7, k] uint8, packed band ids, top to bottom.
  """

  tiles: jax.Array
  blocks: jax.Array
  bands: jax.Array
  frames: jax.Array


def id_bytes(num_items: int) -> int:
  """Bytes of an id of one of so many items."""
  return max(1, ((num_items - 1).bit_length() + 7) // 8)


def pack(ids: np.ndarray, num_items: int) -> np.ndarray:
  """Ids [...] less than `num_items` as little-endian bytes [..., k] uint8."""
  words = np.ascontiguousarray(ids, '<u4')[..., None]
  return np.ascontiguousarray(words.view(np.uint8)[..., : id_bytes(num_items)])


def unpack(packed):
  """The ids [...] int32 that `pack` made into bytes [..., k]; NumPy's or JAX's, as they come."""
  return sum(packed[..., i].astype(np.int32) << 8 * i for i in range(packed.shape[-1]))


def decode(store: FrameStore | RawFrames, rows: jax.Array) -> jax.Array:
  """The frames [..., 84, 84] uint8 in these rows [...]; pure.

  Rows must be in 0 .. N - 1: for others the result means nothing.
  """
  if isinstance(store, RawFrames):
    return store.frames.at[rows].get(mode='promise_in_bounds')

  def look_up(items: jax.Array, ids: jax.Array) -> jax.Array:
    # The barrier keeps XLA from finding an id anew for everything that is looked up with it.
    ids = jax.lax.optimization_barrier(ids)
    return items.at[ids].get(mode='promise_in_bounds')

  bands = unpack(look_up(store.frames, rows))
  blocks = unpack(look_up(store.bands, bands))
  tiles = unpack(look_up(store.blocks, blocks))
  return to_pixels(jax.lax.optimization_barrier(look_up(store.tiles, tiles)))


def to_pixels(words: jax.Array) -> jax.Array:
  """Puts the tiles [..., 7, 7, 9, 4] uint32 of frames where they belong: [..., 84, 84] uint8."""
  shape = words.shape[:-4]
  # [..., band, block, tile row, tile column, row] to [..., band, tile row, row, block, tile column]
  words = words.reshape(*shape, NUM_BANDS, NUM_BLOCKS, BLOCK, BLOCK, TILE)
  words = jnp.moveaxis(words, (-5, -3, -1), (-5, -4, -3))
  return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape, *FRAME_SHAPE)
