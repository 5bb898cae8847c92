"""What every `run_atari.py` shares: the run loop, evaluation, results, checkpoints, flags."""

import csv
import dataclasses
import fcntl
import importlib.metadata
import inspect
import io
import itertools
import json
import logging as std_logging
import math
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import dm_env
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from tqdm import tqdm

from offline_zoo import atari_data

if typing.TYPE_CHECKING:
  from offline_zoo import replay  # which imports this file

# DQN's usual limit, 30 minutes of play (Bellemare et al. 2013): 27,000 agent steps.
MAX_FRAMES_PER_EPISODE = 108_000
NUM_ACTION_REPEATS = 4
# What an online agent plays for an update: four agent steps of four frames.
FRAMES_PER_UPDATE = 16
# A learning run heeds signals and looks at its loss between chunks: seconds on a CPU, a tenth of
# one on a GPU.
MAX_UPDATES_PER_CHUNK = 250

# Acting.


class Agent(Protocol):
  """What the run loop needs of an agent."""

  def reset(self, rng_key: jax.Array | None = None) -> None:
    """Forgets the episode. With a key, acts from now on with randomness drawn from that key."""

  def step(self, timestep: dm_env.TimeStep) -> int:
    """Takes a raw timestep, returns the action; for an episode's last one that is not used."""

  @property
  def statistics(self) -> Mapping[str, float]:
    """What the agent has to say of its last action, such as `state_value`."""


def run_loop(
  agent: Agent,
  environment: dm_env.Environment,
  max_frames_per_episode: int = MAX_FRAMES_PER_EPISODE,
) -> Iterator[tuple[dm_env.Environment, dm_env.TimeStep, Agent, int | None]]:
  """Plays episode after episode, one raw frame at a time, for as long as the caller iterates.

  Yields (environment, timestep, agent, action): the action is the agent's answer to the timestep,
  or None for the last timestep of an episode, which the agent has seen as well. An episode ends
  `max_frames_per_episode` frames after its first one if the game has not ended it; its discount is
  then left as it is.
  """
  while True:
    agent.reset()
    timestep = environment.reset()
    for frame in itertools.count(1):
      action = agent.step(timestep)
      yield environment, timestep, agent, action
      timestep = environment.step(action)
      if frame == max_frames_per_episode:
        timestep = timestep._replace(step_type=dm_env.StepType.LAST)
      if timestep.last():
        agent.step(timestep)
        yield environment, timestep, agent, None
        break


class EpisodeTracker:
  """Counts episodes and agent steps and adds up rewards.

  Returns are of whole episodes: raw, as the game scores, and clipped, each agent step's reward
  clipped to [-1, 1] as in training.
  """

  def __init__(self, num_action_repeats: int = NUM_ACTION_REPEATS):
    self._num_action_repeats = num_action_repeats
    self.num_steps = 0  # of agents, in all episodes, a cut-short last step included
    self.episode_returns: list[float] = []
    self.episode_clipped_returns: list[float] = []

  def step(self, environment, timestep: dm_env.TimeStep, agent, action) -> None:
    del environment, agent, action
    if timestep.first():
      self._frame = 0
      self._return = self._clipped_return = self._step_reward = 0.0
      return
    if self._frame % self._num_action_repeats == 0:
      self.num_steps += 1
    self._frame += 1
    self._return += timestep.reward
    self._step_reward += timestep.reward
    if self._frame % self._num_action_repeats == 0 or timestep.last():
      self._clipped_return += min(max(self._step_reward, -1.0), 1.0)
      self._step_reward = 0.0
    if timestep.last():
      self.episode_returns.append(float(self._return))
      self.episode_clipped_returns.append(float(self._clipped_return))

  def get(self) -> dict[str, float]:
    """Statistics of the finished episodes, of which there must be one."""
    return {
      'episode_return': float(np.mean(self.episode_returns)),
      'episode_clipped_return': float(np.mean(self.episode_clipped_returns)),
      'num_episodes': len(self.episode_returns),
    }


class FrameRateTracker:
  """Counts raw frames a second."""

  def __init__(self):
    self._start = time.perf_counter()
    self._num_frames = 0

  def step(self, environment, timestep, agent, action) -> None:
    self._num_frames += not timestep.first()

  def get(self) -> dict[str, float]:
    seconds = time.perf_counter() - self._start
    return {'frame_rate': self._num_frames / seconds, 'seconds': seconds}


class StateValueTracker:
  """Averages the agent's own estimate of the value of the states it acts in, over raw frames."""

  def __init__(self):
    self._sum = 0.0
    self._count = 0

  def step(self, environment, timestep, agent, action) -> None:
    if action is not None:
      self._sum += agent.statistics['state_value']
      self._count += 1

  def get(self) -> dict[str, float]:
    return {'state_value': self._sum / max(self._count, 1)}


def evaluation_seed(seed: int, iteration: int) -> tuple[int, jax.Array]:
  """The emulator's seed and the agent's key for the evaluation after an iteration."""
  environment_seed, key_seed = np.random.SeedSequence((seed, iteration)).generate_state(2)
  return int(environment_seed), jax.random.PRNGKey(key_seed)


def evaluate(
  agent: Agent,
  environment: dm_env.Environment,
  eval_steps: int,
  rng_key: jax.Array,
  stop: 'StopSignal | None' = None,
) -> dict[str, float]:
  """Plays whole episodes until at least `eval_steps` agent steps are played.

  Args:
    agent: acts with randomness drawn from `rng_key`.
    environment: is reset first.
    eval_steps: agent steps, of four frames.
    rng_key: see `agent`.
    stop: leaves the evaluation when it is requested.

  Returns:
    What the trackers say of the episodes, names beginning with `eval_`.
  """
  episodes = EpisodeTracker()
  trackers = (episodes, FrameRateTracker(), StateValueTracker())
  agent.reset(rng_key)
  with progress_bar(eval_steps, 'evaluating', 'step') as bar:
    for step in run_loop(agent, environment):
      for tracker in trackers:
        tracker.step(*step)
      bar.update(episodes.num_steps - bar.n)
      if stop is not None:
        stop.check()
      if step[1].last() and episodes.num_steps >= eval_steps:
        break
  return {f'eval_{k}': v for tracker in trackers for k, v in tracker.get().items()}


# Learning.


def learn_loop(update: Callable) -> Callable:
  """Makes `update(state, data) -> (state, metrics)` into `learn(state, data, n)`.

  `learn` runs n updates and returns the last state and the mean of each metric, a float. The state
  that it is given is donated, that is, gone afterwards.

  On accelerators it is one jitted scan, which compiles once for each n. On CPU, XLA runs
  convolutions in a loop body ten times slower than elsewhere (jax issue 12868), so there it is a
  loop over the jitted update. It waits for each update: queued ones would each hold a state.
  """

  def mean(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in metrics.items()}

  if jax.default_backend() == 'cpu':
    jitted_update = jax.jit(update, donate_argnums=0)

    def learn(state, data, n: int):
      history: list[Mapping[str, Any]] = []
      for _ in range(n):
        state, metrics = jitted_update(state, data)
        history.append(jax.device_get(metrics))
      return state, mean({name: [m[name] for m in history] for name in history[0]})

    return learn

  def scan(state, data, n: int):
    return jax.lax.scan(lambda state, _: update(state, data), state, length=n)

  jitted_scan = jax.jit(scan, static_argnums=2, donate_argnums=0)

  def learn_on_accelerator(state, data, n: int):
    state, metrics = jitted_scan(state, data, n)
    return state, mean(jax.device_get(metrics))

  return learn_on_accelerator


def chunk_size(num_updates: int) -> int:
  """The largest divisor that is not too large: chunks are equal, so that `learn` compiles once."""
  return max(n for n in range(1, MAX_UPDATES_PER_CHUNK + 1) if num_updates % n == 0)


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
  """A bar on a terminal, nothing elsewhere."""
  return tqdm(
    total=total, initial=initial, desc=description, unit=unit, leave=False, disable=None,
    dynamic_ncols=True,
  )  # fmt: skip


def user_cache_dir() -> pathlib.Path:
  """Where what can be made again is kept: $XDG_CACHE_HOME/offline_zoo."""
  return pathlib.Path(
    os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache', 'offline_zoo'
  )


class StopSignal:
  """A block that SIGTERM and Ctrl-C end early, but only where it calls `check`.

  A second signal acts as it would have without the block.

  Attributes:
    requested: the name of the signal that has come, or None.
  """

  class _Stopped(Exception):  # noqa: N818, no error
    pass

  def __enter__(self) -> 'StopSignal':
    self.requested: str | None = None
    self._handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for number in self._handlers:
      signal.signal(number, self._request)
    return self

  def __exit__(self, kind: type | None, *unused) -> bool:
    self._restore_handlers()
    return kind is self._Stopped

  def check(self) -> None:
    """Leaves the block if a signal has come."""
    if self.requested:
      logging.warning('%s: stopping; the same command goes on from here', self.requested)
      raise self._Stopped

  def _request(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.requested = signal.Signals(number).name
    self._restore_handlers()

  def _restore_handlers(self) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)


@dataclasses.dataclass
class Progress:
  """How far a run is: with the agent's state, all that a checkpoint holds.

  Attributes:
    num_updates: updates done in the iteration under way.
    metric_sums: for each metric of `learn`, its sum over these updates.
    seconds: wall time spent on these updates.
    rows: the CSV's rows, one for each finished iteration.
    num_resident_shards: how many log shards are sampled from at a time; None before it is known.
  """

  num_updates: int = 0
  metric_sums: dict[str, float] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  num_resident_shards: int | None = None

  @property
  def iteration(self) -> int:
    """The number, from 1, of the iteration under way."""
    return len(self.rows) + 1

  def add(self, metrics: Mapping[str, float], num_updates: int, seconds: float) -> None:
    """Counts a chunk of updates in, with the means of its metrics."""
    for name, mean in metrics.items():
      self.metric_sums[name] = self.metric_sums.get(name, 0.0) + mean * num_updates
    self.num_updates += num_updates
    self.seconds += seconds

  def means(self) -> dict[str, float]:
    """The metrics' means over the iteration so far."""
    return {name: value / self.num_updates for name, value in self.metric_sums.items()}

  def finish_iteration(
    self, config: Any, evaluation: Mapping[str, float], dataset_episode_return: float
  ) -> None:
    """Adds the row of the iteration under way, logs it and begins the next.

    Args:
      config: an agent's Config.
      evaluation: what `evaluate` returned.
      dataset_episode_return: mean return of the logged episodes; NaN, if there are none, makes an
        empty cell, as the normalised returns of a game without a published human score do.
    """
    total_updates = self.iteration * self.num_updates
    scores = (config.environment_name, evaluation['eval_episode_return'])
    dataset = None if math.isnan(dataset_episode_return) else dataset_episode_return
    row = {
      'environment_name': config.environment_name,
      'seed': config.seed,
      'iteration': self.iteration,
      'num_updates': total_updates,
      'frame': FRAMES_PER_UPDATE * total_updates,
      'eval_episode_return': evaluation['eval_episode_return'],
      'normalized_return': atari_data.human_normalized_score(*scores),
      'capped_normalized_return': atari_data.capped_human_normalized_score(*scores),
      'dataset_episode_return': dataset,
      **self.means(),
      **{k: v for k, v in evaluation.items() if k not in ('eval_episode_return', 'eval_seconds')},
      'updates_per_second': self.num_updates / self.seconds,
      'seconds': self.seconds + evaluation['eval_seconds'],
    }
    logging.info(
      'iteration %d of %d: return %.1f over %d episodes (logged: %s), loss %.4g, q %.3g, '
      '%.0f updates/s, %.0f frames/s, %.0f s',
      self.iteration, config.num_iterations, row['eval_episode_return'], row['eval_num_episodes'],
      'none whole' if dataset is None else f'{dataset:.1f}', row['loss'], row['q_logged_action'],
      row['updates_per_second'], row['eval_frame_rate'], row['seconds'],
    )  # fmt: skip
    self.rows.append(row)
    self.num_updates, self.metric_sums, self.seconds = 0, {}, 0.0


def learn_iteration(agent, progress: Progress, num_updates: int, stop: StopSignal) -> None:
  """Lets the agent learn, in equal chunks, until the iteration has its updates.

  Between chunks it heeds `stop` and checks the loss.

  Raises:
    FloatingPointError: the loss is NaN or infinite.
  """
  chunk = chunk_size(num_updates)
  with progress_bar(num_updates, 'learning', 'update', progress.num_updates) as bar:
    while progress.num_updates < num_updates:
      stop.check()
      start = time.perf_counter()
      metrics = agent.learn(chunk)
      progress.add(metrics, chunk, time.perf_counter() - start)
      bar.update(chunk)
      for name, mean in metrics.items():
        if not math.isfinite(mean):
          raise FloatingPointError(
            f'{name} is {mean} in iteration {progress.iteration}, within its updates up to '
            f'{progress.num_updates}; the last checkpoint is from before'
          )


# Results: the CSV, the config and the checkpoint.


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
        f'{_first_line(error)}'
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
          f'{_first_line(error)}'
        ) from error


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0][:500]


def _check_ranges(config: Any) -> None:
  names = [field.name for field in dataclasses.fields(config)]
  positive = [name for name in names if name.startswith('num_')]
  positive += ['batch_size', 'eval_steps', 'learning_rate', 'n_step']
  positive += ['target_network_update_period']
  for name in positive:
    if not getattr(config, name) > 0:
      raise ValueError(f'--{name}={getattr(config, name)}: expected more than 0')
  if config.replay_memory_gb is not None and not config.replay_memory_gb > 0:
    raise ValueError(f'--replay_memory_gb={config.replay_memory_gb}: expected more than 0')
  in_unit = [name for name in names if name.endswith(('_decay', '_epsilon', '_probability'))]
  for name in ('discount', *in_unit):
    if not 0 <= getattr(config, name) <= 1:
      raise ValueError(f'--{name}={getattr(config, name)}: expected a number in [0, 1]')
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'--seed={config.seed}: expected 0 or more, and less than 2^32')


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

  def __init__(self, config: Any, agent_name: str):
    """Checks what can be checked before data is loaded; writes nothing yet.

    Args:
      config: an agent's Config.
      agent_name: the name of its directory.

    Raises:
      ValueError: a flag's value is out of range, or the checkpoint there is of another run.
      FileExistsError: there are results, but no checkpoint that they belong to.
      OSError: the results or the checkpoint cannot be where the flags say.
    """
    _check_ranges(config)
    default = pathlib.Path('runs', agent_name, config.environment_name, str(config.seed))
    self._csv = CsvWriter(config.results_csv_path or default / 'results.csv')
    self._config_path = self._csv.path.with_name('config.json')
    self._checkpoint = Checkpoint(config.checkpoint_dir or self._csv.path.parent / 'checkpoint')
    # As JSON gives it back, so that a stored one compares equal.
    flag_values = json.loads(json.dumps(dataclasses.asdict(config)))
    self._identity = {'agent': agent_name, 'flags': flag_values}

    self._record = self._checkpoint.restore_record()
    self.progress = Progress(**self._record['progress']) if self._record else Progress()
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

  def resume(self, agent, logs: 'replay.Logs') -> Progress:
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

  def save(self, agent, progress: Progress) -> None:
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
    'offline_zoo', 'jax', 'jaxlib', 'dm-haiku', 'optax', 'rlax', 'numpy', 'ale-py', 'gymnasium',
    'opencv-python-headless', 'orbax-checkpoint',
  )  # fmt: skip
  return {
    'commit': _commit(),
    'device': jax.devices()[0].device_kind,
    'versions': {
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


# Flags and start-up.


def define_flags(config_class: type) -> None:
  """Defines an absl flag for each field of a Config dataclass.

  The flag has the field's name and default; its help text is the comment on the field's line. Types
  are int, float, bool, str and tuple[int, ...] (a comma-separated list), each also with `| None`.
  """
  comments = dict(re.findall(r'^  (\w+): .*?  # (.*)$', inspect.getsource(config_class), re.M))
  define: dict[Any, Callable] = {
    bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float,
    str: flags.DEFINE_string, tuple[int, ...]: flags.DEFINE_list,
  }  # fmt: skip
  for field in dataclasses.fields(config_class):
    kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if kind in define]
    define[kinds[0]](field.name, field.default, comments.get(field.name, ''))


def config_from_flags(config_class: type) -> Any:
  """The Config that the parsed flags ask for.

  Raises:
    ValueError: a flag has an empty value, or a list flag holds something other than integers.
  """
  values = {}
  for field in dataclasses.fields(config_class):
    value = flags.FLAGS[field.name].value
    if value == '':
      raise ValueError(f'--{field.name}=: expected a value, got nothing')
    if isinstance(value, list):
      try:
        value = tuple(int(item) for item in value)
      except ValueError:
        raise ValueError(f'--{field.name}: expected integers, got {",".join(value)}') from None
    values[field.name] = value
  return config_class(**values)


def _is_for_users(record: std_logging.LogRecord) -> bool:
  # Libraries' warnings pass. Orbax's do not: a failing save logs a page of tracebacks and raises.
  ours = pathlib.Path(record.pathname).is_relative_to(pathlib.Path(__file__).parent)
  return ours or (record.levelno >= std_logging.WARNING and 'orbax' not in record.pathname)


def _set_up_jax(jax_platform_name: str | None) -> None:
  if jax_platform_name:
    jax.config.update('jax_platforms', jax_platform_name)
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:
    raise ValueError(
      f'--jax_platform_name={jax_platform_name}: not to be had here: {_first_line(error)}'
    ) from error
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  # Otherwise recent NVIDIA GPUs multiply in TF32, with 10 bits of mantissa.
  jax.config.update('jax_default_matmul_precision', 'float32')


def run(main: Callable[[Any], None], config_class: type) -> None:
  """Runs a program's `main(config)` with a Config from the command line.

  What is wrong with the input (ValueError, OSError), with the learning (FloatingPointError) or with
  the machine's memory ends the program with one line and exit code 1; `--debug` shows the traceback
  as well.
  """
  define_flags(config_class)

  def start(argv: list[str]) -> None:
    # An exit, rather than sudden death, so that half-written files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.set_verbosity(logging.INFO)
    message = None
    try:
      if len(argv) > 1:
        raise ValueError(f'expected flags only, got {" ".join(argv[1:])}')
      config = config_from_flags(config_class)
      if not config.debug:
        logging.get_absl_handler().addFilter(_is_for_users)
      _set_up_jax(getattr(config, 'jax_platform_name', None))
      main(config)
    except (FloatingPointError, MemoryError, OSError, ValueError, jax.errors.JaxRuntimeError) as e:
      if flags.FLAGS.debug:
        raise
      message = f'error: {_first_line(e) or type(e).__name__}'
    except KeyboardInterrupt:
      message = 'interrupted'
    if message:  # not inside `except`, which would keep emulators alive until the interpreter's end
      print(message, file=sys.stderr)
      sys.exit(1)

  app.run(start)
