"""Runs, read from a `results.csv` with its `config.json` beside it, or from a `results.tar.gz`.

Such an archive holds a CSV an agent, named after it, with all its runs one below the other.
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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from offline_zoo import atari_data

# A paper's 60 games with five seeds take 15 MB.
MAX_BYTES = 2**27
_INTEGERS = ('seed', 'num_updates')
_NUMBERS = ('eval_episode_return', 'normalized_return', 'dataset_episode_return')
_MAY_BE_EMPTY = ('normalized_return', 'dataset_episode_return')


@dataclasses.dataclass(frozen=True)
class Run:
  """One agent's learning on one game with one seed.

  Attributes:
    agent: the name of its directory.
    environment_name: snake_case name of the game.
    seed: of the run.
    rows: the CSV's cells as they stand there; one row an iteration, at least one.
    source: the file that they are from.
    flags: those of `config.json`; None for runs from an archive.
  """

  agent: str
  environment_name: str
  seed: int
  rows: tuple[dict[str, str], ...]
  source: str
  flags: dict[str, Any] | None

  def __str__(self) -> str:
    return f'{self.agent} on {self.environment_name}, seed {self.seed}'

  @property
  def identity(self) -> tuple[str, str, int]:
    """Tells runs apart."""
    return self.agent, self.environment_name, self.seed

  @property
  def num_updates(self) -> np.ndarray:
    """Gradient updates before each evaluation [num_rows], ascending."""
    return np.array([int(row['num_updates']) for row in self.rows])

  @property
  def dqn_replay_run(self) -> int | None:
    """Which of a game's runs in the DQN Replay Dataset was learnt from; None if none or unknown.

    A copy of one is told by its path, which ends as in the dataset's bucket: `Pong/1/replay_logs`.
    """
    replay_dir = str((self.flags or {}).get('replay_dir'))
    *_, directory, number, logs = ('', '', '', *pathlib.PurePath(replay_dir).parts)
    game = atari_data.game(self.environment_name)
    known = (directory, logs) == (game.directory, 'replay_logs') and number.isdecimal()
    return int(number) if known else None

  def column(self, name: str) -> np.ndarray:
    """Numbers of a column [num_rows]; NaN for empty cells."""
    return np.array([float(row[name] or math.nan) for row in self.rows])


def read(paths: Iterable[pathlib.Path]) -> list[Run]:
  """Reads CSVs and archives of them.

  A run that is there twice, once shorter perhaps, counts once, as far as it goes.

  Returns:
    The runs, sorted by agent, game and seed.

  Raises:
    ValueError: a file is no results CSV or archive, or two runs share agent, game and seed.
    OSError: a file cannot be read.
  """
  runs: dict[tuple, Run] = {}
  for run in itertools.chain.from_iterable(map(_read_file, paths)):
    other = runs.get(run.identity, run)
    # Archives have empty cells where another run of the agent has columns that this one has not.
    tables = [[{k: v for k, v in row.items() if v} for row in r.rows] for r in (run, other)]
    if any(a != b for a, b in zip(*tables, strict=False)):
      raise ValueError(f'{run.source}: another run of {run} than in {other.source}')
    runs[run.identity] = max(other, run, key=lambda r: (len(r.rows), r.flags is not None))
  return sorted(runs.values(), key=lambda run: run.identity)


def _read_file(path: pathlib.Path) -> Iterator[Run]:
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file')
  if path.name.endswith('.tar.gz'):
    yield from _read_archive(path)
    return
  config_path = path.with_name('config.json')
  if config_path.is_file():
    content = _read_bytes(config_path)
    try:
      config = json.loads(content)
      agent, flags = str(config['agent']), dict(config['flags'])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
      raise ValueError(f'{config_path}: not the config.json of a run: {error!r}') from error
  elif path.stem == 'results':
    raise ValueError(f'{path}: no config.json beside it that says which agent this is')
  else:
    agent, flags = path.stem, None
  yield from _runs(_read_bytes(path), str(path), agent, flags)


def _read_bytes(path: pathlib.Path) -> bytes:
  if path.stat().st_size > MAX_BYTES:
    raise ValueError(f'{path}: too large, more than {MAX_BYTES} bytes')
  return path.read_bytes()


def _read_archive(path: pathlib.Path) -> Iterator[Run]:
  try:
    with tarfile.open(path, 'r:gz') as archive:
      for member in archive:
        source = f'{path}:{member.name}'
        file = archive.extractfile(member) if member.isreg() else None
        if file is None or not member.name.endswith('.csv'):
          raise ValueError(f'{source}: expected CSV files only')
        if member.size > MAX_BYTES:
          raise ValueError(f'{source}: too large, more than {MAX_BYTES} bytes')
        yield from _runs(file.read(), source, pathlib.PurePath(member.name).stem, None)
  except (EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'{path}: not a tar archive, or damaged: {error}') from error


def _runs(content: bytes, source: str, agent: str, flags: dict[str, Any] | None) -> list[Run]:
  """Splits a CSV into its runs."""
  if not re.fullmatch(r'[\w-]+', agent):  # which names a file in an archive
    raise ValueError(f'{source}: {agent!r} cannot be the name of an agent')
  runs: dict[tuple[str, int], list[dict[str, str]]] = {}
  try:
    reader = csv.DictReader(io.StringIO(content.decode(), newline=''), strict=True)
    for name in ('environment_name', *_INTEGERS, *_NUMBERS):
      if name not in (reader.fieldnames or ()):
        raise ValueError(f'not a results CSV: no column {name}')
    for row in reader:
      _check(row, reader.line_num)
      runs.setdefault((row['environment_name'], int(row['seed'])), []).append(row)
  except (ValueError, csv.Error) as error:
    raise ValueError(f'{source}: {error}') from error
  if not runs:
    raise ValueError(f'{source}: no rows')
  found = [
    Run(agent, *identity, rows=tuple(rows), source=source, flags=flags)
    for identity, rows in runs.items()
  ]
  for run in found:
    if (np.diff(run.num_updates) <= 0).any():
      raise ValueError(f'{source}: num_updates does not ascend in {run}')
  return found


def _check(row: dict[str, str], line: int) -> None:
  if None in row or None in row.values():
    raise ValueError(f'line {line}: expected as many cells as there are columns')
  atari_data.game(row['environment_name'])
  for name in _INTEGERS:
    if not row[name].isdecimal():
      raise ValueError(f'line {line}: {name} is {row[name]!r}, expected an integer')
  for name in _NUMBERS:
    if not row[name] and name in _MAY_BE_EMPTY:
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


def references(of_game: Sequence[Run]) -> list[tuple[str, float]]:
  """Names the returns that those of one game's runs are to be compared with.

  Rewards of the DQN Replay Dataset are clipped, and so is the logged mean of a run that is known to
  have learnt from it.
  """
  # Of the same logs, sums in another order differ by rounding.
  logged = {
    ('logged mean' if run.dqn_replay_run is None else 'logged mean, clipped', float(f'{mean:.5g}'))
    for run in of_game
    if not math.isnan(mean := run.column('dataset_episode_return')[-1])
  }
  game = atari_data.game(of_game[0].environment_name)
  published = [('random play', game.random_score), ('human', game.human_score)]
  return sorted(logged) + [(name, score) for name, score in published if score is not None]


def describe_references(of_game: Sequence[Run]) -> str:
  """Says in a line what `references` gives."""
  return ', '.join(f'{name} {value:,.1f}' for name, value in references(of_game))


def limits(of_game: Sequence[Run]) -> tuple[float, float]:
  """Finds the lowest and the highest return to show of one game's runs and their references.

  The human's score is left out where it would take more than half of the height.
  """
  shown = [value for run in of_game for value in run.column('eval_episode_return')]
  shown += [value for name, value in references(of_game) if name != 'human']
  low, high = min(shown), max(shown)
  human = dict(references(of_game)).get('human', high)
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
    for agent, of_agent in itertools.groupby(in_order, key=lambda run: run.agent):
      rows = [row for run in of_agent for row in run.rows]
      text = io.StringIO()
      writer = csv.DictWriter(
        text,
        fieldnames=list(dict.fromkeys(itertools.chain(*rows))),
        restval='',
        lineterminator='\n',
      )
      writer.writeheader()
      writer.writerows(rows)
      member = tarfile.TarInfo(f'{agent}.csv')
      data = text.getvalue().encode()
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return content.getvalue()
