"""Tests for evaluation.py: episodes, those that count, workers, and what a run leaves to them."""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import resource
import signal
import time
import types
from typing import NamedTuple

import cv2
import dm_env
import numpy as np
import pytest

from offline_zoo import evaluation, parts
from offline_zoo.parts_test import Counting, Echo

TIMINGS = ('eval_frame_rate', 'eval_seconds')


class Seeded(Counting):
  """Notes its seeds."""

  def __init__(self, length: int = 10):
    super().__init__(length)
    self.seeds = []

  def seed(self, seed):
    self.seeds.append(seed)


# Episodes.


def test_an_episode_by_hand():
  """Of 11 frames: agent steps of 4, 4 and 3, whose rewards are clipped; the last frame is 11."""
  episode = evaluation.play_episode(Echo(), Seeded(11), (1, 2, 3))
  assert (episode.num_frames, episode.num_steps) == (11, 3)
  assert (episode.episode_return, episode.clipped_return) == (66.0, 3.0)
  assert episode.statistics == {'state_value': sum(range(100, 111)) / 2}


def test_clipping_is_of_agent_steps_not_frames():
  episode = evaluation.Episode()
  agent = types.SimpleNamespace(statistics={})
  episode.add(dm_env.restart(0), agent)
  for reward in (0.5, 0.25, 0, 0, -3, 1, 0, 0, 1, -1, 7, 0):
    episode.add(dm_env.transition(reward, 0), agent)
  episode.add(dm_env.termination(-0.5, 0), agent)
  assert episode.clipped_return == 0.75 - 1 + 1 - 0.5
  assert episode.episode_return == 0.75 - 2 + 7 - 0.5
  assert episode.num_steps == 4


def test_an_episode_ends_after_half_an_hour_of_play():
  episode = evaluation.play_episode(Echo(), Seeded(10**9), (0, 0, 0))
  assert episode.num_frames == 108_000  # 60 frames a second
  assert episode.clipped_return == episode.num_steps == 27_000


def test_an_episode_begins_with_its_own_seed_and_key():
  agent, environment = Echo(), Seeded()
  numbers = [(seed, i, n) for seed in range(8) for i in range(8) for n in range(8)]
  for seeds in [*numbers, numbers[7]]:
    evaluation.play_episode(agent, environment, seeds)
  keys = [tuple(np.asarray(key)) for key in agent.keys]
  assert len(keys) == len(environment.seeds) == 513
  assert len({*keys}) == len({*environment.seeds}) == 512
  assert (keys[-1], environment.seeds[-1]) == (keys[7], environment.seeds[7])


class Painting(Seeded):
  """Shows frame n as a red wall, a green one, and grey that brightens with n."""

  def render(self) -> np.ndarray:
    picture = np.zeros((210, 160, 3), np.uint8)
    picture[:70, :, 0] = picture[70:140, :, 1] = 200
    picture[140:] = 20 * self._frame
    return picture


def test_the_first_episode_is_recorded_in_its_colours(tmp_path):
  path = tmp_path / 'new' / '1.mp4'
  evaluation.evaluate(Echo(), Painting(10), 4, 0, 1, video_path=path)
  video = cv2.VideoCapture(str(path))
  assert video.get(cv2.CAP_PROP_FPS) == 60
  frames = [video.read()[1] for _ in range(11)]
  assert not video.read()[0]  # neither of the second episode
  for number, frame in enumerate(frames):
    assert frame.shape == (420, 320, 3)
    picture = frame[1::2, 1::2, ::-1].astype(int)
    assert np.abs(picture[5:65] - [200, 0, 0]).mean() < 8
    assert np.abs(picture[75:135] - [0, 200, 0]).mean() < 8
    assert np.abs(picture[145:205] - 20 * number).mean() < 8
  assert os.listdir(path.parent) == ['1.mp4']


def test_a_signal_leaves_no_half_a_video(tmp_path):
  class Stops:
    calls = 0

    def check(self):
      self.calls += 1
      if self.calls == 5:
        assert os.listdir(tmp_path) == ['.1.partial.mp4']
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluation.evaluate(Echo(), Painting(), 4, 0, 1, Stops(), tmp_path / '1.mp4')
  assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def full_disk():
  """Files of at most a hundred bytes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_a_video(tmp_path):
  with full_disk(), pytest.raises(OSError, match=r'1\.mp4: the video could not be written'):
    evaluation.evaluate(Echo(), Painting(), 4, 0, 1, None, tmp_path / '1.mp4')
  assert os.listdir(tmp_path) == []


# Evaluations.


@pytest.mark.parametrize('eval_steps, num_episodes', [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_whole_episodes_are_played_until_enough_steps(eval_steps: int, num_episodes: int):
  """Of 10, 11 and 12 frames, each three agent steps."""
  agent, environment = Echo(), Seeded()
  result = evaluation.evaluate(agent, environment, eval_steps, seed=5, iteration=2)
  lengths = np.arange(10, 10 + num_episodes)
  assert {name: value for name, value in result.items() if name not in TIMINGS} == {
    'eval_episode_return': np.mean(lengths * (lengths + 1) / 2),
    'eval_episode_clipped_return': 3.0,
    'eval_num_episodes': num_episodes,
    'eval_state_value': sum(sum(range(100, 100 + n)) / 2 for n in lengths) / sum(lengths),
  }
  seeds = [evaluation.episode_seed(5, 2, number) for number in range(num_episodes)]
  assert environment.seeds == [environment_seed for environment_seed, _ in seeds]
  np.testing.assert_array_equal(agent.keys, [key for _, key in seeds])
  rate = sum(lengths) / result['eval_seconds']
  assert result['eval_frame_rate'] == pytest.approx(rate)


def test_the_episodes_that_count_are_the_first_ones():
  def of_steps(num_steps: int) -> evaluation.Episode:
    return evaluation.Episode(num_frames=4 * num_steps)

  episodes = {0: of_steps(5), 1: of_steps(9), 3: of_steps(2), 4: of_steps(50)}
  for eval_steps, count in ((1, 1), (5, 1), (6, 2), (14, 2)):
    assert evaluation.counting(episodes, eval_steps) == [episodes[n] for n in range(count)]
  # Episode 2 may yet be long; without it nobody knows whether 3 counts.
  assert evaluation.counting(episodes, 15) is None
  episodes[2] = of_steps(1)
  assert evaluation.counting(episodes, 15) == [episodes[n] for n in range(3)]
  assert evaluation.counting(episodes, 17) == [episodes[n] for n in range(4)]


def test_a_signal_ends_an_evaluation():
  class Interrupted(Echo):
    def step(self, timestep):
      if len(self.seen) == 17:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().step(timestep)

  agent = Interrupted()
  with parts.StopSignal() as stop:
    evaluation.evaluate(agent, Seeded(), 1000, 0, 1, stop)
    raise AssertionError('not left')
  assert stop.requested and len(agent.seen) == 18


# Workers.


class State(NamedTuple):
  online_params: float
  others: str


class Gambler:
  """Acts at random, with its parameter as its statistic."""

  def __init__(self):
    self._state = State(0.0, 'more')

  def reset(self, rng_key=None):
    if rng_key is not None:
      self._rng = np.random.default_rng(np.asarray(rng_key))

  def step(self, timestep):
    return int(self._rng.integers(100))

  def get_state(self):
    return self._state

  def set_state(self, state):
    assert state.others == 'more'
    self._state = state

  @property
  def statistics(self):
    return {'state_value': self._state.online_params}


class Dice(dm_env.Environment):
  """Games of random length; a throw decides what the action brings."""

  def __init__(self, directory: str | None = None, *, seed: int):
    self._directory = directory
    self.seed(seed)

  def seed(self, seed):
    self._rng = np.random.default_rng(seed)

  def reset(self):
    self._left = int(self._rng.integers(1, 200))
    self._disturb()
    return dm_env.restart(0)

  def step(self, action):
    self._left -= 1
    reward = float(action * self._rng.random())
    return dm_env.transition(reward, 0) if self._left else dm_env.termination(reward, 0)

  def _disturb(self):
    pass

  def render(self):
    return np.zeros((210, 160, 3), np.uint8)

  def observation_spec(self):
    raise NotImplementedError

  action_spec = observation_spec


class Deadly(Dice):
  """Kills the process in which the game of a fixed throw is played for the first time."""

  def _disturb(self):
    path = pathlib.Path(self._directory, str(self._left % 3))
    if not path.exists():
      path.touch()
      os.kill(os.getpid(), signal.SIGKILL)


class AlwaysDeadly(Dice):
  def _disturb(self):
    os.kill(os.getpid(), signal.SIGKILL)


class Endless(Dice):
  """Says by a file which process plays it; never ends."""

  def reset(self):
    pathlib.Path(self._directory, str(os.getpid())).touch()
    return dm_env.restart(0)

  def step(self, action):
    time.sleep(0.001)
    return dm_env.transition(0.0, 0)


def without_timings(result: dict) -> dict:
  return {name: value for name, value in result.items() if name not in TIMINGS}


@pytest.fixture(scope='module')
def wanted():
  """Of three evaluations, with other parameters each, what they give in this process."""
  agent = Gambler()
  results = []
  for iteration in (1, 2, 3):
    agent.set_state(State(iteration / 10, 'more'))
    result = evaluation.evaluate(agent, Dice(seed=0), 400, 7, iteration)
    results.append(without_timings(result))
  assert results[0] != results[1] and results[0]['eval_num_episodes'] > 5
  return results


def play_all(workers: evaluation.Workers) -> list[dict]:
  return [
    without_timings(workers.play(iteration / 10, 400, 7, iteration)) for iteration in (1, 2, 3)
  ]


@pytest.mark.parametrize('num_workers', [1, 2, 3])
def test_workers_have_no_say_in_what_is_evaluated(num_workers: int, wanted):
  with contextlib.closing(evaluation.Workers(num_workers, Gambler, Dice)) as workers:
    assert play_all(workers) == wanted
    assert len(multiprocessing.active_children()) >= num_workers
  assert not [
    p for p in multiprocessing.active_children() if p.name.startswith('ForkServerProcess')
  ]


def test_an_episode_that_a_worker_died_in_is_played_again(tmp_path, wanted):
  deadly = functools.partial(Deadly, str(tmp_path))
  with contextlib.closing(evaluation.Workers(2, Gambler, deadly)) as workers:
    assert play_all(workers) == wanted
  assert len(os.listdir(tmp_path)) == 3


def test_workers_that_all_die_are_given_up():
  with (
    contextlib.closing(evaluation.Workers(1, Gambler, AlwaysDeadly)) as workers,
    pytest.raises(ChildProcessError, match=r'4 evaluation workers died .* exit code -9'),
  ):
    workers.play(0.0, 1, 7, 1)


class Faulty(Dice):
  def _disturb(self):
    raise ZeroDivisionError


def test_a_worker_that_fails_is_not_replaced(capfd):
  with (
    contextlib.closing(evaluation.Workers(1, Gambler, Faulty)) as workers,
    pytest.raises(ChildProcessError, match='an evaluation worker failed'),
  ):
    workers.play(0.0, 1, 7, 1)
  assert capfd.readouterr().err.count('\nZeroDivisionError') <= 1


def test_an_evaluation_can_be_cancelled_and_leaves_its_workers_free(tmp_path, wanted):
  endless = functools.partial(Endless, str(tmp_path))
  with contextlib.closing(evaluation.Workers(1, Gambler, endless)) as workers:
    for iteration in (1, 2):  # the second needs the first to be dropped
      result = workers.play(0.0, 1, 7, iteration, cancelled=lambda: len(os.listdir(tmp_path)) == 1)
      assert result is None
      (pid,) = os.listdir(tmp_path)
      os.unlink(tmp_path / pid)


def play_endlessly(directory: str) -> None:
  workers = evaluation.Workers(1, Gambler, functools.partial(Endless, directory))
  workers.play(0.0, 1, 7, 1)


def test_workers_end_when_the_run_is_killed(tmp_path):
  process = multiprocessing.get_context('forkserver').Process(
    target=play_endlessly, args=(str(tmp_path),)
  )
  process.start()
  while not (names := os.listdir(tmp_path)):
    time.sleep(0.05)
  os.kill(int(names[0]), 0)  # is there
  process.kill()
  process.join()
  for _ in range(100):
    try:
      os.kill(int(names[0]), 0)
    except ProcessLookupError:
      return
    time.sleep(0.1)
  raise AssertionError('the worker lives on')


def test_workers_record_the_first_episode_and_tell_what_forbids_it(tmp_path):
  with contextlib.closing(evaluation.Workers(2, Gambler, Dice)) as workers:
    workers.play(0.0, 400, 7, 1, tmp_path / '1.mp4')
    assert os.listdir(tmp_path) == ['1.mp4']
    with pytest.raises(OSError, match='/dev/null'):
      workers.play(0.0, 400, 7, 2, pathlib.Path('/dev/null/1.mp4'))


def test_the_default_leaves_a_core_to_learning(monkeypatch):
  for cores, want in ((1, 1), (2, 1), (3, 2), (16, 15)):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _, cores=cores: {*range(cores)})
    assert evaluation.num_workers(None) == want
    assert (evaluation.num_workers(0), evaluation.num_workers(20)) == (0, 20)
