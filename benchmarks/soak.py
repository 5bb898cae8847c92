"""What must neither lose nor spoil a run, many times over; exits with 1 if anything does.

  python -m benchmarks.soak checkpoints --flips=200
  python -m benchmarks.soak kills --kills=50
  python -m benchmarks.soak starts --starts=50
  python -m benchmarks.soak shards --mutations=5000
  python -m benchmarks.soak cache --flips=200

Runs are tiny ones of every agent, on CPU. The last two need none: see soak_logs.py. The test suite
does a little of the same.
"""

import argparse
import collections
import contextlib
import csv
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

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
    'batch_size': 4,
    'target_network_update_period': 5,
  }


@contextlib.contextmanager
def started(agent: str, settings: dict[str, Any]) -> Iterator[subprocess.Popen]:
  """A run in a process of its own, which ends with the block."""
  with subprocess.Popen(
    [
      *(sys.executable, '-m', f'offline_zoo.{agent}.run_atari'),
      *(f'--{name}={value}' for name, value in settings.items()),
    ],
    cwd=PACKAGE.parent, stderr=subprocess.PIPE, text=True,
  ) as process:  # fmt: skip
    try:
      yield process
    finally:
      process.kill()


def finish(agent: str, settings: dict[str, Any]) -> str:
  """Lets a run begin, or go on, and end; returns what went wrong."""
  with started(agent, settings) as process:
    _, errors = process.communicate()
    return '' if process.returncode == 0 else f'{agent}: {errors.splitlines()[-1]}'


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
  return [f'{agent}: another CSV than the undisturbed run'] * (tables[0] != tables[1]) + [
    f'{agent}: other parameters than the undisturbed run'
  ] * (not is_same(one, other))


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
    with mock.patch.object(checkpoints.logging, 'warning') as warning:
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


def kill_runs(num_kills: int, scratch: pathlib.Path) -> list[str]:
  """Kills runs of every agent at random moments, goes on, and compares with undisturbed runs."""
  faults = []
  for agent in AGENTS:
    kills = len(range(AGENTS.index(agent), num_kills, len(AGENTS)))
    # A kill comes before three more iterations are done.
    settings, undisturbed = (
      make_settings(scratch / f'{agent}_{name}', 3 * kills + 1)
      for name in ('killed', 'undisturbed')
    )
    rng = np.random.default_rng([*agent.encode()])
    done = 0  # iterations that must not be lost
    for _ in range(kills):
      with started(agent, settings) as process:
        # After the checkpoint is restored, or one or two iterations later; then at any moment of
        # compiling, learning, evaluating or saving.
        num_iterations = rng.integers(3)
        assert process.stderr is not None
        for line in process.stderr:
          if 'iteration ' in line and ' of ' in line:  # which is then saved
            done = max(done, int(line.split('iteration ')[1].split()[0]) - 1)
            num_iterations -= 1
          if num_iterations < 0 or ('Checkpoint: ' in line and num_iterations == 0):
            break
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode != -signal.SIGKILL:
          faults.append(f'{agent}: ended by itself, with {process.returncode}')
      checkpoint = restored(settings)
      kept = len(checkpoint.record['progress']['rows']) if checkpoint else 0
      if kept < done:
        faults.append(f'{agent}: {done} iterations were saved, {kept} are left')
      done = kept
    errors = [error for run in (settings, undisturbed) if (error := finish(agent, run))]
    faults += errors or differences(agent, settings, undisturbed)
    print(f'{agent}: killed {kills} times, {settings["num_iterations"]} iterations', flush=True)
  return faults


def _start_onto_saves(
  agent: str,
  settings: dict[str, Any],
  num_starts: int,
  sending: multiprocessing.connection.Connection,
) -> None:
  """Starts a run again whenever another process saves; sends how each start ended."""
  module = importlib.import_module(f'offline_zoo.{agent}.run_atari')
  config = module.Config(**settings)
  saving = pathlib.Path(settings['results_csv_path']).with_name('checkpoint') / '.partial'
  rng = np.random.default_rng([*agent.encode()])
  sending.send('ready')
  for _ in range(num_starts):
    while not saving.exists():
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    was_saving = saving.exists()
    try:
      module.main(config)
    except BlockingIOError:
      sending.send('during a save' if was_saving else 'just after a save')
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
      make_settings(scratch / f'{agent}_{name}', starts + 3) for name in ('shared', 'undisturbed')
    )
    receiving, sending = multiprocessing.Pipe(duplex=False)
    second = multiprocessing.get_context('spawn').Process(
      target=_start_onto_saves, args=(agent, settings, starts, sending), daemon=True
    )
    second.start()
    receiving.recv()
    error = finish(agent, settings)
    outcomes: collections.Counter[str] = collections.Counter()
    while receiving.poll(1):
      outcomes[receiving.recv()] += 1
    second.terminate()
    second.join()
    error = error or finish(agent, undisturbed)
    faults += [error] if error else differences(agent, settings, undisturbed)
    faults += [f'{agent}: {outcome}' for outcome in outcomes if outcome.startswith('fault')]
    if outcomes.total() < starts:
      faults.append(f'{agent}: only {outcomes.total()} of {starts} starts were made')
    print(f'{agent}: started again {dict(outcomes)}', flush=True)
  return faults


# The name of each, with that of its number and how large that is by default.
SOAKS = {
  'checkpoints': (flip_checkpoints, 'flips', 200),
  'kills': (kill_runs, 'kills', 50),
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
