"""Tests for parts.py: the run loop, trackers, evaluation, results, checkpoints and flags."""

import csv
import dataclasses
import io
import os
import resource
import signal
import subprocess
import sys

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from offline_zoo import parts


class Counting(dm_env.Environment):
  """Episodes of 10, 11, 12, ... frames after the first; the reward of frame n is n."""

  def __init__(self, length: int = 10):
    self._length = length

  def reset(self):
    self._frame = 0
    return dm_env.restart(0)

  def step(self, action):
    self._frame += 1
    if self._frame == self._length:
      self._length += 1
      return dm_env.termination(float(self._frame), self._frame)
    return dm_env.transition(float(self._frame), self._frame)

  def observation_spec(self):
    raise NotImplementedError

  action_spec = observation_spec


class Echo:
  """Answers a timestep with 100 more than what it shows; its state value is half of that."""

  def __init__(self):
    self.seen, self.keys, self.num_resets = [], [], 0
    self.statistics = {}

  def reset(self, rng_key=None):
    self.num_resets += 1
    if rng_key is not None:
      self.keys.append(rng_key)

  def step(self, timestep):
    self.seen.append(timestep)
    self.statistics = {'state_value': (timestep.observation + 100) / 2}
    return timestep.observation + 100


def take(loop, num_episodes: int) -> list:
  steps = []
  for step in loop:
    steps.append(step)
    num_episodes -= step[1].last()
    if not num_episodes:
      return steps
  raise AssertionError('the loop must not end')


def test_run_loop_yields_every_frame_and_the_answer_to_it():
  agent, environment = Echo(), Counting()
  steps = take(parts.run_loop(agent, environment), 2)
  assert [s[1].observation for s in steps] == [*range(11), *range(12)]
  assert [s[3] for s in steps] == [*range(100, 110), None, *range(100, 111), None]
  assert all(s[0] is environment and s[2] is agent for s in steps)
  assert [s[1] for s in steps] == agent.seen
  assert agent.num_resets == 2


def test_run_loop_ends_an_episode_at_the_frame_limit():
  steps = take(parts.run_loop(Echo(), Counting(), max_frames_per_episode=4), 2)
  assert [s[1].observation for s in steps] == [0, 1, 2, 3, 4] * 2
  assert [s[1].last() for s in steps] == [False, False, False, False, True] * 2
  assert steps[4][1].discount == 1.0  # cut, not ended by the game
  # An end by the game on the very frame of the limit stays one.
  steps = take(parts.run_loop(Echo(), Counting(), max_frames_per_episode=10), 1)
  assert steps[-1][1].discount == 0.0


def test_trackers_by_hand():
  episodes, rate = parts.EpisodeTracker(), parts.FrameRateTracker()
  value = parts.StateValueTracker()
  for step in parts.run_loop(Echo(), Counting()):
    for tracker in (episodes, rate, value):
      tracker.step(*step)
    if len(episodes.episode_returns) == 2:
      break
  # Episodes of 10 and 11 frames are 3 agent steps each: of 4, 4 and 2 or 3 frames.
  assert episodes.num_steps == 6
  assert episodes.get() == {
    'episode_return': (55 + 66) / 2,
    'episode_clipped_return': 3.0,
    'num_episodes': 2,
  }
  assert value.get()['state_value'] == np.mean([*range(100, 110), *range(100, 111)]) / 2
  assert rate.get()['frame_rate'] == pytest.approx(21 / rate.get()['seconds'], rel=0.5)


def test_clipping_is_of_agent_steps_not_frames():
  tracker = parts.EpisodeTracker()
  tracker.step(None, dm_env.restart(0), None, 0)
  for reward in (0.5, 0.25, 0, 0, -3, 1, 0, 0, 1, -1, 7, 0):
    tracker.step(None, dm_env.transition(reward, 0), None, 0)
  tracker.step(None, dm_env.termination(-0.5, 0), None, None)
  assert tracker.get()['episode_clipped_return'] == 0.75 - 1 + 1 - 0.5
  assert tracker.get()['episode_return'] == 0.75 - 2 + 7 - 0.5


@pytest.mark.parametrize('eval_steps, num_episodes', [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_evaluate_plays_whole_episodes_until_enough_steps(eval_steps: int, num_episodes: int):
  key = jax.random.PRNGKey(5)
  agent = Echo()
  result = parts.evaluate(agent, Counting(), eval_steps, key)
  assert result['eval_num_episodes'] == num_episodes
  lengths = np.arange(10, 10 + num_episodes)
  assert result['eval_episode_return'] == np.mean(lengths * (lengths + 1) / 2)
  assert agent.keys == [key]


def test_evaluation_seeds_differ():
  seeds = [parts.evaluation_seed(seed, i) for seed in range(20) for i in range(20)]
  assert len({environment_seed for environment_seed, _ in seeds}) == 400
  assert len({tuple(np.asarray(key)) for _, key in seeds}) == 400
  np.testing.assert_array_equal(parts.evaluation_seed(3, 4)[1], parts.evaluation_seed(3, 4)[1])


# Learning.


@pytest.mark.parametrize('num_updates, size', [(62_500, 250), (1, 1), (1000, 250), (202, 202),
                                               (404, 202), (257, 1), (251 * 2, 2)])  # fmt: skip
def test_chunks_are_equal(num_updates: int, size: int):
  assert parts.chunk_size(num_updates) == size


class Learner:
  """Its loss is the number of the update; metrics are means over a chunk."""

  def __init__(self, bad_update: int | None = None):
    self.num_updates = 0
    self.chunks = []
    self._bad_update = bad_update

  def learn(self, num_updates):
    updates = np.arange(self.num_updates, self.num_updates + num_updates) + 1.0
    updates[updates == self._bad_update] = np.inf
    self.num_updates += num_updates
    self.chunks.append(num_updates)
    return {'loss': float(updates.mean()), 'q_logged_action': 2.0}


def test_learn_iteration_averages_over_all_its_updates():
  learner, progress = Learner(), parts.Progress()
  with parts.StopSignal() as stop:
    parts.learn_iteration(learner, progress, 1000, stop)
  assert learner.chunks == [250] * 4
  assert progress.means() == {'loss': 500.5, 'q_logged_action': 2.0}


def test_a_loss_that_is_not_finite_stops_the_run():
  progress = parts.Progress()
  with (
    pytest.raises(FloatingPointError, match=r'loss is inf in iteration 1.* up to 750'),
    parts.StopSignal() as stop,
  ):
    parts.learn_iteration(Learner(bad_update=700), progress, 1000, stop)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_learning_after_its_chunk(number):
  class Interrupted(Learner):
    def learn(self, num_updates):
      metrics = super().learn(num_updates)
      if self.num_updates == 500:
        os.kill(os.getpid(), number)
      return metrics

  learner, progress = Interrupted(), parts.Progress()
  before = signal.getsignal(number)
  with parts.StopSignal() as stop:
    parts.learn_iteration(learner, progress, 1000, stop)
    raise AssertionError('not left')
  assert stop.requested
  assert progress.num_updates == learner.num_updates == 500
  assert signal.getsignal(number) is before


def test_a_signal_ends_an_evaluation():
  class Interrupted(Echo):
    def step(self, timestep):
      if len(self.seen) == 17:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().step(timestep)

  agent = Interrupted()
  with parts.StopSignal() as stop:
    parts.evaluate(agent, Counting(), 1000, jax.random.PRNGKey(0), stop)
    raise AssertionError('not left')
  assert stop.requested and len(agent.seen) == 18


def test_other_errors_leave_the_block_as_they_are():
  with pytest.raises(ZeroDivisionError), parts.StopSignal():
    raise ZeroDivisionError


# Results.


def read_csv(path) -> list[dict[str, str]]:
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def test_csv_rows_read_back_and_none_is_empty(tmp_path):
  path = tmp_path / 'new' / 'results.csv'
  writer = parts.CsvWriter(path)
  assert not path.exists()
  rows = [{'iteration': 1, 'loss': 0.1 + 0.2, 'normalized_return': None}]
  writer.write(rows)
  rows.append({'iteration': 2, 'loss': 1e-9, 'normalized_return': 0.5})
  writer.write(rows)
  got = read_csv(path)
  assert [float(row['loss']) for row in got] == [0.1 + 0.2, 1e-9]
  assert [row['normalized_return'] for row in got] == ['', '0.5']
  assert os.listdir(path.parent) == ['results.csv']


def test_a_failing_csv_write_leaves_the_old_rows(tmp_path, monkeypatch):
  writer = parts.CsvWriter(tmp_path / 'results.csv')
  writer.write([{'iteration': 1}])

  def full_disk(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space'):
    writer.write([{'iteration': 1}, {'iteration': 2}])
  assert len(read_csv(writer.path)) == 1
  assert os.listdir(tmp_path) == ['results.csv']


def test_csv_paths_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').touch()
  for path in (tmp_path, tmp_path / 'file' / 'results.csv', '/proc/none/results.csv'):
    with pytest.raises(OSError, match='--results_csv_path='):
      parts.CsvWriter(path)


def state(value: float, width: int = 3):
  return {'w': np.full(width, value, np.float32), 'n': np.array(value, np.int32)}


def test_checkpoints_restore_the_newest_bit_for_bit(tmp_path):
  checkpoint = parts.Checkpoint(tmp_path / 'checkpoint')
  assert checkpoint.restore_record() is None
  for value in (0.1, 0.2, 0.3):
    checkpoint.save(state(value), {'rows': [value, None, 'x'], 'nested': {'sum': value / 3}})
  record = parts.Checkpoint(tmp_path / 'checkpoint').restore_record()
  assert record == {'rows': [0.3, None, 'x'], 'nested': {'sum': 0.3 / 3}}
  restored = checkpoint.restore_state(state(0))
  np.testing.assert_array_equal(restored['w'], state(0.3)['w'])
  assert restored['n'].dtype == np.int32
  assert len(os.listdir(tmp_path / 'checkpoint')) == 1  # the older ones are gone


@pytest.mark.parametrize('other', [state(0, 4), {'v': np.zeros(3, np.float32)}])
def test_a_checkpoint_of_another_network_is_refused(tmp_path, other):
  checkpoint = parts.Checkpoint(tmp_path)
  checkpoint.save(state(1), {})
  with pytest.raises(ValueError, match='another network') as error:
    checkpoint.restore_state(other)
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_a_damaged_checkpoint_is_named(tmp_path):
  checkpoint = parts.Checkpoint(tmp_path)
  checkpoint.save(state(1), {'a': 1})
  for path in tmp_path.rglob('*'):
    if path.is_file() and 'record' in str(path):
      path.write_text('{')
  with pytest.raises(ValueError, match='damaged'):
    checkpoint.restore_record()


def test_a_checkpoint_directory_that_is_a_file(tmp_path):
  (tmp_path / 'file').touch()
  for path in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/none/checkpoint'):
    with pytest.raises(OSError, match='--checkpoint_dir='):
      parts.Checkpoint(path)


def test_a_disk_that_fills_up_under_orbax_leaves_the_last_checkpoint(tmp_path, monkeypatch):
  """Files of at most 100 kB; without the claim of space that `save` begins with."""
  checkpoint = parts.Checkpoint(tmp_path)
  checkpoint.save(state(0.1), {'number': 1})
  noise = {'w': np.random.default_rng(0).random(10**6), 'n': np.zeros((), np.int32)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with monkeypatch.context() as patch:
    patch.setattr(parts.tempfile, 'TemporaryFile', lambda dir: io.BytesIO())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
      with pytest.raises(OSError, match='could not write a checkpoint'):
        checkpoint.save(noise, {'number': 2})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  again = parts.Checkpoint(tmp_path)
  assert again.restore_record() == {'number': 1}
  np.testing.assert_array_equal(again.restore_state(state(0))['w'], state(0.1)['w'])
  again.save(state(0.2), {'number': 3})
  assert again.restore_record() == {'number': 3}


# Flags.


@dataclasses.dataclass(frozen=True)
class Config:
  test_an_int: int = 3  # updates; somebody 2020
  test_a_float: float = 0.5
  test_a_bool: bool = False
  test_a_path: str | None = None  # where
  test_a_list: tuple[int, ...] | None = None  # which


def test_flags_from_a_config():
  parts.define_flags(Config)
  values = flags.FLAGS
  try:
    values(['program'])
    assert parts.config_from_flags(Config) == Config()
    assert values['test_an_int'].help == 'updates; somebody 2020'
    values(['program', '--test_an_int=4', '--test_a_float=1e-3', '--test_a_bool',
            '--test_a_path=x', '--test_a_list=1,5'])  # fmt: skip
    assert parts.config_from_flags(Config) == Config(4, 1e-3, True, 'x', (1, 5))
    values(['program', '--test_a_list=1,b'])
    with pytest.raises(ValueError, match='--test_a_list: expected integers, got 1,b'):
      parts.config_from_flags(Config)
    values(['program', '--test_a_path='])
    with pytest.raises(ValueError, match='--test_a_path=: expected a value'):
      parts.config_from_flags(Config)
  finally:
    for field in dataclasses.fields(Config):
      delattr(flags.FLAGS, field.name)


def test_learn_loop_donates_and_averages(monkeypatch):
  def update(state, data):
    return state + data, {'state': state}

  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    before = jnp.array(1.0)
    after, metrics = parts.learn_loop(update)(before, jnp.array(2.0), 4)
    assert after == 9.0
    assert metrics == {'state': np.mean([1.0, 3.0, 5.0, 7.0])}
    assert before.is_deleted()


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--jax_platform_name=gpuu', 'error: --jax_platform_name=gpuu: not to be had here'),
    ('--replay_dir=', 'error: --replay_dir=: expected a value, got nothing'),
    ('--shards=a', 'error: --shards: expected integers, got a'),
    ('pong', 'error: expected flags only, got pong'),
  ],
)
def test_what_only_a_command_line_can_get_wrong(flag: str, message: str):
  run = subprocess.run(
    [sys.executable, '-m', 'offline_zoo.dqn.run_atari', flag],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert run.returncode == 1
  assert message in run.stderr and 'Traceback' not in run.stderr
