"""What a run must do with bad input, signals, kills and resumption.

What agents can get wrong each by itself is tested of every one, on a small torso; the rest of one.
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import json
import logging as std_logging
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from absl import logging

from offline_zoo import (
  atari_data,
  atari_env,
  checkpoints,
  evaluation,
  parts,
  replay,
  results,
  seeds,
  testing,
  trained_agent,
)
from offline_zoo.logs import dqn_replay
from offline_zoo.studies import runs

PACKAGE = pathlib.Path(__file__).parent
AGENT = 'dqn'  # for what is the same in all
NUM_ITERATIONS = 4  # a kill comes before three are done
TIMING_COLUMNS = ('updates_per_second', 'eval_frame_rate', 'seconds')

# An agent's tests share runs, so they go to the same process.
every_agent = pytest.mark.parametrize(
  'agent', [pytest.param(agent, marks=pytest.mark.xdist_group(agent)) for agent in testing.AGENTS]
)
one_agent = pytest.mark.parametrize(
  'agent', [pytest.param(AGENT, marks=pytest.mark.xdist_group(AGENT))]
)


@pytest.fixture(scope='session')
def logs(tmp_path_factory):
  directory = tmp_path_factory.mktemp('logs')
  testing.write_noise(directory, 6)
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
    'num_eval_workers': 0,
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
    return settings, rows(settings), learnt(settings)

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
  """Runs an agent's `main` on a small torso, in chunks of two updates and short episodes."""
  module = testing.run_atari(agent)
  # Runs of this one, that evaluate in other processes too, compile as these do.
  compiled = contextlib.nullcontext() if agent == AGENT else testing.compiled_quickly()
  with pytest.MonkeyPatch.context() as patch, testing.small_torsos(), compiled:
    patch.setattr(parts, 'max_updates_per_chunk', lambda: 2)
    patch.setattr(parts, 'MAX_FRAMES_PER_EPISODE', 240)
    module.main(module.Config(**testing.known_flags(module.Config, settings)))


def run_in_child(agent: str, settings: dict, connection) -> None:
  """In a process of its own, the same; sends what it logs."""

  class Handler(std_logging.Handler):
    def emit(self, record):
      connection.send(record.getMessage())

  logging.set_verbosity(logging.INFO)
  std_logging.getLogger('absl').addHandler(Handler())
  run_here(agent, settings)


def start_child(agent: str, settings: dict):
  """Starts `run_in_child`, as a copy of a process that has imported all already."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['offline_zoo.run_atari_test'])
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=run_in_child, args=(agent, settings, sender))
  process.start()
  sender.close()
  return process, receiver


def command(agent: str, settings: dict) -> list[str]:
  flags = {**settings, 'shards': ','.join(map(str, settings['shards']))}
  return [
    *(sys.executable, '-m', f'offline_zoo.{agent}.run_atari'),
    *(f'--{name}={value}' for name, value in flags.items()),
  ]


def environment() -> dict[str, str]:
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(PACKAGE.parent)}


def run_there(agent: str, settings: dict) -> subprocess.CompletedProcess:
  return subprocess.run(
    command(agent, settings),
    env=environment(), capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip


def rows(settings: dict) -> list[dict[str, str]]:
  """The CSV without its timing columns."""
  with open(settings['results_csv_path'], newline='') as file:
    return [
      {name: value for name, value in row.items() if name not in TIMING_COLUMNS}
      for row in csv.DictReader(file)
    ]


def saved(settings: dict) -> checkpoints.Checkpoint:
  """The run's checkpoint."""
  directory = pathlib.Path(settings['results_csv_path']).with_name('checkpoint')
  checkpoint = checkpoints.Checkpoints(directory).restore()
  assert checkpoint is not None
  return checkpoint


def learnt(settings: dict) -> dict[str, np.ndarray]:
  """The learner state in the run's checkpoint: its arrays, by name."""
  return saved(settings).arrays


# What a run leaves behind.


@every_agent
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
  n_step = config['flags'].get('n_step', 1)
  assert config['replay'] == {
    'num_transitions': replay.Logs(settings['replay_dir'], n_step=n_step).num_transitions,
    'mean_episode_return': logs.mean_episode_return,
  }
  assert [session['from_iteration'] for session in config['sessions']] == [1]
  assert set(config['sessions'][0]['versions']) > {'jax', 'numpy', 'ale-py'}


@one_agent
def test_what_else_a_run_may_leave_does_not_disturb_it(agent, settings, undisturbed, tmp_path):
  settings |= {
    'num_iterations': 3, 'keep_checkpoints': 'all',
    'tensorboard_dir': str(tmp_path / 'board'), 'video_dir': str(tmp_path / 'video'),
  }  # fmt: skip
  run_here(agent, settings)
  assert rows(settings) == undisturbed(agent)[1][:3]
  run = pathlib.Path(settings['results_csv_path']).parent
  assert {'step_1', 'step_2', 'step_3'} < set(os.listdir(run / 'checkpoint'))
  below = pathlib.Path(agent, 'breakout', '3')
  assert sorted(os.listdir(tmp_path / 'video' / below)) == ['1.mp4', '2.mp4', '3.mp4']
  (events,) = (tmp_path / 'board' / below).iterdir()
  assert events.read_bytes().count(b'eval_episode_return') == 3


@one_agent
def test_a_rom_unlike_that_of_the_public_data_is_noted(agent, after_one, monkeypatch, caplog):
  settings = {**after_one, 'num_iterations': 1}  # is complete: only resumes
  run_here(agent, settings)
  assert 'another ROM' not in caplog.text
  monkeypatch.setitem(atari_data._ROM_MD5, 'breakout', ('', '0' * 32))
  run_here(agent, settings)
  assert caplog.text.count('logged with another ROM of breakout') == 1


# Resumption, bit for bit.


def assert_as_undisturbed(agent: str, settings: dict, undisturbed) -> None:
  _, want_rows, want_state = undisturbed(agent)
  assert rows(settings) == want_rows
  chex.assert_trees_all_equal(learnt(settings), want_state)


def interrupt(monkeypatch, owner, name: str, call: int, number: int):
  """Sends this process a signal when a function is called for the n-th time."""
  function, calls = getattr(owner, name), []

  def interrupted(*args):
    calls.append(args)
    if len(calls) == call:
      os.kill(os.getpid(), number)
    return function(*args)

  monkeypatch.setattr(owner, name, interrupted)
  return calls


@every_agent
def test_a_run_goes_on_where_it_was_stopped(agent, settings, undisturbed, monkeypatch):
  """After a signal in the midst of an iteration; after its end."""
  agent_class = testing.agent_class(testing.run_atari(agent).agent)
  with monkeypatch.context() as patch:
    calls = interrupt(patch, agent_class, 'learn', 5, signal.SIGTERM)  # the third iteration's first
    run_here(agent, settings)
  assert len(calls) == 5 and len(rows(settings)) == 2
  for _ in range(2):  # the second time, nothing is left to do
    run_here(agent, settings)
    assert_as_undisturbed(agent, settings, undisturbed)


@one_agent
def test_a_run_goes_on_where_its_own_evaluation_was_stopped(
  agent, settings, undisturbed, monkeypatch
):
  """After a signal in the midst of an iteration; after one while it evaluates that iteration."""
  agent_class = testing.agent_class(testing.run_atari(agent).agent)
  with monkeypatch.context() as patch:
    interrupt(patch, agent_class, 'learn', 5, signal.SIGTERM)  # the third iteration's first
    run_here(agent, settings)
  with monkeypatch.context() as patch:
    learnt_again = interrupt(patch, agent_class, 'learn', -1, signal.SIGTERM)
    calls = interrupt(patch, atari_env.AtariEnv, 'step', 50, signal.SIGINT)
    run_here(agent, settings)
  assert len(learnt_again) == 1 and len(calls) == 50 and len(rows(settings)) == 2
  run_here(agent, settings)
  assert_as_undisturbed(agent, settings, undisturbed)


@one_agent
@pytest.mark.parametrize('num_eval_workers', [0, 1])
@pytest.mark.parametrize('num_lines', [0, 1])
def test_a_sigkill_at_a_random_moment(agent, settings, undisturbed, num_lines, num_eval_workers):
  """One kill; for many, see benchmarks/soak.py."""
  settings |= {'num_eval_workers': num_eval_workers}
  rng = np.random.default_rng((num_lines, num_eval_workers))
  process, lines = start_child(agent, settings)
  # After the checkpoint is restored, or an iteration later; then at any moment of compiling,
  # learning, evaluating or saving. Three iterations take longer than the wait.
  while True:
    line = lines.recv()
    num_lines -= 'Checkpoint: ' in line or 'iteration ' in line
    if num_lines < 0:
      break
  time.sleep(rng.uniform(0, 0.25))
  process.kill()
  process.join()
  assert process.exitcode == -signal.SIGKILL
  run_here(agent, settings)
  assert_as_undisturbed(agent, settings, undisturbed)


# Evaluation beside learning.


@one_agent
@pytest.mark.parametrize('num_eval_workers', [1, 3])
def test_workers_change_nothing_but_the_time_it_takes(
  agent, settings, undisturbed, num_eval_workers
):
  settings |= {'num_eval_workers': num_eval_workers}
  run_here(agent, settings)
  assert_as_undisturbed(agent, settings, undisturbed)


@one_agent
@pytest.mark.parametrize('call', [4, 5])
def test_a_run_goes_on_where_an_evaluation_was_left(
  agent, settings, undisturbed, monkeypatch, call
):
  """The signal comes in the third iteration, while the second is evaluated; or before the third is.

  Two calls of `learn` make an iteration.
  """
  settings |= {'num_eval_workers': 2}
  play = evaluation.Workers.play

  def long(self, online_params, eval_steps, seed, iteration, video_path, cancelled):
    while iteration == 2 and not cancelled():
      time.sleep(0.01)
    return play(self, online_params, eval_steps, seed, iteration, video_path, cancelled)

  agent_class = testing.agent_class(testing.run_atari(agent).agent)
  with monkeypatch.context() as patch:
    patch.setattr(evaluation.Workers, 'play', long)
    interrupt(patch, agent_class, 'learn', call + 1, signal.SIGTERM)
    run_here(agent, settings)
  assert rows(settings) == undisturbed(agent)[1][:1]
  with monkeypatch.context() as patch:
    calls = interrupt(patch, agent_class, 'learn', -1, signal.SIGTERM)
    run_here(agent, settings)
  assert len(calls) == 4  # the second iteration's updates are kept
  assert_as_undisturbed(agent, settings, undisturbed)


@one_agent
def test_what_a_thread_cannot_save_ends_the_run(agent, after_one, monkeypatch):
  def save(self, state, progress):
    raise OSError(f'no room for iteration {progress.iteration - 1}')

  monkeypatch.setattr(results.Results, 'save', save)
  with pytest.raises(OSError, match='no room for iteration 2'):
    run_here(agent, {**after_one, 'num_eval_workers': 1})


@one_agent
def test_sigterm_ends_the_program_cleanly(agent, settings):
  settings = {**settings, 'num_iterations': 10_000, 'num_eval_workers': 1}
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


# Several seeds.


@pytest.fixture(scope='session')
def two_seeds(logs, tmp_path_factory):
  """The settings of a run of two seeds, made without a disturbance."""
  settings = make_settings(logs, tmp_path_factory.mktemp('two_seeds')) | {'num_seeds': 2}
  run_here(AGENT, settings)
  return settings


@one_agent
def test_several_seeds_are_each_as_alone(agent, settings, undisturbed, two_seeds, monkeypatch):
  """But for what is resident, which is drawn with the first seed."""
  load = replay.Logs
  monkeypatch.setattr(replay, 'Logs', lambda *args, **kwargs: load(*args, **kwargs | {'seed': 3}))
  run_here(agent, settings | {'seed': 4})
  alone = [undisturbed(agent)[1], rows(settings)]
  assert rows(two_seeds) == [row for iteration in zip(*alone, strict=True) for row in iteration]
  checkpoint = saved(two_seeds)
  chex.assert_trees_all_equal(checkpoint.part('[0]').arrays, undisturbed(agent)[2])
  chex.assert_trees_all_equal(checkpoint.part('[1]').arrays, learnt(settings))
  # Each seed's agent can be had from the checkpoint, and a report takes them for two runs.
  path = pathlib.Path(two_seeds['results_csv_path'])
  for seed, part in ((None, '[0]'), (4, '[1]')):
    with testing.small_torsos():
      trained = trained_agent.restore(path.with_name('checkpoint'), seed=seed)
    assert trained.seed == (seed or 3) and trained.num_updates == 4 * NUM_ITERATIONS
    state = trained.agent.get_state()
    chex.assert_trees_all_equal(state, checkpoint.part(part).state(state))
  assert [(run.seed, len(run.rows)) for run in runs.read([path])] == [(3, 4), (4, 4)]


@one_agent
def test_several_seeds_go_on_where_they_were_stopped(agent, settings, two_seeds, monkeypatch):
  """In an iteration; killed; while the second seed is evaluated. The rest is done with a worker."""
  settings |= {'num_seeds': 2}
  with monkeypatch.context() as patch:
    calls = interrupt(patch, seeds.Seeds, 'learn', 1, signal.SIGTERM)
    run_here(agent, settings)
  assert len(calls) == 1 and not os.path.exists(settings['results_csv_path'])
  process, lines = start_child(agent, settings)
  while 'iteration 1 of 4, seed 4: ' not in lines.recv():
    pass
  process.kill()
  process.join()
  assert process.exitcode == -signal.SIGKILL
  with monkeypatch.context() as patch:
    calls = interrupt(patch, evaluation, 'evaluate', 2, signal.SIGINT)
    run_here(agent, settings)
  assert len(calls) == 2
  run_here(agent, settings | {'num_eval_workers': 1})
  assert rows(settings) == rows(two_seeds)
  chex.assert_trees_all_equal(learnt(settings), learnt(two_seeds))


# Bad input.


@every_agent
def test_bad_flags_are_named_before_anything_is_written(agent, settings):
  for changes, message in (
    ({'environment_name': 'brekout'}, "unknown game 'brekout'; did you mean 'breakout'"),
    ({'replay_dir': '/nowhere/logs'}, '/nowhere/logs: no such replay directory'),
    ({'shards': (0, 9)}, r'no shards \[9\]'),
    ({'tensorboard_dir': '/proc/none'}, '--tensorboard_dir=/proc/none: cannot be written'),
    ({'video_dir': '/proc/none'}, '--video_dir=/proc/none: cannot be written'),
    ({'seed': 2**32 - 1, 'num_seeds': 2}, '--num_seeds=2: expected that --seed and those after'),
    ({'rom_dir': '/nowhere/roms'}, r'--rom_dir=/nowhere/roms: no breakout\.bin there'),
  ):
    with pytest.raises((ValueError, OSError), match=message):
      run_here(agent, {**settings, **changes})
    assert not pathlib.Path(settings['results_csv_path']).parent.exists()


@every_agent
def test_logs_of_another_game(agent, settings, tmp_path):
  shutil.copytree(settings['replay_dir'], tmp_path / 'logs')
  shard = dqn_replay.ShardFiles(settings['replay_dir'], 0).read()
  shard.action[5] = 4
  dqn_replay.ShardFiles(tmp_path / 'logs', 0).write(shard)
  with pytest.raises(ValueError, match=r'action_ckpt\.0\.gz: .*0 to 3.*another game'):
    run_here(agent, {**settings, 'replay_dir': str(tmp_path / 'logs')})


def test_logs_without_the_probabilities_that_an_agent_needs(settings, tmp_path):
  shutil.copytree(settings['replay_dir'], tmp_path / 'logs')
  (tmp_path / 'logs' / '$store$_prob_ckpt.3.gz').unlink()
  settings = {**settings, 'replay_dir': str(tmp_path / 'logs')}
  with pytest.raises(FileNotFoundError, match=r'prob_ckpt\.3\.gz: expected the probabilities'):
    run_here('off_policy_dqn', settings)
  assert not pathlib.Path(settings['results_csv_path']).parent.exists()


# What may change while a run is under way: where its files are, its length, and the machine.
FREE_FLAGS = {
  'replay_dir', 'replay_cache_dir', 'replay_memory_gb', 'results_csv_path', 'checkpoint_dir',
  'tensorboard_dir', 'video_dir', 'num_iterations', 'jax_platform_name', 'compilation_cache_dir',
  'num_eval_workers', 'debug',
}  # fmt: skip
OTHERS = {
  'environment_name': 'pong', 'shards': (1,), 'keep_checkpoints': 'all', 'first_fraction': 0.5,
  'top_fraction': 0.5, 'padding': 'VALID',
}  # fmt: skip


@one_agent
def test_a_checkpoint_of_another_run(agent, after_one):
  before = rows(after_one)
  config = testing.run_atari(agent).Config(**after_one)
  for field in dataclasses.fields(config):
    if field.name in FREE_FLAGS:
      continue
    value = getattr(config, field.name)
    if field.name in OTHERS or isinstance(value, bool):
      other = OTHERS.get(field.name, not value)
    else:
      other = 100 if value is None else value + 1 if isinstance(value, int) else value / 2
    with pytest.raises(ValueError, match=f'of another run: its --{field.name} is '):
      run_here(agent, {**after_one, field.name: other})
  assert rows(after_one) == before


@one_agent
def test_what_may_change_on_resumption(agent, after_one, undisturbed, tmp_path):
  for source, target in ((after_one['replay_dir'], 'logs'), (tmp_path / 'run', 'moved')):
    shutil.copytree(source, tmp_path / target)
  changes = {
    'replay_dir': tmp_path / 'logs',
    'replay_cache_dir': 'none',
    'replay_memory_gb': 1.0,  # six shards would fit, but the run goes on with two at a time
    'results_csv_path': tmp_path / 'moved' / 'results.csv',
    'checkpoint_dir': tmp_path / 'moved' / 'checkpoint',
    'tensorboard_dir': tmp_path / 'board',
    'video_dir': tmp_path / 'video',
    'num_iterations': 2,
    'jax_platform_name': 'cpu',
    'compilation_cache_dir': 'none',
    'num_eval_workers': 1,
    'debug': True,
  }
  assert changes.keys() == FREE_FLAGS
  settings = {**after_one, **{k: str(v) if 'dir' in k or 'path' in k else v
                              for k, v in changes.items()}}  # fmt: skip
  run_here(agent, settings)
  assert rows(settings) == undisturbed(agent)[1][:2]


@one_agent
def test_a_checkpoint_of_another_agent_or_network(agent, after_one, monkeypatch):
  with monkeypatch.context() as patch:
    torso = testing.small_torso
    patch.setattr(testing, 'small_torso', lambda *args: torso(*args)[:, :100])
    with pytest.raises(ValueError, match='another network'):
      run_here(agent, after_one)
  original = results.Results.__init__
  monkeypatch.setattr(
    results.Results, '__init__', lambda self, config, agent_name: original(self, config, 'other')
  )
  with pytest.raises(ValueError, match=f'its agent is {agent}, not other'):
    run_here(agent, after_one)


@one_agent
def test_a_checkpoint_of_other_logs(agent, after_one, tmp_path):
  """The logs may move, but not change."""
  shutil.copytree(after_one['replay_dir'], tmp_path / 'logs')
  shard = dqn_replay.ShardFiles(after_one['replay_dir'], 0).read()
  shard.reward[20] += 1
  dqn_replay.ShardFiles(tmp_path / 'logs', 0).write(shard)
  with pytest.raises(ValueError, match="its logs' checksum is"):
    run_here(agent, {**after_one, 'replay_dir': str(tmp_path / 'logs')})


@one_agent
def test_two_runs_do_not_share_a_directory(agent, after_one, tmp_path):
  other = {**after_one, 'seed': 4, 'checkpoint_dir': str(tmp_path / 'elsewhere')}
  other['results_csv_path'] = after_one['results_csv_path'].replace('results', 'others')
  with pytest.raises(FileExistsError, match=r'config\.json belongs to results\.csv'):
    run_here(agent, other)
  with open(tmp_path / 'run' / '.lock') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match='another run is writing'):
      run_here(agent, after_one)


@one_agent
def test_results_without_their_checkpoint_are_not_overwritten(agent, after_one, tmp_path):
  before = rows(after_one)
  with pytest.raises(FileExistsError, match=r'--results_csv_path=.*no checkpoint'):
    run_here(agent, {**after_one, 'checkpoint_dir': str(tmp_path / 'elsewhere')})
  assert rows(after_one) == before


@one_agent
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(agent, after_one, monkeypatch):
  before = rows(after_one)
  first = learnt(after_one)
  sample = replay.sample

  def poisoned(*args):
    batch = sample(*args)
    return batch._replace(r_t=batch.r_t / 0)

  with monkeypatch.context() as patch:
    patch.setattr(replay, 'sample', poisoned)
    with pytest.raises(FloatingPointError, match=r'loss is (nan|inf) in iteration 2'):
      run_here(agent, after_one)
    # Should only the parameters show it, after an iteration's last update, they are not saved.
    agent_class = testing.agent_class(testing.run_atari(agent).agent)
    learn = agent_class.learn
    patch.setattr(agent_class, 'learn', lambda self, n: dict.fromkeys(learn(self, n), 0.0))
    with pytest.raises(FloatingPointError, match='not finite after update'):
      run_here(agent, after_one)
  assert rows(after_one) == before
  chex.assert_trees_all_equal(learnt(after_one), first)


@one_agent
def test_one_infinite_parameter_is_not_saved(agent, after_one, monkeypatch):
  agent_class = testing.agent_class(testing.run_atari(agent).agent)
  get_state = agent_class.get_state

  def one_infinite(self):
    state = get_state(self)
    jax.tree.leaves(state.online_params)[-1].flat[0] = np.inf if state.num_updates == 8 else 0.0
    return state

  monkeypatch.setattr(agent_class, 'get_state', one_infinite)
  with pytest.raises(FloatingPointError, match='not finite after update 0 of iteration 3'):
    run_here(agent, after_one)
  assert len(rows(after_one)) == 1


@one_agent
def test_a_full_disk_leaves_the_last_checkpoint(agent, after_one):
  """Files of at most 100 kB, which is what a full disk looks like to a checkpoint."""
  before = rows(after_one)
  first = learnt(after_one)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises(OSError, match='could not write a checkpoint, an earlier one is untouched'):
      run_here(agent, after_one)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert rows(after_one) == before
  directory = pathlib.Path(after_one['results_csv_path']).parent / 'checkpoint'
  assert sorted(os.listdir(directory)) == ['.lock', 'step_1']
  chex.assert_trees_all_equal(learnt(after_one), first)


@one_agent
def test_errors_are_one_line_and_exit_code_1(agent, settings):
  settings = {**settings, 'replay_dir': '/nowhere/logs'}
  run = run_there(agent, settings)
  assert run.returncode == 1
  assert run.stderr.strip() == 'error: /nowhere/logs: no such replay directory'
  assert 'Traceback' in run_there(agent, {**settings, 'debug': True}).stderr
