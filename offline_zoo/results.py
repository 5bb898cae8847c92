"""What a run leaves, and how it goes on: the CSV, config.json and checkpoints."""

import csv
import dataclasses
import fcntl
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

import offline_zoo
from offline_zoo import parts, program, replay


def _write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file so that whoever looks, whenever, sees the old one or the new one, whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.partial')
  try:
    with open(partial, 'w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _check_writable(directory: pathlib.Path, flag: str) -> None:
  """Makes sure that files can be put in a directory, which need not exist yet."""
  directory = directory.absolute()
  nearest = next(path for path in (directory, *directory.parents) if path.exists())
  try:
    tempfile.TemporaryFile(dir=nearest).close()
  except OSError as error:
    raise OSError(f'{flag}: cannot be written: {error}') from error


class CsvWriter:
  """Keeps a CSV file equal to a list of rows.

  The rows live in the checkpoint and the file follows it: after a kill at any moment it lacks at
  most the newest row, which the next `write` brings. The first row's keys are the columns; None
  makes an empty cell.
  """

  def __init__(self, path: str | os.PathLike):
    """Writes nothing yet, but makes sure that it could.

    Raises:
      OSError: a file cannot be written there.
    """
    self.path = pathlib.Path(path)
    if self.path.is_dir():
      raise IsADirectoryError(f'--results_csv_path={self.path}: is a directory, expected a file')
    _check_writable(self.path.parent, f'--results_csv_path={self.path}')

  def write(self, rows: list[dict[str, Any]]) -> None:
    """Replaces the file, atomically; makes its directory if need be."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    _write_atomically(self.path, text.getvalue())


class Checkpoint:
  """The newest state of a run in a directory, kept by Orbax.

  A save is atomic: killed, or out of disk space, it leaves the checkpoint before it as it was.
  """

  def __init__(self, directory: str | os.PathLike):
    """Writes nothing yet, but makes sure that it could.

    Raises:
      OSError: files cannot be written there.
    """
    self.directory = pathlib.Path(directory).absolute()
    if self.directory.exists() and not self.directory.is_dir():
      raise NotADirectoryError(f'--checkpoint_dir={directory}: is a file, expected a directory')
    _check_writable(self.directory, f'--checkpoint_dir={directory}')

  def _manager(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=1, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(self.directory, options=options)

  def save(self, state: Any, record: dict[str, Any]) -> None:
    """Saves a pytree of arrays and a JSON-able record with it.

    Raises:
      OSError: it could not be written; the one before, if any, is still there.
    """
    try:
      # Claims the space first: when a disk fills up under Orbax, its threads print tracebacks and
      # go on writing for a while.
      self.directory.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self.directory) as file:
        for array in jax.tree.leaves(state):
          file.write(bytes(array.nbytes))
      with self._manager() as manager:
        manager.save(
          (manager.latest_step() or 0) + 1,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
          ),
        )
    except Exception as error:  # TensorStore has its own kinds
      raise OSError(
        f'{self.directory}: could not write a checkpoint, an earlier one is untouched: '
        f'{program.first_line(error)}'
      ) from error

  def restore_record(self) -> dict[str, Any] | None:
    """The newest checkpoint's record; None if there is no checkpoint."""
    if not self.directory.exists():
      return None
    return self._restore(record=ocp.args.JsonRestore())

  def restore_state(self, like: Any) -> Any:
    """The newest checkpoint's pytree, of NumPy arrays.

    Args:
      like: a pytree of NumPy arrays, of the structure, shapes and dtypes that are expected.

    Raises:
      ValueError: it has another structure, other shapes or dtypes, or is damaged.
    """
    state = self._restore(state=ocp.args.StandardRestore(like))
    for (path, got), want in zip(
      jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(like), strict=True
    ):
      if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise ValueError(
          f'{self.directory}: checkpoint of another network: {jax.tree_util.keystr(path)} is '
          f'{got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}'
        )
    return state

  def _restore(self, **item: Any) -> Any:
    with self._manager() as manager:
      step = manager.latest_step()
      if step is None:
        return None
      try:
        return manager.restore(step, args=ocp.args.Composite(**item))[next(iter(item))]
      except Exception as error:
        raise ValueError(
          f'{self.directory / str(step)}: damaged, or the checkpoint of another network: '
          f'{program.first_line(error)}'
        ) from error


class Results:
  """Where a run's CSV, config and checkpoint are, and the run that they belong to.

  Attributes:
    progress: how far the run is: what the newest checkpoint says, or the beginning.
  """

  # Flags that may have other values when a run is resumed.
  _FREE = (
    'checkpoint_dir', 'debug', 'jax_platform_name', 'num_iterations', 'replay_cache_dir',
    'replay_dir', 'replay_memory_gb', 'results_csv_path',
  )  # fmt: skip

  def __init__(self, config: parts.Config, agent_name: str):
    """Checks what can be checked before data is loaded; writes nothing yet.

    Args:
      config: an agent's Config.
      agent_name: the name of its directory.

    Raises:
      ValueError: the checkpoint there is of another run.
      FileExistsError: there are results, but no checkpoint that they belong to.
      OSError: the results or the checkpoint cannot be where the flags say.
    """
    default = pathlib.Path('runs', agent_name, config.environment_name, str(config.seed))
    self._csv = CsvWriter(config.results_csv_path or default / 'results.csv')
    self._config_path = self._csv.path.with_name('config.json')
    self._checkpoint = Checkpoint(config.checkpoint_dir or self._csv.path.parent / 'checkpoint')
    # As JSON gives it back, so that a stored one compares equal.
    flag_values = json.loads(json.dumps(dataclasses.asdict(config)))
    self._identity = {'agent': agent_name, 'flags': flag_values}

    self._record = self._checkpoint.restore_record()
    self.progress = parts.Progress(**self._record['progress']) if self._record else parts.Progress()
    if self._record is None:
      self._check_nothing_is_overwritten()
      return
    stored = self._record['identity']
    if stored['agent'] != agent_name:
      raise self._other_run('agent', stored['agent'], agent_name)
    for name in sorted({*flag_values, *stored['flags']} - {*self._FREE}):
      if flag_values.get(name) != stored['flags'].get(name):
        raise self._other_run(f'--{name}', stored['flags'].get(name), flag_values.get(name))

  def _check_nothing_is_overwritten(self) -> None:
    if self._csv.path.exists():
      raise FileExistsError(
        f'--results_csv_path={self._csv.path}: exists, with no checkpoint in '
        f'{self._checkpoint.directory} to go on from; move it or name another'
      )
    others = [path for path in self._csv.path.parent.glob('*.csv') if self._config_path.exists()]
    if others:
      raise FileExistsError(
        f'--results_csv_path={self._csv.path}: {self._config_path} belongs to {others[0].name}; '
        'name a file in another directory'
      )

  def _other_run(self, name: str, theirs: Any, ours: Any) -> ValueError:
    return ValueError(
      f'{self._checkpoint.directory}: checkpoint of another run: its {name} is {theirs}, not '
      f'{ours}; give another --checkpoint_dir and --results_csv_path'
    )

  def resume(self, agent: parts.Learner, logs: replay.Logs) -> parts.Progress:
    """Brings the agent and the files to where the newest checkpoint was; else to the beginning.

    Args:
      agent: as it is at the beginning.
      logs: what it learns from.

    Raises:
      ValueError: the checkpoint is damaged, or of other logs or another network.
      BlockingIOError: another process writes there.
    """
    # The logs may have moved, but must hold the same.
    self._identity['replay_checksum'] = logs.checksum
    progress = self.progress
    progress.num_resident_shards = logs.num_resident_shards
    if self._record is not None:
      theirs, ours = (x['replay_checksum'] for x in (self._record['identity'], self._identity))
      if theirs != ours:
        raise self._other_run("logs' checksum", theirs, ours)
      agent.set_state(self._checkpoint.restore_state(agent.get_state()))

    self._lock_directory()
    if progress.rows:
      self._csv.write(progress.rows)
    self._write_config(progress.iteration)
    logging.info('Device: %s', jax.devices()[0].device_kind)
    logging.info('Results: %s', self._csv.path)
    logging.info('Config: %s', self._config_path)
    logging.info('Checkpoint: %s', self._checkpoint.directory)
    if self._record is not None:
      logging.info('Resuming in iteration %d, update %d', progress.iteration, progress.num_updates)
    return progress

  def _lock_directory(self) -> None:
    self._csv.path.parent.mkdir(parents=True, exist_ok=True)
    self._lock = open(self._csv.path.with_name('.lock'), 'w')  # noqa: SIM115, held while we live
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise BlockingIOError(
        f'--results_csv_path={self._csv.path}: another run is writing in this directory'
      ) from None

  def _write_config(self, iteration: int) -> None:
    """Writes config.json: the run, and what software each part of it ran on, if it changed."""
    session = _session()
    sessions = []
    if self._record is not None and self._config_path.exists():
      sessions = json.loads(self._config_path.read_text())['sessions']
    if not sessions or {name: sessions[-1].get(name) for name in session} != session:
      sessions.append({'from_iteration': iteration, **session})
    text = json.dumps({**self._identity, 'sessions': sessions}, indent=2)
    _write_atomically(self._config_path, text + '\n')

  def save(self, agent: parts.Learner, progress: parts.Progress) -> None:
    """Saves a checkpoint, then brings the CSV up to it.

    Raises:
      FloatingPointError: a parameter is NaN or infinite; nothing is saved.
      OSError: nothing is saved, or only the checkpoint.
    """
    state = agent.get_state()
    for path, array in jax.tree_util.tree_leaves_with_path(state):
      if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise FloatingPointError(
          f'{jax.tree_util.keystr(path)} is not finite after update {progress.num_updates} of '
          f'iteration {progress.iteration}; the last checkpoint is from before'
        )
    record = {'identity': self._identity, 'progress': dataclasses.asdict(progress)}
    self._checkpoint.save(state, record)
    if progress.rows:
      self._csv.write(progress.rows)


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
