"""Tests for episodes.py: of a few made-up shards, each choice against what it is counted to be."""

import dataclasses

import numpy as np
import pytest

from offline_zoo import episodes
from offline_zoo.encoding import replay_cache
from offline_zoo.logs.shard import CUT, TERMINAL


def make_shard(ends: dict[int, int], num_rows: int, returns: list[float]):
  """A shard whose terminal flags are 0 but for these."""
  terminals = np.zeros(num_rows, np.uint8)
  terminals[list(ends)] = list(ends.values())
  columns = {field.name: np.zeros(0) for field in dataclasses.fields(replay_cache.EncodedShard)}
  columns |= {'terminals': terminals, 'episode_returns': np.array(returns)}
  return replay_cache.EncodedShard(**columns)


def many(num_episodes: int, length: int, first_return: int):
  """A shard of whole episodes, each with a return one more than the last."""
  ends = {(length + 3) * (i + 1) - 1: TERMINAL for i in range(num_episodes)}
  returns = first_return + np.arange(num_episodes, dtype=float)
  return make_shard(ends, (length + 3) * num_episodes, list(returns))


def test_episodes_of_a_shard():
  # The first began before the shard, the third was cut, and of the last only blank rows are there.
  shard = make_shard({4: TERMINAL, 11: TERMINAL, 19: CUT, 29: TERMINAL}, 32, [5.0, 7.0])
  starts, lengths, returns = episodes.of_shard(shard)
  assert starts.tolist() == [0, 5, 12, 20, 30]
  assert lengths.tolist() == [2, 4, 5, 7, 0]
  np.testing.assert_array_equal(returns, [np.nan, 5, np.nan, 7, np.nan])
  # Episodes that are there only in part count among the first, those without a frame do not.
  for fraction, want in ((0.25, 1), (0.74, 2), (0.75, 3), (1.0, 4)):
    (kept,) = episodes.choose([shard], [0], first_fraction=fraction).kept
    assert kept.tolist() == [i < want for i in range(5)]


def test_the_first_of_each_shard_are_as_many_as_dopamines_lab_takes():
  """It takes int(percent / 100 * n) of a checkpoint's n episodes."""
  shards = [many(40, 5, 0), many(199, 2, 0)]
  choice = episodes.choose(shards, [0, 1], first_fraction=0.05)
  assert [kept.sum() for kept in choice.kept] == [2, 9]
  assert all(kept[: kept.sum()].all() for kept in choice.kept)
  assert choice.mean_return == (0 + 1 + sum(range(9))) / 11
  assert choice.description == (
    '; only 11 of 239 episodes, the first 5% of each shard: 28 of 598 transitions'
  )
  with pytest.raises(ValueError, match=r'--first_fraction=0\.02: .* shard 7 has 40: leave it out'):
    episodes.choose(shards, [7, 8], first_fraction=0.02)


def test_random_episodes_are_whole_and_alike_in_all_shards():
  shards = [many(10, 7, 0), many(30, 7, 100), make_shard({}, 50, [])]
  counts = np.zeros(43)
  for seed in range(300):
    choice = episodes.choose(shards, [0, 1, 2], max_random_transitions=90, seed=seed)
    kept = np.concatenate(choice.kept)
    assert kept.sum() == 12  # of 7 transitions each
    counts += kept
  assert not counts[[10, 41, 42]].any()  # those without an end
  drawn = np.delete(counts, [10, 41, 42]) / 300
  # Expected: 12 of 40; three standard errors and a little.
  np.testing.assert_allclose(drawn, 0.3, atol=0.1)
  assert 'drawn at random up to 90 transitions: 84 of 327 transitions' in choice.description


def test_a_seed_draws_the_same_again():
  shards = [many(50, 4, 0)]
  first, again, other = (
    episodes.choose(shards, [0], max_random_transitions=100, seed=seed).kept[0]
    for seed in (1, 1, 2)
  )
  assert (first == again).all() and (first != other).any()


def test_one_episode_is_drawn_even_if_it_is_longer():
  choice = episodes.choose([many(5, 30, 0)], [0], max_random_transitions=10)
  assert choice.kept[0].sum() == 1


def test_each_condition_looks_at_what_those_before_it_kept():
  shards = [many(10, 5, 0), many(10, 5, 100)]
  kept = np.concatenate(
    episodes.choose(
      shards, [0, 1], first_fraction=0.5, max_random_transitions=10**6, top_fraction=0.6
    ).kept
  )
  # Of the returns 0 to 4 and 100 to 104 the six best.
  assert np.flatnonzero(kept).tolist() == [4, 11, 12, 13, 14, 15]
  # Of the returns 3 to 9 the three best, not those of the five best that return 3.
  choice = episodes.choose(shards[:1], [0], min_episode_return=3, top_fraction=0.5)
  assert np.flatnonzero(choice.kept[0]).tolist() == [7, 8, 9]
  assert ', those that return 3 or more, the best, which return 7 or more: ' in choice.description


def test_without_a_condition_all_is_kept_and_nothing_said():
  choice = episodes.choose([many(3, 4, 1)], [0])
  assert choice.kept[0].tolist() == [True, True, True, False]
  assert choice.mean_return == 2 and choice.description == ''
