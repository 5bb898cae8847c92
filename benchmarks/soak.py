"""What must neither lose nor spoil a run, many times over; exits with 1 if anything does.

  python -m benchmarks.soak checkpoints --flips=200
  python -m benchmarks.soak kills --kills=50
  python -m benchmarks.soak workers --kills=20
  python -m benchmarks.soak growth --evaluations=30
  python -m benchmarks.soak starts --starts=50
  python -m benchmarks.soak shards --mutations=5000
  python -m benchmarks.soak cache --flips=200

Runs are tiny ones of every agent, on CPU and on a small torso. The last two need none: see
soak_logs.py. The test suite does a little of the same.
"""

import argparse
import collections
import contextlib
import csv
import logging as std_logging
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import numpy as np
import psutil
from absl import logging

from benchmarks import soak_logs
from offline_zoo import checkpoints, testing

PACKAGE = pathlib.Path(checkpoints.__file__).parent
AGENTS = sorted(path.parent.name for path in PACKAGE.glob('*/run_atari.py'))
TIMING_COLUMNS = ('updates_per_second', 'eval_frame_rate', 'seconds')

# Runs.


def make_settings(directory: pathlib.Path, num_iterations: int) -> dict[str, Any]:
  """The flags of a tiny run, whose logs are beside its directory.

  It evaluates a random policy, because Breakout waits for FIRE until the frame limit.
  """
  logs = directory.parent / 'logs'
  if not logs.exists():
    testing.write_logs(logs)
  return {
    'environment_name': 'breakout',
    'replay_dir': str(logs),
    'results_csv_path': str(directory / 'results.csv'),
    'num_iterations': num_iterations,
    'num_updates_per_iteration': 4,
    'eval_steps': 1,
    'eval_epsilon': 1.0,
    'num_eval_workers': 0,
    'batch_size': 4,
    'target_network_update_period': 5,
    # Of those that learn online, whose replay forgets.
    'warmup_steps': 60,
    'replay_capacity': 400,
    'num_processes': 1,
  }


def _kill_a_worker() -> None:
  if workers := multiprocessing.active_children():
    with contextlib.suppress(ValueError):  # is buried already
      np.random.default_rng().choice(np.array(workers, object)).kill()
      logging.info('killed a worker')


def _run(agent: str, settings: dict[str, Any], kill_workers: bool, sending: Connection) -> None:
  """Runs an agent's `main` and sends what it logs; an error's line begins with `error`.

  If wanted, a worker is killed at a random moment of every evaluation.
  """

  class Handler(std_logging.Handler):
    def emit(self, record):
      sending.send(record.getMessage())
      if kill_workers and record.getMessage().startswith(('iteration ', 'Checkpoint: ')):
        threading.Timer(np.random.default_rng().uniform(0, 2), _kill_a_worker).start()

  logging.set_verbosity(logging.INFO)
  logger = std_logging.getLogger('absl')
  logger.handlers, logger.propagate = [Handler()], False
  module = testing.run_atari(agent)
  with testing.small_torsos():
    try:
      module.main(module.Config(**testing.known_flags(module.Config, settings)))
    except Exception as error:
      sending.send(f'error: {type(error).__name__}: {error}')


@contextlib.contextmanager
def started(function: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
  """A process of `function(*args, sending)`, and the receiving end; it ends with the block.

  It is a copy of one that has imported all already.
  """
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([f'offline_zoo.{agent}.run_atari' for agent in AGENTS])
  receiving, sending = context.Pipe(duplex=False)
  process = context.Process(target=function, args=(*args, sending))
  process.start()
  sending.close()
  try:
    yield process, receiving
  finally:
    process.kill()
    process.join()


def messages(receiving: Connection) -> Iterator[Any]:
  """What a process sends until it ends."""
  with contextlib.suppress(EOFError):
    while True:
      yield receiving.recv()


def finish(agent: str, settings: dict[str, Any]) -> str:
  """Lets a run begin, or go on, and end; returns what went wrong."""
  with started(_run, agent, settings, False) as (process, receiving):
    errors = [message for message in messages(receiving) if message.startswith('error')]
    process.join()
    if errors or process.exitcode:
      return f'{agent}: ended with {process.exitcode}: {" ".join(errors)}'
  return ''


def restored(settings: dict[str, Any]) -> checkpoints.Checkpoint | None:
  directory = pathlib.Path(settings['results_csv_path']).with_name('checkpoint')
  return checkpoints.Checkpoints(directory).restore()


def is_same(one: checkpoints.Checkpoint, other: checkpoints.Checkpoint) -> bool:
  """Whether all arrays are the same, bit for bit."""
  contents = (
    {name: (array.dtype, array.shape, array.tobytes()) for name, array in saved.arrays.items()}
    for saved in (one, other)
  )
  return next(contents) == next(contents)


def differences(agent: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
  """What two runs that ended disagree in, but for timings."""
  tables = []
  for settings in (ours, theirs):
    with open(settings['results_csv_path'], newline='') as file:
      rows = [*csv.DictReader(file)]
    tables.append([{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in rows])
  one, other = restored(ours), restored(theirs)
  assert one is not None and other is not None
  # What an agent that learns online has played.
  csv_paths = [pathlib.Path(settings['results_csv_path']) for settings in (ours, theirs)]
  recordings = [[path.read_bytes() for path in p.parent.glob('recorded.play')] for p in csv_paths]
  agree = {
    'CSV': tables[0] == tables[1],
    'parameters': is_same(one, other),
    'recording': recordings[0] == recordings[1],
  }
  return [f'{agent}: not the {name} of the undisturbed run' for name in agree if not agree[name]]


# What is done to them. Each takes a number and a scratch directory, and returns what went wrong.


def flip_checkpoints(num_flips: int, scratch: pathlib.Path) -> list[str]:
  """Flips single bits of a run's two checkpoints, one at a time, and restores."""
  settings = make_settings(scratch / 'run', num_iterations=2)
  if error := finish(AGENTS[0], settings):
    return [error]
  directory = scratch / 'run' / 'checkpoint'
  newest = restored(settings)
  assert newest is not None
  # What is there when the newest is not.
  newest.path.rename(scratch / 'newest')
  before = restored(settings)
  assert before is not None
  (scratch / 'newest').rename(newest.path)

  rng = np.random.default_rng(0)
  files = sorted(p for p in directory.rglob('*') if p.is_file() and p.stat().st_size)
  outcomes: collections.Counter[str] = collections.Counter()
  faults = []
  for i in range(num_flips):
    # By turns each file is as likely as another, and each byte is.
    sizes = np.array([path.stat().st_size for path in files], float)
    path = files[rng.choice(len(files), p=None if i % 2 else sizes / sizes.sum())]
    place, bit = int(rng.integers(path.stat().st_size)), 1 << int(rng.integers(8))
    with open(path, 'r+b') as file:
      file.seek(place)
      (byte,) = file.read(1)
      file.seek(place)
      file.write(bytes([byte ^ bit]))
    with mock.patch.object(logging, 'warning') as warning:
      try:
        got = restored(settings)
      except ValueError:
        outcome = 'an error line'
      else:
        outcome = 'something else, in silence'
        for checkpoint, said in ((newest, 0), (before, 1)):
          if (
            got is not None
            and got.record == checkpoint.record
            and is_same(got, checkpoint)
            and warning.call_count == said
          ):
            outcome = 'the one before, and said so' if said else 'exactly what was saved'
    with open(path, 'r+b') as file:
      file.seek(place)
      file.write(bytes([byte]))
    outcomes[outcome] += 1
    if 'silence' in outcome:
      faults.append(f'bit {bit} of byte {place} of {path.relative_to(directory)}: {outcome}')
  for outcome, count in outcomes.items():
    print(f'{count} of {num_flips} flips: restored {outcome}')
  return faults


def kill_runs(num_kills: int, scratch: pathlib.Path, workers: bool = False) -> list[str]:
  """Kills runs of every agent at random moments, goes on, and compares with undisturbed runs."""
  faults = []
  num_killed_workers = 0
  for agent in AGENTS:
    kills = len(range(AGENTS.index(agent), num_kills, len(AGENTS)))
    # A kill comes before three more iterations are done.
    settings, undisturbed = (
      make_settings(scratch / f'{agent}_{name}', 3 * kills + 1)
      for name in ('killed', 'undisturbed')
    )
    if workers:
      for run in (settings, undisturbed):
        run['eval_steps'] = 1000
      settings['num_eval_workers'] = 2
    rng = np.random.default_rng([*agent.encode()])
    done = 0  # iterations that must not be lost
    for _ in range(kills):
      with started(_run, agent, settings, workers) as (process, receiving):
        # After the checkpoint is restored, or one or two iterations later; then at any moment of
        # compiling, learning, evaluating or saving.
        num_iterations = rng.integers(3)
        for line in messages(receiving):
          num_killed_workers += line == 'killed a worker'
          if line.startswith('iteration '):  # which is then saved
            done = max(done, int(line.split()[1]) - 1)
            num_iterations -= 1
          if num_iterations < 0 or (line.startswith('Checkpoint: ') and num_iterations == 0):
            break
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
          faults.append(f'{agent}: ended by itself, with {process.exitcode}')
      checkpoint = restored(settings)
      kept = len(checkpoint.record['progress']['rows']) if checkpoint else 0
      if kept < done:
        faults.append(f'{agent}: {done} iterations were saved, {kept} are left')
      done = kept
    errors = [error for run in (settings, undisturbed) if (error := finish(agent, run))]
    faults += errors or differences(agent, settings, undisturbed)
    print(f'{agent}: killed {kills} times, {settings["num_iterations"]} iterations', flush=True)
  if workers:
    print(f'at least {num_killed_workers} workers were killed, too')
  return faults


def kill_workers_too(num_kills: int, scratch: pathlib.Path) -> list[str]:
  """Kills runs and the workers that evaluate beside them; undisturbed runs have no workers."""
  return kill_runs(num_kills, scratch, workers=True)


def watch_growth(num_evaluations: int, scratch: pathlib.Path) -> list[str]:
  """Looks for growth of memory, descriptors and processes in a run of two workers."""
  settings = make_settings(scratch / 'run', num_evaluations) | {
    'num_eval_workers': 2, 'num_updates_per_iteration': 70, 'eval_steps': 300,
  }  # fmt: skip
  sizes = []
  with started(_run, AGENTS[0], settings, False) as (process, receiving):
    for line in messages(receiving):
      if line.startswith('iteration '):
        run = psutil.Process(process.pid)
        everything = psutil.Process().children(recursive=True)
        memory = sum(p.memory_full_info().uss for p in everything)
        sizes.append((memory / 1e6, run.num_fds(), len(everything)))
  if len(sizes) < num_evaluations:
    return ['the run ended by itself']
  # In the first third, workers start and everything is compiled. The least of several sizes, since
  # some are taken while a checkpoint is saved.
  third = num_evaluations // 3
  early, late = (np.min(part, axis=0) for part in (sizes[third:-third], sizes[-third:-1]))
  for name, size in (('early', early), ('late', late)):
    print(f'{name}: {size[0]:.0f} MB, {size[1]:.0f} descriptors, {size[2]:.0f} processes')
  grown = (late[0] > 1.1 * early[0], late[1] > early[1] + 2, late[2] > early[2])
  names = ('memory grows', 'descriptors are left open', 'processes are left')
  return [name for name, has in zip(names, grown, strict=True) if has]


def _start_onto_saves(
  agent: str, settings: dict[str, Any], num_starts: int, sending: Connection
) -> None:
  """Starts a run again whenever another process saves; sends how each start ended."""
  module = testing.run_atari(agent)
  config = module.Config(**testing.known_flags(module.Config, settings))
  saving = pathlib.Path(settings['results_csv_path']).with_name('checkpoint') / '.partial'
  rng = np.random.default_rng([*agent.encode()])
  sending.send('ready')
  for _ in range(num_starts):
    while not saving.exists():
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    was_saving = saving.exists()
    try:
      module.main(config)
    except BlockingIOError:
      sending.send('refused during a save' if was_saving else 'refused just after a save')
    except BaseException as error:
      sending.send(f'fault: {type(error).__name__}: {error}')
    else:
      sending.send('fault: a second start ran')
    while saving.exists():
      time.sleep(0.001)


def start_again(num_starts: int, scratch: pathlib.Path) -> list[str]:
  """Starts runs of every agent again while they save, and compares with undisturbed runs."""
  faults = []
  for agent in AGENTS:
    starts = len(range(AGENTS.index(agent), num_starts, len(AGENTS)))
    settings, undisturbed = (
      make_settings(scratch / f'{agent}_{name}', 2 * starts + 1)
      for name in ('shared', 'undisturbed')
    )
    with started(_start_onto_saves, agent, settings, starts) as (_, receiving):
      receiving.recv()
      error = finish(agent, settings)
      outcomes: collections.Counter[str] = collections.Counter()
      while receiving.poll(1) and outcomes.total() < starts:
        outcomes[receiving.recv()] += 1
    error = error or finish(agent, undisturbed)
    faults += [error] if error else differences(agent, settings, undisturbed)
    faults += [f'{agent}: {outcome}' for outcome in outcomes if outcome.startswith('fault')]
    if outcomes.total() < starts:
      faults.append(f'{agent}: only {outcomes.total()} of {starts} starts were made')
    print(f'{agent}: started again {dict(outcomes)}', flush=True)
  return faults


# The name of each, with that of its number and how large that is by default.
SOAKS: dict[str, tuple[Callable[[int, pathlib.Path], list[str]], str, int]] = {
  'checkpoints': (flip_checkpoints, 'flips', 200),
  'kills': (kill_runs, 'kills', 50),
  'workers': (kill_workers_too, 'kills', 20),
  'growth': (watch_growth, 'evaluations', 30),
  'starts': (start_again, 'starts', 50),
  'shards': (soak_logs.mutate_shards, 'mutations', 5000),
  'cache': (soak_logs.flip_cache, 'flips', 200),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  subparsers = parser.add_subparsers(dest='soak', required=True)
  for name, (function, number, default) in SOAKS.items():
    subparser = subparsers.add_parser(name, help=function.__doc__, description=function.__doc__)
    subparser.add_argument(f'--{number}', type=int, default=default)
  args = parser.parse_args()

  function, number, _ = SOAKS[args.soak]
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as scratch:
    # Many runs compile the same. Nothing is kept where the user's caches are.
    os.environ.update(
      JAX_PLATFORMS='cpu',
      JAX_COMPILATION_CACHE_DIR=f'{scratch}/compiled',
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1',
      XDG_CACHE_HOME=f'{scratch}/cache',
    )
    faults = function(getattr(args, number), pathlib.Path(scratch))
  print(f'{time.perf_counter() - start:.0f} s')
  for fault in faults:
    print(f'fault: {fault}', file=sys.stderr)
  sys.exit(1 if faults else 0)


if __name__ == '__main__':
  main()
