"""Tests for parts.py: the run loop and learning."""

import concurrent.futures
import dataclasses
import os
import signal

import chex
import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_run_loop_ends_an_episode_at_the_frame_limit(monkeypatch):
  monkeypatch.setattr(parts, 'MAX_FRAMES_PER_EPISODE', 4)
  steps = take(parts.run_loop(Echo(), Counting()), 2)
  assert [s[1].observation for s in steps] == [0, 1, 2, 3, 4] * 2
  assert [s[1].last() for s in steps] == [False, False, False, False, True] * 2
  assert steps[4][1].discount == 1.0  # cut, not ended by the game
  # An end by the game on the very frame of the limit stays one.
  monkeypatch.setattr(parts, 'MAX_FRAMES_PER_EPISODE', 10)
  steps = take(parts.run_loop(Echo(), Counting()), 1)
  assert steps[-1][1].discount == 0.0


# Learning.


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
    parts.learn_iteration(learner, progress, 1001, stop)
  assert learner.chunks == [25] * 40 + [1]  # on a CPU
  assert progress.means() == {'loss': 501.0, 'q_logged_action': 2.0}


@dataclasses.dataclass
class Config:
  environment_name: str = 'breakout'
  seed: int = 7
  num_seeds: int = 1
  num_iterations: int = 5


def evaluated(episode_return: float) -> dict[str, float]:
  return {
    'eval_episode_return': episode_return,
    'eval_episode_clipped_return': 3.0,
    'eval_num_episodes': 2,
    'eval_frame_rate': 500.0,
    'eval_seconds': 30.0,
    'eval_state_value': 0.25,
  }


def test_the_row_of_an_iteration():
  progress = parts.Progress(iteration=2, rows=[{}])
  progress.add({'loss': 1.0, 'q_max': 4.0}, 3, seconds=2.0)
  progress.add({'loss': 5.0, 'q_max': 8.0}, 1, seconds=6.0)
  progress.finish_iteration(Config(), {7: evaluated(16.1)}, dataset_episode_return=12.5)
  assert progress.rows[1:] == [
    {
      'environment_name': 'breakout',
      'seed': 7,
      'iteration': 2,
      'num_updates': 8,
      'frame': 128,
      'eval_episode_return': 16.1,
      'normalized_return': pytest.approx(0.5),  # 1.7 by chance, 30.5 by a human, raw
      'capped_normalized_return': pytest.approx(0.5),
      'dataset_episode_return': 12.5,
      'loss': 2.0,
      'q_max': 5.0,
      'eval_episode_clipped_return': 3.0,
      'eval_num_episodes': 2,
      'eval_frame_rate': 500.0,
      'eval_state_value': 0.25,
      'updates_per_second': 0.5,
      'seconds': 38.0,
    }
  ]
  assert progress.iteration == 3
  assert (progress.num_updates, progress.metric_sums, progress.seconds) == (0, {}, 0.0)


def test_each_seed_has_a_row_of_an_iteration():
  progress = parts.Progress()
  progress.add({'loss': [1.0, 3.0], 'q_max': [4.0, 0.0]}, 3, seconds=2.0)
  progress.add({'loss': [5.0, 3.0], 'q_max': [8.0, 4.0]}, 1, seconds=6.0)
  assert progress.metric_sums == {'loss': [8.0, 12.0], 'q_max': [20.0, 4.0]}
  evaluations = {7: evaluated(16.1), 8: {**evaluated(30.5), 'eval_seconds': 2.0}}
  progress.finish_iteration(Config(num_seeds=2), evaluations, dataset_episode_return=12.5)
  names = (
    'seed', 'iteration', 'num_updates', 'eval_episode_return', 'loss', 'q_max',
    'updates_per_second', 'seconds',
  )  # fmt: skip
  assert [[row[name] for name in names] for row in progress.rows] == [
    [7, 1, 4, 16.1, 2.0, 5.0, 0.5, 38.0],
    [8, 1, 4, 30.5, 3.0, 1.0, 0.5, 10.0],
  ]
  assert progress.iteration == 2


def test_normalised_returns_are_capped_in_one_column_and_empty_without_a_human():
  progress = parts.Progress()
  for game, episode_return in (('breakout', 59.3), ('breakout', -27.1), ('pooyan', 100.0)):
    progress.add({'loss': 1.0}, 1, seconds=1.0)
    progress.finish_iteration(Config(game), {7: evaluated(episode_return)}, float('nan'))
  columns = ('normalized_return', 'capped_normalized_return', 'dataset_episode_return')
  assert [[row[name] for name in columns] for row in progress.rows] == [
    [pytest.approx(2.0), 1.0, None],
    [pytest.approx(-1.0), pytest.approx(-1.0), None],
    [None, None, None],
  ]


def test_a_loss_that_is_not_finite_stops_the_run():
  progress = parts.Progress()
  with (
    pytest.raises(FloatingPointError, match=r'loss is inf in iteration 1.* up to 700'),
    parts.StopSignal() as stop,
  ):
    parts.learn_iteration(Learner(bad_update=700), progress, 1000, stop)


def test_one_seeds_loss_that_is_not_finite_stops_all():
  class Two(Learner):
    def learn(self, num_updates):
      return {'loss': [0.5, super().learn(num_updates)['loss']]}

  with (
    pytest.raises(FloatingPointError, match=r'loss is \[0.5, inf\] in iteration 1'),
    parts.StopSignal() as stop,
  ):
    parts.learn_iteration(Two(bad_update=700), parts.Progress(), 1000, stop)


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


def test_what_fails_beside_learning_ends_it_after_its_chunk():
  beside: concurrent.futures.Future[None] = concurrent.futures.Future()

  class Beside(Learner):
    def learn(self, num_updates):
      metrics = super().learn(num_updates)
      if self.num_updates == 500:
        beside.set_exception(OSError('the disk is full'))
      return metrics

  learner, progress = Beside(), parts.Progress()
  with pytest.raises(OSError, match='the disk is full'), parts.StopSignal() as stop:
    stop.watch(beside)
    parts.learn_iteration(learner, progress, 1000, stop)
  assert learner.num_updates == 500


def test_other_errors_leave_the_block_as_they_are():
  with pytest.raises(ZeroDivisionError), parts.StopSignal():
    raise ZeroDivisionError


def test_losses_of_examples_and_their_gradients_are_as_vmaps(monkeypatch):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(5, 8)), jnp.float32) for _ in range(2))

  def loss(x, y):
    return jnp.sum(jnp.abs(x[:, None] - y[None]) ** 3)

  def mean(mapped):
    return jax.value_and_grad(lambda x: jnp.mean(mapped(x, y)))(x)

  assert 'scan' in str(jax.make_jaxpr(parts.map_examples(loss))(x, y))
  chex.assert_trees_all_close(
    mean(parts.map_examples(loss)), mean(jax.vmap(loss)), rtol=1e-6, atol=1e-6
  )
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert 'scan' not in str(jax.make_jaxpr(parts.map_examples(loss))(x, y))


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
    _, metrics = parts.learn_loop(update)(jnp.array([1.0, 5.0]), jnp.array([2.0, 4.0]), 2)
    assert metrics == {'state': [2.0, 7.0]}
