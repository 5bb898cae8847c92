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
from offline_zoo.logs import shard

NUM_PADDING_ROWS = STACK_SIZE - 1

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
  except shard.FormatError:
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


@dataclasses.dataclass(frozen=True)
class ShardFiles:
  """The files of one shard: a `shard.LogShard`."""

  replay_dir: str | os.PathLike
  number: int

  def path(self, name: str) -> pathlib.Path:
    """The file of one column, or of add_count."""
    prefix = '$store$_' if name in _COLUMNS else ''
    return pathlib.Path(self.replay_dir, f'{prefix}{name}_ckpt.{self.number}.gz')

  def fingerprint(self) -> dict[str, list[int]]:
    """Size and modification time of those of the files that are there, by name."""
    paths = (self.path(name) for name in (*_COLUMNS, *_COUNTERS))
    stats = {path.name: path.stat() for path in paths if path.exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

  def read_small_files(self, num_actions: int | None) -> shard.Rows:
    """Reads and checks all but the frames; see `shard.LogShard`."""
    columns, add_count = self._read_small_files()
    capacity = len(columns['terminal'])
    # Only rows that are not stale: what the others hold is nobody's business.
    used = {name: column[: add_count % capacity] for name, column in columns.items()}
    rows = shard.Rows(**used, num_frames=capacity)
    shard.check_rows(self, rows, num_actions)
    return rows

  def _read_small_files(self) -> tuple[dict[str, np.ndarray], int]:
    """The columns but for the frames, stale rows included, and add_count."""
    frames = self.path('observation')
    if not frames.exists():
      raise FileNotFoundError(f'{frames}: a file of this shard is missing')
    path = self.path('add_count')
    add_count = _read_array(path)
    is_count = add_count.ndim == 0 and add_count.dtype.kind in 'iu' and add_count >= 0
    shard.expect(is_count, path, 'one count of rows', f'{_describe(add_count)} {add_count}')
    path = self.path('invalid_range')
    invalid_range = _read_array(path)
    is_range = invalid_range.ndim == 1 and invalid_range.dtype.kind in 'iu'
    shard.expect(is_range, path, 'integers [K]', _describe(invalid_range))

    columns = {'terminal': self._read_column('terminal')}
    capacity = len(columns['terminal'])
    for name in ('action', 'reward'):
      columns[name] = self._read_column(name, capacity)
    return columns, int(add_count)

  def _read_column(self, name: str, capacity: int | None = None) -> np.ndarray:
    """Reads one column and checks its type and shape."""
    path = self.path(name)
    dtype, shape = _COLUMNS[name]
    column = _read_array(path)
    good = column.dtype == dtype and column.ndim > 0 and column.shape[1:] == shape
    shard.expect(good, path, f'{dtype} {["C", *shape]}', _describe(column))
    shard.expect(len(column), path, 'at least one row', 'none')
    if capacity is not None:
      expected = f'{capacity} rows as in $store$_terminal'
      shard.expect(len(column) == capacity, path, expected, len(column))
    return column

  def read_frames(self, num_frames: int) -> Iterator[np.ndarray]:
    """Yields the frames; see `shard.LogShard`. Those that come next are read in the background."""
    path = self.path('observation')
    with _reading(path) as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
      version = np.lib.format.read_magic(file)
      if version != (1, 0):
        raise ValueError
      shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
      if dtype.hasobject:
        raise ValueError
      good = dtype == np.uint8 and shape[1:] == FRAME_SHAPE and not is_fortran
      shard.expect(good, path, f'uint8 {["C", *FRAME_SHAPE]}', f'{dtype} {list(shape)}')
      expected = f'{num_frames} rows as in $store$_terminal'
      shard.expect(shape[0] == num_frames, path, expected, shape[0])
      buffers = np.zeros((2, min(num_frames, _FRAMES_PER_READ), *FRAME_SHAPE), np.uint8)

      def read(start: int) -> np.ndarray:
        pixels = buffers[start // _FRAMES_PER_READ % 2][: num_frames - start]
        rest = memoryview(pixels).cast('B')
        while rest:
          size = file.readinto(rest)
          if not size:
            raise EOFError('it ends early')
          rest = rest[size:]
        return pixels

      reading = thread.submit(read, 0)
      for start in range(_FRAMES_PER_READ, num_frames + _FRAMES_PER_READ, _FRAMES_PER_READ):
        pixels = reading.result()
        if start < num_frames:
          reading = thread.submit(read, start)
        yield pixels

  def read(self) -> Shard:
    """Reads the whole shard, stale rows included, whatever its rows hold.

    Raises:
      OSError, ValueError: as `shard.LogShard.read_small_files` does.
    """
    columns, add_count = self._read_small_files()
    observation = self._read_column('observation', len(columns['terminal']))
    return Shard(observation=observation, **columns, add_count=add_count)

  def write(self, content: Shard) -> None:
    """Writes the shard, replacing one that is there; makes the directory if need be.

    All six files are complete on disk before the first of them takes its name. The same content
    gives the same bytes.

    Raises:
      ValueError: the columns do not have the types and shapes of `Shard`.
      OSError: the directory cannot be written, or the disk is full.
    """
    capacity = len(content.terminal)
    for name, column in content.columns.items():
      dtype, shape = _COLUMNS[name]
      good = column.dtype == dtype and column.shape == (capacity, *shape)
      expected = f'{dtype} {[capacity, *shape]}'
      shard.expect(good, self.path(name), expected, _describe(column))
    arrays = {
      **content.columns,
      'add_count': np.array(content.add_count, np.int64),
      # The rows around the write position that Dopamine, with a horizon of 1, would not sample.
      'invalid_range': (content.num_rows - 1 + np.arange(STACK_SIZE + 1, dtype=np.int64))
      % capacity,
    }

    directory = pathlib.Path(self.replay_dir)
    directory.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f'.shard-{self.number}-', dir=directory))
    staged = ShardFiles(staging, self.number)
    try:
      for name, array in arrays.items():
        # No name and no time in the gzip header, so that equal arrays give equal files.
        with (
          open(staged.path(name), 'wb') as file,
          igzip.IGzipFile('', 'wb', _COMPRESSION_LEVEL, file, mtime=0) as f,
        ):
          np.save(f, array, allow_pickle=False)
      for name in arrays:
        os.replace(staged.path(name), self.path(name))
    finally:
      shutil.rmtree(staging, ignore_errors=True)


def open_shards(replay_dir: str | os.PathLike) -> list[ShardFiles]:
  """Lists the shards in a directory, in ascending order of their numbers.

  A shard counts when any of its files is there, so that one that lacks files is not passed over in
  silence but reported when it is read.

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
  numbers = sorted({int(match[1]) for match in matches if match})
  if not numbers:
    raise FileNotFoundError(
      f'{directory}: no log shards here; looked for files such as $store$_observation_ckpt.0.gz'
    )
  return [ShardFiles(replay_dir, number) for number in numbers]


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
      self._write(index, self._add_count)
      for column in self._columns.values():
        column[:] = 0
    return kept

  def close(self) -> None:
    """Writes the rows since the last full shard."""
    index, position = divmod(self._add_count, self._capacity)
    if 0 < position < self._capacity - 1:
      self._write(index, position)

  def _write(self, number: int, add_count: int) -> None:
    ShardFiles(self._replay_dir, number).write(Shard(**self._columns, add_count=add_count))
