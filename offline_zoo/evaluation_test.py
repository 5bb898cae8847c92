"""Tests for evaluation.py: the episodes that count, workers, and what a run leaves to them."""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import signal
import time
import types
from typing import Any

import dm_env
import jax
import numpy as np
import pytest

from offline_zoo import evaluation, parts, playing
from offline_zoo.parts_test import Echo
from offline_zoo.playing_test import Seeded

TIMINGS = ('eval_frame_rate', 'eval_seconds')


# Evaluations.


def alone(agent, environment):
  """Plays one episode at a time."""
  return functools.partial(playing.play_episodes, [agent], [environment])


@pytest.mark.parametrize('eval_steps, num_episodes', [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_whole_episodes_are_played_until_enough_steps(eval_steps: int, num_episodes: int):
  """Of 10, 11 and 12 frames, each three agent steps."""
  agent, environment = Echo(), Seeded()
  result = evaluation.evaluate(alone(agent, environment), eval_steps, seed=5, iteration=2)
  lengths = np.arange(10, 10 + num_episodes)
  assert {name: value for name, value in result.items() if name not in TIMINGS} == {
    'eval_episode_return': np.mean(lengths * (lengths + 1) / 2),
    'eval_episode_clipped_return': 3.0,
    'eval_num_episodes': num_episodes,
    'eval_state_value': sum(sum(range(100, 100 + n)) / 2 for n in lengths) / sum(lengths),
  }
  seeds = [playing.episode_seed(5, 2, number) for number in range(num_episodes)]
  assert environment.seeds == [environment_seed for environment_seed, _ in seeds]
  np.testing.assert_array_equal(agent.keys, [key for _, key in seeds])
  rate = sum(lengths) / result['eval_seconds']
  assert result['eval_frame_rate'] == pytest.approx(rate)


def test_the_episodes_that_count_are_the_first_ones():
  def of_steps(num_steps: int) -> playing.Episode:
    return playing.Episode(num_frames=4 * num_steps)

  episodes = {0: of_steps(5), 1: of_steps(9), 3: of_steps(2), 4: of_steps(50)}
  for eval_steps, count in ((1, 1), (5, 1), (6, 2), (14, 2)):
    assert evaluation.counting(episodes, eval_steps) == [episodes[n] for n in range(count)]
  # Episode 2 may yet be long; without it nobody knows whether 3 counts.
  assert evaluation.counting(episodes, 15) is None
  episodes[2] = of_steps(1)
  assert evaluation.counting(episodes, 15) == [episodes[n] for n in range(3)]
  assert evaluation.counting(episodes, 17) == [episodes[n] for n in range(4)]


@pytest.mark.parametrize(
  'eval_steps, size', [(1, 1), (4_000, 2), (6_000, 3), (8_000, 4), (125_000, 4)]
)
def test_groups_are_small_where_few_episodes_count(eval_steps: int, size: int):
  assert evaluation.group_size(eval_steps) == size


def test_what_is_missing_is_what_no_earlier_episode_has():
  episodes = {n: playing.Episode(num_frames=4 * n) for n in (1, 2, 5)}
  assert [evaluation.missing_steps(episodes, n, 10) for n in range(7)] == [10, 10, 9, 7, 7, 7, 2]


def test_a_signal_ends_an_evaluation():
  class Interrupted(Echo):
    def step(self, timestep):
      if len(self.seen) == 17:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().step(timestep)

  agent = Interrupted()
  with parts.StopSignal() as stop:
    evaluation.evaluate(alone(agent, Seeded()), 1000, 0, 1, stop)
    raise AssertionError('not left')
  assert stop.requested and len(agent.seen) == 18


# Workers.


class Raw:
  """Leaves timesteps as they are."""

  def reset(self):
    pass

  def __call__(self, timestep):
    return timestep


class Gambler:
  """Acts at random, with its parameter as its statistic."""

  processor = Raw()
  statistics = {'state_value': 0.0}  # noqa: RUF012

  def act(self, online_params, rng_key, s_t):
    rng_key, action_key = jax.random.split(rng_key)
    return rng_key, jax.random.randint(action_key, (), 0, 100), online_params


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


NUM_PLAYERS = 3


def make_workers(num_workers: int, make_environment=Dice):
  workers = evaluation.Workers(num_workers, Gambler, make_environment, NUM_PLAYERS)
  return contextlib.closing(workers)


def param(iteration: int) -> np.ndarray:
  return np.array(iteration / 10, np.float32)


@pytest.fixture(scope='module')
def wanted():
  """Of three evaluations, with other parameters each, what they give in this process."""
  players = playing.Players(Gambler(), Dice, NUM_PLAYERS)
  results = []
  for iteration in (1, 2, 3):
    players.set_params(param(iteration))
    result = evaluation.evaluate(players.play, 400, 7, iteration)
    results.append(without_timings(result))
  assert results[0] != results[1] and results[0]['eval_num_episodes'] > 5
  return results


def play_all(workers: evaluation.Workers) -> list[dict]:
  return [
    without_timings(workers.play(param(iteration), 400, 7, iteration)) for iteration in (1, 2, 3)
  ]


@pytest.mark.parametrize('num_workers', [1, 2, 3])
def test_workers_have_no_say_in_what_is_evaluated(num_workers: int, wanted):
  with make_workers(num_workers) as workers:
    assert play_all(workers) == wanted
    assert len(multiprocessing.active_children()) >= num_workers
  assert not [
    p for p in multiprocessing.active_children() if p.name.startswith('ForkServerProcess')
  ]


class Noting(Dice):
  """Notes its seeds in a file."""

  def seed(self, seed):
    super().seed(seed)
    with open(pathlib.Path(self._directory, 'seeds'), 'a') as file:
      file.write(f'{seed}\n')


def test_workers_play_different_episodes(tmp_path):
  with make_workers(2, functools.partial(Noting, str(tmp_path))) as workers:
    workers.play(param(1), 400, 7, 1)
  seeds = (tmp_path / 'seeds').read_text().split()
  played = [seed for seed in seeds if seed != '0']  # with which it is made
  assert len({*played}) == len(played) > 5


def test_episodes_that_a_worker_died_in_are_played_again(tmp_path, wanted):
  deadly = functools.partial(Deadly, str(tmp_path))
  with make_workers(2, deadly) as workers:
    assert play_all(workers) == wanted
  assert len(os.listdir(tmp_path)) == 3


def test_workers_that_all_die_are_given_up():
  with (
    make_workers(1, AlwaysDeadly) as workers,
    pytest.raises(ChildProcessError, match=r'4 evaluation workers died .* exit code -9'),
  ):
    workers.play(param(1), 1, 7, 1)


class Faulty(Dice):
  def _disturb(self):
    raise ZeroDivisionError


def test_a_worker_that_fails_is_not_replaced(capfd):
  with (
    make_workers(1, Faulty) as workers,
    pytest.raises(ChildProcessError, match='an evaluation worker failed'),
  ):
    workers.play(param(1), 1, 7, 1)
  assert capfd.readouterr().err.count('\nZeroDivisionError') <= 1


def test_an_evaluation_can_be_cancelled_and_leaves_its_workers_free(tmp_path, wanted):
  endless = functools.partial(Endless, str(tmp_path))
  with make_workers(1, endless) as workers:
    for iteration in (1, 2):  # the second needs the first to be dropped
      result = workers.play(
        param(1), 1, 7, iteration, cancelled=lambda: len(os.listdir(tmp_path)) == 1
      )
      assert result is None
      (pid,) = os.listdir(tmp_path)
      os.unlink(tmp_path / pid)


def play_endlessly(directory: str) -> None:
  with make_workers(1, functools.partial(Endless, directory)) as workers:
    workers.play(param(1), 1, 7, 1)


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
  with make_workers(2) as workers:
    workers.play(param(1), 400, 7, 1, tmp_path / '1.mp4')
    assert os.listdir(tmp_path) == ['1.mp4']
    with pytest.raises(OSError, match='/dev/null'):
      workers.play(param(1), 400, 7, 2, pathlib.Path('/dev/null/1.mp4'))


def make_evaluator(num_eval_workers: int):
  """Of a run after its first updates; gives what is saved as well: (updates, rows) each time."""
  config: Any = types.SimpleNamespace(
    num_eval_workers=num_eval_workers, eval_steps=1, seed=1, num_seeds=1, num_iterations=2,
    environment_name='pong',
  )  # fmt: skip
  saved: list[tuple[int, int]] = []
  run: Any = types.SimpleNamespace(
    video_path=lambda *_: None,
    save=lambda state, progress: saved.append((progress.num_updates, len(progress.rows))),
  )
  learner: Any = Gambler()
  learner.get_state = lambda: types.SimpleNamespace(online_params=param(1))
  evaluator = evaluation.Evaluator(config, run, learner, Gambler, Dice, 0.0)
  return evaluator, parts.Progress(num_updates=50, seconds=1.0), saved


@pytest.mark.parametrize('num_eval_workers', [0, 1])
def test_an_evaluation_that_fails_ends_the_run_and_what_was_learnt_is_kept(
  monkeypatch, num_eval_workers
):
  def fail(*unused):
    raise OSError('the disk is full')

  monkeypatch.setattr(evaluation.Workers, 'play', fail)
  monkeypatch.setattr(evaluation, 'evaluate', fail)
  evaluator, progress, saved = make_evaluator(num_eval_workers)
  with (
    pytest.raises(OSError, match='the disk is full'),
    parts.StopSignal() as stop,
    evaluator,
  ):
    evaluator.evaluate(progress, stop)
    assert progress.iteration == 2
    for _ in range(100):  # chunks of updates
      stop.check()
      time.sleep(0.1)
    raise AssertionError('it learnt on')
  assert saved == [(50, 0)]


def test_updates_that_go_wrong_do_not_cost_the_row_of_those_before(monkeypatch):
  evaluated = {
    'eval_episode_return': 1.0, 'eval_seconds': 1.0, 'eval_num_episodes': 1, 'eval_frame_rate': 1.0,
  }  # fmt: skip

  def play(self, params, eval_steps, seed, iteration, video_path, cancelled):
    time.sleep(0.5)
    return None if cancelled() else evaluated

  monkeypatch.setattr(evaluation.Workers, 'play', play)
  evaluator, progress, saved = make_evaluator(1)
  with pytest.raises(FloatingPointError), parts.StopSignal() as stop, evaluator:
    evaluator.evaluate(progress, stop)
    raise FloatingPointError
  assert saved == [(0, 1)]


def test_the_default_leaves_a_core_to_learning(monkeypatch):
  for cores, want in ((1, 1), (2, 1), (3, 2), (16, 15), (64, 15)):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _, cores=cores: {*range(cores)})
    assert evaluation.num_workers(None, 125_000) == want
    # Of two episodes, played together, or less.
    assert evaluation.num_workers(None, 4_000) == evaluation.num_workers(None, 10) == 1
    assert (evaluation.num_workers(0, 10), evaluation.num_workers(20, 10)) == (0, 20)
