r"""Runs agents x seeds on many logs, each as a `run_atari` of its own, and goes on where it ended.

  python -m offline_zoo.studies.sweep sweep.toml --num_parallel=2

A sweep is described by a file such as

  directory = 'runs/laptop'
  agents = ['dqn', 'cql']
  seeds = [1, 2]
  flagfile = 'laptop.flags'           # if any: its name in each agent's directory
  flags = ['--num_iterations=20']     # if any: of every run
  evaluate = 20                       # if any: episodes of a last evaluation of what was learnt

  [[data]]                            # as often as there are logs, or parts of logs, to learn from
  name = 'freeway_mixed'
  environment_name = 'freeway'
  replay_dir = 'runs/laptop/freeway_mixed/logs'
  make = ['logs.demo', '--num_transitions=50000']  # if any: a program of ours that makes the logs

  [[data]]
  name = 'freeway_30k'
  environment_name = 'freeway'
  replay_dir = 'runs/laptop/freeway_mixed/logs'
  make = ['logs.demo', '--num_transitions=50000']  # the same: whoever comes first makes them
  flags = ['--max_random_transitions=30000']       # if any: of the runs on this data
  agents = ['cql']                    # if other ones than above; seeds likewise

Paths are relative to where the command is given. Programs that make logs are given --replay_dir
and, if they have it, --environment_name; they are started where the logs are missing, and what is
there is not compared with what they would make. A run is in <directory>/<name>/<agent>/<seed>: its
results.csv, config.json and checkpoint, evaluation.csv with the last evaluation's episodes, and
log.txt, which is locked for as long as anything runs there.

What is finished is not run again, so the same command goes on after any end of the sweep. What
failed is tried again when all else has begun. Several sweeps, on several machines, may share a
directory, if locks (flock) work there.

On a cluster, where the directories must be everywhere the same, one sweep hands its runs to Ray:

  python -m offline_zoo.studies.sweep sweep.toml --ray_address=auto --gpus_per_run=0.5

and with Slurm each run is a task of an array, whose script is written by

  python -m offline_zoo.studies.sweep sweep.toml --slurm_path=sweep.sh
"""

import collections
import contextlib
import dataclasses
import datetime
import heapq
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from absl import logging

from offline_zoo import logs, parts, program, results
from offline_zoo.logs import bundled
from offline_zoo.studies import plan

_PATIENCE = 0.2  # seconds until it is looked again whether something has ended
_REDRAWN_EVERY = 5.0  # seconds, on a terminal
_MAX_TAIL_BYTES = 2**16  # of a log, to look for an error in
_JAX_MEMORY_FRACTION = 0.75  # of a GPU, as JAX's processes claim it


@dataclasses.dataclass(frozen=True)
class Config:
  """How to run which sweep; each field but the first is a flag."""

  # What

  paths: tuple[str, ...]
  index: int | None = None  # runs this one alone; numbers as --dry_run prints them
  dry_run: bool = False  # only checks all, prints each run's command and how far it is
  num_retries: int = 2  # of a run that failed

  # Here

  num_parallel: int = 1  # runs at a time, each on cores of its own
  niceness: int = 0  # added to that of the runs; 19: they yield to everything
  minutes_between_tables: float = 10.0  # where the output is no terminal

  # On a cluster

  ray_address: str | None = None  # of the cluster's head; auto: this machine is part of it
  gpus_per_run: float = 0.0  # Ray: may be a fraction
  cpus_per_run: float = 1.0  # Ray: for its count only; cores are not pinned
  slurm_path: str | None = None  # writes a script for sbatch here, and runs nothing

  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    if len(self.paths) != 1:
      raise ValueError(f'expected one file that describes a sweep, got {len(self.paths)}')
    program.check_positive(self, 'num_parallel', 'minutes_between_tables')
    program.check_not_negative(self, 'num_retries', 'niceness', 'gpus_per_run', 'cpus_per_run')
    program.check(self, 'index', self.index is None or self.index >= 0, '0 or more')
    num_cores = len(os.sched_getaffinity(0))
    good = self.num_parallel <= num_cores
    program.check(self, 'num_parallel', good, f'at most {num_cores}, the number of cores')


# Running it.


class Attempt(Protocol):
  """A run, or the next step of it, that has been started."""

  run: plan.Run

  def error(self) -> str | None:
    """Says why it failed, '' if it ended well; None while it runs."""


class Executor(Protocol):
  """Where runs are run; a context, whose end stops what has not ended."""

  def __enter__(self) -> 'Executor': ...
  def __exit__(self, *unused) -> None: ...
  def has_room(self) -> bool:
    """Whether it takes one more."""

  def start(self, run: plan.Run) -> Attempt | None:
    """Starts a run, or its next step; None if another sweep is at it."""


def _error_line(text: str) -> str | None:
  """What a program of ours said was wrong; else its last line, if any."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  errors = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
  return program.printable((errors or lines or [''])[-1])[:500] or None


def _killed_by(code: int) -> str:
  """What ended a process with this negative exit code."""
  return f'killed by {signal.Signals(-code).name}'


class _Process:
  """A step of a run, in a process on some cores."""

  def __init__(
    self, run: plan.Run, step: plan.Step, file: BinaryIO, cores: Sequence[int], niceness: int, env
  ):
    self.run, self.cores = run, cores
    self._step, self.file, self._start = step, file, file.tell()
    module, *words = step.words
    self.process = subprocess.Popen(
      [
        sys.executable, '-m', 'offline_zoo.studies.child', str(os.getpid()),
        ','.join(map(str, cores)), str(niceness), f'offline_zoo.{module}', *words,
      ],
      stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
      start_new_session=True,  # Ctrl-C is for the sweep, which passes it on, once
    )  # fmt: skip

  def error(self) -> str | None:
    code = self.process.poll()
    if code is None:
      return None
    self.file.close()
    if code < 0:
      return _killed_by(code)
    if code == 0:
      return '' if plan.next_step(self.run) != self._step else 'ended before it was finished'
    with open(self._step.log, 'rb') as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(self._start, size - _MAX_TAIL_BYTES))
      text = file.read(_MAX_TAIL_BYTES).decode(errors='replace')
    return _error_line(text) or f'exit code {code}'


def shares(cores: Sequence[int], num_parallel: int) -> list[Sequence[int]]:
  """Divides cores among so many runs, as equally as possible."""
  ends = [len(cores) * i // num_parallel for i in range(num_parallel + 1)]
  return [cores[ends[i] : ends[i + 1]] for i in range(num_parallel)]


class Here:
  """Runs on this machine, each on cores of its own."""

  def __init__(self, num_parallel: int, niceness: int = 0):
    """Starts nothing yet."""
    self._free = shares(sorted(os.sched_getaffinity(0)), num_parallel)
    self._niceness = niceness
    self._started: list[_Process] = []
    self._env = dict(os.environ)
    if num_parallel > 1:  # so that they all find room on one GPU
      fraction = f'{_JAX_MEMORY_FRACTION / num_parallel:.3f}'
      self._env.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', fraction)

  def __enter__(self) -> 'Here':
    return self

  def __exit__(self, *unused) -> None:
    for attempt in self._started:
      if attempt.process.poll() is None:
        attempt.process.terminate()  # which saves what was learnt so far
    for attempt in self._started:
      attempt.process.wait()
      attempt.file.close()

  def has_room(self) -> bool:
    """Whether there are free cores."""
    for attempt in [a for a in self._started if a.process.poll() is not None]:
      self._started.remove(attempt)
      self._free.append(attempt.cores)
    return bool(self._free)

  def start(self, run: plan.Run) -> _Process | None:
    """Starts a run's next step."""
    step = plan.next_step(run)
    file = plan.lock(step.log) if step is not None else None
    if step is None or file is None:
      return None
    with contextlib.ExitStack() as unlocked:
      unlocked.enter_context(file)
      if plan.next_step(run) != step:  # another sweep has just done it
        return None
      if not (run.directory / 'results.csv').exists():  # of what was learnt before
        (run.directory / 'evaluation.csv').unlink(missing_ok=True)
      process = _Process(run, step, file, self._free[0], self._niceness, self._env)
      unlocked.pop_all()
    self._free.pop(0)
    self._started.append(process)
    return process


def run_all(
  runs: Sequence[plan.Run],
  executor: Executor,
  num_retries: int,
  display: 'Display',
) -> tuple[dict[plan.Run, str], bool]:
  """Runs what is not finished until all is, or a signal comes.

  Args:
    runs: in the order in which they begin.
    executor: where.
    num_retries: how often a run that failed is tried again.
    display: is told of all that happens.

  Returns:
    The runs that failed, with the reason; and whether a signal has come.
  """
  waiting = [run for run in runs if plan.next_step(run) is not None]
  running: list[Attempt] = []
  num_failures: collections.Counter[plan.Run] = collections.Counter()
  failed: dict[plan.Run, str] = {}

  def fail(run: plan.Run, error: str) -> None:
    num_failures[run] += 1
    if num_failures[run] <= num_retries:
      waiting.append(run)
      display.say(f'{run} failed, to be tried again: {error}')
    else:
      failed[run] = error
      display.say(f'{run} failed for good: {error}')

  with parts.StopSignal() as stop, executor:
    while waiting or running:
      stop.check()
      for attempt in list(running):
        error = attempt.error()
        if error is None:
          continue
        running.remove(attempt)
        if error:
          fail(attempt.run, error)
        else:
          waiting.insert(0, attempt.run)  # its next step, if any
      for run in list(waiting):
        if not executor.has_room():
          break
        if plan.next_step(run) is None:
          waiting.remove(run)
          display.say(f'{run} is finished')
          continue
        try:
          started = executor.start(run)
        except OSError as error:  # where its results or logs are to be
          waiting.remove(run)
          fail(run, program.first_line(error))
          continue
        if started:
          waiting.remove(run)
          running.append(started)
      display.update(failed)
      time.sleep(_PATIENCE)
  return failed, bool(stop.requested)


# Ray.


def _task(words: list[str], directory: str, memory_fraction: float) -> str:
  """In a worker of Ray: runs a program of ours; says what it said last, '' if all is well."""
  cores = ','.join(map(str, os.sched_getaffinity(0)))
  with tempfile.TemporaryFile() as file:
    process = subprocess.Popen(
      [sys.executable, '-m', 'offline_zoo.studies.child', str(os.getpid()), cores, '0', *words],
      cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
      env={'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{memory_fraction:.3f}', **os.environ},
      start_new_session=True,
    )  # fmt: skip
    try:
      while process.poll() is None:  # a wait for it could not be cancelled
        time.sleep(_PATIENCE)
    finally:
      process.terminate()  # if it is cancelled
      process.wait()
    file.seek(0)
    lines = file.read().decode(errors='replace').strip().splitlines()
  if process.returncode < 0:
    return _killed_by(process.returncode)
  return (lines or [f'exit code {process.returncode}'])[-1] if process.returncode else ''


class _OnRay:
  """A run that Ray was given."""

  def __init__(self, run: plan.Run, ray: Any, reference: Any):
    self.run, self._ray, self.reference = run, ray, reference

  def error(self) -> str | None:
    if not self._ray.wait([self.reference], timeout=0)[0]:
      return None
    try:
      said = self._ray.get(self.reference)
    except self._ray.exceptions.RayError as error:  # `_task` failed (the cause), or its worker died
      return program.first_line(getattr(error, 'cause', None) or error)
    return said.rpartition(f' {self.run}: ')[2]


class Ray:
  """Runs on a cluster: Ray says when and where, and is given a sweep of one run for each."""

  _PATIENCE = 60.0  # seconds for what is stopped to save

  def __init__(self, path: pathlib.Path, runs: Sequence[plan.Run], config: Config):
    """Joins the cluster.

    Args:
      path: of the file that describes the sweep.
      runs: all of it.
      config: how.

    Raises:
      ValueError: Ray is not installed.
      OSError: there is no such cluster.
    """
    try:
      import ray
    except ModuleNotFoundError as error:
      raise ValueError(
        f'--ray_address: needs {error.name}, which the extra `sweep` installs: '
        "pip install -e '.[sweep]'"
      ) from error
    self._ray: Any = ray
    self._path, self._runs = path, runs
    ray.init(address=config.ray_address, log_to_driver=False, logging_level='ERROR')
    # A task that fails is not Ray's to try again, but `run_all`'s.
    resources = {'num_cpus': config.cpus_per_run, 'num_gpus': config.gpus_per_run}
    self._task = ray.remote(_task).options(max_retries=0, **resources)
    self._memory_fraction = _JAX_MEMORY_FRACTION * min(config.gpus_per_run or 1, 1)
    self._started: list[Any] = []

  def __enter__(self) -> 'Ray':
    return self

  def __exit__(self, *unused) -> None:
    for reference in self._started:
      self._ray.cancel(reference)
    if self._started:
      self._ray.wait(self._started, num_returns=len(self._started), timeout=self._PATIENCE)
    self._ray.shutdown()

  def has_room(self) -> bool:
    """Says yes: what it cannot run yet, Ray keeps."""
    return True

  def start(self, run: plan.Run) -> _OnRay:
    """Gives Ray a run."""
    words = ['offline_zoo.studies.sweep', str(self._path), '--num_retries=0']
    words.append(f'--index={self._runs.index(run)}')
    self._started.append(self._task.remote(words, os.getcwd(), self._memory_fraction))
    return _OnRay(run, self._ray, self._started[-1])


# Slurm.


def slurm_script(path: pathlib.Path, runs: Sequence[plan.Run], num_retries: int) -> str:
  """Writes a script for sbatch, of which each task is one of the runs that are not finished.

  Raises:
    ValueError: all are.
  """
  left = [str(i) for i, run in enumerate(runs) if plan.next_step(run) is not None]
  if not left:
    raise ValueError(f'{path}: all runs are finished')
  words = ['offline_zoo.studies.sweep', str(path), f'--num_retries={num_retries}']
  command = shlex.join([sys.executable, '-m', *words])
  name = re.sub(r'[^\w.-]', '_', path.stem)
  return f"""\
#!/bin/bash
# Resources are for sbatch to say: sbatch --time=4:00:00 --cpus-per-task=4 --gres=gpu:1 <this file>
#SBATCH --job-name={name}
#SBATCH --array={','.join(left)}
#SBATCH --requeue
#SBATCH --open-mode=append
# A minute before the time is up, the run saves what it has learnt; the next sbatch goes on.
#SBATCH --signal=B:TERM@60
cd {shlex.quote(os.getcwd())} || exit 1
exec {command} --index="$SLURM_ARRAY_TASK_ID"
"""


# What is shown.


def seconds_left(of_runs: Mapping[plan.Run, plan.Status]) -> float | None:
  """Reckons how long it takes until all is learnt; None if no iteration has been measured yet.

  The updates that are left take as long as the agent's have taken so far, evaluation included; an
  agent's without any, as long as the others'. As many runs go on at a time as do now.
  """
  seconds: dict[str | None, float] = collections.defaultdict(float)
  updates: collections.Counter[str | None] = collections.Counter()
  for run, (_, progress) in of_runs.items():
    for agent in (run.agent, None):  # None: all
      seconds[agent] += progress.seconds
      updates[agent] += progress.iterations * run.config.num_updates_per_iteration
  if not updates[None]:
    return None
  ends = [0.0] * max(1, sum(status.state == 'running' for status in of_runs.values()))
  for state in ('running', 'waiting'):
    for run, status in of_runs.items():
      if status.state == state:
        agent = run.agent if updates[run.agent] else None
        left = run.num_updates - status.progress.iterations * run.config.num_updates_per_iteration
        heapq.heapreplace(ends, ends[0] + max(left, 0) * seconds[agent] / updates[agent])
  return max(ends)


def table(of_runs: Mapping[plan.Run, plan.Status], now: datetime.datetime) -> str:
  """Makes a table of agents and data, a word a seed, and a line that says when all is done."""

  def word(run: plan.Run, status: plan.Status) -> str:
    if status.state == 'running':
      return f'{status.progress.iterations}/{run.config.num_iterations}'
    return '-' if status.state == 'waiting' else status.state

  cells: dict[tuple[str, str], list[str]] = {}
  for run, status in of_runs.items():
    cells.setdefault((run.agent, run.data), []).append(word(run, status))
  data = list(dict.fromkeys(run.data for run in of_runs))
  agents = list(dict.fromkeys(run.agent for run in of_runs))
  lines = [['', *data]]
  lines += [[agent, *(' '.join(cells.get((agent, name), [])) for name in data)] for agent in agents]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = ['  '.join(map(str.ljust, line, widths)).rstrip() for line in lines]

  states = collections.Counter(status.state for status in of_runs.values())
  total = sum(run.num_updates for run in of_runs)
  made = sum(
    min(status.progress.iterations * run.config.num_updates_per_iteration, run.num_updates)
    for run, status in of_runs.items()
  )
  summary = (
    f'{states["done"]} of {len(of_runs)} runs done, {states["running"]} running, '
    f'{states["waiting"]} waiting, {states["failed"]} failed; {made:,} of {total:,} updates'
  )
  left = seconds_left(of_runs)
  if left is not None and states['running'] + states['waiting']:
    hours, minutes = divmod(round(left / 60), 60)
    end = now + datetime.timedelta(seconds=left)
    summary += f'; about {hours} h {minutes:02} min left, until {end:%a %H:%M}'
  return '\n'.join([*text, summary])


class Display:
  """Shows the table, drawn anew on a terminal, now and then elsewhere."""

  def __init__(self, runs: Sequence[plan.Run], minutes: float):
    """Shows nothing yet; `minutes` go by between two tables that are not on a terminal."""
    self._runs = runs
    self._is_terminal = sys.stdout.isatty()
    self._every = _REDRAWN_EVERY if self._is_terminal else 60 * minutes
    self._due = 0.0
    self._num_lines = 0  # of the table that is on the terminal

  def update(self, failed: Mapping[plan.Run, str]) -> None:
    """Shows the table if it is time; `failed` has what has failed for good."""
    if time.monotonic() >= self._due:
      self.show(failed)

  def show(self, failed: Mapping[plan.Run, str]) -> None:
    """Shows the table."""
    lines = table(plan.statuses(self._runs, failed), datetime.datetime.now()).splitlines()
    self._erase()
    if self._is_terminal:
      width = shutil.get_terminal_size().columns
      lines = [line[:width] for line in lines]  # a longer one would take two
      self._num_lines = len(lines)
    print('\n'.join(lines), flush=True)
    self._due = time.monotonic() + self._every

  def say(self, line: str) -> None:
    """Logs a line, above the table."""
    self._erase()
    logging.info(line)
    if self._is_terminal:
      self._due = 0.0

  def _erase(self) -> None:
    if self._num_lines:
      print(f'\x1b[{self._num_lines}F\x1b[J', end='', flush=True)
      self._num_lines = 0


def main(config: Config) -> None:
  path = pathlib.Path(config.paths[0])
  every_run = plan.read(path)
  for run in every_run:
    replay_dir = run.config.replay_dir
    is_missing = replay_dir not in bundled.NAMES and not logs.exist(replay_dir)
    if run.make is None and is_missing:
      raise ValueError(f'{path}: data {run.data!r}: there are no logs at {replay_dir}, and no make')
    try:
      bundled.find(replay_dir, run.config.environment_name)
    except ValueError as error:
      raise ValueError(f'{path}: data {run.data!r}: {error}') from error
  if config.slurm_path is not None and not config.dry_run:
    script = slurm_script(path, every_run, config.num_retries)
    results.write_atomically(pathlib.Path(config.slurm_path), script)
    logging.info('Script: %s', config.slurm_path)
    return
  runs = every_run
  if config.index is not None:
    good = config.index < len(runs)
    program.check(config, 'index', good, f'less than {len(runs)}, the number of runs')
    runs = [runs[config.index]]
  display = Display(runs, config.minutes_between_tables)
  if config.dry_run:
    for run in runs:
      words = shlex.join(['python', '-m', f'offline_zoo.{run.words[0]}', *run.words[1:]])
      print(f'{every_run.index(run)}  {run}  {words}')
    display.show({})
    return
  executor: Executor
  if config.ray_address is not None:
    executor = Ray(path, every_run, config)
  else:
    for run in runs:  # once, not in each run that begins at the same time
      if run.config.replay_dir in bundled.NAMES and plan.next_step(run) is not None:
        bundled.find_or_make(run.config.replay_dir, run.config.environment_name)
    executor = Here(config.num_parallel, config.niceness)
  failed, stopped = run_all(runs, executor, config.num_retries, display)
  display.show(failed)
  if failed and not stopped:
    reasons = '; '.join(f'{run}: {error}' for run, error in failed.items())
    raise ValueError(f'{len(failed)} of {len(runs)} failed: {reasons}')


if __name__ == '__main__':
  program.run(main, Config, arguments='paths')
