"""What every agent's `run_atari` must do with bad input, signals, kills and resumption.

The agents are found by listing: a new directory with a `run_atari.py` is covered as it appears.
"""

import csv
import fcntl
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from offline_zoo import atari_env, networks, parts, replay

PACKAGE = pathlib.Path(__file__).parent
AGENTS = sorted(path.parent.name for path in PACKAGE.glob('*/run_atari.py'))
TIMING_COLUMNS = ('updates_per_second', 'eval_frame_rate', 'seconds')

pytestmark = pytest.mark.parametrize('agent', AGENTS)


@pytest.fixture(scope='session')
def logs(golden):
  return golden / 'replay' / 'Breakout' / '1' / 'replay_logs'


@pytest.fixture
def settings(logs, tmp_path):
  """A tiny run: random evaluation, because Breakout waits for FIRE until the frame limit."""
  return {
    'environment_name': 'breakout',
    'replay_dir': str(logs),
    'shards': (0,),
    'results_csv_path': str(tmp_path / 'run' / 'results.csv'),
    'seed': 3,
    'num_iterations': 3,
    'num_updates_per_iteration': 4,
    'eval_steps': 1,
    'eval_epsilon': 1.0,
    'batch_size': 4,
    'target_network_update_period': 5,
  }


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
  original = parts.Results.resume

  def resume(self, agent):
    progress = original(self, agent)
    kept.append(agent.get_state())
    return progress

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts.Results, 'resume', resume)
    module.main(module.Config(**settings))  # the run is complete: only resumes
  return kept[0]


def undisturbed(agent: str, settings: dict, directory: pathlib.Path):
  settings = {**settings, 'results_csv_path': str(directory / 'undisturbed' / 'results.csv')}
  run_here(agent, settings)
  return rows(settings), learnt(agent, settings)


# What a run leaves behind.


def test_results(agent, settings, tmp_path):
  run_here(agent, settings)
  table = rows(settings)
  assert [row['iteration'] for row in table] == ['1', '2', '3']
  assert [row['num_updates'] for row in table] == ['4', '8', '12']
  assert [row['frame'] for row in table] == ['64', '128', '192']
  stream_mean = float(replay.load(settings['replay_dir'], [0]).mean_episode_return)
  for row in table:
    score = float(row['eval_episode_return'])
    assert float(row['normalized_return']) == pytest.approx((score - 1.7) / (30.5 - 1.7))
    assert float(row['dataset_episode_return']) == stream_mean
    assert int(row['eval_num_episodes']) == 1
    assert row['environment_name'] == 'breakout' and row['seed'] == '3'
    values = [value for name, value in row.items() if name != 'environment_name']
    assert np.isfinite([float(value) for value in values]).all()
  with open(settings['results_csv_path']) as file:
    assert set(TIMING_COLUMNS) < set(next(csv.reader(file)))
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['agent'] == agent and config['flags']['eval_epsilon'] == 1.0
  assert [session['from_iteration'] for session in config['sessions']] == [1]
  assert set(config['sessions'][0]['versions']) > {'jax', 'numpy', 'ale-py'}


# Resumption, bit for bit.


def test_more_iterations_go_on_where_a_run_ended(agent, settings, tmp_path):
  want = undisturbed(agent, settings, tmp_path)
  run_here(agent, {**settings, 'num_iterations': 1})
  assert len(rows(settings)) == 1
  run_here(agent, settings)
  assert rows(settings) == want[0]
  chex.assert_trees_all_equal(learnt(agent, settings), want[1])


def test_a_signal_while_learning(agent, settings, tmp_path, monkeypatch):
  monkeypatch.setattr(parts, 'MAX_UPDATES_PER_CHUNK', 1)
  want = undisturbed(agent, settings, tmp_path)
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
  assert rows(settings) == want[0]
  chex.assert_trees_all_equal(learnt(agent, settings), want[1])


def test_a_signal_while_evaluating(agent, settings, tmp_path, monkeypatch):
  want = undisturbed(agent, settings, tmp_path)
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
  assert rows(settings) == want[0]
  chex.assert_trees_all_equal(learnt(agent, settings), want[1])


def test_sigkill_at_random_moments(agent, settings, tmp_path):
  """Three kills; for many, run benchmarks/kill.sh."""
  num_kills = int(os.environ.get('OFFLINE_ZOO_NUM_KILLS', '3'))
  settings = {**settings, 'num_iterations': 3 * num_kills + 1}
  want = undisturbed(agent, settings, tmp_path)
  rng = np.random.default_rng(0)
  for _ in range(num_kills):
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
  assert rows(settings) == want[0]
  chex.assert_trees_all_equal(learnt(agent, settings), want[1])


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
    ({'target_network_update_period': -1}, 'target_network_update_period.*-1'),
  ],
)
def test_bad_flags_are_named_before_anything_is_written(agent, settings, changes, message):
  with pytest.raises((ValueError, OSError), match=message):
    run_here(agent, {**settings, **changes})
  assert not pathlib.Path(settings['results_csv_path']).parent.exists()


def test_logs_of_another_game(agent, settings, tmp_path):
  shard = replay.read_shard(settings['replay_dir'], 0)
  shard.action[5] = 4
  replay.write_shard(tmp_path / 'logs', 0, shard)
  with pytest.raises(ValueError, match=r'action_ckpt\.0\.gz: .*0 to 3.*another game'):
    run_here(agent, {**settings, 'replay_dir': str(tmp_path / 'logs')})


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'environment_name': 'pong'}, 'its --environment_name is breakout, not pong'),
    ({'learning_rate': 1e-3}, r'its --learning_rate is .*, not 0\.001'),
    ({'shards': (1,)}, r'its --shards is \[0\], not \[1\]'),
    ({'max_rows_per_shard': 100}, '--max_rows_per_shard is None, not 100'),
  ],
)
def test_a_checkpoint_of_another_run(agent, settings, changes, message):
  run_here(agent, {**settings, 'num_iterations': 1})
  before = rows(settings)
  with pytest.raises(ValueError, match=message):
    run_here(agent, {**settings, **changes})
  assert rows(settings) == before


def test_a_checkpoint_of_another_agent_or_network(agent, settings, monkeypatch):
  run_here(agent, {**settings, 'num_iterations': 1})
  with monkeypatch.context() as patch:
    torso = networks.nature_torso
    patch.setattr(networks, 'nature_torso', lambda *args: torso(*args)[:, :100])
    with pytest.raises(ValueError, match='another network'):
      run_here(agent, settings)
  results = parts.Results.__init__
  monkeypatch.setattr(
    parts.Results, '__init__', lambda self, config, name: results(self, config, 'other')
  )
  with pytest.raises(ValueError, match=f'its agent is {agent}, not other'):
    run_here(agent, settings)


def test_a_checkpoint_of_other_logs(agent, settings, tmp_path):
  """The same flags, but the logs at that place have changed."""
  shard = replay.read_shard(settings['replay_dir'], 0)
  settings = {**settings, 'replay_dir': str(tmp_path / 'logs')}
  replay.write_shard(settings['replay_dir'], 0, shard)
  run_here(agent, {**settings, 'num_iterations': 1})
  shard.reward[20] += 1
  replay.write_shard(settings['replay_dir'], 0, shard)
  with pytest.raises(ValueError, match="its logs' checksum is"):
    run_here(agent, settings)


def test_two_runs_do_not_share_a_directory(agent, settings, tmp_path):
  run_here(agent, {**settings, 'num_iterations': 1})
  other = {**settings, 'seed': 4, 'checkpoint_dir': str(tmp_path / 'elsewhere')}
  other['results_csv_path'] = settings['results_csv_path'].replace('results', 'others')
  with pytest.raises(FileExistsError, match=r'config\.json belongs to results\.csv'):
    run_here(agent, other)
  with open(tmp_path / 'run' / '.lock') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match='another run is writing'):
      run_here(agent, settings)


def test_results_without_their_checkpoint_are_not_overwritten(agent, settings, tmp_path):
  run_here(agent, {**settings, 'num_iterations': 1})
  before = rows(settings)
  with pytest.raises(FileExistsError, match=r'--results_csv_path=.*no checkpoint'):
    run_here(agent, {**settings, 'checkpoint_dir': str(tmp_path / 'elsewhere')})
  assert rows(settings) == before


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(agent, settings, monkeypatch):
  run_here(agent, {**settings, 'num_iterations': 1})
  before = rows(settings)
  sample = replay.sample

  def poisoned(*args):
    batch = sample(*args)
    return batch._replace(r_t=batch.r_t / 0)

  with monkeypatch.context() as patch:
    patch.setattr(replay, 'sample', poisoned)
    with pytest.raises(FloatingPointError, match=r'loss is (nan|inf) in iteration 2'):
      run_here(agent, settings)
    # Should only the parameters show it, after an iteration's last update, they are not saved.
    patch.setattr(parts.math, 'isfinite', lambda x: True)
    with pytest.raises(FloatingPointError, match='not finite after update'):
      run_here(agent, settings)
  assert rows(settings) == before
  run_here(agent, settings)
  assert len(rows(settings)) == 3


def test_a_full_disk_leaves_the_last_checkpoint(agent, settings):
  """Files of at most 100 kB, which is what a full disk looks like to a checkpoint."""
  run_here(agent, {**settings, 'num_iterations': 1})
  before = rows(settings), learnt(agent, {**settings, 'num_iterations': 1})
  failed = run_there(agent, settings, ('bash', '-c', 'ulimit -f 100; exec "$@"', '-'))
  assert failed.returncode == 1
  assert 'could not write a checkpoint, an earlier one is untouched' in failed.stderr
  assert 'Traceback' not in failed.stderr
  assert rows(settings) == before[0]
  chex.assert_trees_all_equal(learnt(agent, {**settings, 'num_iterations': 1}), before[1])
  checkpoints = pathlib.Path(settings['results_csv_path']).parent / 'checkpoint'
  assert len(os.listdir(checkpoints)) == 1


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--jax_platform_name=gpuu', 'error: --jax_platform_name=gpuu: not to be had here'),
    ('--replay_dir=', 'error: --replay_dir=: expected a value, got nothing'),
    ('--shards=a', 'error: --shards: expected integers, got a'),
  ],
)
def test_flags_that_only_a_command_line_has(agent, settings, flag, message):
  run = subprocess.run(
    [*command(agent, settings), flag],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 1
  assert message in run.stderr and 'Traceback' not in run.stderr


def test_errors_are_one_line_and_exit_code_1(agent, settings):
  settings = {**settings, 'replay_dir': '/nowhere/logs'}
  run = run_there(agent, settings)
  assert run.returncode == 1
  assert run.stderr.strip() == 'error: /nowhere/logs: no such replay directory'
  assert 'Traceback' in run_there(agent, {**settings, 'debug': True}).stderr
