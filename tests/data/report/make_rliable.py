"""Records what rliable says of made-up scores: `python make_rliable.py > rliable.json`.

rliable 1.2.0 does not import with today's pandas; recorded with Python 3.11 and
`pip install --no-deps rliable==1.2.0` beside `arch==5.6.0 numpy==1.26.4 pandas==2.1.4 scipy==1.12.0
absl-py seaborn`.
"""

import json

import numpy as np
from rliable import library, metrics

NUM_RESAMPLES = 50_000
THRESHOLDS = np.linspace(0.0, 2.0, 9)


def made_up_scores(num_runs: int, num_games: int, seed: int) -> np.ndarray:
  """Scores [num_runs, num_games], some above 1 and, to one decimal, some tied."""
  rng = np.random.default_rng(seed)
  return np.round(rng.gamma(2.0, 0.4, (num_runs, num_games)), 1)


def recorded(distribution_of: dict, statistic) -> dict:
  np.random.seed(0)  # what rliable's resampling draws from
  points, intervals = library.get_interval_estimates(distribution_of, statistic, reps=NUM_RESAMPLES)
  return {
    name: {'point': np.atleast_1d(points[name]).tolist(), 'interval': intervals[name].tolist()}
    for name in distribution_of
  }


def main() -> None:
  # Odd and even numbers of runs, so that a quarter of the scores is a whole number and is not.
  scores = {'x': made_up_scores(5, 7, seed=1), 'y': made_up_scores(4, 7, seed=2)}

  def aggregates(x: np.ndarray) -> np.ndarray:
    return np.array(
      [
        metrics.aggregate_iqm(x),
        metrics.aggregate_median(x),
        metrics.aggregate_mean(x),
        metrics.aggregate_optimality_gap(x),
      ]
    )

  np.random.seed(0)
  profiles, bands = library.create_performance_profile(scores, THRESHOLDS, reps=NUM_RESAMPLES)
  print(
    json.dumps(
      {
        'num_resamples': NUM_RESAMPLES,
        'scores': {name: x.tolist() for name, x in scores.items()},
        'order': ['iqm', 'median', 'mean', 'optimality_gap'],
        'aggregates': recorded(scores, aggregates),
        'probability_of_improvement': recorded(
          {'x,y': (scores['x'], scores['y'])}, metrics.probability_of_improvement
        )['x,y'],
        'thresholds': THRESHOLDS.tolist(),
        'profiles': {
          name: {'point': profiles[name].tolist(), 'interval': bands[name].tolist()}
          for name in scores
        },
      },
      indent=1,
    )
  )


if __name__ == '__main__':
  main()
