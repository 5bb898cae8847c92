"""Log shards on disk, in the format of the DQN Replay Dataset (Agarwal et al. 2020).

This is the only module that knows it. A replay directory holds shards numbered N; a shard is six
gzip-compressed `.npy` files, checkpoints of a circular buffer of C rows:

  $store$_observation_ckpt.N.gz  [C, 84, 84] uint8, one preprocessed frame a row
  $store$_action_ckpt.N.gz       [C] int32, index into the game's minimal action set
  $store$_reward_ckpt.N.gz       [C] float32
  $store$_terminal_ckpt.N.gz     [C] uint8, 1 on an episode's last row
  add_count_ckpt.N.gz            [] integer, rows ever added when the shard was written
  invalid_range_ckpt.N.gz        [K] integer, not used here

Row i holds a frame, the action taken at it, the reward that followed and whether the episode ended
then. Rows from `add_count mod C` on are stale: left over from the lap before. Three all-zero rows
stand before each episode's first frame, so that a stack of four never reaches into the episode
before. Log directories are untrusted input: nothing in them is ever unpickled.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from isal import igzip

from offline_zoo.atari_data import FRAME_SHAPE, STACK_SIZE

NUM_PADDING_ROWS = STACK_SIZE - 1
MAX_ACTION = 255  # what the replay has room for

# Column of a shard: dtype and shape of a row.
_COLUMNS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
  'observation': (np.dtype(np.uint8), FRAME_SHAPE),
  'action': (np.dtype(np.int32), ()),
  'reward': (np.dtype(np.float32), ()),
  'terminal': (np.dtype(np.uint8), ()),
}
_COUNTERS = ('add_count', 'invalid_range')
# The fastest of isal's four levels (0 to 3): frames shrink about thirtyfold all the same.
_COMPRESSION_LEVEL = 1
# Frames are read, while those before them are encoded, in pieces of 7 MB, which caches can hold.
_FRAMES_PER_READ = 1000


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard as it lies on disk, stale rows included.

  Attributes:
    observation: [C, 84, 84] uint8.
    action: [C] int32.
    reward: [C] float32, as logged.
    terminal: [C] uint8.
    add_count: rows ever added when the shard was written.
  """

  observation: np.ndarray
  action: np.ndarray
  reward: np.ndarray
  terminal: np.ndarray
  add_count: int

  @property
  def columns(self) -> dict[str, np.ndarray]:
    return {name: getattr(self, name) for name in _COLUMNS}

  @property
  def num_rows(self) -> int:
    """How many rows, from the first on, are not stale."""
    return self.add_count % len(self.terminal)


def shard_path(replay_dir: str | os.PathLike, name: str, index: int) -> pathlib.Path:
  """The file of one column, or of a counter."""
  prefix = '$store$_' if name in _COLUMNS else ''
  return pathlib.Path(replay_dir) / f'{prefix}{name}_ckpt.{index}.gz'


def fingerprint(replay_dir: str | os.PathLike, index: int) -> dict[str, list[int]]:
  """Size and modification time of those of a shard's files that are there, by name."""
  paths = (shard_path(replay_dir, name, index) for name in (*_COLUMNS, *_COUNTERS))
  stats = {path.name: path.stat() for path in paths if path.exists()}
  return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def list_shards(replay_dir: str | os.PathLike) -> list[int]:
  """Numbers of the shards in a directory, in ascending order.

  A shard counts when any of its files is there, so that one that lacks files is not passed over in
  silence but reported by `read_shard`.

  Raises:
    FileNotFoundError: no such directory, or no shard in it.
    NotADirectoryError: it is not a directory.
  """
  directory = pathlib.Path(replay_dir)
  if not directory.exists():
    raise FileNotFoundError(f'{directory}: no such replay directory')
  names = rf'\$store\$_(?:{"|".join(_COLUMNS)})|{"|".join(_COUNTERS)}'
  pattern = re.compile(rf'(?:{names})_ckpt\.(\d+)\.gz')
  matches = (pattern.fullmatch(path.name) for path in directory.iterdir())
  shards = sorted({int(match[1]) for match in matches if match})
  if not shards:
    raise FileNotFoundError(
      f'{directory}: no log shards here; looked for files such as $store$_observation_ckpt.0.gz'
    )
  return shards


class _FormatError(ValueError):
  """Its message says what is wrong with which file."""


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[Any]:
  """Opens a gzip-compressed `.npy`, and says what is wrong with it if reading it fails."""
  try:
    with igzip.open(path) as file:
      yield file
      # To the end of the stream, so that its checksum is verified.
      if file.read(1):
        raise ValueError
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: a file of this shard is missing') from None
  except _FormatError:
    raise
  except Exception as error:  # damage makes gzip, zlib, NumPy and its tokenizer raise all sorts
    # What NumPy says of objects and pickles advises to trust them.
    said = 'it holds something else' if isinstance(error, ValueError) else error
    raise ValueError(f'{path}: expected a gzip-compressed .npy array: {said}') from error


def _read_array(path: pathlib.Path) -> np.ndarray:
  with _reading(path) as file:
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray):  # np.load also opens archives of arrays
      raise ValueError
  return array


def _describe(array: np.ndarray) -> str:
  return f'{array.dtype} {list(array.shape)}'


def _expect(condition: object, path: pathlib.Path, expected: str, got: object) -> None:
  if not condition:
    raise _FormatError(f'{path}: expected {expected}, got {got}')


def _read_column(
  replay_dir: str | os.PathLike, index: int, name: str, capacity: int | None = None
) -> np.ndarray:
  """Reads one column and checks its type and shape."""
  path = shard_path(replay_dir, name, index)
  dtype, shape = _COLUMNS[name]
  column = _read_array(path)
  good = column.dtype == dtype and column.ndim > 0 and column.shape[1:] == shape
  _expect(good, path, f'{dtype} {["C", *shape]}', _describe(column))
  _expect(len(column), path, 'at least one row', 'none')
  if capacity is not None:
    _expect(len(column) == capacity, path, f'{capacity} rows as in $store$_terminal', len(column))
  return column


def read_frames(path: pathlib.Path, capacity: int) -> Iterator[np.ndarray]:
  """Yields a shard's frames [K, 84, 84], some at a time, valid until the next are asked for.

  Those that come next are read in the background.
  """
  with _reading(path) as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
      raise ValueError
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
      raise ValueError
    good = dtype == np.uint8 and shape[1:] == FRAME_SHAPE and not is_fortran
    _expect(good, path, f'uint8 {["C", *FRAME_SHAPE]}', f'{dtype} {list(shape)}')
    _expect(shape[0] == capacity, path, f'{capacity} rows as in $store$_terminal', shape[0])
    buffers = np.zeros((2, min(capacity, _FRAMES_PER_READ), *FRAME_SHAPE), np.uint8)

    def read(start: int) -> np.ndarray:
      pixels = buffers[start // _FRAMES_PER_READ % 2][: capacity - start]
      rest = memoryview(pixels).cast('B')
      while rest:
        size = file.readinto(rest)
        if not size:
          raise EOFError('it ends early')
        rest = rest[size:]
      return pixels

    reading = thread.submit(read, 0)
    for start in range(_FRAMES_PER_READ, capacity + _FRAMES_PER_READ, _FRAMES_PER_READ):
      pixels = reading.result()
      if start < capacity:
        reading = thread.submit(read, start)
      yield pixels


def _check_rows(replay_dir, index: int, name: str, column, good: np.ndarray, expected: str) -> None:
  if not good.all():
    row = np.argmin(good)
    _expect(False, shard_path(replay_dir, name, index), expected, f'{column[row]} in row {row}')


def check_actions(
  replay_dir: str | os.PathLike, index: int, actions: np.ndarray, num_actions: int | None
) -> None:
  """Checks that a shard's usable rows hold actions of a set of this size, if it is known.

  Raises:
    ValueError: one does not.
  """
  top = MAX_ACTION if num_actions is None else num_actions - 1
  expected = f'actions 0 to {top} (are these the logs of another game?)'
  _check_rows(replay_dir, index, 'action', actions, (actions >= 0) & (actions <= top), expected)


def read_small_files(
  replay_dir: str | os.PathLike, index: int, num_actions: int | None
) -> dict[str, Any]:
  """Reads and checks all of a shard but its frames: what a `Shard` has besides `observation`."""
  frames = shard_path(replay_dir, 'observation', index)
  if not frames.exists():
    raise FileNotFoundError(f'{frames}: a file of this shard is missing')
  path = shard_path(replay_dir, 'add_count', index)
  add_count = _read_array(path)
  is_count = add_count.ndim == 0 and add_count.dtype.kind in 'iu' and add_count >= 0
  _expect(is_count, path, 'one count of rows', f'{_describe(add_count)} {add_count}')
  path = shard_path(replay_dir, 'invalid_range', index)
  invalid_range = _read_array(path)
  is_range = invalid_range.ndim == 1 and invalid_range.dtype.kind in 'iu'
  _expect(is_range, path, 'integers [K]', _describe(invalid_range))

  columns = {'terminal': _read_column(replay_dir, index, 'terminal')}
  capacity = len(columns['terminal'])
  for name in ('action', 'reward'):
    columns[name] = _read_column(replay_dir, index, name, capacity)
  # Only rows that are not stale: what the others hold is nobody's business.
  used = {name: column[: add_count % capacity] for name, column in columns.items()}
  check_actions(replay_dir, index, used['action'], num_actions)
  _check_rows(
    replay_dir, index, 'terminal', used['terminal'], used['terminal'] <= 1, 'flags 0 or 1'
  )
  finite = np.isfinite(used['reward'])
  _check_rows(replay_dir, index, 'reward', used['reward'], finite, 'finite rewards')
  return {**columns, 'add_count': int(add_count)}


def read_shard(
  replay_dir: str | os.PathLike, index: int, *, num_actions: int | None = None
) -> Shard:
  """Reads and checks one shard.

  Args:
    replay_dir: the directory with the shards.
    index: the shard's number.
    num_actions: the size of the game's action set, to check the logged actions against.

  Raises:
    FileNotFoundError: one of the six files is missing.
    ValueError: a file is damaged, its array has the wrong type or shape, or a row that is not stale
      holds an action outside 0 .. num_actions - 1, a reward that is not finite or a terminal flag
      other than 0 and 1. The message names the file.
  """
  rest = read_small_files(replay_dir, index, num_actions)
  capacity = len(rest['terminal'])
  return Shard(observation=_read_column(replay_dir, index, 'observation', capacity), **rest)


def write_shard(replay_dir: str | os.PathLike, index: int, shard: Shard) -> None:
  """Writes one shard, replacing one of that number; makes the directory if need be.

  All six files are complete on disk before the first of them takes its name. The same shard gives
  the same bytes.

  Raises:
    ValueError: the columns do not have the types and shapes of `Shard`.
    OSError: the directory cannot be written, or the disk is full.
  """
  directory = pathlib.Path(replay_dir)
  capacity = len(shard.terminal)
  for name, column in shard.columns.items():
    dtype, shape = _COLUMNS[name]
    good = column.dtype == dtype and column.shape == (capacity, *shape)
    expected = f'{dtype} {[capacity, *shape]}'
    _expect(good, shard_path(directory, name, index), expected, _describe(column))
  arrays = {
    **shard.columns,
    'add_count': np.array(shard.add_count, np.int64),
    # The rows around the write position that Dopamine, with a horizon of 1, would not sample.
    'invalid_range': (shard.num_rows - 1 + np.arange(STACK_SIZE + 1, dtype=np.int64)) % capacity,
  }

  directory.mkdir(parents=True, exist_ok=True)
  staging = pathlib.Path(tempfile.mkdtemp(prefix=f'.shard-{index}-', dir=directory))
  try:
    for name, array in arrays.items():
      # No name and no time in the gzip header, so that equal arrays give equal files.
      with (
        open(shard_path(staging, name, index), 'wb') as file,
        igzip.IGzipFile('', 'wb', _COMPRESSION_LEVEL, file, mtime=0) as f,
      ):
        np.save(f, array, allow_pickle=False)
    for name in arrays:
      os.replace(shard_path(staging, name, index), shard_path(directory, name, index))
  finally:
    shutil.rmtree(staging, ignore_errors=True)


class ShardWriter:
  """Logs play, row by row, into shards of `capacity` rows, as a Dopamine run logs it.

  A full shard is written when the write position reaches the last row. The row that comes next
  would go there and is in no shard: one row in `capacity` is lost, as it is in the public data, but
  no other is. `close` writes what is left as a last, partial shard with the write position as its
  add_count, as batch_rl does, so that other readers too take its stale rows as never written.
  Stale rows are zeros.
  """

  def __init__(self, replay_dir: str | os.PathLike, capacity: int):
    if capacity <= NUM_PADDING_ROWS + 2:
      raise ValueError(f'a shard needs a capacity of at least 6 rows, got {capacity}')
    self._replay_dir = replay_dir
    self._columns = {
      name: np.zeros((capacity, *shape), dtype) for name, (dtype, shape) in _COLUMNS.items()
    }
    self._capacity = capacity
    self._add_count = 0
    self.num_transitions = 0  # rows in shards, written or not yet, that are not padding

  def start_episode(self) -> None:
    """Adds the blank rows that stand before an episode's first frame."""
    for _ in range(NUM_PADDING_ROWS):
      self._add(np.zeros(FRAME_SHAPE, np.uint8), 0, 0.0, False)

  def add(self, frame: np.ndarray, action: int, reward: float, terminal: bool) -> None:
    """Adds a frame [84, 84] uint8, the action taken at it and what followed."""
    self.num_transitions += self._add(frame, action, reward, terminal)

  def _add(self, *row) -> bool:
    """Returns whether the row is kept."""
    index, position = divmod(self._add_count, self._capacity)
    kept = position < self._capacity - 1
    if kept:
      for column, value in zip(self._columns.values(), row, strict=True):
        column[position] = value
    self._add_count += 1
    if position == self._capacity - 2:
      write_shard(self._replay_dir, index, Shard(**self._columns, add_count=self._add_count))
      for column in self._columns.values():
        column[:] = 0
    return kept

  def close(self) -> None:
    """Writes the rows since the last full shard."""
    index, position = divmod(self._add_count, self._capacity)
    if 0 < position < self._capacity - 1:
      write_shard(self._replay_dir, index, Shard(**self._columns, add_count=position))
