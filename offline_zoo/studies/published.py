"""Scores that others published, for where their protocol and data are ours.

`published.csv` holds, with its source, what d3rlpy's benchmarks recorded on 1% of the DQN Replay
Dataset: means over seeds of ten evaluation episodes with sticky actions and epsilon 0.001, after
known numbers of updates of batch 32. Each run draws the episodes that make up the 1%, theirs as
ours, but theirs are 10,000 transitions of each shard (`get_atari_transitions`, d3rlpy 2.8.1). Left
out of the file is whatever could match no run of ours: best evaluations, chosen with hindsight;
scores without a number of updates; other or unknown protocols (RL Unplugged's, Tianshou's); agents
that learn online, or one network for many games.
"""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from offline_zoo import atari_data
from offline_zoo.studies.runs import Run

_FLAGS: dict[str, Any] = {
  'sticky_action_probability': 0.25,
  'eval_epsilon': 0.001,
  'batch_size': 32,
  'max_rows_per_shard': None,
  'first_fraction': None,
  'max_random_transitions': 500_000,  # of 50 million: 1%
  'min_episode_return': None,
  'top_fraction': None,
}
_NUM_SHARDS = 50


def read_table() -> list[dict[str, str]]:
  """Reads `published.csv`."""
  with open(pathlib.Path(__file__).with_name('published.csv'), newline='') as file:
    return list(csv.DictReader(file))


def mismatch(run: Run, dqn_replay_run: int) -> str | None:
  """Says what in a run's flags is not the published protocol or data; None if all of it is."""
  if run.flags is None:
    return f'{run.source} has no config.json beside it'
  for name, value in _FLAGS.items():
    if run.flags.get(name) != value:
      return f'{run} has --{name}={run.flags.get(name)}, not {value}'
  if run.dqn_replay_run != dqn_replay_run:
    game = atari_data.game(run.environment_name)
    return f'--replay_dir of {run} does not end with {game.directory}/{dqn_replay_run}/replay_logs'
  shards = run.flags.get('shards')
  if shards is not None and shards != [*range(_NUM_SHARDS)]:
    return f'{run} has --shards={shards}, not all {_NUM_SHARDS} of them'
  return None


def beside(
  runs: Sequence[Run],
) -> tuple[dict[tuple[str, str], tuple[str, np.ndarray]], list[str]]:
  """Finds what may be drawn beside runs: where every one of the data matches, up to their updates.

  Returns:
    For (agent, data), a label and points (updates, return) [N, 2]; and for each data set with
    published scores that are not drawn, why.
  """
  table = read_table()
  found, notes = {}, []
  for data in sorted({run.data for run in runs}):
    of_data = [run for run in runs if run.data == data]
    name, agents = of_data[0].environment_name, {run.agent for run in of_data}
    rows = [row for row in table if row['environment_name'] == name and row['agent'] in agents]
    if not rows:
      continue
    reasons = (mismatch(run, int(rows[0]['dqn_replay_run'])) for run in of_data)
    if reason := next(filter(None, reasons), None):
      notes.append(f'No published scores beside {data}: {reason}.')
      continue
    last = max(run.num_updates[-1] for run in of_data)
    for agent in sorted(agents):
      points = [
        (int(row['num_updates']), float(row['score']))
        for row in rows
        if row['agent'] == agent and int(row['num_updates']) <= last
      ]
      if points:
        label = next(row['label'] for row in rows if row['agent'] == agent)
        found[agent, data] = (label, np.array(points))
  return found, notes
