"""Which logged episodes to learn from: parts of the data, as papers mean them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offline_zoo.atari_data import STACK_SIZE
from offline_zoo.encoding import replay_cache
from offline_zoo.logs.shard import TERMINAL


class Episodes(NamedTuple):
  """What a shard has of episodes, in order: E stretches of rows, the last up to the shard's end.

  Attributes:
    starts: [E] first rows, blank ones included.
    lengths: [E] rows but for the first three, which are blank where an episode begins; 0 if there
      are no others.
    returns: [E] sums of rewards as logged; NaN where an episode is not whole within the shard.
  """

  starts: np.ndarray
  lengths: np.ndarray
  returns: np.ndarray


def of_shard(shard: replay_cache.EncodedShard) -> Episodes:
  """Finds the episodes of a shard."""
  ends = np.flatnonzero(shard.terminals) + 1
  starts = np.append(0, ends)
  lengths = np.append(ends, len(shard.terminals)) - starts - (STACK_SIZE - 1)
  returns = np.full(len(starts), np.nan)
  ended = np.flatnonzero(shard.terminals[ends - 1] == TERMINAL)
  # The first may have begun before the shard.
  returns[ended[len(ended) - len(shard.episode_returns) :]] = shard.episode_returns
  return Episodes(starts, np.maximum(lengths, 0), returns)


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which episodes are kept.

  Attributes:
    kept: [E] bool for each shard, of its `Episodes`.
    mean_return: of those kept that lie whole within a shard, as logged; NaN without any.
    description: for the log; empty if nothing is left out.
  """

  kept: list[np.ndarray]
  mean_return: float
  description: str


def choose(
  shards: Sequence[replay_cache.EncodedShard],
  numbers: Sequence[int],
  *,
  first_fraction: float | None = None,
  max_random_transitions: int | None = None,
  min_episode_return: float | None = None,
  top_fraction: float | None = None,
  seed: int = 0,
) -> Choice:
  """Chooses episodes; of several conditions each looks at what those before it have kept.

  Args:
    shards: whose episodes.
    numbers: of the shards, for messages.
    first_fraction: keeps this part, in (0, 1], of each shard's episodes, rounded down: those that
      come first. As Dopamine's offline_rl lab takes percentages of RL Unplugged. Here episodes that
      a shard holds only in part count, too.
    max_random_transitions: keeps whole episodes, drawn at random from all shards until the next
      would make it more transitions than this; at least one. The 1% of Decision Transformer (Chen
      et al. 2021, arXiv 2106.01345) and d3rlpy are 500,000 of 50 million; these draw from one shard
      after the other, and go on within an episode or beyond the number.
    min_episode_return: keeps whole episodes that return at least this.
    top_fraction: keeps the best whole episodes: as many as have this part, in (0, 1], of the
      transitions that whole episodes have, at least one; ties at the boundary are kept. As the
      "%BC" of Chen et al. 2021.
    seed: of what is drawn.

  Raises:
    ValueError: there is no such episode, or `first_fraction` is less than one of a shard's.
  """
  of_shards = [of_shard(shard) for shard in shards]
  lengths = np.concatenate([episodes.lengths for episodes in of_shards])
  returns = np.concatenate([episodes.returns for episodes in of_shards])
  kept, which = lengths > 0, []
  num_episodes = kept.sum()

  if first_fraction is not None:
    firsts = [
      _first(episodes, number, first_fraction)
      for episodes, number in zip(of_shards, numbers, strict=True)
    ]
    kept &= np.concatenate(firsts)
    which.append(f'the first {100 * first_fraction:g}% of each shard')
  if max_random_transitions is not None:
    candidates = _whole(kept, returns, 'max_random_transitions')
    drawn = np.random.default_rng(seed).permutation(candidates)
    num_drawn = np.searchsorted(np.cumsum(lengths[drawn]), max_random_transitions, side='right')
    kept = np.isin(np.arange(len(kept)), drawn[: max(num_drawn, 1)])
    which.append(f'drawn at random up to {max_random_transitions:,} transitions')
  if min_episode_return is not None:
    best = returns[_whole(kept, returns, 'min_episode_return')].max()
    if min_episode_return > best:
      raise ValueError(
        f'--min_episode_return={min_episode_return:g}: expected at most {best:g}, the best logged '
        'return'
      )
    kept &= returns >= min_episode_return
    which.append(f'those that return {min_episode_return:g} or more')
  if top_fraction is not None:
    candidates = _whole(kept, returns, 'top_fraction')
    least = _least_return(returns[candidates], lengths[candidates], top_fraction)
    kept &= returns >= least
    which.append(f'the best, which return {least:g} or more')

  whole = returns[kept & ~np.isnan(returns)]
  description = (
    f'; only {kept.sum():,} of {num_episodes:,} episodes, {", ".join(which)}: '
    f'{lengths[kept].sum():,} of {lengths.sum():,} transitions'
  )
  return Choice(
    np.split(kept, np.cumsum([len(episodes.starts) for episodes in of_shards])[:-1]),
    float(whole.mean()) if len(whole) else math.nan,
    description if which else '',
  )


def _first(episodes: Episodes, number: int, fraction: float) -> np.ndarray:
  """Finds [E] the first ones of a shard."""
  is_there = episodes.lengths > 0
  num_kept = int(fraction * is_there.sum())
  if is_there.any() and not num_kept:
    raise ValueError(
      f'--first_fraction={fraction:g}: expected an episode or more of each shard; shard {number} '
      f'has {is_there.sum()}: leave it out with --shards, or take more'
    )
  return np.cumsum(is_there) <= num_kept


def _whole(kept: np.ndarray, returns: np.ndarray, flag: str) -> np.ndarray:
  """Lists those kept that lie whole within a shard."""
  whole = np.flatnonzero(kept & ~np.isnan(returns))
  if not len(whole):
    raise ValueError(f'--{flag}: expected logs with whole episodes; none lies whole within a shard')
  return whole


def _least_return(returns: np.ndarray, lengths: np.ndarray, top_fraction: float) -> float:
  """Finds the least return of the best of whole episodes; see `choose`."""
  best_first = np.argsort(-returns, kind='stable')
  num_transitions = np.cumsum(lengths[best_first])
  # As many of the best as the fraction has room for, but at least one.
  room = top_fraction * num_transitions[-1]
  num_kept = max(np.searchsorted(num_transitions, room, side='right'), 1)
  return returns[best_first[num_kept - 1]]
