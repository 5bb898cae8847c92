"""Shows what runs have learnt: curves, tables and intervals, from any number of results.

  python -m offline_zoo.studies.report runs/cql/freeway/1/results.csv
  python -m offline_zoo.studies.report --report_dir=report runs/*/*/*/results.csv results.tar.gz

It prints a curve of each agent on each game. Without --report_dir it draws them beside the CSV too,
as results.png. With it, the directory gets report.md, its pictures as PNG and SVG, and
results.tar.gz, which packs all runs that were read and can itself be read again.

An agent is named by config.json beside its CSV, or else by the CSV's own name: cql.csv.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from offline_zoo import atari_data, program, results
from offline_zoo.studies import published, runs, statistics
from offline_zoo.studies.runs import Run

_BAR_WIDTH = 50  # characters
_MAX_BARS = 20
_AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'interquartile mean': statistics.interquartile_mean,
  'median': statistics.median,
  'mean': statistics.mean,
  'optimality gap': statistics.optimality_gap,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to report; each field but the first is a flag."""

  csv_paths: tuple[str, ...]
  report_dir: str | None = None  # where to write the report; default: only a picture, beside a CSV
  published: bool = False  # draws others' scores as well, where their data and protocol are ours
  dark: bool = False  # pictures for a dark background
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    if not self.csv_paths:
      raise ValueError('expected one results.csv or more, or archives of them (.tar.gz)')


class Estimate(NamedTuple):
  """A number and the ends of its interval, NaN if it has none."""

  point: float
  low: float
  high: float

  def __format__(self, spec: str) -> str:
    if math.isnan(self.low):
      return format(self.point, spec)
    return f'{self.point:{spec}} [{self.low:{spec}}, {self.high:{spec}}]'


class Scores(NamedTuple):
  """Human-normalised scores that can be put together.

  Attributes:
    games: those that every agent has and that have a human score.
    num_updates: the last number of updates after which every run was evaluated.
    of_agents: for each agent, scores then [num_seeds, num_games].
  """

  games: list[str]
  num_updates: int
  of_agents: dict[str, np.ndarray]


def by_game_and_agent(read: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
  """Groups runs: for each game and agent, its seeds."""
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in sorted(read, key=lambda run: (run.environment_name, run.agent, run.seed)):
    groups.setdefault((run.environment_name, run.agent), []).append(run)
  return groups


# The curve as text.


def text_curve(seeds: Sequence[Run]) -> str:
  """Writes an agent's learning curve on a game, a bar an evaluation, beside what it compares with.

  Args:
    seeds: the agent's runs on the game; the curve is their mean, where all were evaluated.

  Returns:
    Lines of about 80 characters: some evaluations, the last among them, then the logged mean,
    random play and the human. Bars begin at the lowest return shown; the bar of a human score far
    above all else ends in an arrow.
  """
  shared = runs.shared_updates(seeds)
  means = runs.at(seeds, shared, 'eval_episode_return').mean(axis=0)
  shown = np.linspace(0, len(shared) - 1, min(len(shared), _MAX_BARS)).round().astype(int)
  bars = [(f'{shared[i]:,} updates', means[i]) for i in shown] + runs.references(seeds)
  low, high = runs.limits(seeds)
  run = seeds[0]
  whose = f'seed {run.seed}' if len(seeds) == 1 else f'mean of {len(seeds)} seeds'
  lines = [f'{run.agent} on {run.environment_name}, {whose}: mean return of an episode']
  width = max(len(label) for label, _ in bars)
  for label, value in bars:
    length = round(_BAR_WIDTH * (value - low) / (high - low or 1))
    bar = '#' * length if value <= high else '#' * (_BAR_WIDTH - 1) + '>'
    lines.append(f'{label:>{width}} {value:>10,.1f}  {bar}'.rstrip())
  return '\n'.join(lines)


# What report.md says.


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Makes a Markdown table."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def last_evaluations(read: Sequence[Run]) -> str:
  """Makes a table of each agent's last evaluation on each game that all of its seeds have had."""
  rows = []
  for (name, agent), seeds in by_game_and_agent(read).items():
    last = runs.shared_updates(seeds)[-1:]
    if not len(last):
      continue
    values = runs.at(seeds, last, 'eval_episode_return')[:, 0]
    estimate = Estimate(values.mean(), *statistics.mean_interval(values))
    references = runs.describe_references(seeds)
    rows.append([name, agent, str(len(seeds)), f'{last[0]:,}', f'{estimate:,.1f}', references])
  return _table(['game', 'agent', 'seeds', 'updates', 'return', 'beside'], rows)


def comparable_scores(read: Sequence[Run]) -> tuple[Scores | None, list[str]]:
  """Finds the scores that aggregates are made of.

  An agent's games have as many seeds each, the first ones, so that each game counts the same.

  Returns:
    The scores; None if there are none. And what was left out and why, in sentences.
  """
  groups = by_game_and_agent(read)
  agents = sorted({run.agent for run in read})
  games, left_out = [], []
  for name in sorted({run.environment_name for run in read}):
    if missing := [agent for agent in agents if (name, agent) not in groups]:
      left_out.append(f'{name}: there is none of {", ".join(missing)}.')
    elif atari_data.game(name).human_score is None:
      left_out.append(f'{name}: no human score is published.')
    else:
      games.append(name)
  if not games:
    return None, left_out
  chosen: dict[str, list[list[Run]]] = {}
  for agent in agents:
    num_seeds = min(len(groups[name, agent]) for name in games)
    chosen[agent] = [groups[name, agent][:num_seeds] for name in games]
    left_out += [
      f'{run}: another game has fewer seeds.'
      for name in games
      for run in groups[name, agent][num_seeds:]
    ]
  every_run = [run for of_agent in chosen.values() for seeds in of_agent for run in seeds]
  last = runs.shared_updates(every_run)[-1:]
  if not len(last):
    return None, ['All: there is no number of updates after which every run was evaluated.']
  of_agents = {
    agent: np.concatenate([runs.at(seeds, last, 'normalized_return') for seeds in of_agent], axis=1)
    for agent, of_agent in chosen.items()
  }
  return Scores(games, int(last[0]), of_agents), left_out


def aggregates(scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
  """Estimates, for each statistic and agent, what all scores come to."""
  return {
    title: {
      agent: Estimate(float(statistic(x)), *statistics.bootstrap_interval(statistic, x))
      for agent, x in scores.items()
    }
    for title, statistic in _AGGREGATES.items()
  }


def improvements(scores: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
  """Estimates, for each two agents, how probably the first scores more than the second."""
  statistic = statistics.probability_of_improvement
  return {
    f'{a} over {b}': Estimate(
      float(statistic(x, y)), *statistics.bootstrap_interval(statistic, x, y)
    )
    for (a, x), (b, y) in itertools.combinations(scores.items(), 2)
  }


def make_report(read: Sequence[Run], with_published: bool, dark: bool) -> dict[str, bytes]:
  """Makes a report's files: for each name, its content."""
  plots = import_plots()
  beside, notes = published.beside(read) if with_published else ({}, [])
  scores, left_out = comparable_scores(read)
  text = [
    '# Report',
    '## Learning curves',
    '![Learning curves](curves.png)',
    'Means over seeds; shaded, from three seeds on, their 95% interval (Student). Thin lines: two '
    'seeds. In brackets below, the interval at the last evaluation that all seeds have had.',
    last_evaluations(read),
    *notes,
  ]
  with plots.theme(dark):
    figures = {'curves': plots.learning_curves(read, beside)}
    if scores is not None:
      of_all, of_pairs = aggregates(scores.of_agents), improvements(scores.of_agents)
      figures['aggregates'] = plots.intervals(of_all)
      figures['profiles'] = plots.performance_profiles(scores.of_agents)
      shapes = {f'{len(x)} of {agent}' for agent, x in scores.of_agents.items()}
      text += [
        f'## All of {", ".join(scores.games)}',
        f'Human-normalised scores after {scores.num_updates:,} updates; runs of each game: '
        f'{", ".join(sorted(shapes))}. In brackets, 95% intervals of the stratified bootstrap, '
        f'{statistics.NUM_RESAMPLES:,} resamples.',
        '![Aggregates](aggregates.png)',
        _table(
          ['agent', *of_all],
          [[a, *(f'{of[a]:.3f}' for of in of_all.values())] for a in scores.of_agents],
        ),
        '![Performance profiles](profiles.png)',
      ]
      if of_pairs:
        title = 'probability of improvement'
        figures['improvement'] = plots.intervals({title: of_pairs}, chance=0.5)
        text += [
          '![Probability of improvement](improvement.png)',
          _table(['agents', title], [[name, f'{p:.3f}'] for name, p in of_pairs.items()]),
        ]
    if left_out:
      text += ['## Left out of the aggregates', '\n'.join(f'* {line}' for line in left_out)]
    files = {
      f'{name}.{kind}': plots.save(figure, kind)
      for name, figure in figures.items()
      for kind in ('png', 'svg')
    }
  return {
    **files,
    'report.md': ('\n\n'.join(text) + '\n').encode(),
    'results.tar.gz': runs.pack(read),
  }


def import_plots():
  """Imports what draws pictures, which needs the extra `plots`.

  Raises:
    ValueError: that is not installed.
  """
  try:
    from offline_zoo.studies import plots
  except ModuleNotFoundError as error:
    raise ValueError(
      f"pictures need {error.name}, which the extra `plots` installs: pip install -e '.[plots]'"
    ) from error
  return plots


def _write(path: pathlib.Path, content: bytes) -> None:
  # A run may be writing in the same directory.
  results.write_atomically(path, content, f'.report-{os.getpid()}.partial')


def main(config: Config) -> None:
  paths = [pathlib.Path(path) for path in config.csv_paths]
  read = runs.read(paths)
  if config.report_dir is not None:
    for name, content in make_report(read, config.published, config.dark).items():
      _write(pathlib.Path(config.report_dir, name), content)
    logging.info('Report: %s', pathlib.Path(config.report_dir, 'report.md'))
    return
  print('\n\n'.join(text_curve(seeds) for seeds in by_game_and_agent(read).values()), flush=True)
  beside, notes = published.beside(read) if config.published else ({}, [])
  for note in notes:
    logging.info(note)
  for path in paths:
    if of_path := [run for run in read if run.source == str(path)]:
      plots = import_plots()
      with plots.theme(config.dark):
        picture = plots.save(plots.learning_curves(of_path, beside), 'png')
      _write(path.with_suffix('.png'), picture)
      logging.info('Picture: %s', path.with_suffix('.png'))


if __name__ == '__main__':
  program.run(main, Config, arguments='csv_paths')
