"""Made-up results that the tests of this directory share."""

import csv
import json
import pathlib
from collections.abc import Callable, Sequence

import pytest

from offline_zoo import atari_data


@pytest.fixture
def write_csv(tmp_path) -> Callable[..., pathlib.Path]:
  """Writes a run's CSV, and config.json if it has an agent; returns the CSV's path."""

  def write(
    name: str,
    returns: Sequence[float],
    agent: str | None = None,
    game: str = 'freeway',
    seed: int = 1,
    every: int = 1000,
    logged: float | None = 7.5,
    **flags,
  ) -> pathlib.Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
      {
        'environment_name': game,
        'seed': seed,
        'iteration': i,
        'num_updates': every * i,
        'eval_episode_return': value,
        'normalized_return': atari_data.human_normalized_score(game, value),
        'dataset_episode_return': logged,
      }
      for i, value in enumerate(returns, start=1)
    ]
    with open(path, 'w', newline='') as file:
      writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)
    if agent is not None:
      path.with_name('config.json').write_text(json.dumps({'agent': agent, 'flags': flags}))
    return path

  return write
