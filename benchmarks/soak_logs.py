"""Damaged log shards and cache files, for soak.py: nothing wrong may pass in silence."""

import collections
import gzip
import io
import itertools
import os
import pathlib
import resource
import shutil
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from isal import igzip

from offline_zoo import replay
from offline_zoo.logs import dqn_replay

NUM_ACTIONS = 4
_NAMES = ('observation', 'action', 'reward', 'terminal', 'add_count')


def write_logs(directory: pathlib.Path, num_rows: int = 200, capacity: int = 61) -> None:
  """Logs made-up play, frames of which no two are alike."""
  rng = np.random.default_rng(0)
  writer = dqn_replay.ShardWriter(directory, capacity)
  while writer.num_transitions < num_rows:
    writer.start_episode()
    length = int(rng.integers(5, 30))
    for step in range(length):
      frame = np.zeros((84, 84), np.uint8)
      frame[:12, :24] = rng.integers(256, size=(12, 24))
      action, reward = int(rng.integers(NUM_ACTIONS)), float(rng.integers(-2, 3))
      writer.add(frame, action, reward, step == length - 1)
  writer.close()


# Mutations of a file's bytes: each takes them and a generator of random numbers.


def _flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
  changed = bytearray(data)
  for position in rng.integers(len(data), size=rng.integers(1, 9)):
    changed[position] ^= 1 << rng.integers(8)
  return bytes(changed)


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
  return data[: rng.integers(len(data))]


def _delete(data: bytes, rng: np.random.Generator) -> bytes:
  start = int(rng.integers(len(data)))
  return data[:start] + data[start + int(rng.integers(1, 20)) :]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
  start = int(rng.integers(len(data) + 1))
  return data[:start] + rng.bytes(int(rng.integers(1, 20))) + data[start:]


def _extend(data: bytes, rng: np.random.Generator) -> bytes:
  more = (b'\0' * 100, rng.bytes(100), data, gzip.compress(b''), gzip.compress(b'x'), b'\x1f\x8b')
  return data + more[rng.integers(len(more))]


def _unpacked(change: Callable[[bytes, np.random.Generator], bytes]):
  """The mutation that makes a change to what is compressed, and compresses it again."""

  def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    return gzip.compress(change(gzip.decompress(data), rng), compresslevel=1)

  return mutate


def _edit_header(npy: bytes, rng: np.random.Generator) -> bytes:
  """Changes a few characters of the header to others that headers have."""
  changed = bytearray(npy)
  for position in rng.integers(6, 90, size=rng.integers(1, 4)):
    changed[position] = rng.choice(list(b"0123456789'<>|=iufOSVb?,()[]{}: \0\1\2\3TrueFals\n"))
  return bytes(changed)


def _edit_values(npy: bytes, rng: np.random.Generator) -> bytes:
  changed = bytearray(npy)
  for position in rng.integers(128, len(npy), size=rng.integers(1, 4)):
    changed[position] = rng.integers(256)
  return bytes(changed)


def _rewrite(npy: bytes, rng: np.random.Generator) -> bytes:
  """The array as another writer might have written it, or with another header to it."""
  array = np.load(io.BytesIO(npy), allow_pickle=False)
  header = {
    'descr': rng.choice(
      [array.dtype.str, array.dtype.str, '>i8', '|u1', '<f8', '|O', '<U9', '|b1']
    ),
    'fortran_order': bool(rng.integers(2)),
    'shape': array.shape,
  }
  if rng.integers(2):
    sizes = (0, 1, len(array.shape), 10**6, 2**24, 2**24 + 1, 2**40, 2**70, -1, True)
    header['shape'] = (*(sizes[rng.integers(len(sizes))],), *array.shape[1:])
  file = io.BytesIO()
  version = [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1)][rng.integers(5)]
  text = repr({**header, 'descr': str(header['descr'])}).encode()
  if not rng.integers(20):
    text = b'(' * int(rng.integers(100, 20_000))
  size = len(text) if rng.integers(8) else int(rng.integers(2**31))
  length = size % 2**16 if version[0] == 1 else size
  file.write(b'\x93NUMPY' + bytes(version) + length.to_bytes(2 if version[0] == 1 else 4, 'little'))
  file.write(text + array.tobytes('F' if header['fortran_order'] else 'C'))
  return file.getvalue()


def _widen(npy: bytes, rng: np.random.Generator) -> bytes:
  """The array in another type that holds the same values, or shifted, or turned."""
  array = np.load(io.BytesIO(npy), allow_pickle=False)
  changes: tuple[Callable[[], np.ndarray], ...] = (
    lambda: array.astype(np.int8), lambda: array.astype(np.float64),
    lambda: array.astype(array.dtype.newbyteorder('>')), lambda: np.roll(array, 1),
    lambda: array[..., None], lambda: array[:-1] if array.ndim else array,
    lambda: np.asfortranarray(array), lambda: np.concatenate([np.atleast_1d(array)] * 2),
  )  # fmt: skip
  file = io.BytesIO()
  np.save(file, changes[rng.integers(len(changes))]())
  return file.getvalue()


def _go_on(data: bytes, rng: np.random.Generator) -> bytes:
  """A stream that goes on for half a gigabyte: after the array, or in place of it."""
  npy = gzip.decompress(data)
  begin = (npy, b'PK\3\4', b'', npy[: rng.integers(200)], b'\x93NUMPY\2\0\xff\xff\xff\xff')
  with io.BytesIO() as file:
    with igzip.open(file, 'wb') as stream:
      stream.write(begin[rng.integers(len(begin))])
      for _ in range(512):
        stream.write(bytes(2**20))
    return file.getvalue()


MUTATIONS: dict[str, tuple[float, Callable[[bytes, np.random.Generator], bytes]]] = {
  'bits flipped': (20, _flip_bits),
  'cut': (8, _cut),
  'bytes deleted': (8, _delete),
  'bytes inserted': (8, _insert),
  'extended': (8, _extend),
  'header edited': (15, _unpacked(_edit_header)),
  'values edited': (10, _unpacked(_edit_values)),
  'header rewritten': (10, _unpacked(_rewrite)),
  'array changed': (8, _unpacked(_widen)),
  'contents cut': (4, _unpacked(_cut)),
  'goes on and on': (0.4, _go_on),
}
_SWAPPED, _NOT_A_FILE = 'another file', 'not a regular file'


def _replace(path: pathlib.Path, rng: np.random.Generator) -> None:
  """Puts something in a file's place that is none."""
  path.unlink()
  makers: tuple[Callable[[], object], ...] = (
    lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to('/dev/zero'),
    lambda: path.symlink_to(path), lambda: path.symlink_to('nowhere'), lambda: None,
  )  # fmt: skip
  makers[rng.integers(len(makers))]()


def mutate(files: dqn_replay.ShardFiles, others: list[pathlib.Path], rng) -> tuple[str, str]:
  """Changes one of a shard's files; returns how, and which."""
  name = str(rng.choice(_NAMES))
  path = files.path(name)
  kinds = [*MUTATIONS, _SWAPPED, _NOT_A_FILE]
  weights = np.array([weight for weight, _ in MUTATIONS.values()] + [6, 2])
  kind = str(rng.choice(kinds, p=weights / weights.sum()))
  if kind == _SWAPPED:
    shutil.copyfile(others[rng.integers(len(others))], path)
  elif kind == _NOT_A_FILE:
    _replace(path, rng)
  else:
    path.write_bytes(MUTATIONS[kind][1](path.read_bytes(), rng))
  return kind, name


# What must come of it.


def _expected(files: dqn_replay.ShardFiles) -> dict[str, np.ndarray]:
  """A shard's usable rows, as Python's gzip and NumPy read them."""
  arrays = {}
  for name in _NAMES:
    if files.path(name).exists():
      array = np.lib.format.read_array(io.BytesIO(gzip.decompress(files.path(name).read_bytes())))
      arrays[name] = np.asarray(array)
  num_rows = int(arrays.pop('add_count', len(arrays['terminal']) - 1)) % len(arrays['terminal'])
  return {name: array[:num_rows] for name, array in arrays.items()}


def _read(files: dqn_replay.ShardFiles) -> dict[str, np.ndarray]:
  """The same as a run reads them."""
  rows = files.read_small_files(NUM_ACTIONS)
  frames = np.concatenate([pixels.copy() for pixels in files.read_frames(rows.num_frames)])
  assert len(frames) == rows.num_frames, (len(frames), rows.num_frames)
  columns = {'action': rows.action, 'reward': rows.reward, 'terminal': rows.terminal}
  return {'observation': frames[: len(rows.action)], **columns}


def check_shard(files: dqn_replay.ShardFiles) -> bool:
  """Reads a shard that may be damaged; returns whether it was refused.

  Raises:
    AssertionError: it was read as something else than it holds, or not refused as it should be.
  """
  try:
    got = _read(files)
  except (OSError, ValueError) as error:
    assert f'{files.replay_dir}/' in str(error), f'no file is named: {error!r}'
    assert str(error).isprintable(), f'more than a line: {error!r}'
    return True
  for name, want in _expected(files).items():
    assert got[name].dtype == want.dtype and np.array_equal(got[name], want), f'{name} differs'
  return False


def _memory() -> int:
  """The most memory that this process has held, in bytes (Linux)."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mutate_shards(num_mutations: int, scratch: pathlib.Path) -> list[str]:
  """Mutates files of a shard, one each time: it is read as others read it, or refused in a line."""
  write_logs(scratch / 'good')
  good = dqn_replay.open_shards(scratch / 'good')
  others = [files.path(name) for files in good for name in _NAMES]
  target = dqn_replay.ShardFiles(scratch / 'mutated', good[0].number)
  faults = []
  outcomes: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  first_memory = _memory()
  for number in range(num_mutations):
    shutil.rmtree(target.replay_dir, ignore_errors=True)
    os.mkdir(target.replay_dir)
    for name in _NAMES:
      shutil.copyfile(good[0].path(name), target.path(name))
    kind, name = mutate(target, others, np.random.default_rng(number))
    memory, start = _memory(), time.monotonic()
    try:
      outcomes[kind][check_shard(target)] += 1
      seconds, grown = time.monotonic() - start, _memory() - memory
      # Bounds for a slow machine, and for the 64 MB that 2^24 actions take, and some.
      assert seconds < 20, f'it took {seconds:.0f} s'
      assert grown < 250e6, f'it took {grown / 1e6:.0f} MB'
    except Exception as error:
      faults.append(f'mutation {number} of {name}, {kind}: {type(error).__name__}: {error}')
  print('| mutation | read, and right | refused in a line |\n|---|---|---|')
  for kind, (read, refused) in outcomes.items():
    print(f'| {kind} | {read} | {refused} |')
  read, refused = map(sum, zip(*outcomes.values(), strict=True))
  print(f'| all | {read} | {refused} |')
  print(f'memory grew by {(_memory() - first_memory) / 1e6:.0f} MB')
  return faults


def flip_cache(num_flips: int, scratch: pathlib.Path) -> list[str]:
  """Flips single bits of the cache's files: the replay is as it was, and the file made anew."""
  replay_dir, cache = scratch / 'logs', scratch / 'encoded'
  write_logs(replay_dir)

  def leaves() -> list[np.ndarray]:
    data = replay.load(replay_dir, cache_dir=cache, num_actions=NUM_ACTIONS)
    return [np.asarray(array) for array in jax.tree.leaves(data)]

  want = leaves()
  paths = sorted(cache.glob('*/*.shard'))
  good = [path.read_bytes() for path in paths]
  assert len(paths) == len(dqn_replay.open_shards(replay_dir))
  faults = []
  rng = np.random.default_rng(0)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # it warns of every flip
  for flip in range(num_flips):
    file, bit = int(rng.integers(len(paths))), int(rng.integers(8))
    damaged = bytearray(good[file])
    position = int(rng.integers(len(damaged)))
    damaged[position] ^= 1 << bit
    paths[file].write_bytes(damaged)
    what = f'flip {flip}, byte {position} of {paths[file].name}'
    for got, array in itertools.zip_longest(leaves(), want):
      if got.dtype != array.dtype or not np.array_equal(got, array):
        faults.append(f'{what}: rows differ')
    if [path.read_bytes() for path in paths] != good:
      faults.append(f'{what}: the file was not made anew')
  logging.set_verbosity(verbosity)
  print(f'{num_flips} flips in {len(paths)} files, {len(faults)} faults')
  return faults
