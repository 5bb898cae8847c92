"""What a run leaves, and how it goes on: the CSV, config.json and checkpoints."""

import csv
import dataclasses
import errno
import fcntl
import importlib.metadata
import io
import itertools
import json
import math
import os
import pathlib
import platform
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

import offline_zoo
from offline_zoo import checkpoints, parts, replay

# Every row begins with these.
_FIRST_COLUMNS = ('environment_name', 'seed', 'iteration', 'num_updates', 'frame')
_LOCK, _PARTIAL = '.lock', '.results.partial'  # a checkpoint's is another
# Linux takes 4,096; the rest is for what Orbax makes below it.
_MAX_PATH_BYTES = 3840


# Files.


def write_atomically(
  path: pathlib.Path, content: str | bytes, partial_name: str | None = None
) -> None:
  """Writes a file so that whoever looks, whenever, sees the old one or the new one, whole.

  Args:
    path: of the file; its directory is made if need be.
    content: text becomes UTF-8.
    partial_name: of the file until it is whole; who holds the directory's lock gives one, so that
      what a kill leaves is written over. None: one of this process alone.

  Raises:
    OSError: it could not be written.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(partial_name or f'.{path.name}-{os.getpid()}.partial')
  try:
    partial.unlink(missing_ok=True)
    with open(partial, 'xb') as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
  finally:
    partial.unlink(missing_ok=True)


def check_path(flag: str, value: str | os.PathLike, is_directory: bool) -> pathlib.Path:
  """Makes sure that a file or directory can be made, or is there and can be replaced or filled.

  Raises:
    ValueError: it is a URL, or not UTF-8, which Orbax and JSON need.
    OSError: it cannot be written, or is of another kind.
  """
  text = os.fspath(value)
  if '://' in text:
    raise ValueError(f'--{flag}={text}: only local directories work')
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(f'--{flag}={text}: expected a name in UTF-8') from None
  path = pathlib.Path(text).absolute()
  try:
    around = (path, *path.parents) if is_directory else path.parents
    nearest = next(directory for directory in around if directory.exists())
    longest = max(len(part.encode()) for part in path.parts)
    if longest > os.pathconf(nearest, 'PC_NAME_MAX') or len(str(path).encode()) > _MAX_PATH_BYTES:
      raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    tempfile.TemporaryFile(dir=nearest).close()
    mode = path.lstat().st_mode if os.path.lexists(path) else None
  except OSError as error:
    raise OSError(f'--{flag}={text}: cannot be written: {error}') from error
  if not is_directory and mode is not None and not stat.S_ISREG(mode):
    kind = 'directory' if stat.S_ISDIR(mode) else 'link or special file'
    raise OSError(f'--{flag}={text}: is a {kind}, expected a file')
  return pathlib.Path(text)


def _lock(directory: pathlib.Path) -> io.FileIO:
  """Locks a directory, with a file `.lock` in it, for as long as the file returned is open.

  Raises:
    BlockingIOError: another process, or other results in this one, have locked it.
    OSError: it cannot be locked.
  """
  path = directory / _LOCK
  # Whatever is there is not truncated, not followed, and not waited for.
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
  file = io.FileIO(os.open(path, flags, 0o666), 'r+')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise BlockingIOError(
      f'{directory}: another run is writing in this directory; wait for it, or give another '
      '--checkpoint_dir and --results_csv_path'
    ) from None
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error
  return file


def _identities(config: parts.Config) -> Iterator[list[Any]]:
  """What the first row, the second and so on begin with: game, seed and iteration."""
  for iteration in itertools.count(1):
    for seed in parts.seeds(config):
      yield [config.environment_name, seed, iteration]


class CsvWriter:
  """Keeps a CSV file equal to a list of rows.

  The rows live in the checkpoint and the file follows it: after a kill at any moment it lacks at
  most the newest iteration, which the next `write` brings. The first row's keys are the columns;
  None makes an empty cell.
  """

  def __init__(self, path: str | os.PathLike):
    """Writes nothing yet, but makes sure that it could.

    Raises:
      ValueError: it is a URL or not UTF-8.
      OSError: a file cannot be written there, or something is there that is no file.
    """
    self.path = check_path('results_csv_path', path, is_directory=False)

  def write(self, rows: list[dict[str, Any]]) -> None:
    """Replaces the file, atomically; makes its directory if need be. No rows: no file."""
    if not rows:
      self.path.unlink(missing_ok=True)
      return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(self.path, text.getvalue(), _PARTIAL)

  def holds(self, config: parts.Config) -> bool:
    """Whether what is there, if anything, is such a file, of this game and these seeds."""
    try:
      text = checkpoints.read_text_file(self.path).decode()
      header, *rows = csv.reader(io.StringIO(text), strict=True)
    except FileNotFoundError:
      return True
    except (ValueError, csv.Error):  # UnicodeDecodeError is a ValueError
      return False
    return tuple(header[: len(_FIRST_COLUMNS)]) == _FIRST_COLUMNS and all(
      len(row) == len(header) and row[:3] == [*map(str, identity)]
      for row, identity in zip(rows, _identities(config), strict=False)
    )


class TensorBoard:
  """Keeps TensorBoard's scalars equal to a list of rows; see `CsvWriter`.

  A row's numbers stand at its `num_updates`. Each process begins a new file of events, with all
  rows, which makes TensorBoard forget those of the files before it.
  """

  def __init__(self, directory: pathlib.Path):
    """Writes nothing yet.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
      from tensorboardX import event_file_writer, summary
      from tensorboardX.proto import event_pb2
    except ModuleNotFoundError as error:
      raise ValueError(
        f'--tensorboard_dir: needs {error.name}, which the extra `tensorboard` installs: '
        "pip install -e '.[tensorboard]'"
      ) from error
    self._event, self._scalar = event_pb2.Event, summary.scalar
    # Not tensorboardX's SummaryWriter, whose thread writes when it likes.
    self._make_writer = event_file_writer.EventsWriter
    self._directory = directory
    self._writer: Any = None
    self._num_rows = 0

  def write(self, rows: list[dict[str, Any]]) -> None:
    """Adds the rows that are new since the last call."""
    if self._writer is None:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._writer = self._make_writer(str(self._directory / 'events'), f'.{os.getpid()}')
      self._writer.write_event(self._event(step=0, session_log={'status': 'START'}))
    for row in rows[self._num_rows :]:
      for name, value in row.items():
        if isinstance(value, int | float) and name not in _FIRST_COLUMNS:
          scalar = self._scalar(name, value)
          event = self._event(wall_time=time.time(), step=row['num_updates'], summary=scalar)
          self._writer.write_event(event)
    self._writer.flush()
    self._num_rows = len(rows)


# Flags that may have other values when a run is resumed.
_FREE = (
  'checkpoint_dir', 'compilation_cache_dir', 'debug', 'jax_platform_name', 'num_eval_workers',
  'num_iterations', 'num_processes', 'replay_cache_dir', 'replay_dir', 'replay_memory_gb',
  'results_csv_path', 'tensorboard_dir', 'video_dir',
)  # fmt: skip


def _flag_values(config: parts.Config) -> dict[str, Any]:
  """A Config's values as JSON gives them back, so that stored ones compare equal."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
  """Names of flags that make two runs of one agent different ones."""
  return [
    name for name in sorted({*ours, *theirs} - {*_FREE}) if theirs.get(name) != ours.get(name)
  ]


def read_rows(config: parts.Config, agent_name: str) -> list[dict[str, str]]:
  """Reads the CSV of the run with these flags as it is now, locking nothing.

  Args:
    config: an agent's Config, with a `results_csv_path`.
    agent_name: the name of its directory.

  Returns:
    The rows; none where there are none, or what is there is damaged, or of another run or of logs
    at another place. The run itself says then what is the matter.
  """
  path = pathlib.Path(config.results_csv_path or '')
  try:
    stored = json.loads(checkpoints.read_text_file(path.with_name('config.json')))
    theirs, ours = stored['flags'], _flag_values(config)
    moved = theirs['replay_dir'] != ours['replay_dir']
    if stored['agent'] != agent_name or moved or _differing(theirs, ours):
      return []
    text = checkpoints.read_text_file(path).decode()
    return [*csv.DictReader(io.StringIO(text), strict=True)]
  except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError, csv.Error):
    return []


def _member(place: pathlib.Path, stored: Any, name: str) -> Any:
  """A member of a JSON object that was read from a file; a ValueError if it is not there."""
  if not isinstance(stored, dict) or name not in stored:
    raise ValueError(f'{place}: damaged, or not ours: expected a JSON object with "{name}"')
  return stored[name]


def _read_progress(place: pathlib.Path, stored: Any, config: parts.Config) -> parts.Progress:
  """The progress that a record holds; a ValueError if there cannot be such."""
  names = (field.name for field in dataclasses.fields(parts.Progress) if field.name != 'iteration')
  values = {name: _member(place, stored, name) for name in names}
  progress = parts.Progress(**values)

  def is_number(x: Any) -> bool:
    return type(x) in (int, float) and -math.inf < x < math.inf

  def are_numbers(x: Any) -> bool:
    if config.num_seeds == 1:
      return is_number(x)
    return isinstance(x, list) and len(x) == config.num_seeds and all(map(is_number, x))

  def is_row(row: Any, identity: list[Any]) -> bool:
    return (
      isinstance(row, dict)
      and list(row) == list(progress.rows[0])
      and tuple(row)[: len(_FIRST_COLUMNS)] == _FIRST_COLUMNS
      and [*row.values()][:3] == identity
      and all(type(x) in (int, float, str, type(None)) for x in row.values())
    )

  good = {
    'num_updates': type(progress.num_updates) is int
    and 0 <= progress.num_updates <= config.num_updates_per_iteration,
    'metric_sums': isinstance(progress.metric_sums, dict)
    and all(map(are_numbers, progress.metric_sums.values())),
    'seconds': is_number(progress.seconds) and progress.seconds >= 0,
    'rows': isinstance(progress.rows, list)
    and len(progress.rows) % config.num_seeds == 0
    and all(map(is_row, progress.rows, _identities(config))),
    'num_resident_shards': progress.num_resident_shards is None
    or (type(progress.num_resident_shards) is int and progress.num_resident_shards > 0),
  }
  for name in good:
    if not good[name]:
      raise ValueError(f'{place}: no run has {name} {values[name]}')
  progress.iteration = len(progress.rows) // config.num_seeds + 1
  return progress


class Results:
  """Where a run's CSV, config and checkpoints are, and the run that they belong to.

  While it lives, no other process can begin to write in these directories.

  Attributes:
    progress: how far the run is: what the checkpoint says that it goes on from, or the beginning.
  """

  def __init__(self, config: parts.Config, agent_name: str):
    """Checks what can be checked before data is loaded; writes nothing yet.

    The checkpoint that the run goes on from is chosen and read here, under the directories' locks.

    Args:
      config: an agent's Config.
      agent_name: the name of its directory.

    Raises:
      ValueError: the checkpoint or config.json there is damaged, or of another run.
      FileExistsError: there are files that do not belong to this run.
      BlockingIOError: another run writes there.
      OSError: the results or the checkpoints cannot be where the flags say.
    """
    self._config = config
    below = pathlib.Path(agent_name, config.environment_name)
    default_path = pathlib.Path('runs', below, str(config.seed), 'results.csv')
    self._csv = CsvWriter(config.results_csv_path or default_path)
    self._config_path = self._csv.path.with_name('config.json')
    self._checkpoints = checkpoints.Checkpoints(
      check_path(
        'checkpoint_dir',
        config.checkpoint_dir or self._csv.path.with_name('checkpoint'),
        is_directory=True,
      ),
      config.keep_checkpoints,
    )
    self._video_dir: pathlib.Path | None = None
    if config.video_dir is not None:
      self._video_dir = check_path('video_dir', config.video_dir, is_directory=True) / below
    self._tensorboards: dict[int, TensorBoard] = {}
    if config.tensorboard_dir is not None:
      directory = check_path('tensorboard_dir', config.tensorboard_dir, is_directory=True)
      self._tensorboards = {
        seed: TensorBoard(directory / below / str(seed)) for seed in parts.seeds(config)
      }
    self._directories = (self._csv.path.parent, self._checkpoints.directory)
    self._check_paths_are_apart()
    self._identity: dict[str, Any] = {'agent': agent_name, 'flags': _flag_values(config)}

    self._locks: dict[str, io.FileIO] = {}
    for directory in self._directories:
      # Makes no lock where no run was: flags may yet turn out to be wrong.
      if (directory / _LOCK).exists():
        self._lock(directory)
    if self._checkpoints.exist():
      self._lock(self._checkpoints.directory)
    self._checkpoint = self._checkpoints.restore()
    self.progress = parts.Progress()
    if self._checkpoint is not None:
      place, record = self._checkpoint.path, self._checkpoint.record
      self._check_same_run(place, _member(place, record, 'identity'))
      self.progress = _read_progress(place, _member(place, record, 'progress'), config)
    self._check_nothing_is_overwritten()

  def _check_paths_are_apart(self) -> None:
    results_dir, checkpoint_dir = (pathlib.Path(os.path.realpath(d)) for d in self._directories)
    csv_path = results_dir / self._csv.path.name
    if self._csv.path.name in ('config.json', _LOCK, _PARTIAL):
      raise ValueError(f'--results_csv_path={self._csv.path}: another file has that name')
    for path in (csv_path, *map(csv_path.with_name, ('config.json', _LOCK, _PARTIAL))):
      if checkpoint_dir.is_relative_to(path):
        raise ValueError(f'--checkpoint_dir={checkpoint_dir}: {path} is to be a file')
    if csv_path.is_relative_to(checkpoint_dir):
      inner = csv_path.relative_to(checkpoint_dir).parts[0]
      if checkpoints.is_reserved(inner):
        raise ValueError(f'--results_csv_path={self._csv.path}: {inner} is to be a checkpoint')

  def _lock(self, directory: pathlib.Path) -> None:
    key = os.path.realpath(directory)  # the two directories may be the same
    if key not in self._locks:
      self._locks[key] = _lock(directory)

  def _check_nothing_is_overwritten(self) -> None:
    csv_flag = f'--results_csv_path={self._csv.path}'
    stored_config = self._stored_config()
    if self._checkpoint is not None:
      if not self._csv.holds(self._config):
        raise FileExistsError(f"{csv_flag}: exists, and is not this run's; name another")
      if stored_config is not None:
        self._check_same_run(self._config_path, stored_config)
    elif self._csv.path.exists():
      raise FileExistsError(
        f'{csv_flag}: exists, with no checkpoint in {self._checkpoints.directory} to go on from; '
        'move it or name another'
      )
    elif stored_config is not None and (others := [*self._csv.path.parent.glob('*.csv')]):
      raise FileExistsError(
        f'{csv_flag}: {self._config_path} belongs to {others[0].name}; '
        'name a file in another directory'
      )

  def _stored_config(self) -> dict[str, Any] | None:
    """What config.json holds; None if there is none."""
    try:
      stored = json.loads(checkpoints.read_text_file(self._config_path))
    except FileNotFoundError:
      return None
    except (OSError, ValueError, RecursionError):
      stored = None
    kinds = {'agent': str, 'flags': dict, 'sessions': list}
    if (
      not isinstance(stored, dict)
      or not all(isinstance(stored.get(name), kind) for name, kind in kinds.items())
      or not all(isinstance(session, dict) for session in stored['sessions'])
    ):
      raise FileExistsError(
        f'{self._config_path}: exists, and is not the config.json of a run; move it, or name a '
        '--results_csv_path in another directory'
      )
    return stored

  def _check_same_run(self, place: pathlib.Path, stored: Any) -> None:
    agent, flags = (_member(place, stored, name) for name in ('agent', 'flags'))
    if agent != self._identity['agent']:
      raise self._other_run(place, 'agent', agent, self._identity['agent'])
    if not isinstance(flags, dict):
      raise ValueError(f'{place}: damaged, or not ours: its flags are {flags}')
    ours = self._identity['flags']
    for name in _differing(flags, ours)[:1]:
      raise self._other_run(place, f'--{name}', flags.get(name), ours.get(name))

  def _other_run(self, place: pathlib.Path, name: str, theirs: Any, ours: Any) -> ValueError:
    return ValueError(
      f'{place}: of another run: its {name} is {theirs}, not {ours}; give another '
      '--checkpoint_dir and --results_csv_path'
    )

  def video_path(self, seed: int, iteration: int) -> pathlib.Path | None:
    """Says where to record a seed's evaluation in an iteration; None: nowhere."""
    return self._video_dir and self._video_dir / str(seed) / f'{iteration}.mp4'

  @property
  def directory(self) -> pathlib.Path:
    """Names where the CSV is."""
    return self._csv.path.parent

  def resume(self, agent: parts.Trainable, logs: replay.Logs | None) -> parts.Progress:
    """Brings the agent and the files to where the checkpoint was; else to the beginning.

    Args:
      agent: as it is at the beginning.
      logs: what it learns from; None: what it plays itself.

    Raises:
      ValueError: the checkpoint is of other logs or another network.
      BlockingIOError: another run writes there.
      FileExistsError: files have appeared that do not belong to this run.
    """
    # The logs may have moved, but must hold the same.
    checksum = None if logs is None else logs.checksum
    self._identity['replay_checksum'] = checksum
    if logs is not None:
      mean_return = logs.mean_episode_return
      self._identity['replay'] = {
        'num_transitions': logs.num_transitions,
        'mean_episode_return': None if math.isnan(mean_return) else mean_return,
      }
    progress, checkpoint = self.progress, self._checkpoint
    progress.num_resident_shards = None if logs is None else logs.num_resident_shards
    if checkpoint is not None:
      theirs = checkpoint.record['identity'].get('replay_checksum')
      if theirs != checksum:
        raise self._other_run(checkpoint.path, "logs' checksum", theirs, checksum)
      state = checkpoint.state(agent.get_state())

    for directory in self._directories:
      directory.mkdir(parents=True, exist_ok=True)
      self._lock(directory)
    # Whatever was not locked may have changed since.
    if checkpoint is None and self._checkpoints.exist():
      raise BlockingIOError(f'{self._checkpoints.directory}: another run has begun here meanwhile')
    self._check_nothing_is_overwritten()
    if checkpoint is not None:
      agent.set_state(state)
    self._write_rows(progress.rows)
    self._write_config(progress.iteration)
    logging.info('Device: %s', jax.devices()[0].device_kind)
    logging.info('Results: %s', self._csv.path)
    logging.info('Config: %s', self._config_path)
    logging.info('Checkpoint: %s', self._checkpoints.directory)
    if checkpoint is not None:
      logging.info('Resuming in iteration %d, update %d', progress.iteration, progress.num_updates)
    self._checkpoint = None  # frees its arrays
    return progress

  def _write_config(self, iteration: int) -> None:
    """Writes config.json: the run, and what software each part of it ran on, if it changed."""
    session = _session()
    stored = self._stored_config() if self._checkpoint is not None else None
    sessions = stored['sessions'] if stored else []
    if not sessions or {name: sessions[-1].get(name) for name in session} != session:
      sessions.append({'from_iteration': iteration, **session})
    text = json.dumps({**self._identity, 'sessions': sessions}, indent=2)
    write_atomically(self._config_path, text + '\n', _PARTIAL)

  def save(self, state: Any, progress: parts.Progress) -> None:
    """Saves a checkpoint, then brings the CSV up to it.

    Args:
      state: the learner's, as `get_state` gave it.
      progress: how far the run was then.

    Raises:
      FloatingPointError: a parameter is NaN or infinite; nothing is saved.
      OSError: nothing is saved, or only the checkpoint.
    """
    for path, array in jax.tree_util.tree_leaves_with_path(state):
      if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise FloatingPointError(
          f'{jax.tree_util.keystr(path)} is not finite after update {progress.num_updates} of '
          f'iteration {progress.iteration}; the last checkpoint is from before'
        )
    stored = dataclasses.asdict(progress)
    del stored['iteration']  # which the rows tell: what is saved lacks none
    record = {'identity': self._identity, 'progress': stored}
    evaluated = bool(progress.rows) and not progress.num_updates
    of_seeds = [row['eval_episode_return'] for row in progress.rows[-self._config.num_seeds :]]
    score = float(np.mean(of_seeds)) if evaluated else None
    self._checkpoints.save(state, record, score)
    self._write_rows(progress.rows)

  def _write_rows(self, rows: list[dict[str, Any]]) -> None:
    self._csv.write(rows)
    for seed, tensorboard in self._tensorboards.items():
      tensorboard.write([row for row in rows if row['seed'] == seed])


def _session() -> dict[str, Any]:
  """The software and the device of this process, for config.json."""
  packages = (
    'jax', 'jaxlib', 'dm-haiku', 'optax', 'rlax', 'numpy', 'ale-py', 'gymnasium',
    'opencv-python-headless', 'orbax-checkpoint',
  )  # fmt: skip
  return {
    'commit': _commit(),
    'device': jax.devices()[0].device_kind,
    'versions': {
      'offline_zoo': offline_zoo.__version__,
      'python': platform.python_version(),
      **{package: importlib.metadata.version(package) for package in packages},
    },
  }


def _commit() -> str | None:
  """The commit of this code, '-dirty' if it was changed since; None outside a checkout."""
  if commit := os.environ.get('OFFLINE_ZOO_COMMIT'):  # set in the container, which has no checkout
    return commit

  def git(*arguments: str) -> str:
    run = subprocess.run(
      ['git', *arguments],
      cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip()

  try:
    git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)  # ours, not one around us
    return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
  except (OSError, subprocess.CalledProcessError):
    return None
