"""Log shards on disk, in the format of the DQN Replay Dataset (Agarwal et al. 2020).

This is the only module that knows it. A replay directory holds shards numbered N; a shard is five
gzip-compressed `.npy` files, checkpoints of a circular buffer of C rows, at most 2^24:

  $store$_observation_ckpt.N.gz  [C, 84, 84] uint8, one preprocessed frame a row
  $store$_action_ckpt.N.gz       [C] int32, index into the game's minimal action set
  $store$_reward_ckpt.N.gz       [C] float32
  $store$_terminal_ckpt.N.gz     [C] uint8, 1 on an episode's last row
  add_count_ckpt.N.gz            [] integer, rows ever added when the shard was written

There may be another, which the public data lacks and n17s/batch_rl added:

  $store$_prob_ckpt.N.gz         [C] float32, probability of the action under the policy that acted

Row i holds a frame, the action taken at it, the reward that followed and whether the episode ended
then. Rows from `add_count mod C` on are stale: left over from the lap before. Where there is no
add_count, as in some public copies, a shard is taken for a full one: all rows but the last are
usable. Three all-zero rows stand before each episode's first frame, so that a stack of four never
reaches into the episode before. Other files, such as the invalid_range_ckpt.N.gz that is written
for other readers, are never opened.

Log directories are untrusted input: nothing in them is ever unpickled, and what a header claims is
checked before room is made for it.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import glob
import io
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging
from isal import igzip

from offline_zoo.atari_data import FRAME_SHAPE, STACK_SIZE
from offline_zoo.logs import shard
from offline_zoo.logs.shard import NUM_PADDING_ROWS

MAX_ROWS = 2**24  # of a shard: seventeen times what the public ones have

# Column of a shard: dtype and shape of a row.
_COLUMNS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
  'observation': (np.dtype(np.uint8), FRAME_SHAPE),
  'action': (np.dtype(np.int32), ()),
  'reward': (np.dtype(np.float32), ()),
  'terminal': (np.dtype(np.uint8), ()),
  'prob': (np.dtype(np.float32), ()),
}
# The fastest of isal's four levels (0 to 3): frames shrink about thirtyfold all the same.
_COMPRESSION_LEVEL = 1
# Frames are read, while those before them are encoded, in pieces of 7 MB, which caches can hold.
_FRAMES_PER_READ = 1000
_BYTES_PER_READ = 8_000_000
# NumPy takes headers of up to 10,000 bytes, whatever length they claim.
_MAX_HEADER_BYTES = 2**14
_HEADER_READERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
  # As the second but for the names of a structure's fields, and structures are refused.
  (3, 0): np.lib.format.read_array_header_2_0,
}


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard as it lies on disk, stale rows included.

  Attributes:
    observation: [C, 84, 84] uint8.
    action: [C] int32.
    reward: [C] float32, as logged.
    terminal: [C] uint8.
    add_count: rows ever added when the shard was written.
    prob: [C] float32, probability of the action under the policy that acted; None if not logged.
  """

  observation: np.ndarray
  action: np.ndarray
  reward: np.ndarray
  terminal: np.ndarray
  add_count: int
  prob: np.ndarray | None = None

  @property
  def columns(self) -> dict[str, np.ndarray]:
    columns = {name: getattr(self, name) for name in _COLUMNS}
    return {name: column for name, column in columns.items() if column is not None}

  @property
  def num_rows(self) -> int:
    """How many rows, from the first on, are not stale."""
    return self.add_count % len(self.terminal)


@dataclasses.dataclass(frozen=True)
class _Array:
  """A gzip-compressed `.npy` of which only the header has been read, and nothing is believed yet.

  Attributes:
    file: uncompressed, at the first value.
    shape: what the header claims.
    is_fortran: whether the first index runs fastest.
    dtype: of the values.
  """

  file: io.BufferedIOBase
  shape: tuple[int, ...]
  is_fortran: bool
  dtype: np.dtype

  def __str__(self) -> str:
    return f'{self.dtype} {list(self.shape)}'

  def read(self) -> np.ndarray:
    """Reads all values, for which there must be room."""
    array = np.empty(self.shape[::-1] if self.is_fortran else self.shape, self.dtype)
    self.fill(array)
    return array.T if self.is_fortran else array

  def fill(self, array: np.ndarray) -> None:
    """Reads as many values as a C-contiguous array has, in the order of the file."""
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
      size = self.file.readinto(rest[:_BYTES_PER_READ])
      if not size:
        raise EOFError('it ends early')
      rest = rest[size:]


@contextlib.contextmanager
def _open_array(path: pathlib.Path) -> Iterator[_Array]:
  """Opens a gzip-compressed `.npy`, and says what is wrong with it if reading it fails."""
  with shard.open_regular(path) as compressed:
    try:
      with igzip.open(compressed) as file:
        head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        if version not in _HEADER_READERS:
          raise ValueError
        header = _HEADER_READERS[version](head)
        file.seek(head.tell())
        yield _Array(file, *header)
        # To the end of the stream, so that its checksum is verified; it may not go on.
        if file.read(1):
          raise ValueError
    except shard.FormatError:
      raise
    except Exception as error:  # damage makes gzip, zlib, NumPy and its tokenizer raise all sorts
      # What NumPy says of objects and pickles advises to trust them.
      said = 'it holds something else' if isinstance(error, ValueError) else error
      raise ValueError(f'{path}: expected a gzip-compressed .npy array: {said}') from error


@dataclasses.dataclass(frozen=True)
class ShardFiles:
  """The files of one shard: a `shard.LogShard`."""

  replay_dir: str | os.PathLike
  number: int
  kind = 'shards of the DQN Replay Dataset'

  def path(self, name: str) -> pathlib.Path:
    """The file of one column, or of add_count."""
    prefix = '$store$_' if name in _COLUMNS else ''
    return pathlib.Path(self.replay_dir, f'{prefix}{name}_ckpt.{self.number}.gz')

  def has_probabilities(self) -> bool:
    """Whether there is a file of them."""
    return os.path.lexists(self.path('prob'))

  def fingerprint(self) -> dict[str, list[int]]:
    """Size, times of modification and of change, and inode of the files that are there, by name."""
    paths = (self.path(name) for name in (*_COLUMNS, 'add_count'))
    stats = {path.name: path.stat() for path in paths if path.exists()}
    return {
      name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
      for name, stat in stats.items()
    }

  def read_small_files(self, num_actions: int | None, max_rows: int | None = None) -> shard.Rows:
    """Reads and checks all but the frames; see `shard.LogShard`."""
    columns, add_count = self._read_small_files()
    capacity = len(columns['terminal'])
    # Only rows that are not stale: what the others hold is nobody's business.
    used = {name: column[: add_count % capacity] for name, column in columns.items()}
    if 'prob' in used:
      used['probability'] = used.pop('prob')
    shard.check_rows(self, shard.Rows(**used, num_frames=capacity), num_actions)
    kept = {name: column[:max_rows] for name, column in used.items()}
    return shard.Rows(**kept, num_frames=capacity)

  def _read_small_files(self) -> tuple[dict[str, np.ndarray], int]:
    """The columns but for the frames, stale rows included, and add_count."""
    frames = self.path('observation')
    if not frames.exists():
      raise FileNotFoundError(f'{frames}: a file of this shard is missing')
    add_count = self._read_add_count()
    columns = {'terminal': self._read_column('terminal')}
    capacity = len(columns['terminal'])
    for name in ('action', 'reward', 'prob'):
      if name != 'prob' or self.has_probabilities():
        columns[name] = self._read_column(name, capacity)
    return columns, capacity - 1 if add_count is None else add_count

  def _read_add_count(self) -> int | None:
    path = self.path('add_count')
    if not os.path.lexists(path):  # a link to nothing is one that lacks its file
      return None
    with _open_array(path) as array:
      is_count = array.shape == () and array.dtype.kind in 'iu'
      shard.expect(is_count, path, 'one count of rows', array)
      add_count = int(array.read())
    shard.expect(add_count >= 0, path, 'one count of rows', add_count)
    return add_count

  def _read_column(self, name: str, capacity: int | None = None) -> np.ndarray:
    with self._open_column(name, capacity) as array:
      return array.read()

  @contextlib.contextmanager
  def _open_column(self, name: str, capacity: int | None = None) -> Iterator[_Array]:
    """Opens one column and checks its type and shape."""
    path = self.path(name)
    dtype, shape = _COLUMNS[name]
    with _open_array(path) as array:
      good = array.dtype == dtype and len(array.shape) > 0 and array.shape[1:] == shape
      shard.expect(good, path, f'{dtype} {["C", *shape]}', array)
      rows = array.shape[0]
      if capacity is None:
        shard.expect(0 < rows <= MAX_ROWS, path, f'1 to {MAX_ROWS} rows', rows)
      else:
        shard.expect(rows == capacity, path, f'{capacity} rows as in $store$_terminal', rows)
      yield array

  def read_frames(self, num_frames: int) -> Iterator[np.ndarray]:
    """Yields the frames; see `shard.LogShard`. Those that come next are read in the background."""
    with (
      self._open_column('observation', num_frames) as array,
      concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):
      if array.is_fortran:  # each pixel of all frames, then the next
        frames = array.read()
        for start in range(0, num_frames, _FRAMES_PER_READ):
          yield np.ascontiguousarray(frames[start : start + _FRAMES_PER_READ])
        return
      buffers = np.zeros((2, min(num_frames, _FRAMES_PER_READ), *FRAME_SHAPE), np.uint8)

      def read(start: int) -> np.ndarray:
        pixels = buffers[start // _FRAMES_PER_READ % 2][: num_frames - start]
        array.fill(pixels)
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

    All files are complete on disk before the first of them takes its name. The same content
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
      shard.expect(good, self.path(name), expected, f'{column.dtype} {list(column.shape)}')
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
        try:
          # No name and no time in the gzip header, so that equal arrays give equal files.
          with (
            open(staged.path(name), 'wb') as file,
            igzip.IGzipFile('', 'wb', _COMPRESSION_LEVEL, file, mtime=0) as f,
          ):
            np.save(f, array, allow_pickle=False)
        except OSError as error:  # a full disk's does not say which file it was
          raise OSError(
            f'{self.path(name)}: cannot be written: {error.strerror or error}'
          ) from error
      for name in arrays:
        os.replace(staged.path(name), self.path(name))
      if content.prob is None:  # those of what was replaced are not this one's
        self.path('prob').unlink(missing_ok=True)
    finally:
      shutil.rmtree(staging, ignore_errors=True)


def open_shards(replay_dir: str | os.PathLike) -> list[ShardFiles]:
  """Lists the shards in a directory, in ascending order of their numbers; none if it holds none.

  A shard counts when any of its files is there, so that one that lacks files is not passed over in
  silence but reported when it is read.
  """
  directory = pathlib.Path(replay_dir)
  if not directory.is_dir():
    return []
  names = rf'\$store\$_(?:{"|".join(_COLUMNS)})|add_count'
  pattern = re.compile(rf'({names})_ckpt\.([0-9]+)\.gz')
  matches = [match for path in directory.iterdir() if (match := pattern.fullmatch(path.name))]
  numbers = sorted({int(match[2]) for match in matches})
  counted = {int(match[2]) for match in matches if match[1] == 'add_count'}
  if assumed := [number for number in numbers if number not in counted]:
    logging.warning(
      '%s: shards %s have no add_count_ckpt files: taken for full ones, all rows usable but the '
      "last. If one is a run's last, partial shard, older rows follow its newest ones, and up to "
      'n + 3 transitions (n: the n-step horizon) where they meet are wrong',
      directory, ', '.join(map(str, assumed)),
    )  # fmt: skip
  return [ShardFiles(replay_dir, number) for number in numbers]


class EpisodeRows(NamedTuple):
  """An episode's T rows, to be logged.

  Attributes:
    frames: [T, 84, 84] uint8.
    actions: [T] int32.
    rewards: [T] float32.
    terminals: [T] uint8, 1 on the last row of an episode that ended.
    probs: [T] float32, of the actions under the policy that acted.
  """

  frames: np.ndarray
  actions: np.ndarray
  rewards: np.ndarray
  terminals: np.ndarray
  probs: np.ndarray


@contextlib.contextmanager
def new_directory(replay_dir: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a directory that appears at the end of the block, when it is complete.

  Gives the directory to write to meanwhile, beside it, which is gone if the block fails. What a
  killed process has left of one is removed.

  Raises:
    FileExistsError: there is something at `replay_dir` already.
    OSError: it is a mount point or the current directory.
  """
  if replay_dir.exists() and (not replay_dir.is_dir() or any(replay_dir.iterdir())):
    raise FileExistsError(f'--replay_dir={replay_dir}: exists and is not an empty directory')
  target = pathlib.Path(os.path.realpath(replay_dir))  # a link stays one
  if os.path.ismount(target) or target == pathlib.Path.cwd():  # which cannot be replaced
    kind = 'a mount point or the current directory'
    raise OSError(f'--replay_dir={replay_dir}: is {kind}; name a directory in it')
  prefix, number = f'.{target.name}.partial-', uuid.uuid4().hex[:8]
  for left in target.parent.glob(f'{glob.escape(prefix)}*'):
    with contextlib.suppress(OSError), _locked(left):  # else it is being written
      shutil.rmtree(left)
  fresh, partial = target.with_name(f'.{target.name}.{number}'), target.with_name(prefix + number)
  fresh.mkdir(parents=True)
  try:
    with contextlib.ExitStack() as stack:
      with contextlib.suppress(OSError):  # without locks there, nobody removes anything
        stack.enter_context(_locked(fresh))
      fresh.rename(partial)  # only now has it a name that others look for
      yield partial
      partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
  """Locks a directory until the block or the process ends; OSError if another one has locked it."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(descriptor)


class ShardWriter:
  """Logs play, row by row, into shards of `capacity` rows, as a Dopamine run logs it.

  A full shard is written when the write position reaches the last row. The row that comes next
  would go there and is in no shard: one row in `capacity` is lost, as it is in the public data, but
  no other is. `close` writes what is left as a last, partial shard with the write position as its
  add_count, as batch_rl does, so that other readers too take its stale rows as never written.
  Stale rows are zeros.
  """

  def __init__(self, replay_dir: str | os.PathLike, capacity: int, with_prob: bool = False):
    """Begins a directory of shards of so many rows, `with_prob` with probabilities of actions."""
    if not NUM_PADDING_ROWS + 2 < capacity <= MAX_ROWS:
      raise ValueError(f'--shard_capacity={capacity}: expected 6 to {MAX_ROWS} rows')
    self._replay_dir = replay_dir
    self._columns = {
      name: np.zeros((capacity, *shape), dtype)
      for name, (dtype, shape) in _COLUMNS.items()
      if with_prob or name != 'prob'
    }
    self._capacity = capacity
    self._add_count = 0
    self.num_transitions = 0  # rows in shards, written or not yet, that are not padding

  def start_episode(self) -> None:
    """Adds the blank rows that stand before an episode's first frame."""
    for _ in range(NUM_PADDING_ROWS):
      self._add(np.zeros(FRAME_SHAPE, np.uint8), 0, 0.0, False, 0.0)

  def add(
    self, frame: np.ndarray, action: int, reward: float, terminal: bool, prob: float = 0.0
  ) -> None:
    """Adds a row.

    Args:
      frame: [84, 84] uint8.
      action: taken at it.
      reward: that followed.
      terminal: whether the episode ended then.
      prob: of the action under the policy that acted; where there is no such file, of no use.
    """
    self.num_transitions += self._add(frame, action, reward, terminal, prob)

  def add_episode(self, rows: EpisodeRows, max_transitions: int | None = None) -> None:
    """Adds an episode, blank rows first; not more of it than brings all to `max_transitions`."""
    self.start_episode()
    for row in zip(*rows, strict=True):
      if self.num_transitions == max_transitions:
        break
      self.add(*row)

  def _add(self, *row) -> bool:
    """Returns whether the row is kept."""
    index, position = divmod(self._add_count, self._capacity)
    kept = position < self._capacity - 1
    if kept:
      for column, value in zip(self._columns.values(), row, strict=False):
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
