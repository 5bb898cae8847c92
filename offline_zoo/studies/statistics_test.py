"""Tests for statistics.py: numbers worked by hand, and those that rliable gave."""

import json

import numpy as np
import pytest

from offline_zoo.studies import statistics

AGGREGATES = {
  'iqm': statistics.interquartile_mean,
  'median': statistics.median,
  'mean': statistics.mean,
  'optimality_gap': statistics.optimality_gap,
}


@pytest.fixture(scope='module')
def rliable(golden):
  return json.loads((golden / 'report' / 'rliable.json').read_text())


@pytest.fixture(scope='module')
def scores(rliable):
  return {name: np.array(x) for name, x in rliable['scores'].items()}


# By hand.


@pytest.mark.parametrize(
  'runs, mean_of',
  [
    ([8, 1, 7, 2, 6, 3, 5, 4], (3, 4, 5, 6)),  # two of eight at either end
    ([100, 1, 7, 2, 6, -100], (1, 2, 6, 7)),  # 1.5 of six, rounded down
    ([9, 1, 4], (1, 4, 9)),  # 0.75 of three
  ],
)
def test_interquartile_mean(runs, mean_of):
  want = sum(mean_of) / len(mean_of)
  for shape in ((len(runs), 1), (1, len(runs))):  # runs of one game, or a run of each game
    assert statistics.interquartile_mean(np.reshape(runs, shape).astype(float)) == want


def test_median_is_of_the_games_means():
  # Games' means are 2, 0 and 7; the median of all six scores would be 1.5.
  scores = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 12.0]])
  assert statistics.median(scores) == 2
  assert statistics.mean(scores) == 3


def test_optimality_gap_does_not_reward_more_than_human_play():
  assert (
    statistics.optimality_gap(np.array([[0.25, 1.0], [3.0, -0.25]])) == (0.75 + 0 + 0 + 1.25) / 4
  )


def test_probability_of_improvement():
  x, y = np.array([[1.0, 5.0], [3.0, 5.0], [4.0, 5.0]]), np.array([[2.0, 6.0], [3.0, 5.0]])
  # First game: 1 beats neither, 3 beats 2 and ties with 3, 4 beats both. Second: three ties.
  want = ((0 + 1.5 + 2) / 6 + 1.5 / 6) / 2
  assert statistics.probability_of_improvement(x, y) == pytest.approx(want, abs=1e-15)
  assert statistics.probability_of_improvement(y, x) == pytest.approx(1 - want, abs=1e-15)


def test_performance_profile_counts_runs_above_a_threshold():
  profile = statistics.performance_profile(
    np.array([[0.0, 1.0], [2.0, 2.0]]), np.array([-1.0, 0.0, 1.0, 2.0])
  )
  assert profile.tolist() == [1, 0.75, 0.5, 0]


def test_resampling_where_its_distribution_can_be_worked_by_hand():
  """Two runs of one game, 0 and 1: means 0, 1/2, 1/2, 1; of two such games, 0 to 1 in quarters."""
  one = statistics.resample(np.array([[0.0], [1.0]]), 40_000, np.random.default_rng(0))
  _, counts = np.unique(statistics.mean(one), return_counts=True)
  np.testing.assert_allclose(counts / 40_000, [0.25, 0.5, 0.25], atol=0.01)
  two = statistics.resample(np.array([[0.0, 10.0], [1.0, 11.0]]), 40_000, np.random.default_rng(0))
  _, counts = np.unique(statistics.mean(two), return_counts=True)
  # Games are drawn apart from each other: had they shared a draw, there would be three values.
  np.testing.assert_allclose(counts / 40_000, np.array([1, 4, 6, 4, 1]) / 16, atol=0.01)


def test_one_or_two_runs_have_no_interval():
  x, y = np.ones((2, 3)), np.ones((3, 3))
  np.testing.assert_array_equal(statistics.bootstrap_interval(statistics.mean, y), [1, 1])
  assert np.isnan(statistics.bootstrap_interval(statistics.mean, x)).all()
  assert np.isnan(statistics.bootstrap_interval(statistics.probability_of_improvement, y, x)).all()
  assert np.isnan(statistics.mean_interval(np.ones((1, 4)))).all()


def test_interval_of_the_mean():
  # 1, 2, 3: mean 2, standard error 1 / sqrt(3). With two degrees of freedom, Student's quantile
  # has a closed form, (2 p - 1) / sqrt(2 p (1 - p)), 4.30 for p = 0.975.
  radius = 0.95 / np.sqrt(2 * 0.975 * 0.025) / np.sqrt(3)
  values = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
  low, high = statistics.mean_interval(values)
  np.testing.assert_allclose(low, [2 - radius, 0], rtol=1e-12)
  np.testing.assert_allclose(high, [2 + radius, 0], rtol=1e-12)


# Beside rliable.


@pytest.mark.parametrize('name', ['x', 'y'])
def test_points_are_rliables(rliable, scores, name):
  want = dict(zip(rliable['order'], rliable['aggregates'][name]['point'], strict=True))
  for aggregate, statistic in AGGREGATES.items():
    assert statistic(scores[name]) == pytest.approx(want[aggregate], abs=1e-12)
  np.testing.assert_allclose(
    statistics.performance_profile(scores[name], np.array(rliable['thresholds'])),
    rliable['profiles'][name]['point'],
    atol=1e-12,
  )


def test_probability_of_improvement_is_rliables(rliable, scores):
  (want,) = rliable['probability_of_improvement']['point']
  got = statistics.probability_of_improvement(scores['x'], scores['y'])
  assert got == pytest.approx(want, abs=1e-12)


def assert_within_monte_carlo_error(values: np.ndarray, interval, num_resamples: int) -> None:
  """Checks the ends of another's interval against our own resampled values.

  An end that leaves a fraction q of the other's resamples below it leaves, in ours, q within five
  standard deviations of the difference of two binomial fractions: whatever the distribution, with
  a chance of error below 1e-6. Many resamples may lie at the very end, so that a range of fractions
  is its own: it is the range that must come that close.
  """
  for end, fraction in zip(interval, (0.025, 0.975), strict=True):
    error = 5 * np.sqrt(fraction * (1 - fraction) * (1 / len(values) + 1 / num_resamples))
    # An end may also lie, interpolated, in the gap between two values; and sums differ by rounding.
    assert np.mean(values < end - 1e-9) - error <= fraction <= np.mean(values <= end + 1e-9) + error


def test_intervals_are_rliables(rliable, scores):
  cases = [
    (AGGREGATES[aggregate], (scores[name],), interval)
    for name in scores
    for aggregate, interval in zip(
      rliable['order'], np.transpose(rliable['aggregates'][name]['interval']), strict=True
    )
  ]
  interval = np.ravel(rliable['probability_of_improvement']['interval'])
  cases.append((statistics.probability_of_improvement, (scores['x'], scores['y']), interval))
  for statistic, args, theirs in cases:
    rng = np.random.default_rng(1)
    values = statistic(*(statistics.resample(x, 50_000, rng) for x in args))
    assert_within_monte_carlo_error(values, theirs, rliable['num_resamples'])
    ours = statistics.bootstrap_interval(statistic, *args)
    assert_within_monte_carlo_error(values, ours, statistics.NUM_RESAMPLES)
    # What that means in numbers, for scores around 0.7.
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_bands_of_profiles_are_rliables(rliable, scores):
  thresholds = np.array(rliable['thresholds'])
  for name, x in scores.items():
    resampled = statistics.resample(x, 50_000, np.random.default_rng(0))
    values = statistics.performance_profile(resampled, thresholds)
    bands = np.array(rliable['profiles'][name]['interval'])
    for i in range(len(thresholds)):
      assert_within_monte_carlo_error(values[:, i], bands[:, i], rliable['num_resamples'])
