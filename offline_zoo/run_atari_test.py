"""What every agent's `run_atari` must do with bad input, signals, kills and resumption.

The agents are found by listing: a new directory with a `run_atari.py` is covered as it appears.
"""

import csv
import fcntl
import functools
import importlib
import inspect
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from offline_zoo import atari_env, networks, parts, replay, results
from offline_zoo.logs import dqn_replay

PACKAGE = pathlib.Path(__file__).parent
AGENTS = sorted(path.parent.name for path in PACKAGE.glob('*/run_atari.py'))
NUM_KILLS = int(os.environ.get('OFFLINE_ZOO_NUM_KILLS', '1'))
NUM_ITERATIONS = 3 * NUM_KILLS + 1  # a kill comes before three more are done
TIMING_COLUMNS = ('updates_per_second', 'eval_frame_rate', 'seconds')

# An agent's tests share runs, so they go to the same process.
pytestmark = pytest.mark.parametrize(
  'agent', [pytest.param(agent, marks=pytest.mark.xdist_group(agent)) for agent in AGENTS]
)


@pytest.fixture(scope='session')
def logs(tmp_path_factory):
  """Six shards of noise, which share no tile, so that each takes as much memory."""
  directory = tmp_path_factory.mktemp('logs')
  rng = np.random.default_rng(0)
  for index in range(6):
    terminal = np.zeros(120, np.uint8)
    terminal[20::30] = 1
    shard = dqn_replay.Shard(
      observation=rng.integers(256, size=(120, 84, 84), dtype=np.uint8),
      action=rng.integers(4, size=120, dtype=np.int32),
      reward=rng.integers(-2, 3, size=120).astype(np.float32),
      terminal=terminal,
      add_count=119,
    )
    dqn_replay.ShardFiles(directory, index).write(shard)
  return directory


def make_settings(logs, directory) -> dict:
  """A tiny run, with two of six shards resident at a time.

  It evaluates a random policy, because Breakout waits for FIRE until the frame limit.
  """
  return {
    'environment_name': 'breakout',
    'replay_dir': str(logs),
    'shards': tuple(range(6)),
    'replay_memory_gb': 0.005,
    'results_csv_path': str(directory / 'run' / 'results.csv'),
    'seed': 3,
    'num_iterations': NUM_ITERATIONS,
    'num_updates_per_iteration': 4,
    'eval_steps': 1,
    'eval_epsilon': 1.0,
    'batch_size': 4,
    'target_network_update_period': 5,
  }


@pytest.fixture
def settings(logs, tmp_path):
  return make_settings(logs, tmp_path)


@pytest.fixture(scope='session')
def undisturbed(logs, tmp_path_factory):
  """Of each agent, an undisturbed run's settings, rows and learner state; made when asked for."""

  @functools.cache
  def run(agent: str):
    settings = make_settings(logs, tmp_path_factory.mktemp(f'undisturbed_{agent}'))
    run_here(agent, settings)
    return settings, rows(settings), learnt(agent, settings)

  return run


@pytest.fixture(scope='session')
def first_iteration(logs, tmp_path_factory):
  """Of each agent, the directory of a run's first iteration; made when asked for."""

  @functools.cache
  def run(agent: str) -> pathlib.Path:
    settings = make_settings(logs, tmp_path_factory.mktemp(f'first_{agent}'))
    run_here(agent, {**settings, 'num_iterations': 1})
    return pathlib.Path(settings['results_csv_path']).parent

  return run


@pytest.fixture
def after_one(agent, settings, first_iteration):
  """The settings of a run that has done its first iteration."""
  shutil.copytree(first_iteration(agent), pathlib.Path(settings['results_csv_path']).parent)
  return settings


def run_here(agent: str, settings: dict) -> None:
  module = importlib.import_module(f'offline_zoo.{agent}.run_atari')
  module.main(module.Config(**settings))


def command(agent: str, settings: dict) -> list[str]:
  flags = {**settings, 'shards': ','.join(map(str, settings['shards']))}
  return [
    *(sys.executable, '-m', f'offline_zoo.{agent}.run_atari'),
    *(f'--{name}={value}' for name, value in flags.items()),
  ]


def environment() -> dict[str, str]:
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(PACKAGE.parent)}


def run_there(agent: str, settings: dict, prefix=()) -> subprocess.CompletedProcess:
  return subprocess.run(
    [*prefix, *command(agent, settings)],
    env=environment(), capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip


def rows(settings: dict) -> list[dict[str, str]]:
  """The CSV without its timing columns."""
  with open(settings['results_csv_path'], newline='') as file:
    return [
      {name: value for name, value in row.items() if name not in TIMING_COLUMNS}
      for row in csv.DictReader(file)
    ]


def learnt(agent: str, settings: dict):
  """The learner state in the run's checkpoint."""
  kept = []
  module = importlib.import_module(f'offline_zoo.{agent}.run_atari')
  original = results.Results.resume

  def resume(self, agent, logs):
    progress = original(self, agent, logs)
    kept.append(agent.get_state())
    return progress

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(results.Results, 'resume', resume)
    module.main(module.Config(**settings))  # the run is complete: only resumes
  return kept[0]


# What a run leaves behind.


def test_results(agent, undisturbed):
  settings, table, _ = undisturbed(agent)
  numbers = range(1, NUM_ITERATIONS + 1)
  assert [int(row['iteration']) for row in table] == [*numbers]
  assert [int(row['num_updates']) for row in table] == [4 * i for i in numbers]
  assert [int(row['frame']) for row in table] == [64 * i for i in numbers]
  logs = replay.Logs(settings['replay_dir'], memory_gb=settings['replay_memory_gb'])
  assert logs.num_resident_shards == 2
  assert len({str(logs.resident_shards(i)) for i in numbers}) > 1
  for row in table:
    score = float(row['eval_episode_return'])
    assert float(row['normalized_return']) == pytest.approx((score - 1.7) / (30.5 - 1.7))
    assert float(row['dataset_episode_return']) == logs.mean_episode_return
    assert int(row['eval_num_episodes']) == 1
    assert row['environment_name'] == 'breakout' and row['seed'] == '3'
    values = [value for name, value in row.items() if name != 'environment_name']
    assert np.isfinite([float(value) for value in values]).all()
  with open(settings['results_csv_path']) as file:
    assert set(TIMING_COLUMNS) < set(next(csv.reader(file)))
  config = json.loads(
    pathlib.Path(settings['results_csv_path']).with_name('config.json').read_text()
  )
  assert config['agent'] == agent and config['flags']['eval_epsilon'] == 1.0
  assert [session['from_iteration'] for session in config['sessions']] == [1]
  assert set(config['sessions'][0]['versions']) > {'jax', 'numpy', 'ale-py'}


# Resumption, bit for bit.


def assert_as_undisturbed(agent: str, settings: dict, undisturbed) -> None:
  _, want_rows, want_state = undisturbed(agent)
  assert rows(settings) == want_rows
  chex.assert_trees_all_equal(learnt(agent, settings), want_state)


def test_more_iterations_go_on_where_a_run_ended(agent, after_one, undisturbed):
  assert len(rows(after_one)) == 1
  run_here(agent, after_one)
  assert_as_undisturbed(agent, after_one, undisturbed)


def test_a_signal_while_learning(agent, settings, tmp_path, monkeypatch):
  monkeypatch.setattr(parts, 'MAX_UPDATES_PER_CHUNK', 1)
  settings = {**settings, 'num_iterations': 2}
  other = {**settings, 'results_csv_path': str(tmp_path / 'other' / 'results.csv')}
  run_here(agent, other)
  learn_iteration, calls = parts.learn_iteration, []

  def interrupted(learner, progress, num_updates, stop):
    original = learner.learn

    def learn(n):
      calls.append(n)
      if len(calls) == 6:  # the second update of the second iteration
        os.kill(os.getpid(), signal.SIGTERM)
      return original(n)

    monkeypatch.setattr(learner, 'learn', learn)
    learn_iteration(learner, progress, num_updates, stop)

  with monkeypatch.context() as patch:
    patch.setattr(parts, 'learn_iteration', interrupted)
    run_here(agent, settings)
  assert len(calls) == 6
  assert len(rows(settings)) == 1
  run_here(agent, settings)
  assert rows(settings) == rows(other)
  chex.assert_trees_all_equal(learnt(agent, settings), learnt(agent, other))


def test_a_signal_while_evaluating(agent, settings, undisturbed, monkeypatch):
  step, calls = atari_env.AtariEnv.step, []

  def interrupted(self, action):
    calls.append(action)
    if len(calls) == 50:
      os.kill(os.getpid(), signal.SIGINT)
    return step(self, action)

  with monkeypatch.context() as patch:
    patch.setattr(atari_env.AtariEnv, 'step', interrupted)
    run_here(agent, settings)
  assert len(calls) == 50
  assert not os.path.exists(settings['results_csv_path'])  # no row yet
  run_here(agent, settings)
  assert_as_undisturbed(agent, settings, undisturbed)


def test_sigkill_at_random_moments(agent, settings, undisturbed):
  """A few kills; for many, run benchmarks/kill.sh."""
  rng = np.random.default_rng(list(agent.encode()))
  for _ in range(NUM_KILLS):
    process = subprocess.Popen(
      command(agent, settings), env=environment(), stderr=subprocess.PIPE, text=True
    )
    # After the checkpoint is restored, or one or two iterations later; then at any moment of
    # compiling, learning, evaluating or saving.
    num_lines = rng.integers(3)
    for line in process.stderr:
      num_lines -= 'iteration ' in line
      if num_lines < 0 or ('Checkpoint: ' in line and num_lines == 0):
        break
    time.sleep(rng.uniform(0, 1))
    process.kill()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
  assert run_there(agent, settings).returncode == 0
  assert_as_undisturbed(agent, settings, undisturbed)


def test_sigterm_ends_the_program_cleanly(agent, settings):
  settings = {**settings, 'num_iterations': 10_000}
  process = subprocess.Popen(
    command(agent, settings), env=environment(), stderr=subprocess.PIPE, text=True
  )
  for line in process.stderr:
    if 'iteration 2 of' in line:
      break
  process.send_signal(signal.SIGTERM)
  rest = process.stderr.read()
  assert process.wait(60) == 0
  assert 'SIGTERM: stopping' in rest and 'Traceback' not in rest
  assert len(rows(settings)) >= 2


# Bad input.


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'environment_name': 'brekout'}, "unknown game 'brekout'; did you mean 'breakout'"),
    ({'replay_dir': '/nowhere/logs'}, '/nowhere/logs: no such replay directory'),
    ({'shards': (0, 9)}, r'no shards \[9\]'),
    ({'n_step': 0}, '--n_step=0: expected more than 0'),
    ({'discount': 1.1}, r'--discount=1\.1'),
    ({'sticky_action_probability': -0.1}, 'sticky_action_probability'),
    ({'seed': -1}, '--seed=-1'),
    ({'batch_size': 0}, 'batch_size.*0'),
    ({'num_updates_per_iteration': 0}, 'num_updates_per_iteration.*0'),
    ({'eval_epsilon': 2.0}, r'eval_epsilon.*2\.0'),
    ({'learning_rate': 0.0}, r'learning_rate.*0\.0'),
    ({'target_network_update_period': -1}, 'target_network_update_period.*-1'),
  ],
)
def test_bad_flags_are_named_before_anything_is_written(agent, settings, changes, message):
  with pytest.raises((ValueError, OSError), match=message):
    run_here(agent, {**settings, **changes})
  assert not pathlib.Path(settings['results_csv_path']).parent.exists()


def test_logs_of_another_game(agent, settings, tmp_path):
  shutil.copytree(settings['replay_dir'], tmp_path / 'logs')
  shard = dqn_replay.ShardFiles(settings['replay_dir'], 0).read()
  shard.action[5] = 4
  dqn_replay.ShardFiles(tmp_path / 'logs', 0).write(shard)
  with pytest.raises(ValueError, match=r'action_ckpt\.0\.gz: .*0 to 3.*another game'):
    run_here(agent, {**settings, 'replay_dir': str(tmp_path / 'logs')})


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'environment_name': 'pong'}, 'its --environment_name is breakout, not pong'),
    ({'learning_rate': 1e-3}, r'its --learning_rate is .*, not 0\.001'),
    ({'shards': (1,)}, r'its --shards is \[0, 1, 2, 3, 4, 5\], not \[1\]'),
    ({'max_rows_per_shard': 100}, '--max_rows_per_shard is None, not 100'),
  ],
)
def test_a_checkpoint_of_another_run(agent, after_one, changes, message):
  before = rows(after_one)
  with pytest.raises(ValueError, match=message):
    run_here(agent, {**after_one, **changes})
  assert rows(after_one) == before


def test_a_checkpoint_of_another_agent_or_network(agent, after_one, monkeypatch):
  with monkeypatch.context() as patch:
    torso = networks.nature_torso
    patch.setattr(networks, 'nature_torso', lambda *args: torso(*args)[:, :100])
    with pytest.raises(ValueError, match='another network'):
      run_here(agent, after_one)
  original = results.Results.__init__
  monkeypatch.setattr(
    results.Results, '__init__', lambda self, config, agent_name: original(self, config, 'other')
  )
  with pytest.raises(ValueError, match=f'its agent is {agent}, not other'):
    run_here(agent, after_one)


def test_a_checkpoint_of_other_logs(agent, after_one, tmp_path):
  """The logs may move, but not change."""
  shutil.copytree(after_one['replay_dir'], tmp_path / 'logs')
  shard = dqn_replay.ShardFiles(after_one['replay_dir'], 0).read()
  shard.reward[20] += 1
  dqn_replay.ShardFiles(tmp_path / 'logs', 0).write(shard)
  with pytest.raises(ValueError, match="its logs' checksum is"):
    run_here(agent, {**after_one, 'replay_dir': str(tmp_path / 'logs')})


def test_two_runs_do_not_share_a_directory(agent, after_one, tmp_path):
  other = {**after_one, 'seed': 4, 'checkpoint_dir': str(tmp_path / 'elsewhere')}
  other['results_csv_path'] = after_one['results_csv_path'].replace('results', 'others')
  with pytest.raises(FileExistsError, match=r'config\.json belongs to results\.csv'):
    run_here(agent, other)
  with open(tmp_path / 'run' / '.lock') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match='another run is writing'):
      run_here(agent, after_one)


def test_results_without_their_checkpoint_are_not_overwritten(agent, after_one, tmp_path):
  before = rows(after_one)
  with pytest.raises(FileExistsError, match=r'--results_csv_path=.*no checkpoint'):
    run_here(agent, {**after_one, 'checkpoint_dir': str(tmp_path / 'elsewhere')})
  assert rows(after_one) == before


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(agent, after_one, monkeypatch):
  before = rows(after_one)
  first = learnt(agent, {**after_one, 'num_iterations': 1})
  sample = replay.sample

  def poisoned(*args):
    batch = sample(*args)
    return batch._replace(r_t=batch.r_t / 0)

  with monkeypatch.context() as patch:
    patch.setattr(replay, 'sample', poisoned)
    with pytest.raises(FloatingPointError, match=r'loss is (nan|inf) in iteration 2'):
      run_here(agent, after_one)
    # Should only the parameters show it, after an iteration's last update, they are not saved.
    patch.setattr(parts.math, 'isfinite', lambda x: True)
    with pytest.raises(FloatingPointError, match='not finite after update'):
      run_here(agent, after_one)
  assert rows(after_one) == before
  chex.assert_trees_all_equal(learnt(agent, {**after_one, 'num_iterations': 1}), first)


def test_a_full_disk_leaves_the_last_checkpoint(agent, after_one):
  """Files of at most 100 kB, which is what a full disk looks like to a checkpoint."""
  before = rows(after_one)
  first = learnt(agent, {**after_one, 'num_iterations': 1})
  failed = run_there(agent, after_one, ('bash', '-c', 'ulimit -f 100; exec "$@"', '-'))
  assert failed.returncode == 1
  assert 'could not write a checkpoint, an earlier one is untouched' in failed.stderr
  assert 'Traceback' not in failed.stderr
  assert rows(after_one) == before
  checkpoints = pathlib.Path(after_one['results_csv_path']).parent / 'checkpoint'
  assert len(os.listdir(checkpoints)) == 1
  chex.assert_trees_all_equal(learnt(agent, {**after_one, 'num_iterations': 1}), first)


def test_errors_are_one_line_and_exit_code_1(agent, settings):
  settings = {**settings, 'replay_dir': '/nowhere/logs'}
  run = run_there(agent, settings)
  assert run.returncode == 1
  assert run.stderr.strip() == 'error: /nowhere/logs: no such replay directory'
  assert 'Traceback' in run_there(agent, {**settings, 'debug': True}).stderr


# The creed: agents repeat each other's text rather than share it, so that each can be read alone.


# (agent, name): why this agent's is another than DQN's. None so far.
DIFFERENCES: dict[tuple[str, str], str] = {}


def test_agents_differ_only_where_they_are_listed_to(agent):
  """What learning and acting have in common must stay the same in every agent."""
  sources = []
  for name in (agent, 'dqn'):
    module = importlib.import_module(f'offline_zoo.{name}.agent')
    learner = next(
      member
      for member in vars(module).values()
      if hasattr(member, 'learn') and inspect.isclass(member)
    )
    methods = ('learn', 'reset', 'step', 'get_state', 'set_state', 'statistics')
    members = {method: vars(learner)[method] for method in methods}
    members['LearnerState'] = module.LearnerState
    sources.append({n: inspect.getsource(getattr(x, 'fget', x)) for n, x in members.items()})
  ours, theirs = sources
  for name in ours:
    if (agent, name) in DIFFERENCES:
      assert ours[name] != theirs[name], f'{name} is the same again: take it off DIFFERENCES'
    else:
      assert ours[name] == theirs[name], f'list in DIFFERENCES why {name} is another, or mend it'
