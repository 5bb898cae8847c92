"""Runs, read from a `results.csv` with its `config.json` beside it, or from a `results.tar.gz`.

Beside it may be `evaluation.csv` as well: the episodes of a last evaluation, a row each.

Such an archive holds a CSV an agent, named after it, with all its runs one below the other, and
likewise their last episodes, if any, in `evaluation/`. Runs of one game may have learnt from
several logs. Where these have names of their own, the first column, `data`, tells them. A last
column, `dqn_replay_run`, tells which of a game's runs in the DQN Replay Dataset was learnt from, if
one was.
"""

import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import pathlib
import re
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from offline_zoo import atari_data

# A paper's 60 games with five seeds take 15 MB.
MAX_BYTES = 2**27
_INTEGERS = ('seed', 'num_updates')
_NUMBERS = ('eval_episode_return', 'dataset_episode_return', 'seconds', 'episode_return')
_MAY_BE_EMPTY = ('dataset_episode_return', 'seconds')
_COLUMNS = ('environment_name', *_INTEGERS, 'eval_episode_return', 'dataset_episode_return')
_EPISODES_DIRECTORY = 'evaluation'  # in an archive
_EPISODE_COLUMNS = ('agent', 'environment_name', *_INTEGERS, 'episode_return')


@dataclasses.dataclass(frozen=True)
class Run:
  """One agent's learning from one game's logs with one seed.

  Attributes:
    agent: the name of its directory.
    data: the name of the logs; the game's, if they have none of their own.
    environment_name: snake_case name of the game.
    seed: of the run.
    rows: the CSV's cells as they stand there; one row an iteration, at least one.
    source: the file that they are from.
    flags: those of `config.json`; None for runs from an archive.
    episodes: likewise the cells of `evaluation.csv`, if it is of what was learnt last.
    dqn_replay_run: which of a game's runs in the DQN Replay Dataset was learnt from; None if none
      or unknown.
  """

  agent: str
  data: str
  environment_name: str
  seed: int
  rows: tuple[dict[str, str], ...]
  source: str
  flags: dict[str, Any] | None
  episodes: tuple[dict[str, str], ...] = ()
  dqn_replay_run: int | None = None

  def __str__(self) -> str:
    return f'{self.agent} on {self.data}, seed {self.seed}'

  @property
  def identity(self) -> tuple[str, str, int]:
    """Tells runs apart."""
    return self.agent, self.data, self.seed

  @property
  def num_updates(self) -> np.ndarray:
    """Gradient updates before each evaluation [num_rows], ascending."""
    return np.array([int(row['num_updates']) for row in self.rows])

  @property
  def learns_online(self) -> bool:
    """Whether the play in `dataset_episode_return` is the agent's own, of the same iteration."""
    return self.agent.startswith('online_')

  def column(self, name: str) -> np.ndarray:
    """Numbers of a column [num_rows]; NaN for empty cells, and without such a column."""
    return np.array([float(row.get(name) or math.nan) for row in self.rows])


def read(paths: Iterable[pathlib.Path], data_names: Collection[str] = ()) -> list[Run]:
  """Reads CSVs and archives of them.

  A run that is there twice, once shorter perhaps, counts once, as far as it goes.

  Args:
    paths: of the files.
    data_names: those of the logs of a sweep, whose runs are in `<data>/<agent>/<seed>`. There, a
      CSV without config.json is of the agent that its directory names.

  Returns:
    The runs, sorted by agent, data and seed.

  Raises:
    ValueError: a file is no results CSV or archive, or two runs share agent, data and seed, or two
      games share a name of data.
    OSError: a file cannot be read.
  """
  runs: dict[tuple, Run] = {}
  games: dict[str, str] = {}
  for run in itertools.chain.from_iterable(_read_file(path, data_names) for path in paths):
    if (game := games.setdefault(run.data, run.environment_name)) != run.environment_name:
      raise ValueError(f'{run.source}: {run.data} is of {run.environment_name}, and of {game}')
    other = runs.get(run.identity, run)
    # Archives have empty cells where another run of the agent has columns that this one has not.
    tables = [[{k: v for k, v in row.items() if v} for row in r.rows] for r in (run, other)]
    if any(a != b for a, b in zip(*tables, strict=False)):
      raise ValueError(f'{run.source}: another run of {run} than in {other.source}')
    most = max(other, run, key=_completeness)
    least = other if most is run else run
    runs[run.identity] = dataclasses.replace(
      most,
      flags=least.flags if most.flags is None else most.flags,  # an archive has none
      dqn_replay_run=most.dqn_replay_run or least.dqn_replay_run,  # from 1 on
    )
  return sorted(runs.values(), key=lambda run: run.identity)


def _completeness(run: Run) -> tuple[int, int, bool]:
  """Tells which of two records of the same run holds more."""
  return len(run.rows), len(run.episodes), run.flags is not None


def _read_file(path: pathlib.Path, data_names: Collection[str]) -> list[Run]:
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file')
  if path.name.endswith('.tar.gz'):
    return _read_archive(path)
  *_, name, directory, _, _ = ('', '', *path.absolute().parts)
  data = name if name in data_names else None
  config_path = path.with_name('config.json')
  if config_path.is_file():
    content = _read_bytes(config_path)
    try:
      config = json.loads(content)
      agent, flags = str(config['agent']), dict(config['flags'])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
      raise ValueError(f'{config_path}: not the config.json of a run: {error!r}') from error
  elif path.stem != 'results':
    agent, flags = path.stem, None
  elif data is not None:
    agent, flags = directory, None
  else:
    raise ValueError(f'{path}: no config.json beside it that says which agent this is')
  runs = _runs(_read_bytes(path), str(path), agent, flags, data)
  episodes_path = path.with_name('evaluation.csv')
  if path.stem == 'results' and episodes_path.is_file():
    runs = _with_episodes(runs, _read_bytes(episodes_path), str(episodes_path), data)
  return runs


def _read_bytes(path: pathlib.Path) -> bytes:
  if path.stat().st_size > MAX_BYTES:
    raise ValueError(f'{path}: too large, more than {MAX_BYTES} bytes')
  return path.read_bytes()


def _read_archive(path: pathlib.Path) -> list[Run]:
  runs: list[Run] = []
  episodes: list[tuple[bytes, str]] = []
  try:
    with tarfile.open(path, 'r:gz') as archive:
      for member in archive:
        source = f'{path}:{member.name}'
        file = archive.extractfile(member) if member.isreg() else None
        if file is None or not member.name.endswith('.csv'):
          raise ValueError(f'{source}: expected CSV files only')
        if member.size > MAX_BYTES:
          raise ValueError(f'{source}: too large, more than {MAX_BYTES} bytes')
        name = pathlib.PurePath(member.name)
        if name.parent.name == _EPISODES_DIRECTORY:
          episodes.append((file.read(), source))
        else:
          runs += _runs(file.read(), source, name.stem, None, None)
  except (EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'{path}: not a tar archive, or damaged: {error}') from error
  for content, source in episodes:
    runs = _with_episodes(runs, content, source, None)
  return runs


def _runs(
  content: bytes, source: str, agent: str, flags: dict[str, Any] | None, data: str | None
) -> list[Run]:
  """Splits a CSV into its runs; `data` is the name of their logs if no column tells it."""
  if not re.fullmatch(r'[\w-]+', agent):  # which names a file in an archive
    raise ValueError(f'{source}: {agent!r} cannot be the name of an agent')
  runs: dict[tuple[str, str, int, int | None], list[dict[str, str]]] = {}
  for row in _rows(content, source, 'a results CSV', _COLUMNS):
    name, game = _pop_data(row, data), row['environment_name']
    packed = row.pop('dqn_replay_run', '')
    number = int(packed) if packed else _dqn_replay_run(flags, game)
    runs.setdefault((name, game, int(row['seed']), number), []).append(row)
  if not runs:
    raise ValueError(f'{source}: no rows')
  found = [
    Run(agent, name, game, seed, tuple(rows), source, flags, dqn_replay_run=number)
    for (name, game, seed, number), rows in runs.items()
  ]
  for run in found:
    if (np.diff(run.num_updates) <= 0).any():
      raise ValueError(f'{source}: num_updates does not ascend in {run}')
  return found


def _dqn_replay_run(flags: dict[str, Any] | None, environment_name: str) -> int | None:
  """Tells a copy of one of the dataset's runs by its path's end: as its bucket's, or download's."""
  replay_dir = str((flags or {}).get('replay_dir'))
  *_, directory, number, logs = ('', '', '', *pathlib.PurePath(replay_dir).parts)
  game = atari_data.game(environment_name)
  known = (directory, logs) == (game.directory, 'replay_logs') and number.isdecimal()
  return int(number) if known else None


def _with_episodes(runs: Sequence[Run], content: bytes, source: str, data: str | None) -> list[Run]:
  """Gives runs their last episodes. Those of an evaluation before the last update do not count."""
  episodes: dict[tuple, list[dict[str, str]]] = {
    (*run.identity, run.environment_name): [] for run in runs
  }
  for row in _rows(content, source, 'an evaluation CSV', _EPISODE_COLUMNS):
    agent, seed, game = row['agent'], int(row['seed']), row['environment_name']
    name = _pop_data(row, data)
    if (of_run := episodes.get((agent, name, seed, game))) is None:
      raise ValueError(
        f'{source}: of {agent} on {name} ({game}), seed {seed}, which is not among the results'
      )
    of_run.append(row)

  def last(run: Run) -> Iterator[dict[str, str]]:
    of_run = episodes[*run.identity, run.environment_name]
    return (row for row in of_run if int(row['num_updates']) == run.num_updates[-1])

  return [dataclasses.replace(run, episodes=(*run.episodes, *last(run))) for run in runs]


def _pop_data(row: dict[str, str], data: str | None) -> str:
  """Takes the name of the logs out of a row, if it tells it."""
  return row.pop('data', '') or data or row['environment_name']


def _rows(
  content: bytes, source: str, kind: str, columns: Sequence[str]
) -> Iterator[dict[str, str]]:
  """Reads and checks a CSV that must have these columns."""
  try:
    reader = csv.DictReader(io.StringIO(content.decode(), newline=''), strict=True)
    for name in columns:
      if name not in (reader.fieldnames or ()):
        raise ValueError(f'not {kind}: no column {name}')
    for row in reader:
      _check(row, reader.line_num)
      yield row
  except (ValueError, csv.Error) as error:
    raise ValueError(f'{source}: {error}') from error


def _check(row: dict[str, str], line: int) -> None:
  if None in row or None in row.values():
    raise ValueError(f'line {line}: expected as many cells as there are columns')
  atari_data.game(row['environment_name'])
  if not re.fullmatch(r'(\w[\w.-]*)?', row.get('data', '')):  # which pictures and tables show
    raise ValueError(f'line {line}: {row["data"]!r} cannot be the name of data')
  for name in (*_INTEGERS, *(['dqn_replay_run'] if row.get('dqn_replay_run') else [])):
    if not row[name].isdecimal():
      raise ValueError(f'line {line}: {name} is {row[name]!r}, expected an integer')
  for name in _NUMBERS:
    if name not in row or (not row[name] and name in _MAY_BE_EMPTY):
      continue
    try:
      finite = math.isfinite(float(row[name]))
    except ValueError:
      finite = False
    if not finite:
      raise ValueError(f'line {line}: {name} is {row[name]!r}, expected a number')


def shared_updates(runs: Sequence[Run]) -> np.ndarray:
  """Finds after which numbers of updates every run was evaluated: ascending [N]."""
  return functools.reduce(np.intersect1d, [run.num_updates for run in runs])


def at(runs: Sequence[Run], num_updates: np.ndarray, column: str) -> np.ndarray:
  """Takes a column where all runs were evaluated: [num_runs, N]."""
  return np.array([run.column(column)[np.isin(run.num_updates, num_updates)] for run in runs])


class Last(NamedTuple):
  """The last evaluation that all of some runs have had.

  Attributes:
    num_updates: gradient updates before it.
    returns: each run's mean return of an episode [num_runs].
    num_episodes: how many the means are of [num_runs], if all runs have `evaluation.csv`, which
      then is what this is. Else empty: it is one of those that a run makes on its way.
  """

  num_updates: int
  returns: np.ndarray
  num_episodes: tuple[int, ...]


def last_evaluation(runs: Sequence[Run]) -> Last | None:
  """Finds the last evaluation that all runs have had; None if they share none."""
  shared = shared_updates(runs)[-1:]
  if not len(shared):
    return None
  num_updates = int(shared[0])
  if all(run.episodes and run.num_updates[-1] == num_updates for run in runs):
    of_runs = [[float(row['episode_return']) for row in run.episodes] for run in runs]
    return Last(num_updates, np.array([*map(np.mean, of_runs)]), tuple(map(len, of_runs)))
  return Last(num_updates, at(runs, shared, 'eval_episode_return')[:, 0], ())


def references(of_data: Sequence[Run]) -> list[tuple[str, float]]:
  """Names the returns that those of one data set's runs are to be compared with.

  Rewards of the DQN Replay Dataset are clipped, and so is the logged mean of a run that is known to
  have learnt from it. One that learns online has no logs.
  """
  # Of the same logs, sums in another order differ by rounding.
  logged = {
    ('logged mean' if run.dqn_replay_run is None else 'logged mean, clipped', float(f'{mean:.5g}'))
    for run in of_data
    if not run.learns_online and not math.isnan(mean := run.column('dataset_episode_return')[-1])
  }
  game = atari_data.game(of_data[0].environment_name)
  published = [('random play', game.random_score), ('human', game.human_score)]
  return sorted(logged) + [(name, score) for name, score in published if score is not None]


def logged_mean(of_data: Sequence[Run]) -> float:
  """Finds the logged mean return of one data set's runs: the highest one, if they do not agree.

  NaN if none knows it, or if it is of clipped rewards, with which no return compares.
  """
  if any(run.dqn_replay_run is not None for run in of_data):
    return math.nan
  offline = [run for run in of_data if not run.learns_online]
  return float(
    np.fmax.reduce([run.column('dataset_episode_return')[-1] for run in offline], initial=math.nan)
  )


def describe_references(of_data: Sequence[Run]) -> str:
  """Says in a line what `references` gives."""
  return ', '.join(f'{name} {value:,.1f}' for name, value in references(of_data))


def limits(of_data: Sequence[Run], returns: Iterable[float] | None = None) -> tuple[float, float]:
  """Finds the lowest and the highest return to show of one data set's runs and their references.

  The human's score is left out where it would take more than half of the height.

  Args:
    of_data: the runs.
    returns: theirs that are shown; None: all of their rows.
  """
  if returns is None:
    returns = (value for run in of_data for value in run.column('eval_episode_return'))
  shown = [*returns, *(value for name, value in references(of_data) if name != 'human')]
  low, high = min(shown), max(shown)
  human = dict(references(of_data)).get('human', high)
  return min(low, human), human if high < human <= 2 * high - low else high


def pack(runs: Sequence[Run]) -> bytes:
  """Makes an archive of runs, a CSV an agent; the same runs give the same bytes, in any order."""
  content = io.BytesIO()
  # Neither times nor users nor names of this machine.
  with (
    gzip.GzipFile(filename='', mode='wb', fileobj=content, mtime=0) as compressed,
    tarfile.open(fileobj=compressed, mode='w', format=tarfile.USTAR_FORMAT) as archive,
  ):
    in_order = sorted(runs, key=lambda run: run.identity)
    for agent, group in itertools.groupby(in_order, key=lambda run: run.agent):
      of_agent = [*group]
      named = any(run.data != run.environment_name for run in of_agent)
      for name, tables in (
        (f'{agent}.csv', [_packed_rows(run) for run in of_agent]),
        (f'{_EPISODES_DIRECTORY}/{agent}.csv', [run.episodes for run in of_agent]),
      ):
        rows = [
          {'data': run.data, **row} if named else row
          for run, table in zip(of_agent, tables, strict=True)
          for row in table
        ]
        if rows:
          member = tarfile.TarInfo(name)
          data = _to_csv(rows)
          member.size = len(data)
          archive.addfile(member, io.BytesIO(data))
  return content.getvalue()


def _packed_rows(run: Run) -> list[dict[str, str]]:
  number = run.dqn_replay_run
  return [row if number is None else {**row, 'dqn_replay_run': str(number)} for row in run.rows]


def _to_csv(rows: Sequence[dict[str, str]]) -> bytes:
  text = io.StringIO()
  columns = list(dict.fromkeys(itertools.chain(*rows)))
  writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()
