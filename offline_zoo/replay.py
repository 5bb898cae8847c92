"""Logged Atari play: shards on disk, and a replay on the accelerator that is sampled from.

This is the only module that knows the format of the DQN Replay Dataset (Agarwal et al. 2020). A
replay directory holds shards numbered N; a shard is six gzip-compressed `.npy` files, checkpoints
of a circular buffer of C rows:

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

import dataclasses
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from isal import igzip

FRAME_SHAPE = (84, 84)
STACK_SIZE = 4
NUM_PADDING_ROWS = STACK_SIZE - 1
MAX_ABS_REWARD = 1.0

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


class Transition(NamedTuple):
  """A batch of B n-step transitions.

  Attributes:
    s_tm1: [B, 84, 84, 4] uint8, the stack of frames acted on, newest last.
    a_tm1: [B] int32, the logged action.
    r_t: [B] float32, the sum over k < n of discount^k times the reward k steps later, each clipped
      to [-1, 1] before the sum, which ends with the episode.
    discount_t: [B] float32, discount^n, or 0 where the episode ended within the n steps.
    s_t: [B, 84, 84, 4] uint8, the stack n steps later. Means nothing where discount_t is 0.
  """

  s_tm1: jax.Array
  a_tm1: jax.Array
  r_t: jax.Array
  discount_t: jax.Array
  s_t: jax.Array


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


# Shards on disk.


def _path(replay_dir: str | os.PathLike, name: str, index: int) -> pathlib.Path:
  prefix = '$store$_' if name in _COLUMNS else ''
  return pathlib.Path(replay_dir) / f'{prefix}{name}_ckpt.{index}.gz'


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


def _read_array(path: pathlib.Path) -> np.ndarray:
  """Reads a gzip-compressed `.npy` to the end of its stream, so that its checksum is verified."""
  try:
    with igzip.open(path) as f:
      array = np.load(f, allow_pickle=False)
      rest = f.read(1)
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: a file of this shard is missing') from None
  except Exception as error:  # damage makes gzip, zlib, NumPy and its tokenizer raise all sorts
    # What NumPy says of objects and pickles advises to trust them.
    said = 'it holds something else' if isinstance(error, ValueError) else error
    raise ValueError(f'{path}: expected a gzip-compressed .npy array: {said}') from error
  if rest or not isinstance(array, np.ndarray):  # np.load also opens archives of arrays
    raise ValueError(f'{path}: expected a gzip-compressed .npy array and nothing more')
  return array


def _describe(array: np.ndarray) -> str:
  return f'{array.dtype} {list(array.shape)}'


def _expect(condition: object, path: pathlib.Path, expected: str, got: object) -> None:
  if not condition:
    raise ValueError(f'{path}: expected {expected}, got {got}')


def _read_column(
  replay_dir: str | os.PathLike, index: int, name: str, capacity: int | None = None
) -> np.ndarray:
  """Reads one column and checks its type and shape."""
  path = _path(replay_dir, name, index)
  dtype, shape = _COLUMNS[name]
  column = _read_array(path)
  good = column.dtype == dtype and column.ndim > 0 and column.shape[1:] == shape
  _expect(good, path, f'{dtype} {["C", *shape]}', _describe(column))
  _expect(len(column), path, 'at least one row', 'none')
  if capacity is not None:
    _expect(len(column) == capacity, path, f'{capacity} rows as in $store$_terminal', len(column))
  return column


def _read_small_files(
  replay_dir: str | os.PathLike, index: int, num_actions: int | None
) -> dict[str, Any]:
  """Reads and checks all of a shard but its frames: what a `Shard` has besides `observation`."""
  frames = _path(replay_dir, 'observation', index)
  if not frames.exists():
    raise FileNotFoundError(f'{frames}: a file of this shard is missing')
  path = _path(replay_dir, 'add_count', index)
  add_count = _read_array(path)
  is_count = add_count.ndim == 0 and add_count.dtype.kind in 'iu' and add_count >= 0
  _expect(is_count, path, 'one count of rows', f'{_describe(add_count)} {add_count}')
  path = _path(replay_dir, 'invalid_range', index)
  invalid_range = _read_array(path)
  is_range = invalid_range.ndim == 1 and invalid_range.dtype.kind in 'iu'
  _expect(is_range, path, 'integers [K]', _describe(invalid_range))

  columns = {'terminal': _read_column(replay_dir, index, 'terminal')}
  capacity = len(columns['terminal'])
  for name in ('action', 'reward'):
    columns[name] = _read_column(replay_dir, index, name, capacity)
  # Only rows that are not stale: what the others hold is nobody's business.
  used = {name: column[: add_count % capacity] for name, column in columns.items()}
  top = np.iinfo(np.int32).max if num_actions is None else num_actions - 1
  checks = {
    'terminal': (used['terminal'] <= 1, 'flags 0 or 1'),
    'action': (
      (used['action'] >= 0) & (used['action'] <= top),
      f'actions 0 to {top} (are these the logs of another game?)',
    ),
    'reward': (np.isfinite(used['reward']), 'finite rewards'),
  }
  for name, (good, expected) in checks.items():
    if not good.all():
      row = np.argmin(good)
      path = _path(replay_dir, name, index)
      _expect(False, path, expected, f'{used[name][row]} in row {row}')
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
  rest = _read_small_files(replay_dir, index, num_actions)
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
    _expect(good, _path(directory, name, index), expected, _describe(column))
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
        open(_path(staging, name, index), 'wb') as file,
        igzip.IGzipFile('', 'wb', _COMPRESSION_LEVEL, file, mtime=0) as f,
      ):
        np.save(f, array, allow_pickle=False)
    for name in arrays:
      os.replace(_path(staging, name, index), _path(directory, name, index))
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


# The replay on the device.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplayData:
  """Logged rows as device arrays: an argument of a jitted function, never closed over.

  Rows are the usable (not stale) rows of the loaded shards, one shard after the other. N of them.

  Attributes:
    frames: [N, 84, 84] uint8.
    actions: [N] int32.
    rewards: [N] float32, as logged.
    terminals: [N] bool.
    valid: [V] int32, the rows that a transition can begin at, ascending.
    mean_episode_return: [] float32, the mean over all episodes that lie whole within a shard of the
      sum of rewards as logged; NaN without such an episode.
    n_step: the horizon n of the transitions.
    discount: the discount of one step.
  """

  frames: jax.Array
  actions: jax.Array
  rewards: jax.Array
  terminals: jax.Array
  valid: jax.Array
  mean_episode_return: jax.Array
  n_step: int = dataclasses.field(metadata={'static': True})
  discount: float = dataclasses.field(metadata={'static': True})


def _valid_rows(terminal: np.ndarray, n_step: int) -> np.ndarray:
  """Rows i of a shard such that i-3 .. i+n are usable and none of i-3 .. i-1 is terminal."""
  rows = np.arange(NUM_PADDING_ROWS, len(terminal) - n_step)
  before = rows[:, None] - np.arange(1, STACK_SIZE)
  return rows[~terminal[before].any(axis=1)]


def _episode_returns(frames: np.ndarray, reward: np.ndarray, terminal: np.ndarray) -> np.ndarray:
  """Sums of logged rewards [E] of the episodes that lie whole within a shard's usable rows."""
  ends = np.flatnonzero(terminal)
  returns = np.diff(np.cumsum(reward, dtype=np.float64)[ends], prepend=0.0)
  # The first end closes an episode that begins in this shard only if the shard opens with padding.
  begins_here = len(frames) and not frames[0].any() and reward[0] == 0 and not terminal[0]
  return returns if begins_here else returns[1:]


def load(
  replay_dir: str | os.PathLike,
  shards: Sequence[int] | None = None,
  *,
  n_step: int = 1,
  discount: float = 0.99,
  num_actions: int | None = None,
  max_rows_per_shard: int | None = None,
) -> ReplayData:
  """Loads shards onto the default device, through host memory: all frames and one shard's more.

  Args:
    replay_dir: the directory with the shards.
    shards: numbers of the shards to load, in this order; all of them if None.
    n_step: the horizon of the transitions, at least 1.
    discount: of one step, in [0, 1].
    num_actions: the size of the game's action set, to check the logged actions against.
    max_rows_per_shard: keeps only the first rows of each shard, as CQL's data release does: 10,000
      of a million are its "1%".

  Raises:
    FileNotFoundError: the directory, a shard, or a shard's file is missing.
    ValueError: bad arguments, a bad file (see `read_shard`), or no row to begin a transition at.
  """
  if n_step < 1 or not 0 <= discount <= 1:
    raise ValueError(f'need n_step >= 1 and a discount in [0, 1], got {n_step} and {discount}')
  if max_rows_per_shard is not None and max_rows_per_shard < 1:
    raise ValueError(f'max_rows_per_shard must be at least 1, got {max_rows_per_shard}')
  there = list_shards(replay_dir)
  chosen = there if shards is None else list(shards)
  if missing := sorted(set(chosen) - set(there)):
    raise FileNotFoundError(f'{replay_dir}: no shards {missing}; there are {there}')
  if len(set(chosen)) < len(chosen):
    raise ValueError(f'shards must differ from each other, got {chosen}')

  # The small files of all shards first: most bad input is then found within seconds.
  small = [_read_small_files(replay_dir, index, num_actions) for index in chosen]
  num_rows = [shard['add_count'] % len(shard['terminal']) for shard in small]
  if max_rows_per_shard is not None:
    num_rows = [min(rows, max_rows_per_shard) for rows in num_rows]
  columns = {
    name: [shard[name][:rows] for shard, rows in zip(small, num_rows, strict=True)]
    for name in ('action', 'reward', 'terminal')
  }
  first_rows = np.cumsum([0, *num_rows])
  valid = [
    first_row + _valid_rows(terminal, n_step)
    for first_row, terminal in zip(first_rows, columns['terminal'], strict=False)
  ]
  if not sum(map(len, valid)):
    raise ValueError(
      f'{replay_dir}: no valid transition in shards {chosen}: one needs '
      f'{STACK_SIZE + n_step} rows of one shard with no episode end among the first three'
    )

  frames = np.empty((sum(num_rows), *FRAME_SHAPE), np.uint8)
  returns = []
  for i, (index, rows) in enumerate(zip(chosen, num_rows, strict=True)):
    observation = _read_column(replay_dir, index, 'observation', len(small[i]['terminal']))
    frames[first_rows[i] : first_rows[i + 1]] = observation[:rows]
    returns.append(
      _episode_returns(observation[:rows], columns['reward'][i], columns['terminal'][i])
    )
  all_returns = np.concatenate(returns)
  return ReplayData(
    frames=jnp.asarray(frames),
    actions=jnp.asarray(np.concatenate(columns['action'])),
    rewards=jnp.asarray(np.concatenate(columns['reward'])),
    terminals=jnp.asarray(np.concatenate(columns['terminal']).astype(bool)),
    valid=jnp.asarray(np.concatenate(valid), jnp.int32),
    mean_episode_return=jnp.float32(all_returns.mean() if all_returns.size else np.nan),
    n_step=n_step,
    discount=discount,
  )


def describe(data: ReplayData) -> str:
  """What is resident: rows, bytes and logged returns, in one line."""
  num_rows = len(data.actions)
  num_bytes = sum(array.nbytes for array in jax.tree.leaves(data))
  return (
    f'{num_rows:,} rows, {len(data.valid):,} of them to sample from, {num_bytes / num_rows:,.0f} '
    f'bytes a row, {num_bytes / 1e9:.3f} GB resident; '
    f'mean logged return {float(data.mean_episode_return):.1f}'
  )


def checksum(data: ReplayData) -> int:
  """Tells logs apart: a CRC-32 of actions, rewards, terminals and valid rows."""
  value = 0
  for column in (data.actions, data.rewards, data.terminals, data.valid):
    value = zlib.crc32(np.asarray(column).data, value)
  return value


def valid_rows(data: ReplayData) -> jax.Array:
  """The rows [V] int32 that a transition can begin at, ascending."""
  return data.valid


def _stacks(data: ReplayData, rows: jax.Array) -> jax.Array:
  """The stacks [B, 84, 84, 4] that end with these rows [B]."""
  window = rows[:, None] + jnp.arange(1 - STACK_SIZE, 1)[None]
  return jnp.moveaxis(data.frames[window], 1, -1)


def gather(data: ReplayData, rows: jax.Array) -> Transition:
  """The transitions that begin at these rows [B]; pure.

  Rows must be among `valid_rows(data)`: for others the result means nothing.
  """
  window = rows[:, None] + jnp.arange(data.n_step)[None]
  terminal = data.terminals[window]
  # A step belongs to the transition unless an earlier one ended the episode.
  belongs = jnp.cumsum(terminal, axis=1) - terminal == 0
  rewards = jnp.clip(data.rewards[window], -MAX_ABS_REWARD, MAX_ABS_REWARD)
  discounts = jnp.asarray(data.discount ** np.arange(data.n_step), jnp.float32)
  ended = jnp.any(terminal, axis=1)
  return Transition(
    s_tm1=_stacks(data, rows),
    a_tm1=data.actions[rows],
    r_t=jnp.sum(jnp.where(belongs, rewards * discounts[None], 0.0), axis=1),
    discount_t=jnp.where(ended, 0.0, jnp.float32(data.discount**data.n_step)),
    s_t=_stacks(data, rows + jnp.sum(belongs, axis=1)),
  )


def sample(data: ReplayData, rng_key: jax.Array, batch_size: int) -> Transition:
  """A batch of transitions, each uniform over all valid rows of all shards, with replacement."""
  rows = valid_rows(data)
  picked = jax.random.randint(rng_key, (batch_size,), 0, rows.shape[0])
  return gather(data, rows[picked])
