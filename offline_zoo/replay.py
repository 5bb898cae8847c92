"""The replay on the accelerator: log shards -> encoded frames -> sampled transitions.

Frames are held encoded (frame_store.py), on disk (replay_cache.py) as on the device, so that a game
fits where its raw 353 GB would not. They are decoded when they are sampled, inside the jitted
update.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from absl import logging
from isal import isal_zlib

from offline_zoo import frame_store, log_shards, parts, replay_cache

MAX_ABS_REWARD = 1.0
# Of the accelerator's free memory, what is left to network, optimiser and activations by default.
_ACCELERATOR_MARGIN = 2e9


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


# From shards on disk to encoded ones.


def _episode_returns(is_blank: bool, reward: np.ndarray, terminal: np.ndarray) -> np.ndarray:
  """Sums of logged rewards [E] of the episodes that lie whole within a shard's usable rows.

  Args:
    is_blank: whether the first frame is all zeros.
    reward: [n], as logged.
    terminal: [n].
  """
  ends = np.flatnonzero(terminal)
  returns = np.diff(np.cumsum(reward, dtype=np.float64)[ends], prepend=0.0)
  # The first end closes an episode that begins in this shard only if the shard opens with padding.
  begins_here = len(reward) and is_blank and reward[0] == 0 and not terminal[0]
  return returns if begins_here else returns[1:]


def _encode_shard(
  encoder, path: pathlib.Path, small_files: dict[str, Any], num_rows: int, bar
) -> replay_cache.EncodedShard:
  """Encodes a shard's first rows; reads all of them, so that damage anywhere is found.

  Args:
    encoder: of the shards before.
    path: of the frames.
    small_files: the shard's other columns.
    num_rows: how many to encode.
    bar: is told of each row that is read.
  """
  ids = np.empty((num_rows, frame_store.NUM_BANDS), np.uint32)
  checksum, is_blank, start = 0, False, 0
  for pixels in log_shards.read_frames(path, len(small_files['terminal'])):
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
  actions = small_files['action'][:num_rows].astype(np.uint8)
  raw_rewards = small_files['reward'][:num_rows]
  rewards = np.clip(raw_rewards, -MAX_ABS_REWARD, MAX_ABS_REWARD)
  terminals = small_files['terminal'][:num_rows].astype(bool)
  for column in (actions, raw_rewards, terminals):
    checksum = isal_zlib.crc32(column.data, checksum)
  whole = rewards.astype(np.int8)
  return replay_cache.EncodedShard(
    tiles=new.tiles,
    blocks=frame_store.pack(new.blocks, num_items[0]),
    bands=frame_store.pack(new.bands, num_items[1]),
    frames=frame_store.pack(ids, num_items[2]),
    actions=actions,
    rewards=whole if (whole == rewards).all() else rewards,
    terminals=terminals,
    episode_returns=_episode_returns(is_blank, raw_rewards, terminals),
    checksum=np.array(checksum, np.uint32),
  )


def _encoded_shards(
  replay_dir: str | os.PathLike,
  chosen: Sequence[int],
  num_actions: int | None,
  max_rows_per_shard: int | None,
  cache_dir: str | os.PathLike | None,
) -> dict[int, replay_cache.EncodedShard]:
  """Encodes the chosen shards, those in the cache excepted; returns the whole chain."""
  directory = None
  if cache_dir is not None:
    directory = replay_cache.directory_for(cache_dir, replay_dir, max_rows_per_shard)
  fingerprints = {
    index: log_shards.fingerprint(replay_dir, index) for index in log_shards.list_shards(replay_dir)
  }
  with replay_cache.Cache(directory) as cache:
    cache.read(fingerprints)
    missing = [index for index in chosen if index not in cache.shards]
    if not missing:
      return cache.shards
    # The small files of all shards first: most bad input is then found within seconds.
    small_files = {
      index: log_shards.read_small_files(replay_dir, index, num_actions) for index in missing
    }
    from offline_zoo import frame_encoder

    encoder = frame_encoder.Encoder([shard.dictionaries for shard in cache.shards.values()])
    total = sum(len(columns['terminal']) for columns in small_files.values())
    started = time.monotonic()
    with parts.progress_bar(total, 'encoding', 'row') as bar:
      done = 0
      for index in missing:
        columns = small_files.pop(index)
        capacity = len(columns['terminal'])
        num_rows = columns['add_count'] % capacity
        if max_rows_per_shard is not None:
          num_rows = min(num_rows, max_rows_per_shard)
        path = log_shards.shard_path(replay_dir, 'observation', index)
        shard = _encode_shard(encoder, path, columns, num_rows, bar)
        cache.append(index, fingerprints[index], shard)
        done += capacity
        seconds = time.monotonic() - started
        logging.info(
          'Encoded shard %d, %d of %d rows: %.0f MB of frames a second, %.0f s left',
          index, done, total, done * math.prod(log_shards.FRAME_SHAPE) / 1e6 / seconds,
          seconds * (total - done) / done,
        )  # fmt: skip
    return cache.shards


# The replay on the device.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplayData:
  """Logged rows as device arrays: an argument of a jitted function, never closed over.

  Rows are the usable (not stale) rows of the resident shards, one shard after the other. N of them,
  and blank ones after them if other sets of shards are larger. Valid rows, those that a transition
  can begin at, come in R runs of consecutive ones.

  Attributes:
    frames: encoded; see frame_store.decode.
    actions: [N] uint8.
    rewards: [N] int8 or float32, clipped to [-1, 1].
    terminals: [N] bool.
    run_ends: [R] int32, how many valid rows there are up to the end of each run.
    run_offsets: [R] int32, a valid row's number less how many valid rows come before it.
    n_step: the horizon n of the transitions.
    discount: the discount of one step.
  """

  frames: frame_store.FrameStore
  actions: jax.Array
  rewards: jax.Array
  terminals: jax.Array
  run_ends: jax.Array
  run_offsets: jax.Array
  n_step: int = dataclasses.field(metadata={'static': True})
  discount: float = dataclasses.field(metadata={'static': True})


def _valid_runs(terminal: np.ndarray, n_step: int) -> tuple[np.ndarray, np.ndarray]:
  """First rows and lengths of the runs of valid rows among a shard's usable rows.

  Row i is valid if i-3 .. i+n are usable and none of i-3 .. i-1 is terminal.
  """
  starts = np.concatenate([[0], np.flatnonzero(terminal) + 1]) + log_shards.NUM_PADDING_ROWS
  ends = np.append(starts[1:] - log_shards.NUM_PADDING_ROWS, len(terminal))
  ends = np.minimum(ends, len(terminal) - n_step)
  some = starts < ends
  return starts[some], (ends - starts)[some]


class _Sizes(NamedTuple):
  """How many of each thing a set of shards has, or at most has."""

  tiles: int
  blocks: int
  bands: int
  rows: int
  runs: int


class Logs:
  """The chosen shards of a replay directory, and which of them are on the device.

  All are, if they fit; or else a subset of a fixed number of shards, another in each iteration,
  drawn as a function of (seed, iteration) alone. Then the subset that comes next is put on the
  device in the background, and arrays are as large as any subset needs, so that nothing is compiled
  anew.

  Attributes:
    shards: their numbers.
    num_resident_shards: how many are on the device at a time.
    mean_episode_return: the mean over all episodes that lie whole within a shard of the sum of
      rewards as logged; NaN without such an episode.
    checksum: a CRC-32 that tells logs apart.
  """

  def __init__(
    self,
    replay_dir: str | os.PathLike,
    shards: Sequence[int] | None = None,
    *,
    n_step: int = 1,
    discount: float = 0.99,
    num_actions: int | None = None,
    max_rows_per_shard: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    memory_gb: float | None = None,
    num_resident_shards: int | None = None,
    seed: int = 0,
  ):
    """Encodes the shards, or finds them encoded; puts nothing on the device yet.

    Args:
      replay_dir: the directory with the shards.
      shards: numbers of the shards to load, in this order; all of them if None.
      n_step: the horizon of the transitions, at least 1.
      discount: of one step, in [0, 1].
      num_actions: the size of the game's action set, to check the logged actions against.
      max_rows_per_shard: keeps only the first rows of each shard, as CQL's data release does:
        10,000 of a million are its "1%".
      cache_dir: where encoded shards are kept for the next time; None keeps none.
      memory_gb: 10^9 bytes that resident data may take, the incoming subset included; if None, what
        the accelerator has free less 2 GB, or on CPU half of the available memory.
      num_resident_shards: how many there must be, for a run that goes on; if None, as many as fit.
      seed: of the subsets.

    Raises:
      FileNotFoundError: the directory, a shard, or a shard's file is missing.
      ValueError: bad arguments, a bad file (see `read_shard`), no row to begin a transition at, or
        too little memory for one shard.
    """
    if n_step < 1 or not 0 <= discount <= 1:
      raise ValueError(f'need n_step >= 1 and a discount in [0, 1], got {n_step} and {discount}')
    if max_rows_per_shard is not None and max_rows_per_shard < 1:
      raise ValueError(f'max_rows_per_shard must be at least 1, got {max_rows_per_shard}')
    there = log_shards.list_shards(replay_dir)
    self.shards = there if shards is None else list(shards)
    if missing := sorted(set(self.shards) - set(there)):
      raise FileNotFoundError(f'{replay_dir}: no shards {missing}; there are {there}')
    if not self.shards or len(set(self.shards)) < len(self.shards):
      raise ValueError(f'shards must be one or more different ones, got {self.shards}')
    self._n_step, self._discount, self._seed = n_step, discount, seed

    chain = _encoded_shards(replay_dir, self.shards, num_actions, max_rows_per_shard, cache_dir)
    self._chain = list(chain.values())
    self._encoded = [chain[index] for index in self.shards]
    for index, shard in zip(self.shards, self._encoded, strict=True):
      # Those that were in the cache have not been checked against this game.
      log_shards.check_actions(replay_dir, index, shard.actions, num_actions)
    self._rewards_dtype = np.result_type(*(shard.rewards.dtype for shard in self._encoded))
    returns = np.concatenate([shard.episode_returns for shard in self._encoded])
    self.mean_episode_return = float(returns.mean()) if returns.size else math.nan
    checksums = np.array([shard.checksum for shard in self._encoded])
    self.checksum = isal_zlib.crc32(checksums.data)

    # A shard without a row to begin at, such as a run's short last one, is not worth its place.
    runs = [_valid_runs(shard.terminals, n_step) for shard in self._encoded]
    kept = [i for i, (starts, _) in enumerate(runs) if len(starts)]
    if not kept:
      raise ValueError(
        f'{replay_dir}: no valid transition in shards {self.shards}: one needs '
        f'{log_shards.STACK_SIZE + n_step} rows of a shard with no episode end in the first three'
      )
    self.shards = [self.shards[i] for i in kept]
    self._encoded = [self._encoded[i] for i in kept]
    self._runs = [runs[i] for i in kept]
    self.num_resident_shards = self._choose_num_resident(memory_gb, num_resident_shards)
    self._sizes = self._largest_sizes(self.num_resident_shards)
    self._sets: dict[int, concurrent.futures.Future[ReplayData]] = {}
    self._loader = concurrent.futures.ThreadPoolExecutor(1, 'replay')

  def _largest_sizes(self, num_shards: int) -> _Sizes:
    """What no set of so many of the shards exceeds; exact for all of them."""
    rows = [len(shard.actions) for shard in self._encoded]
    runs = [len(starts) for starts, _ in self._runs]
    if num_shards == len(self.shards):
      return _Sizes._make([*self._num_used, sum(rows), sum(runs)])
    sizes = np.column_stack([self._num_used_by_each, rows, runs])
    *most, most_rows, most_runs = np.sort(sizes, axis=0)[::-1][:num_shards].sum(axis=0)
    return _Sizes._make(map(int, (*np.minimum(most, self._num_used), most_rows, most_runs)))

  @functools.cached_property
  def _num_used(self) -> list[int]:
    """How many tiles, blocks and bands the frames of all shards are made of."""
    return [int(occurs.sum()) for occurs in self._occurring(range(len(self.shards)))]

  @functools.cached_property
  def _num_used_by_each(self) -> np.ndarray:
    """The same of each shard alone: [shards, 3]."""
    return np.array(
      [
        [np.count_nonzero(occurs) for occurs in self._occurring([position])]
        for position in range(len(self.shards))
      ]
    )

  def _shapes(self, sizes: _Sizes) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of a resident set."""
    tile_bytes, block_bytes, band_bytes = map(frame_store.id_bytes, sizes[:3])
    tile_words, block_ids, band_ids = frame_store.ITEM_SIZES
    return {
      'tiles': ((sizes.tiles, tile_words), np.dtype(np.uint32)),
      'blocks': ((sizes.blocks, block_ids, tile_bytes), np.dtype(np.uint8)),
      'bands': ((sizes.bands, band_ids, block_bytes), np.dtype(np.uint8)),
      'frames': ((sizes.rows, frame_store.NUM_BANDS, band_bytes), np.dtype(np.uint8)),
      'actions': ((sizes.rows,), np.dtype(np.uint8)),
      'rewards': ((sizes.rows,), self._rewards_dtype),
      'terminals': ((sizes.rows,), np.dtype(bool)),
      'run_ends': ((sizes.runs,), np.dtype(np.int32)),
      'run_offsets': ((sizes.runs,), np.dtype(np.int32)),
    }

  def _num_bytes(self, num_shards: int) -> int:
    """Of one set of so many shards."""
    shapes = self._shapes(self._largest_sizes(num_shards)).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

  def _num_sets(self, num_shards: int) -> int:
    """How many are on the device at a time: the current one and, if shards change, the next."""
    return 1 if num_shards == len(self.shards) else 2

  def _choose_num_resident(self, memory_gb: float | None, wanted: int | None) -> int:
    budget = _default_memory() if memory_gb is None else 1e9 * memory_gb
    if wanted is not None and wanted > len(self.shards):
      raise ValueError(f'{wanted} shards were resident in this run, and there are {self.shards}')
    for number in range(len(self.shards), 0, -1) if wanted is None else [wanted]:
      needed = self._num_sets(number) * self._num_bytes(number)
      if needed <= budget:
        return number
    raise ValueError(
      f'--replay_memory_gb: {budget / 1e9:.4f} are too little; {number} of {len(self.shards)} '
      f'shards at a time take {needed / 1e9:.4f}'
    )

  def describe(self) -> str:
    """What is resident: shards, rows, bytes and logged returns, in one line."""
    number, total = self.num_resident_shards, len(self.shards)
    rows, num_bytes = self._sizes.rows, self._num_bytes(number)
    which, twice = f'all {total} shards', ''
    if self._num_sets(number) == 2:
      which = f'{number} of {total} shards at a time, changing every iteration'
      twice = ' twice, for the current and the incoming shards'
    return (
      f'{which}, {rows:,} rows, {num_bytes / rows:,.1f} bytes a row, {num_bytes / 1e9:.3f} GB '
      f'resident{twice}; mean logged return {self.mean_episode_return:.1f}'
    )

  def resident_shards(self, iteration: int) -> list[int]:
    """The numbers of the shards that an iteration samples from."""
    if self.num_resident_shards == len(self.shards):
      return self.shards
    rng = np.random.default_rng((self._seed, iteration))
    chosen = rng.permutation(len(self.shards))[: self.num_resident_shards]
    return [self.shards[i] for i in sorted(chosen)]

  def resident(self, iteration: int, num_iterations: int | None = None) -> ReplayData:
    """What an iteration samples from.

    If shards change, begins to load what comes next, unless this is the last of `num_iterations`.
    Whoever asks for an iteration must drop the one before.
    """
    if self._num_sets(self.num_resident_shards) == 1:
      wanted = [0]  # the same for all
    else:
      wanted = [iteration] if iteration == num_iterations else [iteration, iteration + 1]
    self._sets = {
      i: self._sets.get(i) or self._loader.submit(self._load, self.resident_shards(i))
      for i in wanted
    }
    return self._sets[wanted[0]].result()

  def _load(self, shards: Sequence[int]) -> ReplayData:
    """Puts a set of shards on the device, with those pieces that their frames are made of."""
    arrays = {
      name: np.zeros(shape, dtype) for name, (shape, dtype) in self._shapes(self._sizes).items()
    }
    positions = [self.shards.index(index) for index in shards]
    encoded = [self._encoded[position] for position in positions]
    first_rows = np.cumsum([0, *(len(shard.actions) for shard in encoded)])

    for first, shard in zip(first_rows, encoded, strict=False):
      for name in ('actions', 'rewards', 'terminals'):
        arrays[name][first : first + len(shard.actions)] = getattr(shard, name)
    tiles, blocks, bands = self._occurring(positions)
    _fill(arrays['frames'], [shard.frames for shard in encoded], bands)
    _fill(arrays['bands'], self._pieces(2, bands), blocks)
    _fill(arrays['blocks'], self._pieces(1, blocks), tiles)
    _fill(arrays['tiles'], self._pieces(0, tiles))

    starts = np.concatenate(
      [
        first + self._runs[position][0]
        for first, position in zip(first_rows, positions, strict=False)
      ]
    )
    lengths = np.concatenate([self._runs[position][1] for position in positions])
    ends = np.cumsum(lengths)
    arrays['run_ends'][:] = ends[-1]
    arrays['run_ends'][: len(ends)] = ends
    arrays['run_offsets'][: len(ends)] = starts - (ends - lengths)

    on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
    store = frame_store.FrameStore(
      *(on_device.pop(name) for name in frame_store.FrameStore._fields)
    )
    return ReplayData(store, **on_device, n_step=self._n_step, discount=self._discount)

  def _occurring(self, positions: Sequence[int]) -> list[np.ndarray]:
    """For each tile, block and band of the chain, whether frames of these shards contain it."""
    numbers = [sum(len(shard.pieces(level)) for shard in self._chain) for level in range(3)]
    if len(positions) == len(self._chain):
      return [np.ones(number, bool) for number in numbers]
    occurs = [np.zeros(number, bool) for number in numbers]
    for position in positions:
      occurs[2][frame_store.unpack(self._encoded[position].frames)] = True
    for level in (2, 1):
      for packed in self._pieces(level, occurs[level]):
        occurs[level - 1][frame_store.unpack(packed)] = True
    return occurs

  def _pieces(self, level: int, occurs: np.ndarray) -> list[np.ndarray]:
    """Those pieces of a level that occur, as they are in each shard of the chain."""
    pieces, first = [], 0
    for shard in self._chain:
      in_shard = shard.pieces(level)
      which = occurs[first : first + len(in_shard)]
      pieces.append(in_shard if which.all() else in_shard[which])
      first += len(in_shard)
    return pieces


def _fill(array: np.ndarray, parts: Sequence[np.ndarray], occurs: np.ndarray | None = None) -> None:
  """Copies parts one after the other into an array that they may leave room in.

  Args:
    array: zeros, to be filled.
    parts: what to fill it with.
    occurs: if the parts are packed ids, which of the pieces that they are ids of are kept; ids then
      become numbers among those.
  """
  numbers = None
  if occurs is not None and not occurs.all():
    numbers = np.cumsum(occurs, dtype=np.int32) - 1
  end = 0
  for part in parts:
    start, end = end, end + len(part)
    if numbers is not None:
      part = frame_store.pack(numbers[frame_store.unpack(part)], int(numbers[-1]) + 1)
    array[start:end, ..., : part.shape[-1]] = part  # ids may be wider there: more zero bytes


def cache_dir(flag: str | None) -> pathlib.Path | None:
  """The directory that --replay_cache_dir asks for.

  It is $XDG_CACHE_HOME/offline_zoo/replay if nothing is asked for, and None if "none" is.

  Raises:
    OSError: it cannot be made.
  """
  if flag is None:
    return parts.user_cache_dir() / 'replay'
  if flag == 'none':
    return None
  try:
    os.makedirs(flag, exist_ok=True)
  except OSError as error:
    raise OSError(f'--replay_cache_dir={flag}: cannot be made: {error}') from error
  return pathlib.Path(flag)


def _default_memory() -> float:
  """Bytes that resident data may take if nothing is said: see `Logs`."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use'] - _ACCELERATOR_MARGIN
  return psutil.virtual_memory().available / 2


def load(
  replay_dir: str | os.PathLike, shards: Sequence[int] | None = None, **kwargs
) -> ReplayData:
  """Puts all chosen shards on the device; arguments and errors are those of `Logs`."""
  return Logs(replay_dir, shards, memory_gb=math.inf, **kwargs).resident(0)


def valid_rows(data: ReplayData) -> jax.Array:
  """The rows [V] int32 that a transition can begin at, ascending."""
  return _nth_valid_row(data, jnp.arange(data.run_ends[-1]))


def _nth_valid_row(data: ReplayData, n: jax.Array) -> jax.Array:
  run = jnp.searchsorted(data.run_ends, n, side='right', method='scan_unrolled')
  return n + data.run_offsets[run]


def gather(data: ReplayData, rows: jax.Array) -> Transition:
  """The transitions that begin at these rows [B]; pure.

  Rows must be among `valid_rows(data)`: for others the result means nothing.
  """
  window = rows[:, None] + jnp.arange(data.n_step)[None]
  terminal = data.terminals[window]
  # A step belongs to the transition unless an earlier one ended the episode.
  belongs = jnp.cumsum(terminal, axis=1) - terminal == 0
  discounts = jnp.asarray(data.discount ** np.arange(data.n_step), jnp.float32)
  ended = jnp.any(terminal, axis=1)
  # All frames between are decoded, too: for the usual horizons that is less than two stacks.
  seen = rows[:, None] + jnp.arange(1 - log_shards.STACK_SIZE, data.n_step + 1)[None]
  images = frame_store.decode(data.frames, seen)
  after = jnp.sum(belongs, axis=1, keepdims=True) + jnp.arange(log_shards.STACK_SIZE)[None]
  return Transition(
    s_tm1=jnp.moveaxis(images[:, : log_shards.STACK_SIZE], 1, -1),
    a_tm1=data.actions[rows].astype(jnp.int32),
    r_t=jnp.sum(jnp.where(belongs, data.rewards[window] * discounts[None], 0.0), axis=1),
    discount_t=jnp.where(ended, 0.0, jnp.float32(data.discount**data.n_step)),
    s_t=jnp.moveaxis(images[jnp.arange(len(rows))[:, None], after], 1, -1),
  )


def sample(data: ReplayData, rng_key: jax.Array, batch_size: int) -> Transition:
  """A batch of transitions, each uniform over all valid rows of all shards, with replacement."""
  picked = jax.random.randint(rng_key, (batch_size,), 0, data.run_ends[-1])
  return gather(data, _nth_valid_row(data, picked))
