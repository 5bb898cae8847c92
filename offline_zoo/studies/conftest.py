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
    seconds: float = 30.0,
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
        'seconds': seconds,
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


@pytest.fixture
def write_episodes(tmp_path) -> Callable[..., pathlib.Path]:
  """Writes the CSV of a last evaluation beside a run's; returns its path."""

  def write(
    name: str,
    returns: Sequence[float],
    agent: str,
    game: str = 'freeway',
    seed: int = 1,
    num_updates: int = 2000,
  ) -> pathlib.Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
      writer = csv.writer(file, lineterminator='\n')
      writer.writerow(
        [
          'agent', 'environment_name', 'seed', 'num_updates', 'eval_seed', 'episode',
          'episode_return',
        ]
      )  # fmt: skip
      for number, value in enumerate(returns, start=1):
        writer.writerow([agent, game, seed, num_updates, 0, number, value])
    return path

  return write


@pytest.fixture
def study(write_csv, write_episodes) -> dict[str, list[pathlib.Path]]:
  """What a sweep of two agents on three data sets has left, and a peer's; by whose they are.

  On `mixed` and `random`, both Freeway's, all is finished but BC's second seed on `random`; on
  `asterix_10k` BC has not begun.
  """
  found: dict[str, list[pathlib.Path]] = {'sweep': [], 'peers': []}
  for place, data, agent, seed, returns, episodes in (
    ('runs', 'mixed', 'cql', 1, [5, 10], [12, 14]),
    ('runs', 'mixed', 'cql', 2, [5, 11], [8, 8]),
    ('runs', 'mixed', 'bc', 1, [6, 9], [9, 10]),
    ('runs', 'mixed', 'bc', 2, [6, 9], [6, 7.5]),
    ('runs', 'random', 'cql', 1, [1, 2], [4, 4]),
    ('runs', 'random', 'cql', 2, [1, 2], [4, 2]),
    ('runs', 'random', 'bc', 1, [1, 3], [5, 5]),
    ('runs', 'random', 'bc', 2, [0], None),
    ('runs', 'asterix_10k', 'cql', 1, [300, 500], [1000, 1500]),
    ('runs', 'asterix_10k', 'cql', 2, [300, 700], [1300, 1300]),
    ('peers', 'mixed', 'tianshou_cql', 1, [10, 20], [29.6, 0]),
  ):
    game = 'asterix' if data == 'asterix_10k' else 'freeway'
    logged = {'mixed': 7.5, 'random': 0.5, 'asterix_10k': 1300.0}[data]
    name = f'{place}/{data}/{agent}/{seed}'
    whose = 'sweep' if place == 'runs' else 'peers'
    path = write_csv(
      f'{name}/results.csv', returns, agent if place == 'runs' else None, game, seed,
      logged=logged, seconds=90.0 if agent == 'bc' else 600.0,
    )  # fmt: skip
    if place == 'peers':  # which lack columns
      rows = [line.split(',') for line in path.read_text().splitlines()]
      kept = [i for i, name in enumerate(rows[0]) if name not in ('iteration', 'normalized_return')]
      path.write_text(''.join(','.join(row[i] for i in kept) + '\n' for row in rows))
    if episodes is not None:
      write_episodes(f'{name}/evaluation.csv', episodes, agent, game, seed)
    found[whose].append(path)
  return found
