"""Tests for plan.py and sweep.py.

Most run stand-ins for the programs that a sweep starts, which take no time: `python -m` finds them
first where the sweep is started, in a package `offline_zoo` that has all else from the real one.
"""

import csv
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time
import types
from multiprocessing import forkserver

import pytest

from offline_zoo import program, results, testing
from offline_zoo.studies import evaluate, plan, runs, sweep
from offline_zoo.studies.plan import Progress, Status

PACKAGE = pathlib.Path(sweep.__file__).parents[1]
NUM_PARALLEL = min(2, len(os.sched_getaffinity(0)))
TIMING_COLUMNS = ('updates_per_second', 'eval_frame_rate', 'seconds')

# Does as the real program where it is imported; as a program, it stands in for it.
STAND_IN = """
import csv, json, os, pathlib, signal, sys, time
if __name__ != '__main__':
  __file__ = {real!r}
  exec(compile(open(__file__).read(), __file__, 'exec'))
else:
  flags = dict(word.lstrip('-').split('=', 1) for word in sys.argv[1:])
{body}
"""

# Learns nothing, an iteration in 30 ms; goes on from its checkpoint, the last rows. BCQ dies when
# it is started for the first time, CRR finds its input bad, SIGTERM is written down.
RUN = """
  directory = pathlib.Path(flags['results_csv_path']).parent
  def write(name, text):
    partial = directory / f'{{name}}.partial'
    partial.write_text(text)
    partial.rename(directory / name)
  def stop(*_):
    write('stopped', '')
    sys.exit()
  signal.signal(signal.SIGTERM, stop)
  first = not (directory / 'starts').exists()
  with open(directory / 'starts', 'a') as file:
    file.write(json.dumps([os.getpid(), sorted(os.sched_getaffinity(0)), os.nice(0)]) + '\\n')
  data, agent, seed = directory.parts[-3:]
  if agent == 'bcq' and first:
    os.kill(os.getpid(), signal.SIGKILL)
  if agent == 'crr':
    print('said before', file=sys.stderr)
    sys.exit('error: --alpha=-1: expected 0 or more')
  identities = pathlib.Path(os.environ['STAND_IN_IDENTITIES'])
  write('config.json', (identities / f'{{data}}-{{agent}}-{{seed}}').read_text())
  def write_csv():
    lines = [','.join(map(str, row.values())) for row in rows]
    write('results.csv', '\\n'.join([','.join(rows[0]), *lines]) + '\\n')
  rows = []
  if (directory / 'checkpoint').exists():
    rows = json.loads((directory / 'checkpoint').read_text())
    write_csv()  # which a kill may have left a row behind
  while len(rows) < int(flags['num_iterations']):
    time.sleep(0.03)
    i = len(rows) + 1
    rows.append({{
      'environment_name': flags['environment_name'], 'seed': seed, 'iteration': i,
      'num_updates': i * int(flags['num_updates_per_iteration']), 'eval_episode_return': i * i,
      'normalized_return': 0.5, 'dataset_episode_return': '', 'updates_per_second': 4.0,
      'seconds': 3.0,
    }})
    write('checkpoint', json.dumps(rows))
    write_csv()
"""

DEMO = """
  target = pathlib.Path(flags['replay_dir'])
  with open(target.with_name('made'), 'a') as file:
    file.write(flags['num_transitions'] + flags['environment_name'] + '\\n')
  time.sleep(0.1)
  target.mkdir()
"""

EVALUATE = """
  directory = pathlib.Path(flags['checkpoint_dir']).parent
  with open(directory / 'evaluations', 'a') as file:
    file.write('.')
  rows = json.loads((directory / 'checkpoint').read_text())
  with open(flags['csv_path'], 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow({columns})
    for i in range(int(flags['episodes'])):
      agent, row = directory.parts[-2], rows[-1]
      writer.writerow(
        [agent, row['environment_name'], row['seed'], row['num_updates'], 0, i + 1, 7.0]
      )
"""

# The real program, on a small torso.
SMALL = """
  from offline_zoo import program, testing
  from offline_zoo.dqn import run_atari
  with testing.small_torsos():
    program.run(run_atari.main, run_atari.Config)
"""

FILE = """
directory = 'runs'
agents = ['dqn', 'bc']
seeds = [1, 2]
flags = ['--num_iterations=5', '--num_updates_per_iteration=4', '--num_eval_workers=0']

[[data]]
name = 'noise'
environment_name = 'breakout'
replay_dir = 'logs'
"""


OTHER = """
[[data]]
name = 'other'
environment_name = 'breakout'
replay_dir = 'logs'
"""


def write_stand_ins(place: pathlib.Path, programs: dict[str, str]) -> None:
  """Writes the package that `python -m` finds first: these bodies, by name, and all else."""
  for name, body in programs.items():
    path = place / 'offline_zoo' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    body = body.format(columns=evaluate.EPISODE_COLUMNS)
    path.write_text(STAND_IN.format(real=str(PACKAGE / name), body=body))
    real = (PACKAGE / name).with_name('__init__.py')
    init = f'__path__.append({str(real.parent)!r})\n{real.read_text()}'
    path.with_name('__init__.py').write_text(init)
  init = f'__path__.append({str(PACKAGE)!r})\n__version__ = ""\n'
  (place / 'offline_zoo' / '__init__.py').write_text(init)


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
  """The current directory: with stand-ins, logs and sweep.toml."""
  programs = {f'{agent}/run_atari.py': RUN for agent in ('dqn', 'bc', 'bcq', 'crr')}
  write_stand_ins(tmp_path, programs | {'logs/demo.py': DEMO, 'studies/evaluate.py': EVALUATE})
  (tmp_path / 'logs').mkdir()
  (tmp_path / 'identities').mkdir()
  # What other tests fork from as well: before stand-ins can be found.
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['offline_zoo.studies.sweep_test'])
  forkserver.ensure_running()
  monkeypatch.setenv('STAND_IN_IDENTITIES', str(tmp_path / 'identities'))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def described(place: pathlib.Path, text: str = FILE) -> list[plan.Run]:
  """Writes sweep.toml; returns its runs, whose stand-ins know whose config.json to write."""
  (place / 'sweep.toml').write_text(text)
  found = plan.read(place / 'sweep.toml')
  for run in found:
    identity = {'agent': run.agent, 'flags': results._flag_values(run.config), 'sessions': []}
    (place / 'identities' / str(run).replace('/', '-')).write_text(json.dumps(identity))
  return found


class Told:
  """A display that keeps what it is told."""

  def __init__(self):
    self.lines = []

  def update(self, failed):
    pass

  def say(self, line):
    self.lines.append(line)


def run_all(chosen, num_retries=2, niceness=0, num_parallel=NUM_PARALLEL) -> list[str]:
  told = Told()
  failed, stopped = sweep.run_all(chosen, sweep.Here(num_parallel, niceness), num_retries, told)
  assert not stopped
  assert [f'{run} failed for good: {error}' for run, error in failed.items()] == [
    line for line in told.lines if 'for good' in line
  ]
  return told.lines


def starts(run: plan.Run) -> list[list]:
  path = run.directory / 'starts'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def returns(run: plan.Run) -> list[float]:
  with open(run.directory / 'results.csv', newline='') as file:
    return [float(row['eval_episode_return']) for row in csv.DictReader(file)]


# What is to be run.


def test_what_a_file_describes(place):
  (place / 'sweep.toml').write_text(f"""
    flagfile = 'laptop.flags'
    evaluate = 20
    {FILE}
    flags = ['--max_random_transitions=300']
    [[data]]
    name = 'demo'
    environment_name = 'freeway'
    replay_dir = 'runs/demo/logs'
    make = ['logs.demo', '--num_transitions=50', '--seed=3']
    agents = ['cql']
    seeds = [7]
  """)
  found = plan.read(place / 'sweep.toml')
  assert [str(run) for run in found] == [
    'noise/dqn/1', 'noise/bc/1', 'noise/dqn/2', 'noise/bc/2', 'demo/cql/7',
  ]  # fmt: skip
  config = found[2].config
  assert (config.environment_name, config.replay_dir, config.seed) == ('breakout', 'logs', 2)
  assert (config.num_iterations, config.max_random_transitions) == (5, 300)
  assert config.results_csv_path == 'runs/noise/dqn/2/results.csv'
  assert found[2].num_updates == 20 and found[2].make is None
  assert found[4].config.learning_rate == 0.0001  # of cql/laptop.flags
  assert found[4].config.max_random_transitions is None
  assert found[4].make == (
    'logs.demo', '--num_transitions=50', '--seed=3', '--environment_name=freeway',
    '--replay_dir=runs/demo/logs',
  )  # fmt: skip
  assert {run.num_eval_episodes for run in found} == {20}


@pytest.mark.parametrize(
  'old, new, message',
  [
    ("['dqn', 'bc']", "['dqm']", "data 'noise': unknown agent 'dqm'; there are bc, bcq, c51"),
    ("['dqn', 'bc']", "['bc', 'bc']", 'agents = .*one is there twice'),
    ("'breakout'", "'brekout'", "data 'noise': unknown game 'brekout'; did you mean 'breakout'"),
    ('directory', 'dir', "sweep.toml: unknown key 'dir'; there are directory, agents"),
    ("replay_dir", 'logs', "data 1: unknown key 'logs'"),
    ("directory = 'runs'\n", '', 'no directory; expected a string'),
    ("seeds = [1, 2]\n", '', 'data 1: no seeds; expected a list of integers'),
    ('[1, 2]', "['1']", r"seeds = \['1'\]: expected a list of integers"),
    ('[1, 2]', '[-1]', 'dqn: --seed=-1: expected 0 or more'),
    ('iterations=5', 'iteration=5', "dqn: Unknown command line flag 'num_iteration'"),
    ('iterations=5', 'iterations=0', 'dqn: --num_iterations=0: expected more than 0'),
    ("'--num_it", "'num_it", "expected such as --name=value, got 'num_iterations=5'"),
    ('num_iterations=5', 'seed=5', 'the sweep itself gives --seed'),
    ("'noise'", "'no/ise'", 'expected a name of letters, digits'),
    ("'logs'\n", "'none'\n", 'there are no logs at none, and no make'),
    ("'logs'\n", "'logs'\nmake = ['download']\n", r"make: expected logs\.demo or logs\.recorded"),
    ("'logs'\n", "'logs'\nmake = ['logs.demo', '--n=5']\n", "make: Unknown command line flag 'n'"),
    ("'logs'\n", "'logs'\nmake = ['logs.demo', 'x']\n", 'make: expected flags only, got x'),
    (
      "'logs'\n",
      "'logs'\nmake = ['logs.demo', '--policy=best']\n",
      'make: --policy=best: expected scripted or random',
    ),
    (
      "'logs'\n",
      "'logs'\nmake = ['logs.demo', '--recorded_path=x']\n",
      'make: --replay_dir=logs: expected none beside --recorded_path',
    ),
    ("'logs'\n", "'logs'\nmake = ['logs.recorded', 'expand']\n", 'make: --path=None: expected'),
    (
      "'logs'\n",
      "'logs'\nmake = ['logs.demo', '--replay_dir=x']\n",
      'the sweep itself gives --replay_dir',
    ),
    (
      "'breakout'\nreplay_dir = 'logs'\n",
      "'seaquest'\nreplay_dir = 'miniature'\n",
      'there is no seaquest; expected breakout, freeway',
    ),
    ("'logs'\n", "'demo'\nmake = ['logs.demo']\n", 'make: nothing, for demo is made by the runs'),
    ("'logs'\n", f"'logs'\n{FILE[FILE.index('[[data'):]}", "data 'noise': there are two of this"),
    ('directory', "flagfile = 'lap.flags'\ndirectory", r'dqn: .*dqn/lap\.flags'),
    ('flags = [', "evaluate = 2\nflags = ['--num_seeds=2', ", 'evaluate is of runs of one seed'),
    ('directory', 'evaluate = 0\ndirectory', 'evaluate = 0: expected a number of episodes'),
    ("'runs'", 'runs', r'sweep\.toml: not TOML'),
    ('flags = [', "flags = ['--num_seeds=2', ", 'dqn/2: --num_seeds=2: another run has'),
    ("workers=0']\n", f"workers=0', '--video_dir=v']\n{OTHER}", '--video_dir=v: a run on other'),
    ("'logs'\n", f"'logs'\nmake = ['logs.demo']\n{OTHER}", "data 'other': make: other data has"),
  ],
)  # fmt: skip
def test_all_is_checked_before_anything_starts(place, old, new, message):
  assert FILE.count(old) == 1
  (place / 'sweep.toml').write_text(FILE.replace(old, new))
  with pytest.raises(ValueError, match=message) as error:
    sweep.main(sweep.Config(('sweep.toml',)))
  assert '\n' not in program.first_line(error.value) and 'sweep.toml' in str(error.value)
  assert not (place / 'runs').exists()


def test_bad_flags():
  for values, message in (
    ({'paths': ()}, 'expected one file that describes a sweep, got 0'),
    ({'num_parallel': 1000}, '--num_parallel=1000: expected at most '),
    ({'index': -1}, '--index=-1: expected 0 or more'),
    ({'num_retries': -1}, '--num_retries=-1: expected 0 or more'),
  ):
    with pytest.raises(ValueError, match=message):
      sweep.Config(**{'paths': ('sweep.toml',), **values})


# Running it.


def test_what_is_finished_never_runs_again(place, capsys):
  found = described(place)
  assert sorted(run_all(found)) == sorted(f'{run} is finished' for run in found)
  assert [returns(run) for run in found] == [[1, 4, 9, 16, 25]] * 4
  assert run_all(found) == []
  sweep.main(sweep.Config(('sweep.toml',)))
  assert capsys.readouterr().out.splitlines() == [
    '     noise',
    'dqn  done done',
    'bc   done done',
    '4 of 4 runs done, 0 running, 0 waiting, 0 failed; 80 of 80 updates',
  ]
  assert [len(starts(run)) for run in found] == [1] * 4
  # More iterations are gone on with; with other flags, it is not the same run.
  longer = described(place, FILE.replace('iterations=5', 'iterations=6'))
  run_all(longer[:1])
  assert len(starts(found[0])) == 2 and returns(found[0])[-1] == 36
  # Nor on other logs.
  (place / 'others').symlink_to('logs')
  for old, new in (('per_iteration=4', 'per_iteration=5'), ("'logs'\n", "'others'\n")):
    others = described(place, FILE.replace(old, new))
    assert plan.progress_of(others[1]).iterations == 0


def test_who_fails_is_tried_again_and_does_not_stop_the_others(place):
  text = FILE.replace("'dqn', 'bc'", "'bcq', 'crr', 'dqn'").replace('[1, 2]', '[1]')
  found = described(place, text)
  lines = run_all(found, num_retries=2)
  bcq, _, dqn = found
  error = '--alpha=-1: expected 0 or more'
  assert [line for line in lines if 'crr' in line] == [
    *[f'noise/crr/1 failed, to be tried again: {error}'] * 2,
    f'noise/crr/1 failed for good: {error}',
  ]
  assert [line for line in lines if 'bcq' in line] == [
    'noise/bcq/1 failed, to be tried again: killed by SIGKILL', 'noise/bcq/1 is finished',
  ]  # fmt: skip
  assert [len(starts(run)) for run in found] == [2, 3, 1]
  assert returns(bcq) == returns(dqn) == [1, 4, 9, 16, 25]
  with pytest.raises(ValueError, match=f'1 of 3 failed: noise/crr/1: {error}$'):
    sweep.main(sweep.Config(('sweep.toml',), num_retries=0))
  assert [len(starts(run)) for run in found] == [2, 4, 1]


def test_a_place_that_cannot_be_is_a_failure_of_its_runs_alone(place):
  found = described(place)
  (place / 'runs' / 'noise').mkdir(parents=True)
  (place / 'runs' / 'noise' / 'dqn').touch()
  lines = run_all(found, num_retries=1)
  assert [line for line in lines if 'dqn/1' in line] == [
    "noise/dqn/1 failed, to be tried again: [Errno 20] Not a directory: 'runs/noise/dqn/1'",
    "noise/dqn/1 failed for good: [Errno 20] Not a directory: 'runs/noise/dqn/1'",
  ]
  failed = {run: '' for run in found if run.agent == 'dqn'}
  assert [status.state for status in plan.statuses(found, failed).values()] == [
    'failed', 'done', 'failed', 'done',
  ]  # fmt: skip


def test_cores_and_niceness(place):
  found = described(place)
  run_all(found, niceness=3)
  shares = sweep.shares(sorted(os.sched_getaffinity(0)), NUM_PARALLEL)
  seen = [start for run in found for start in starts(run)]
  assert sorted({tuple(cores) for _, cores, _ in seen}) == sorted(map(tuple, shares))
  assert {niceness for _, _, niceness in seen} == {os.nice(0) + 3}


def test_niceness_counts_among_sessions_too(tmp_path):
  """What the sweep is told, and what it has already: Linux divides time among sessions first."""
  if not os.path.exists('/proc/self/autogroup'):
    pytest.skip('no groups of sessions here')
  (tmp_path / 'shows.py').write_text(
    "import os; print(os.nice(0), open('/proc/self/autogroup').read())"
  )
  cores = ','.join(map(str, os.sched_getaffinity(0)))
  base = os.nice(0)
  shown = subprocess.run(
    ['nice', '-n', '2', sys.executable, '-c',
     'import os, subprocess, sys; '
     "child = [sys.executable, '-m', 'offline_zoo.studies.child', str(os.getpid())]; "
     f"subprocess.run([*child, {cores!r}, '3', 'shows'], start_new_session=True, check=True)"],
    cwd=tmp_path, capture_output=True, text=True, check=True,
  ).stdout.split()  # fmt: skip
  assert shown[0] == shown[-1] == str(min(base + 5, 19))


def test_a_child_whose_parent_has_ended():
  cores = ','.join(map(str, os.sched_getaffinity(0)))
  words = [str(os.getpid() + 1), cores, '0', 'this']
  run = subprocess.run([sys.executable, '-m', 'offline_zoo.studies.child', *words], check=False)
  assert run.returncode == 128 + signal.SIGTERM


def test_cores_are_divided_equally():
  assert sweep.shares([0, 2, 4, 6], 2) == [[0, 2], [4, 6]]
  assert sweep.shares([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
  assert sweep.shares([3], 1) == [[3]]


def test_logs_are_made_once_and_what_was_learnt_is_evaluated_once(place):
  text = FILE.replace('[[data', 'evaluate = 3\n[[data')
  text += "make = ['logs.demo', '--num_transitions=9']"
  text = text.replace("'logs'", "'runs/made/logs'").replace('=5', '=2')
  found = described(place, text)
  run_all(found)
  assert (place / 'runs/made/made').read_text() == '9breakout\n'
  for run in found:
    assert returns(run) == [1, 4] and (run.directory / 'evaluations').read_text() == '.'
    with open(run.directory / 'evaluation.csv', newline='') as file:
      rows = [*csv.DictReader(file)]
    assert [row['num_updates'] for row in rows] == ['8'] * 3
  assert run_all(found) == []
  longer = described(place, text.replace('iterations=2', 'iterations=3'))[:1]
  run_all(longer)
  assert (found[0].directory / 'evaluations').read_text() == '..'
  # What has learnt longer than it is told now is left as it is.
  assert described(place, text)[0] == found[0] and run_all(found) == []
  # What is begun anew is evaluated anew.
  for name in ('results.csv', 'config.json', 'checkpoint'):
    (found[1].directory / name).unlink()
  assert run_all(found) == [f'{found[1]} is finished']
  assert (found[1].directory / 'evaluations').read_text() == '..'
  # To one with other flags the run itself says what it makes of that; nothing is removed before.
  run_all(described(place, text.replace("iterations=2'", "iterations=2', '--batch_size=7'"))[:2])
  assert (found[1].directory / 'evaluations').read_text() == '..'


def sweep_there(place, environ, num_parallel) -> None:
  """In a process of its own, runs a sweep."""
  os.chdir(place)
  os.environ.update(environ)
  sweep.main(sweep.Config(('sweep.toml',), num_parallel=num_parallel))


def start_sweep(place, num_parallel=NUM_PARALLEL):
  """Starts `sweep_there`, as a copy of a process that has imported all already."""
  context = multiprocessing.get_context('forkserver')
  process = context.Process(target=sweep_there, args=(place, dict(os.environ), num_parallel))
  process.start()
  return process


def wait_for(condition) -> None:
  end = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < end, 'waited for two minutes'
    time.sleep(0.01)


def is_alive(pid: int) -> bool:
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def test_sigkill_at_random_moments(place):
  found = described(place, FILE.replace('iterations=5', 'iterations=12'))
  rng = random.Random(1)
  num_kills = 0

  def num_starts() -> int:
    return sum(len(starts(run)) for run in found)

  while num_kills < 6 and any(map(plan.next_step, found)):
    before = num_starts()
    process = start_sweep(place)
    wait_for(lambda before=before: num_starts() > before)
    process.join(rng.uniform(0, 0.3))
    process.kill()
    process.join()
    num_kills += 1
    pids = [start[0] for run in found for start in starts(run)]
    wait_for(lambda pids=pids: not any(map(is_alive, pids)))
  run_all(found)
  assert any(len(starts(run)) > 1 for run in found)
  assert [returns(run) for run in found] == [[i * i for i in range(1, 13)]] * 4


def test_what_a_killed_sweep_ran_saves_and_ends(place):
  (run, *_) = described(place, FILE.replace('iterations=5', 'iterations=400'))
  process = start_sweep(place)
  wait_for(lambda: (run.directory / 'results.csv').exists())
  process.kill()
  wait_for(lambda: not is_alive(starts(run)[0][0]))
  assert (run.directory / 'stopped').exists() and len(returns(run)) < 400


def test_sigterm_is_passed_on_once(place):
  found = described(place, FILE.replace('iterations=5', 'iterations=10000'))
  process = start_sweep(place)
  started = found[:NUM_PARALLEL]
  wait_for(lambda: all((run.directory / 'results.csv').exists() for run in started))
  os.kill(process.pid, signal.SIGTERM)
  process.join(120)
  assert process.exitcode == 0
  assert [run for run in found if starts(run)] == started
  for run in started:
    assert (run.directory / 'stopped').exists() and not is_alive(starts(run)[0][0])


def test_two_sweeps_share_a_directory(place):
  found = described(place, FILE.replace('iterations=5', 'iterations=20'))
  process = start_sweep(place)
  wait_for(lambda: (found[0].directory / 'results.csv').exists())
  assert plan.statuses(found, {})[found[0]].state == 'running'
  run_all(found)
  process.join(120)
  assert process.exitcode == 0
  assert [len(starts(run)) for run in found] == [1] * 4


# How far it is.


def test_the_estimated_end_by_hand(place):
  """DQN took 2 s an update, BC is yet to be measured: it is taken for as long."""
  found = described(place)
  dqn_1, bc_1, dqn_2, bc_2 = found
  status = {
    dqn_1: Status('running', Progress(2, 16.0)),  # 12 updates left: 24 s
    bc_1: Status('running', Progress(0, 0.0)),  # 20: 40 s
    dqn_2: Status('waiting', Progress(0, 0.0)),  # 40 s, from 24 on
    bc_2: Status('waiting', Progress(0, 0.0)),  # 40 s, from 40 on
  }
  assert sweep.seconds_left(status) == 80
  status[bc_1] = Status('done', Progress(5, 20.0))  # a second an update; one runs at a time
  assert sweep.seconds_left(status) == 24 + 40 + 20
  status[bc_2] = Status('failed', Progress(0, 0.0))
  assert sweep.seconds_left(status) == 24 + 40
  status[dqn_2] = Status('waiting', Progress(1, 40.0))  # DQN: 56 s for 12 updates
  assert sweep.seconds_left(status) == pytest.approx((12 + 16) * 56 / 12)
  assert sweep.table(status, datetime.datetime(2026, 11, 21, 23, 58, 30)).splitlines() == [
    '     noise',
    'dqn  2/5 -',
    'bc   done failed',
    '1 of 4 runs done, 1 running, 1 waiting, 1 failed; 32 of 80 updates; '
    'about 0 h 02 min left, until Sun 00:00',
  ]
  assert sweep.seconds_left({dqn_1: Status('waiting', Progress(0, 0.0))}) is None


def test_time_is_of_what_goes_on_at_a_time(place):
  """Rows of 4 updates at 4 a second, 3 s with evaluation: 1 s of learning, 2 s of evaluating."""
  found = described(place)
  run_all(found[:1])
  assert plan.progress_of(found[0]) == Progress(5, 15.0)
  beside = described(place, FILE.replace('workers=0', 'workers=1'))
  assert plan.progress_of(beside[0]) == Progress(5, 10.0)
  # Of five seeds, a second of learning and ten of evaluating an iteration.
  text = FILE.replace('workers=0', "workers=0', '--num_seeds=5").replace('[1, 2]', '[1]')
  several = described(place, text)
  (found[0].directory / 'config.json').write_text(
    (found[0].directory / 'config.json').read_text().replace('"num_seeds": 1', '"num_seeds": 5')
  )
  assert plan.progress_of(several[0]) == Progress(1, 11.0)


def test_damaged_results_do_not_end_the_sweep(place):
  found = described(place)
  run_all(found[:1])
  path = found[0].directory / 'results.csv'
  text = path.read_text()
  for damaged in ('', text.replace('4.0', 'x'), text.replace('4.0', '0.0'), '\0', 'a,b\n1'):
    path.write_text(damaged)
    assert plan.progress_of(found[0]) == Progress(0, 0.0)
  path.write_text(text)
  for damaged in ('[]', '{"agent": "dqn"}', '{"agent": "dqn", "flags": []}', '{'):
    (found[0].directory / 'config.json').write_text(damaged)
    assert plan.progress_of(found[0]) == Progress(0, 0.0)


def test_the_table_is_drawn_anew_on_a_terminal(place, capsys, monkeypatch):
  found = described(place)
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', '20')
  display = sweep.Display(found, 10.0)
  display.update({})
  assert capsys.readouterr().out.startswith('     noise\ndqn  - -\nbc   - -\n0 of 4 runs done, 0')
  display.update({})  # too soon
  assert capsys.readouterr().out == ''
  display.show({})
  assert capsys.readouterr().out.startswith('\x1b[4F\x1b[J     noise\n')
  display.say('something')
  assert capsys.readouterr().out == '\x1b[4F\x1b[J'
  display.update({})
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == '     noise' and len(lines) == 4 and max(map(len, lines)) == 20


# Clusters.


def test_a_slurm_task_is_one_run(place):
  found = described(place)
  run_all(found[:1])
  sweep.main(sweep.Config(('sweep.toml',), slurm_path='jobs/sweep.sh', num_retries=7))
  script = (place / 'jobs/sweep.sh').read_text()
  assert '\n#SBATCH --array=1,2,3\n' in script and ' --num_retries=7 --index=' in script
  assert script.startswith('#!/bin/bash\n')
  environ = {**os.environ, 'SLURM_ARRAY_TASK_ID': '2'}
  subprocess.run(['bash', place / 'jobs/sweep.sh'], cwd='/', env=environ, check=True)
  assert returns(found[2]) == [1, 4, 9, 16, 25]
  assert not found[1].directory.exists() and not found[3].directory.exists()
  run_all(found)
  with pytest.raises(ValueError, match=r'sweep\.toml: all runs are finished'):
    sweep.main(sweep.Config(('sweep.toml',), slurm_path='jobs/sweep.sh'))


def test_ray(place):
  """Two machines of one core, here; BCQ dies once, CRR's input is bad."""
  pytest.importorskip('ray', reason='needs Ray, which the extra `sweep` installs')
  from ray.cluster_utils import Cluster

  agents = FILE.replace("'dqn', 'bc'", "'dqn', 'bcq', 'crr'").replace('[1, 2]', '[1]')
  found = described(place, agents)
  cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})
  try:
    cluster.add_node(num_cpus=1)
    settings = {'ray_address': cluster.address, 'num_retries': 1}
    with pytest.raises(ValueError, match=r'1 of 3 failed: noise/crr/1: --alpha=-1: expected 0'):
      sweep.main(sweep.Config(('sweep.toml',), **settings))
  finally:
    cluster.shutdown()
  assert [len(starts(run)) for run in found] == [1, 2, 2]
  assert returns(found[0]) == returns(found[1]) == [1, 4, 9, 16, 25]


def test_what_ray_says_went_wrong(place):
  class RayError(Exception):
    pass

  def get(error):
    raise error

  ray = types.SimpleNamespace(
    exceptions=types.SimpleNamespace(RayError=RayError), wait=lambda *_, **__: ([1], []), get=get
  )
  died, failed = RayError('The worker died.\nSee'), RayError('\x1b[36mray::_task()\x1b[39m (pid=3)')
  failed.cause = FileNotFoundError(2, 'No such file or directory', '/checkout')
  run = described(place)[0]
  assert sweep._OnRay(run, ray, died).error() == 'The worker died.'
  assert "'/checkout'" in (sweep._OnRay(run, ray, failed).error() or '')


def test_without_ray(place, monkeypatch):
  described(place)
  monkeypatch.setitem(sys.modules, 'ray', None)
  with pytest.raises(ValueError, match=r'--ray_address: needs ray, which the extra `sweep`'):
    sweep.main(sweep.Config(('sweep.toml',), ray_address='auto'))


# With the real programs.


def test_a_real_sweep_killed_gives_what_an_undisturbed_run_gives(tmp_path, monkeypatch):
  write_stand_ins(tmp_path, {'dqn/run_atari.py': SMALL})
  monkeypatch.chdir(tmp_path)
  testing.write_noise('logs', 2)
  text = """
    directory = 'runs'
    agents = ['dqn']
    seeds = [3]
    flags = [
      '--num_iterations=3', '--num_updates_per_iteration=2', '--eval_steps=1', '--eval_epsilon=1',
      '--num_eval_workers=0', '--batch_size=4', '--jax_platform_name=cpu',
    ]
  """
  for name in ('killed', 'undisturbed'):
    text += f"""
    [[data]]
    name = '{name}'
    environment_name = 'breakout'
    replay_dir = 'logs'
    """
  (tmp_path / 'sweep.toml').write_text(text)
  killed, undisturbed = plan.read(tmp_path / 'sweep.toml')
  process = start_sweep(tmp_path, num_parallel=1)
  wait_for(lambda: (killed.directory / 'results.csv').exists())
  process.kill()
  process.join()
  assert plan.progress_of(killed).iterations < 3 and not undisturbed.directory.exists()
  # What was learnt until the kill may yet be being saved: the other then comes first.
  assert sorted(run_all([killed, undisturbed], num_parallel=1)) == [
    'killed/dqn/3 is finished', 'undisturbed/dqn/3 is finished',
  ]  # fmt: skip
  for run, count in ((killed, 1), (undisturbed, 0)):
    assert (run.directory / 'log.txt').read_text().count('Resuming in iteration') == count
  tables = []
  for run in (killed, undisturbed):
    (of_path,) = runs.read([run.directory / 'results.csv'])
    assert of_path.identity == ('dqn', 'breakout', 3)
    tables.append(
      [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in of_path.rows]
    )
  assert tables[0] == tables[1] and len(tables[0]) == 3
  # The last step of a sweep that says `evaluate = 2`.
  evaluated = dataclasses.replace(killed, num_eval_episodes=2)
  ((module, *words), _) = plan.next_step(evaluated)
  assert module == 'studies.evaluate'
  with testing.small_torsos():
    evaluate.main(program.parse_config(evaluate.Config, shlex.join(words)))
  assert plan.next_step(evaluated) is None
