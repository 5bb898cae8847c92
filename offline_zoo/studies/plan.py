"""What a sweep's file says is to be run, and how far each run is: told by its files.

`sweep.py` says how the file looks.
"""

import csv
import dataclasses
import fcntl
import functools
import importlib
import pathlib
import re
import shlex
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from absl import flags

from offline_zoo import atari_data, parts, program, results
from offline_zoo.logs import bundled
from offline_zoo.studies import evaluate

_PACKAGE = pathlib.Path(__file__).parents[1]
# Programs whose logs appear when they are complete; a download's do not.
_LOG_MAKERS = ('logs.demo', 'logs.recorded')
# Flags of a run that the sweep gives.
_GIVEN = ('environment_name', 'replay_dir', 'seed', 'results_csv_path', 'checkpoint_dir')


# What is to be run.


@dataclasses.dataclass(frozen=True)
class Run:
  """One agent's learning on one of the data sets with one seed.

  Attributes:
    data: the name of the data set.
    agent: the name of its directory.
    config: the agent's Config.
    words: its program and flags.
    make: the program, and its flags, that makes the logs if they are missing; None: they are there.
    num_eval_episodes: of the last evaluation; 0: there is none.
  """

  data: str
  agent: str
  config: Any
  words: tuple[str, ...]
  make: tuple[str, ...] | None
  num_eval_episodes: int

  def __str__(self) -> str:
    return f'{self.data}/{self.agent}/{self.config.seed}'

  @property
  def directory(self) -> pathlib.Path:
    """Names where its results are."""
    return pathlib.Path(self.config.results_csv_path).parent

  @property
  def num_updates(self) -> int:
    """Counts the updates of all its iterations."""
    return self.config.num_iterations * self.config.num_updates_per_iteration

  @property
  def missing_logs(self) -> tuple[str, ...] | None:
    """Gives the program, and its flags, that makes its logs; None if there is nothing to make."""
    return None if pathlib.Path(self.config.replay_dir).exists() else self.make


_STRINGS = 'a list of strings'
_KEYS = {
  'directory': 'a string', 'agents': _STRINGS, 'seeds': 'a list of integers', 'flags': _STRINGS,
  'flagfile': 'a string', 'evaluate': 'a number of episodes', 'data': 'a list of tables',
}  # fmt: skip
_DATA_KEYS = {
  'name': 'a string', 'environment_name': 'a string', 'replay_dir': 'a string', 'make': _STRINGS,
  'flags': _STRINGS, 'agents': _STRINGS, 'seeds': 'a list of integers',
}  # fmt: skip


def _check_table(table: dict[str, Any], keys: Mapping[str, str], needed: Sequence[str]) -> None:
  """Checks that a table of the file has these keys alone, with values of these kinds."""

  def are(kind: type, value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) is kind for item in value)

  is_a: dict[str, Callable[[Any], bool]] = {
    'a string': lambda value: type(value) is str and bool(value),
    'a number of episodes': lambda value: type(value) is int and value > 0,
    _STRINGS: functools.partial(are, str),
    'a list of integers': functools.partial(are, int),
    'a list of tables': functools.partial(are, dict),
  }
  for name, value in table.items():
    if name not in keys:
      raise ValueError(f'unknown key {name!r}; there are {", ".join(keys)}')
    if not is_a[keys[name]](value):
      raise ValueError(f'{name} = {value!r}: expected {keys[name]}')
    if name in ('agents', 'seeds') and len({*value}) < len(value):
      raise ValueError(f'{name} = {value!r}: one is there twice')
  for name in needed:
    if name not in table:
      raise ValueError(f'no {name}; expected {keys[name]}')


def _check_flags(words: Sequence[str], given: Collection[str]) -> None:
  for word in words:
    if not re.match(r'--?\w', word):
      raise ValueError(f'flags: expected such as --name=value, got {word!r}')
    if (name := word.lstrip('-').partition('=')[0]) in given:
      raise ValueError(f'flags: the sweep itself gives --{name}')


def _make_words(words: Sequence[str], given: Mapping[str, str]) -> tuple[str, ...]:
  """Checks a program that makes logs, and gives it those of the flags that it has."""
  name, *rest = words
  if name not in _LOG_MAKERS:
    raise ValueError(f'make: expected {" or ".join(_LOG_MAKERS)} and its flags, got {name!r}')
  flag_values = flags.FlagValues()
  config_class = importlib.import_module(f'offline_zoo.{name}').Config
  program.define_flags(config_class, flag_values=flag_values)
  _check_flags([word for word in rest if word.startswith('-')], given)
  made = (name, *rest, *(f'--{k}={v}' for k, v in given.items() if k in flag_values))
  try:
    _, *command = flag_values(made)
    has_command = 'command' in {field.name for field in dataclasses.fields(config_class)}
    if command and not has_command:
      raise ValueError(f'expected flags only, got {" ".join(command)}')
    arguments = {'command': tuple(command)} if has_command else {}
    program.config_from_flags(config_class, flag_values, **arguments)
  except (flags.Error, ValueError) as error:
    raise ValueError(f'make: {error}') from error
  return made


def _run(sweep: dict[str, Any], data: dict[str, Any], agent: str, seed: int) -> Run:
  """Makes one run of the file's tables; checks its flags."""
  if not (_PACKAGE / agent / 'agent.py').is_file():
    agents = ', '.join(sorted(path.parent.name for path in _PACKAGE.glob('*/agent.py')))
    raise ValueError(f'unknown agent {agent!r}; there are {agents}')
  directory = pathlib.Path(sweep['directory'], data['name'], agent, str(seed))
  given = {name: data[name] for name in ('environment_name', 'replay_dir')}
  words = [
    *([f'--flagfile={_PACKAGE / agent / sweep["flagfile"]}'] if 'flagfile' in sweep else []),
    *sweep.get('flags', []), *data.get('flags', []), *(f'--{k}={v}' for k, v in given.items()),
    f'--seed={seed}', f'--results_csv_path={directory / "results.csv"}',
  ]  # fmt: skip
  module = f'{agent}.run_atari'
  config_class = importlib.import_module(f'offline_zoo.{module}').Config
  try:
    config = program.parse_config(config_class, shlex.join(words))
  except ValueError as error:
    raise ValueError(f'{agent}: {error}') from error
  if 'evaluate' in sweep and config.num_seeds > 1:
    raise ValueError(f'{agent}: evaluate is of runs of one seed, not of --num_seeds')
  make = _make_words(data['make'], given) if 'make' in data else None
  return Run(data['name'], agent, config, (module, *words), make, sweep.get('evaluate', 0))


def _check_apart(runs: Sequence[Run]) -> None:
  """Checks that no two runs are of one seed, or write to one place, or make one log differently."""
  seeds, places = set(), set()
  makers: dict[str, tuple[str, ...] | None] = {}
  for run in runs:
    config = run.config
    for seed in parts.seeds(config):
      if (run.data, run.agent, seed) in seeds:
        raise ValueError(f'{run}: --num_seeds={config.num_seeds}: another run has seed {seed} too')
      seeds.add((run.data, run.agent, seed))
      for flag in ('tensorboard_dir', 'video_dir'):
        place = (flag, getattr(config, flag), run.agent, config.environment_name, seed)
        if place[1] is not None and place in places:
          raise ValueError(f'{run}: --{flag}={place[1]}: a run on other data writes there too')
        places.add(place)
    if makers.setdefault(config.replay_dir, run.make) != run.make:
      raise ValueError(f'data {run.data!r}: make: other data has logs at {config.replay_dir} too')


def read(path: pathlib.Path) -> list[Run]:
  """Reads what a file says is to be run, and checks all of it but that there are logs.

  Returns:
    The runs, in the file's order: data by data, seed by seed, agent by agent.

  Raises:
    ValueError: the file is not as the module's documentation says, or a program has no such flag.
    OSError: it cannot be read.
  """
  with open(path, 'rb') as file:
    try:
      sweep = tomllib.load(file)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
      raise ValueError(f'{path}: not TOML: {error}') from error
  runs: dict[str, list[Run]] = {}
  place = str(path)
  try:
    _check_table(sweep, _KEYS, ('directory', 'data'))
    _check_flags(sweep.get('flags', []), _GIVEN)
    for number, data in enumerate(sweep['data'], start=1):
      place = f'{path}: data {number}'
      defaults = {name: sweep[name] for name in ('agents', 'seeds') if name in sweep}
      _check_table(
        defaults | data, _DATA_KEYS, [k for k in _DATA_KEYS if k not in ('make', 'flags')]
      )
      data = defaults | data
      place = f'{path}: data {data["name"]!r}'
      if not re.fullmatch(r'\w[\w.-]*', data['name']):
        raise ValueError('expected a name of letters, digits and _.-, as it names a directory')
      if data['name'] in runs:
        raise ValueError('there are two of this name')
      atari_data.game(data['environment_name'])
      _check_flags(data.get('flags', []), _GIVEN)
      if 'make' in data and data['replay_dir'] in bundled.NAMES:
        raise ValueError(f'make: nothing, for {data["replay_dir"]} is made by the runs')
      runs[data['name']] = [
        _run(sweep, data, agent, seed) for seed in data['seeds'] for agent in data['agents']
      ]
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error
  every_run = [run for of_data in runs.values() for run in of_data]
  try:
    _check_apart(every_run)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return every_run


# How far a run is, and what comes next: told by its files, whoever runs it.


class Progress(NamedTuple):
  """How far a run is.

  Attributes:
    iterations: that are finished.
    seconds: wall time that they took.
  """

  iterations: int
  seconds: float


def progress_of(run: Run) -> Progress:
  """Finds how far a run is."""
  try:
    seconds = 0.0
    rows = results.read_rows(run.config, run.agent)
    num_seeds = run.config.num_seeds
    for first in range(0, len(rows), num_seeds):  # of an iteration
      learning = run.config.num_updates_per_iteration / float(rows[first]['updates_per_second'])
      of_seeds = rows[first : first + num_seeds]
      evaluating = sum(float(row['seconds']) - learning for row in of_seeds)
      beside = run.config.num_eval_workers != 0  # evaluation goes on beside learning
      seconds += max(learning, evaluating) if beside else learning + evaluating
  except (KeyError, TypeError, ValueError, ZeroDivisionError):  # the run itself says what it is
    return Progress(0, 0.0)
  return Progress(len(rows) // num_seeds, seconds)


def is_evaluated(run: Run, num_updates: int) -> bool:
  """Whether the last evaluation is there, and is of what so many updates have made."""
  expected = (run.agent, run.config.environment_name, str(run.config.seed), str(num_updates))
  try:
    with open(run.directory / 'evaluation.csv', newline='') as file:
      header, *rows = csv.reader(file)
  except (OSError, ValueError, csv.Error):
    return False
  return (
    tuple(header) == evaluate.EPISODE_COLUMNS
    and len(rows) == run.num_eval_episodes
    and all(tuple(row[:4]) == expected for row in rows)
  )


class Step(NamedTuple):
  """A program to run, and the log that it writes, which is locked meanwhile."""

  words: tuple[str, ...]
  log: pathlib.Path


def next_step(run: Run) -> Step | None:
  """Finds what is to be done next for a run; None if it is finished."""
  return _next_step(run, progress_of(run))


def _next_step(run: Run, progress: Progress) -> Step | None:
  log = run.directory / 'log.txt'
  config = run.config
  if progress.iterations < config.num_iterations:
    if (make := run.missing_logs) is not None:
      replay_dir = pathlib.Path(config.replay_dir)
      return Step(make, replay_dir.with_name(f'{replay_dir.name}.log.txt'))
    return Step(run.words, log)
  num_updates = progress.iterations * config.num_updates_per_iteration  # may be more than asked for
  if run.num_eval_episodes and not is_evaluated(run, num_updates):
    values = {
      'checkpoint_dir': run.directory / 'checkpoint', 'num_states': 0,
      'episodes': run.num_eval_episodes, 'csv_path': run.directory / 'evaluation.csv',
      'jax_platform_name': config.jax_platform_name,
      'compilation_cache_dir': config.compilation_cache_dir,
    }  # fmt: skip
    words = [f'--{name}={value}' for name, value in values.items() if value is not None]
    return Step(('studies.evaluate', *words), log)
  return None


def lock(log: pathlib.Path) -> BinaryIO | None:
  """Opens and locks a log until it is closed, here and in what writes it; None if it is locked."""
  log.parent.mkdir(parents=True, exist_ok=True)
  file = open(log, 'ab')  # noqa: SIM115
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  except OSError as error:
    file.close()
    raise OSError(error.errno, error.strerror, str(log)) from error
  return file


def _is_locked(log: pathlib.Path) -> bool:
  try:
    with open(log, 'rb') as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:  # there is none, or what locks it says what is the matter
    pass
  return False


class Status(NamedTuple):
  """What becomes of a run.

  Attributes:
    state: done, running, waiting or failed.
    progress: how far it is.
  """

  state: str
  progress: Progress


def statuses(runs: Sequence[Run], failed: Mapping[Run, str]) -> dict[Run, Status]:
  """Finds how it is with each run, wherever it runs."""
  found, logs = {}, set()
  for run in runs:
    progress = progress_of(run)
    step = _next_step(run, progress)
    state = 'done' if step is None else 'failed' if run in failed else 'waiting'
    # Of those that wait for logs, one makes them.
    if step is not None and step.log not in logs and _is_locked(step.log):
      logs.add(step.log)
      state = 'running'
    found[run] = Status(state, progress)
  return found
