"""Tests for frame_store.py and frame_encoder.py: every frame comes back, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_zoo.encoding import frame_encoder, frame_store
from offline_zoo.logs import dqn_replay


@pytest.fixture(scope='session')
def breakout(golden) -> np.ndarray:
  """Logged frames, blank and stale ones included."""
  logs = golden / 'replay' / 'Breakout' / '1' / 'replay_logs'
  return np.concatenate([dqn_replay.ShardFiles(logs, i).read().observation for i in range(4)])


def noise(num_frames: int, seed: int = 0) -> np.ndarray:
  shape = (num_frames, 84, 84)
  return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def flickering(num_frames: int) -> np.ndarray:
  """Frames that differ from the one before in one pixel, every pixel in turn, corners first."""
  pixels = np.zeros((num_frames, 7056), np.uint8)
  order = np.concatenate([[0, 83, 7055, 7055 - 83], np.arange(num_frames)]) % 7056
  for i in range(1, num_frames):
    pixels[i] = pixels[i - 1]
    pixels[i, order[i]] ^= 1 + i % 255
  return pixels.reshape(-1, 84, 84)


def make_store(encoder: frame_encoder.Encoder, ids: np.ndarray) -> frame_store.FrameStore:
  pieces = encoder.take_new()
  num_items = encoder.num_items
  return frame_store.FrameStore(
    jnp.asarray(pieces.tiles),
    jnp.asarray(frame_store.pack(pieces.blocks, num_items[0])),
    jnp.asarray(frame_store.pack(pieces.bands, num_items[1])),
    jnp.asarray(frame_store.pack(ids, num_items[2])),
  )


@pytest.mark.parametrize('num_items', [1, 2, 256, 257, 2**16, 2**16 + 1, 2**24, 2**24 + 1, 2**31])
def test_pack_takes_as_many_bytes_as_the_largest_id_needs(num_items: int):
  ids = np.unique(np.array([0, 1, 254, 255, 256, 65535, 65536, num_items // 3, num_items - 1]))
  ids = ids[ids < num_items].reshape(1, -1)
  packed = frame_store.pack(ids, num_items)
  expected = next(k for k in (1, 2, 3, 4) if num_items <= 256**k)
  assert packed.shape == (*ids.shape, expected) and packed.dtype == np.uint8
  np.testing.assert_array_equal(frame_store.unpack(packed), ids)
  on_device = frame_store.unpack(jnp.asarray(packed))
  np.testing.assert_array_equal(on_device, ids)
  assert on_device.dtype == jnp.int32


def frames_of(name: str, breakout: np.ndarray) -> np.ndarray:
  return {
    'breakout': lambda: breakout,
    'noise': lambda: noise(700),
    'flickering': lambda: flickering(1500),
    'shuffled': lambda: np.random.default_rng(1).permutation(breakout[:1000]),
    'black first': lambda: np.concatenate([np.zeros((2, 84, 84), np.uint8), breakout[5:9]]),
    'black last': lambda: np.concatenate([noise(2), np.zeros((3, 84, 84), np.uint8)]),
  }[name]()


NAMES = ('breakout', 'noise', 'flickering', 'shuffled', 'black first', 'black last')


@pytest.mark.parametrize('name', NAMES)
def test_every_frame_comes_back(breakout, name: str):
  pixels = frames_of(name, breakout)
  encoder = frame_encoder.Encoder()
  # In calls of several lengths; the tables grow many times on the way.
  cuts = np.cumsum([0, 1, 2, 30, 501, 999])
  parts = np.split(pixels, cuts[cuts < len(pixels)])
  ids = np.concatenate([encoder.encode(part) for part in parts])
  assert ids.shape == (len(pixels), 7)
  store = make_store(encoder, ids)
  decode = jax.jit(frame_store.decode)
  np.testing.assert_array_equal(decode(store, jnp.arange(len(pixels))), pixels)
  # Any rows in any order and any shape.
  rows = np.random.default_rng(2).integers(len(pixels), size=(3, 5))
  decoded = decode(store, rows)
  np.testing.assert_array_equal(decoded, pixels[rows])
  assert decoded.dtype == jnp.uint8


@pytest.mark.parametrize('name', NAMES)
def test_each_piece_is_stored_once(breakout, name: str):
  pixels = frames_of(name, breakout)
  encoder = frame_encoder.Encoder()
  encoder.encode(pixels)

  def num_distinct(items: np.ndarray) -> int:
    return len({item.tobytes() for item in items})

  for items in encoder.take_new():
    assert num_distinct(items) == len(items)
  # By another way: pieces as they are in the pictures. Black ones are known even if unused.
  tiles = pixels.reshape(-1, 21, 4, 21, 4).swapaxes(2, 3).reshape(-1, 16)
  blocks = pixels.reshape(-1, 7, 12, 7, 12).swapaxes(2, 3).reshape(-1, 144)
  bands = pixels.reshape(-1, 12 * 84)
  for items, num_known in zip((tiles, blocks, bands), encoder.num_items, strict=True):
    assert num_known == num_distinct(items) + bool(items.any(axis=1).all())


def test_an_encoder_goes_on_from_dictionaries(breakout):
  whole = frame_encoder.Encoder()
  ids = whole.encode(breakout)
  first = frame_encoder.Encoder()
  first_ids = first.encode(breakout[:1500])
  pieces = [first.take_new()]
  first.encode(breakout[1500:1600])
  pieces.append(first.take_new())
  second = frame_encoder.Encoder(pieces)
  np.testing.assert_array_equal(np.concatenate([first_ids, second.encode(breakout[1500:])]), ids)
  for one, two, all_of in zip(pieces[0], pieces[1], whole.take_new(), strict=True):
    np.testing.assert_array_equal(np.concatenate([one, two]), all_of[: len(one) + len(two)])


def test_pieces_with_equal_hashes_are_told_apart(monkeypatch):
  """With all hashes equal, in the uncompiled kernel: what is compiled is the same text."""
  monkeypatch.setattr(frame_encoder, '_FACTORS', np.zeros(36, np.uint64))
  intern = frame_encoder._intern.py_func
  items = np.random.default_rng(0).integers(3, size=(200, 4), dtype=np.uint32)
  table = frame_encoder._Table(
    np.zeros((100, 4), np.uint32), np.zeros(1, np.int64), np.zeros((256, 2), np.uint32)
  )
  ids = np.array([intern(table, item, 4) for item in items])
  np.testing.assert_array_equal(table.items[ids], items)
  assert table.num_items[0] == len(np.unique(items, axis=0)) == len(np.unique(ids))
  assert (table.slots[: table.num_items[0], 1] == 0).all()  # hashes were equal


def test_hashes_spread():
  """Pieces that differ in one pixel, as frames' pieces do, have different hashes."""
  items = np.zeros((4 * 4 * 255 + 1, 16), np.uint8)
  for i in range(1, len(items)):
    items[i, i % 16] = 1 + i // 16 % 255
  table = frame_encoder._Table.make(np.unique(items, axis=0).view(np.uint32), 4096)
  assert table.num_items[0] == len(np.unique(items, axis=0)) == 4081
  filled = table.slots[:, 0] > 0
  assert len(np.unique(table.slots[filled, 1])) > 4070
  # Runs of filled slots, which a look-up has to walk along: 1.5 at this load, if all is well.
  runs = np.diff(np.flatnonzero(np.diff(filled.astype(int), prepend=0, append=0)))[::2]
  assert np.mean(runs) < 3
