"""Shows what runs have learnt: curves, tables and intervals, from any number of results.

  python -m offline_zoo.studies.report runs/cql/freeway/1/results.csv
  python -m offline_zoo.studies.report --report_dir=report runs/*/*/*/results.csv results.tar.gz
  python -m offline_zoo.studies.report --report_dir=report --sweep=sweep.toml

It prints a curve of each agent on each game. Without --report_dir it draws them beside the CSV too,
as results.png. With it, the directory gets report.md, its pictures as PNG and SVG, and
results.tar.gz, which packs all runs that were read and can itself be read again.

An agent is named by config.json beside its CSV, or else by the CSV's own name: cql.csv.

--sweep reads those runs of a sweep that have results, finished or not. They are told apart by the
sweep's names of data too, which then stand where games did. CSVs of others' learners on that data,
<anywhere>/<data>/<agent>/<seed>/results.csv, may be given beside it: with the columns
environment_name, seed, num_updates, eval_episode_return, dataset_episode_return and, if known,
seconds. A run with evaluation.csv beside its CSV, which the sweep's `evaluate` leaves, counts with
the mean of these episodes as its last evaluation, once all that it is averaged with have one.
"""

import collections
import dataclasses
import itertools
import math
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
_Key = tuple[str, str]  # data, agent
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
  sweep: str | None = None  # the file of a sweep, all of whose runs are read
  report_dir: str | None = None  # where to write the report; default: only a picture, beside a CSV
  published: bool = False  # draws others' scores as well, where their data and protocol are ours
  dark: bool = False  # pictures for a dark background
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    if not self.csv_paths and self.sweep is None:
      raise ValueError('expected one results.csv or more, archives of them (.tar.gz), or --sweep')


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
    data: those that every agent has and whose game has a human score.
    last: the last evaluation that every run has had.
    of_agents: for each agent, scores then [num_seeds, num_data].
  """

  data: list[str]
  last: runs.Last
  of_agents: dict[str, np.ndarray]


def by_data_and_agent(read: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
  """Groups runs: for each data set and agent, its seeds."""
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in sorted(read, key=lambda run: (run.data, run.agent, run.seed)):
    groups.setdefault((run.data, run.agent), []).append(run)
  return groups


# The curve as text.


def text_curve(seeds: Sequence[Run]) -> str:
  """Writes an agent's learning curve on a data set, a bar an evaluation, beside its references.

  Args:
    seeds: the agent's runs on the data; the curve is their mean, where all were evaluated.

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
  lines = [f'{run.agent} on {run.data}, {whose}: mean return of an episode']
  width = max((len(label) for label, _ in bars), default=0)
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
  for (name, agent), seeds in by_data_and_agent(read).items():
    last = runs.last_evaluation(seeds)
    if last is None:
      continue
    estimate = Estimate(last.returns.mean(), *statistics.mean_interval(last.returns))
    references = runs.describe_references(seeds)
    rows.append(
      [name, agent, str(len(seeds)), f'{last.num_updates:,}', f'{estimate:,.1f}', references]
    )
  return _table(['game', 'agent', 'seeds', 'updates', 'return', 'beside'], rows)


def is_study(read: Sequence[Run]) -> bool:
  """Whether runs are compared data set by data set: these have names, or there are episodes."""
  return any(run.data != run.environment_name or run.episodes for run in read)


def _matrix(
  read: Sequence[Run], cells: Mapping[_Key, str], facts: Mapping[_Key, str], last_rows=()
) -> tuple[str, str]:
  """Makes a table with a row an agent and a column a data set.

  Args:
    read: the runs.
    cells: for (data, agent), what is known.
    facts: likewise, what it is known of.
    last_rows: what stands below.

  Returns:
    The fact that most cells share, to be said once, and the table, in which others say theirs.
  """
  usual, _ = collections.Counter(facts.values()).most_common(1)[0]
  data, agents = sorted({run.data for run in read}), sorted({run.agent for run in read})

  def cell(key: _Key) -> str:
    return cells.get(key, '') + (f'; {facts[key]}' if facts.get(key, usual) != usual else '')

  rows = [[agent, *(cell((name, agent)) for name in data)] for agent in agents]
  return usual, _table(['agent', *data], [*rows, *last_rows])


def _counted(values: Sequence[int], noun: str) -> str:
  low, high = min(values), max(values)
  number = f'{low:,}' if low == high else f'{low:,} to {high:,}'
  return f'{number} {noun}{"" if number == "1" else "s"}'


def compare_returns(read: Sequence[Run]) -> list[str]:
  """Makes a table of last evaluations, agents by data, and says what is in it."""
  groups = by_data_and_agent(read)
  of_data = {name: [run for run in read if run.data == name] for name, _ in groups}
  cells, facts = {}, {}
  for (name, agent), seeds in groups.items():
    last = runs.last_evaluation(seeds)
    if last is None:
      continue
    cell = f'{last.returns.mean():,.1f}'
    if last.returns.min() > runs.logged_mean(of_data[name]):
      cell = f'**{cell}**'
    if len(seeds) > 1:
      cell += f' ({last.returns.min():,.1f} to {last.returns.max():,.1f})'
    cells[name, agent] = cell
    what = _counted(last.num_episodes, 'episode') if last.num_episodes else 'evaluated on its way'
    facts[name, agent] = (
      f'{_counted([len(seeds)], "seed")}, {what} after {last.num_updates:,} updates'
    )
  if not cells:
    return []
  references = []
  for label in ('logged mean', 'random play', 'human'):
    values = [
      ', '.join(
        f'{value:,.1f}{name.removeprefix(label)}'
        for name, value in runs.references(some)
        if name.startswith(label)
      )
      for some in of_data.values()
    ]
    if any(values):
      references.append([f'*{label}*', *values])
  usual, table = _matrix(read, cells, facts, references)
  return [
    'Mean return of the last evaluation that all seeds have had; in brackets, the lowest and the '
    "highest seed's. Bold: every seed's is above the mean of the logged episodes. Each cell is of "
    f'{usual}, where it does not say otherwise.',
    table,
  ]


def compare_speed(read: Sequence[Run]) -> list[str]:
  """Makes a table of how long runs took, agents by data, and says what is in it."""
  cells, facts = {}, {}
  for key, seeds in by_data_and_agent(read).items():
    minutes = np.mean([run.column('seconds').sum() / 60 for run in seeds])
    if not math.isnan(minutes):
      cells[key] = f'{minutes:,.1f}'
      facts[key] = _counted([int(run.num_updates[-1]) for run in seeds], 'update')
      together = max((run.flags or {}).get('num_seeds', 1) for run in seeds)
      if together > 1:
        facts[key] += f', {together} seeds at once'
  if not cells:
    return []
  usual, table = _matrix(read, cells, facts)
  return [
    'Minutes that a run took to learn and to be evaluated on its way, mean over seeds, for '
    f'{usual}, where a cell does not say otherwise.',
    table,
  ]


def comparable_scores(read: Sequence[Run]) -> tuple[Scores | None, list[str]]:
  """Finds the scores that aggregates are made of.

  An agent's data sets have as many seeds each, the first ones, so that each counts the same.

  Returns:
    The scores; None if there are none. And what was left out and why, in sentences.
  """
  groups = by_data_and_agent(read)
  agents = sorted({run.agent for run in read})
  data, left_out = [], []
  games = {run.data: run.environment_name for run in read}
  for name, game in sorted(games.items()):
    if missing := [agent for agent in agents if (name, agent) not in groups]:
      left_out.append(f'{name}: there is none of {", ".join(missing)}.')
    elif atari_data.game(game).human_score is None:
      left_out.append(f'{name}: no human score is published.')
    else:
      data.append(name)
  if not data:
    return None, left_out
  chosen: dict[str, list[list[Run]]] = {}
  unit = 'data set' if is_study(read) else 'game'
  for agent in agents:
    num_seeds = min(len(groups[name, agent]) for name in data)
    chosen[agent] = [groups[name, agent][:num_seeds] for name in data]
    left_out += [
      f'{run}: another {unit} has fewer seeds.'
      for name in data
      for run in groups[name, agent][num_seeds:]
    ]
  every_run = [run for of_agent in chosen.values() for seeds in of_agent for run in seeds]
  last = runs.last_evaluation(every_run)
  if last is None:
    return None, ['All: there is no number of updates after which every run was evaluated.']
  score_of = {
    run.identity: atari_data.human_normalized_score(run.environment_name, episode_return)
    for run, episode_return in zip(every_run, last.returns.tolist(), strict=True)
  }
  of_agents = {
    agent: np.array([[score_of[run.identity] for run in seeds] for seeds in of_agent]).T
    for agent, of_agent in chosen.items()
  }
  return Scores(data, last, of_agents), left_out


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
  study = is_study(read)
  text = ['# Report']
  if study:
    text += [
      '## Last evaluations',
      *compare_returns(read),
      '![Last evaluations](last_evaluations.png)',
      *compare_speed(read),
    ]
  text += [
    '## Learning curves',
    '![Learning curves](curves.png)',
    'Means over seeds; shaded, from three seeds on, their 95% interval (Student). Thin lines: two '
    'seeds.',
  ]
  if not study:
    text[-1] += ' In brackets below, the interval at the last evaluation that all seeds have had.'
    text.append(last_evaluations(read))
  text += notes
  with plots.theme(dark):
    figures = {'curves': plots.learning_curves(read, beside)}
    if study:
      figures['last_evaluations'] = plots.last_evaluations(read)
    if scores is not None:
      of_all, of_pairs = aggregates(scores.of_agents), improvements(scores.of_agents)
      figures['aggregates'] = plots.intervals(of_all)
      figures['profiles'] = plots.performance_profiles(scores.of_agents)
      shapes = {f'{len(x)} of {agent}' for agent, x in scores.of_agents.items()}
      of = (
        f'of {_counted(scores.last.num_episodes, "episode")} ' if scores.last.num_episodes else ''
      )
      unit = 'data set' if study else 'game'
      text += [
        f'## All of {", ".join(scores.data)}',
        f'Human-normalised scores {of}after {scores.last.num_updates:,} updates; runs of each '
        f'{unit}: {", ".join(sorted(shapes))}. In brackets, from three runs on, 95% intervals of '
        f'the stratified bootstrap, {statistics.NUM_RESAMPLES:,} resamples.',
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


def paths_of_sweep(path: pathlib.Path) -> tuple[list[pathlib.Path], set[str]]:
  """Finds the CSVs that a sweep's runs have left so far, and the names of its data.

  Raises:
    ValueError: the file does not describe a sweep, or none of its runs has left any.
    OSError: it cannot be read.
  """
  from offline_zoo.studies import plan  # imports every agent, which takes seconds

  every_run = plan.read(path)
  found = [run for run in every_run if results.read_rows(run.config, run.agent)]
  if not found:
    raise ValueError(f'{path}: none of its runs has results yet')
  if missing := [str(run) for run in every_run if run not in found]:
    logging.info('No results yet, or of other flags: %s', ', '.join(missing))
  return [run.directory / 'results.csv' for run in found], {run.data for run in every_run}


def main(config: Config) -> None:
  paths = [pathlib.Path(path) for path in config.csv_paths]
  names: set[str] = set()
  if config.sweep is not None:
    of_sweep, names = paths_of_sweep(pathlib.Path(config.sweep))
    paths += of_sweep
  read = runs.read(paths, names)
  if config.report_dir is not None:
    for name, content in make_report(read, config.published, config.dark).items():
      results.write_atomically(pathlib.Path(config.report_dir, name), content)
    logging.info('Report: %s', pathlib.Path(config.report_dir, 'report.md'))
    return
  print('\n\n'.join(text_curve(seeds) for seeds in by_data_and_agent(read).values()), flush=True)
  beside, notes = published.beside(read) if config.published else ({}, [])
  for note in notes:
    logging.info(note)
  for path in paths:
    if of_path := [run for run in read if run.source == str(path)]:
      plots = import_plots()
      with plots.theme(config.dark):
        picture = plots.save(plots.learning_curves(of_path, beside), 'png')
      results.write_atomically(path.with_suffix('.png'), picture)
      logging.info('Picture: %s', path.with_suffix('.png'))


if __name__ == '__main__':
  program.run(main, Config, arguments='csv_paths')
