"""The replay on the accelerator: which logged rows are there, and transitions sampled from them.

Frames are held encoded (encoding/frame_store.py), on disk as on the device, so that a game fits
where its raw 353 GB would not. They are decoded when they are sampled, inside the jitted update.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from offline_zoo import atari_data, episodes, program, residency
from offline_zoo.encoding import frame_store
from offline_zoo.encoding import shards as encoded_shards
from offline_zoo.logs.shard import CUT, TERMINAL


class Transition(NamedTuple):
  """A batch of B n-step transitions.

  Attributes:
    s_tm1: [B, 84, 84, 4] uint8, the stack of frames acted on, newest last.
    a_tm1: [B] int32, the logged action.
    r_t: [B] float32, the sum over k < n, or up to the episode's end, of discount^k times the reward
      k steps later, each clipped before the sum (see ReplayData.max_abs_reward).
    discount_t: [B] float32, discount^n, or 0 where the episode ended within the n steps.
    s_t: [B, 84, 84, 4] uint8, the stack n steps later. Means nothing where discount_t is 0.
  """

  s_tm1: jax.Array
  a_tm1: jax.Array
  r_t: jax.Array
  discount_t: jax.Array
  s_t: jax.Array


class Windows(NamedTuple):
  """A batch of B windows of n logged steps.

  After an episode's end states mean nothing, actions and rewards are 0 and probabilities 1.

  Attributes:
    s: [B, n + 1, 84, 84, 4] uint8, the stacks of frames acted on, and the one after the window.
    a: [B, n] int32, the logged actions.
    r: [B, n] float32, rewards, clipped (see ReplayData.max_abs_reward).
    probability: [B, n] float32, of the logged actions under the policy that acted.
    discount: [B, n] float32, discount^k of step k, 0 after the end of the episode.
    discount_t: [B] float32, discount^n, or 0 where the episode ended within the n steps.
  """

  s: jax.Array
  a: jax.Array
  r: jax.Array
  probability: jax.Array
  discount: jax.Array
  discount_t: jax.Array


# The replay on the device.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplayData:
  """Logged rows as device arrays: an argument of a jitted function, never closed over.

  Rows are the usable (not stale) rows of the resident shards, one shard after the other. N of them,
  and blank ones after them if other sets of shards are larger. Valid rows, those that a transition
  can begin at, come in R runs of consecutive ones.

  Attributes:
    frames: encoded, or raw in a replay that grows; see frame_store.decode.
    actions: [N] uint8.
    rewards: [N] int8, int16 or float32, as logged.
    terminals: [N] bool.
    probabilities: [N] float32, of the actions under the policy that acted; None if not asked for.
    run_ends: [R] int32, how many valid rows there are up to the end of each run.
    run_offsets: [R] int32, a valid row's number less how many valid rows come before it.
    n_step: the horizon n of the transitions.
    discount: the discount of one step.
    max_abs_reward: rewards are clipped to [-max_abs_reward, max_abs_reward]; None: they are not.
  """

  frames: frame_store.FrameStore | frame_store.RawFrames
  actions: jax.Array
  rewards: jax.Array
  terminals: jax.Array
  probabilities: jax.Array | None
  run_ends: jax.Array
  run_offsets: jax.Array
  n_step: int = dataclasses.field(metadata={'static': True})
  discount: float = dataclasses.field(metadata={'static': True})
  max_abs_reward: float | None = dataclasses.field(metadata={'static': True})


def _valid_runs(terminal: np.ndarray, n_step: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds the run of valid rows of each episode of a shard's usable rows: [E] first rows, lengths.

  Row i is valid if i-3 .. i+n are usable, none of i-3 .. i-1 is the last of an episode, and its own
  episode is not cut within i .. i+n-1.
  """
  starts = np.concatenate([[0], np.flatnonzero(terminal) + 1]) + atari_data.STACK_SIZE - 1
  ends = np.append(starts[1:] - (atari_data.STACK_SIZE - 1), len(terminal))
  is_cut = np.append(terminal, 0)[ends - 1] == CUT
  ends = np.minimum(ends - n_step * is_cut, len(terminal) - n_step)
  return starts, np.maximum(ends - starts, 0)


class Logs:
  """The chosen shards of a replay directory, and which of them are on the device.

  All are, if they fit; or else a subset of a fixed number of shards, another in each iteration,
  drawn as a function of (seed, iteration) alone. Then the subset that comes next is put on the
  device in the background, and arrays are as large as any subset needs, so that nothing is compiled
  anew.

  Attributes:
    shards: their numbers.
    num_resident_shards: how many are on the device at a time.
    num_transitions: how many there are to sample from.
    mean_episode_return: the mean over all episodes that lie whole within a shard, and are not left
      out, of the sum of rewards as logged; NaN without such an episode.
    checksum: a CRC-32 that tells logs apart.
  """

  def __init__(
    self,
    replay_dir: str | os.PathLike,
    shards: Sequence[int] | None = None,
    *,
    n_step: int = 1,
    discount: float = 0.99,
    max_abs_reward: float | None = 1.0,
    num_actions: int | None = None,
    max_rows_per_shard: int | None = None,
    first_fraction: float | None = None,
    max_random_transitions: int | None = None,
    min_episode_return: float | None = None,
    top_fraction: float | None = None,
    with_probabilities: bool = False,
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
      max_abs_reward: bound that rewards are clipped to, each one; None: they are not clipped.
      num_actions: the size of the game's action set, to check the logged actions against.
      max_rows_per_shard: keeps only the first rows of each shard, as CQL's data release does:
        10,000 of a million are its "1%".
      first_fraction, max_random_transitions, min_episode_return, top_fraction: keep only some
        episodes; see `episodes.choose`.
      with_probabilities: for `sample_windows`: loads the probabilities of the logged actions too.
      cache_dir: where encoded shards are kept for the next time; None keeps none.
      memory_gb: 10^9 bytes that resident data may take, the incoming subset included; if None, what
        the accelerator has free less 2 GB, or on CPU half of the available memory.
      num_resident_shards: how many there must be, for a run that goes on; if None, as many as fit.
      seed: of the subsets, and of episodes drawn at random.

    Raises:
      FileNotFoundError: the directory, a shard, or a shard's file is missing.
      ValueError: bad arguments, a bad file (see `logs.shard.LogShard.read_small_files`), no row to
        begin a transition at, no episode to keep, or too little memory for one shard.
    """
    if n_step < 1 or not 0 <= discount <= 1:
      raise ValueError(f'need n_step >= 1 and a discount in [0, 1], got {n_step} and {discount}')
    if max_rows_per_shard is not None and max_rows_per_shard < 1:
      raise ValueError(f'max_rows_per_shard must be at least 1, got {max_rows_per_shard}')
    for name, fraction in {'first_fraction': first_fraction, 'top_fraction': top_fraction}.items():
      if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f'{name} must be in (0, 1], got {fraction}')
    self._n_step, self._discount, self._max_abs_reward = n_step, discount, max_abs_reward
    self._seed = seed
    encoded = encoded_shards.load(
      replay_dir, shards, num_actions, max_rows_per_shard, cache_dir, with_probabilities
    )
    self.checksum = encoded.checksum
    choice = episodes.choose(
      encoded.shards,
      encoded.numbers,
      first_fraction=first_fraction,
      max_random_transitions=max_random_transitions,
      min_episode_return=min_episode_return,
      top_fraction=top_fraction,
      seed=seed,
    )
    self.mean_episode_return, self._chosen = choice.mean_return, choice.description
    runs = []
    for shard, is_kept in zip(encoded.shards, choice.kept, strict=True):
      starts, lengths = _valid_runs(shard.terminals, n_step)
      some = is_kept & (lengths > 0)
      runs.append((starts[some], lengths[some]))
    # A shard without a row to begin at, such as a run's short last one, is not worth its place.
    kept = [i for i, (starts, _) in enumerate(runs) if len(starts)]
    if not kept:
      raise ValueError(
        f'{replay_dir}: no valid transition in shards {encoded.numbers}: one needs '
        f'{atari_data.STACK_SIZE + n_step} rows of a shard with no episode end in the first three'
      )
    self._encoded = encoded.take(kept)
    self.shards = self._encoded.numbers
    self._runs = [runs[i] for i in kept]
    self.num_transitions = sum(int(lengths.sum()) for _, lengths in self._runs)
    num_runs = [len(starts) for starts, _ in self._runs]
    self._plan = residency.plan(
      self._encoded, num_runs, memory_gb, num_resident_shards, with_probabilities
    )
    self.num_resident_shards = self._plan.num_shards
    self._sets: dict[int, concurrent.futures.Future[ReplayData]] = {}
    self._loader = concurrent.futures.ThreadPoolExecutor(1, 'replay')

  def describe(self) -> str:
    """Says what is resident in one line: shards, rows, bytes and logged returns."""
    plan, total = self._plan, len(self.shards)
    which, twice = f'all {total} shards', ''
    if plan.num_sets == 2:
      which = f'{plan.num_shards} of {total} shards at a time, changing every iteration'
      twice = ' twice, for the current and the incoming shards'
    return (
      f'{which}, {plan.num_rows:,} rows, {plan.num_bytes / plan.num_rows:,.1f} bytes a row, '
      f'{plan.num_bytes / 1e9:.3f} GB resident{twice}; '
      f'mean logged return {self.mean_episode_return:.1f}{self._chosen}'
    )

  def resident_shards(self, iteration: int) -> list[int]:
    """Draws the numbers of the shards that an iteration samples from."""
    if self._plan.num_sets == 1:
      return self.shards
    rng = np.random.default_rng((self._seed, iteration))
    chosen = rng.permutation(len(self.shards))[: self.num_resident_shards]
    return [self.shards[i] for i in sorted(chosen)]

  def resident(self, iteration: int, num_iterations: int | None = None) -> ReplayData:
    """Gives what an iteration samples from.

    If shards change, begins to load what comes next, unless this is the last of `num_iterations`.
    Whoever asks for an iteration must drop the one before as soon as this returns, or a third set
    stays in memory.
    """
    if self._plan.num_sets == 1:
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
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._plan.shapes.items()}
    positions = [self.shards.index(index) for index in shards]
    encoded = [self._encoded.shards[position] for position in positions]
    first_rows = np.cumsum([0, *(len(shard.actions) for shard in encoded)])

    for first, shard in zip(first_rows, encoded, strict=False):
      which = slice(first, first + len(shard.actions))
      arrays['actions'][which] = shard.actions
      arrays['rewards'][which] = shard.rewards
      arrays['terminals'][which] = shard.terminals == TERMINAL
      if 'probabilities' in arrays:
        arrays['probabilities'][which] = shard.probabilities
    tiles, blocks, bands = self._encoded.occurring(positions)
    _fill(arrays['frames'], [shard.frames for shard in encoded], bands)
    _fill(arrays['bands'], self._encoded.pieces(2, bands), blocks)
    _fill(arrays['blocks'], self._encoded.pieces(1, blocks), tiles)
    _fill(arrays['tiles'], self._encoded.pieces(0, tiles))

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
    return ReplayData(
      store,
      probabilities=on_device.pop('probabilities', None),
      **on_device,
      n_step=self._n_step,
      discount=self._discount,
      max_abs_reward=self._max_abs_reward,
    )


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
  """Chooses the directory that --replay_cache_dir asks for.

  It is $XDG_CACHE_HOME/offline_zoo/replay if nothing is asked for, and None if "none" is.

  Raises:
    OSError: it cannot be made.
  """
  if flag is None:
    home = program.user_cache_dir()
    if home is None:
      logging.warning('No home directory: encoded logs will not be kept; see --replay_cache_dir')
    return home and home / 'replay'
  if flag == 'none':
    return None
  try:
    os.makedirs(flag, exist_ok=True)
  except OSError as error:
    raise OSError(f'--replay_cache_dir={flag}: cannot be made: {error}') from error
  return pathlib.Path(flag)


def load(
  replay_dir: str | os.PathLike, shards: Sequence[int] | None = None, **kwargs
) -> ReplayData:
  """Puts all chosen shards on the device; arguments and errors are those of `Logs`."""
  return Logs(replay_dir, shards, memory_gb=math.inf, **kwargs).resident(0)


def valid_rows(data: ReplayData) -> jax.Array:
  """Lists the rows [V] int32 that a transition can begin at, ascending."""
  return _nth_valid_row(data, jnp.arange(data.run_ends[-1]))


# What follows is jitted for those who call it outside of an update, where each operation would be
# compiled by itself.


@jax.jit
def _nth_valid_row(data: ReplayData, n: jax.Array) -> jax.Array:
  run = jnp.searchsorted(data.run_ends, n, side='right', method='scan_unrolled')
  return n + data.run_offsets[run]


class _Steps(NamedTuple):
  """The n steps from each of B rows on.

  Attributes:
    rows: [B, n] of the steps.
    belong: [B, n] bool, whether no earlier one ended the episode.
    rewards: [B, n], clipped; 0 where a step does not belong.
    discounts: [B, n], likewise.
    discount_t: [B], of what follows.
    images: [B, n + 4, 84, 84], from the first stack's first frame to the one after the last step.
  """

  rows: jax.Array
  belong: jax.Array
  rewards: jax.Array
  discounts: jax.Array
  discount_t: jax.Array
  images: jax.Array


def _steps(data: ReplayData, rows: jax.Array) -> _Steps:
  window = rows[:, None] + jnp.arange(data.n_step)[None]
  terminal = data.terminals[window]
  belong = jnp.cumsum(terminal, axis=1) - terminal == 0
  discounts = jnp.asarray(data.discount ** np.arange(data.n_step), jnp.float32)
  rewards = data.rewards[window].astype(jnp.float32)
  if data.max_abs_reward is not None:
    rewards = jnp.clip(rewards, -data.max_abs_reward, data.max_abs_reward)
  ended = jnp.any(terminal, axis=1)
  # All frames between are decoded, too: for the usual horizons that is less than four stacks.
  seen = rows[:, None] + jnp.arange(1 - atari_data.STACK_SIZE, data.n_step + 1)[None]
  return _Steps(
    rows=window,
    belong=belong,
    rewards=jnp.where(belong, rewards, 0.0),
    discounts=jnp.where(belong, discounts[None], 0.0),
    discount_t=jnp.where(ended, 0.0, jnp.float32(data.discount**data.n_step)),
    images=frame_store.decode(data.frames, seen),
  )


@jax.jit
def gather(data: ReplayData, rows: jax.Array) -> Transition:
  """Gathers the transitions that begin at these rows [B]; pure.

  Rows must be among `valid_rows(data)`: for others the result means nothing.
  """
  steps = _steps(data, rows)
  after = jnp.sum(steps.belong, axis=1, keepdims=True) + jnp.arange(atari_data.STACK_SIZE)[None]
  return Transition(
    s_tm1=jnp.moveaxis(steps.images[:, : atari_data.STACK_SIZE], 1, -1),
    a_tm1=data.actions[rows].astype(jnp.int32),
    r_t=jnp.sum(steps.rewards * steps.discounts, axis=1),
    discount_t=steps.discount_t,
    s_t=jnp.moveaxis(steps.images[jnp.arange(len(rows))[:, None], after], 1, -1),
  )


@jax.jit
def gather_windows(data: ReplayData, rows: jax.Array) -> Windows:
  """Gathers the windows that begin at these rows [B], as `gather` does transitions; pure.

  The data must have probabilities.
  """
  assert data.probabilities is not None
  steps = _steps(data, rows)
  stacks = jnp.arange(data.n_step + 1)[:, None] + jnp.arange(atari_data.STACK_SIZE)[None]
  return Windows(
    s=jnp.moveaxis(steps.images[:, stacks], 2, -1),
    a=jnp.where(steps.belong, data.actions[steps.rows].astype(jnp.int32), 0),
    r=steps.rewards,
    probability=jnp.where(steps.belong, data.probabilities[steps.rows], 1.0),
    discount=steps.discounts,
    discount_t=steps.discount_t,
  )


def _sampled_rows(data: ReplayData, rng_key: jax.Array, batch_size: int) -> jax.Array:
  picked = jax.random.randint(rng_key, (batch_size,), 0, data.run_ends[-1])
  return _nth_valid_row(data, picked)


@functools.partial(jax.jit, static_argnums=2)
def sample(data: ReplayData, rng_key: jax.Array, batch_size: int) -> Transition:
  """Draws transitions, each uniformly from all valid rows of all shards, with replacement; pure."""
  return gather(data, _sampled_rows(data, rng_key, batch_size))


@functools.partial(jax.jit, static_argnums=2)
def sample_windows(data: ReplayData, rng_key: jax.Array, batch_size: int) -> Windows:
  """Draws windows, as `sample` does transitions; pure."""
  return gather_windows(data, _sampled_rows(data, rng_key, batch_size))
