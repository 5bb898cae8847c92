"""Tests for play.py: against the run loop, a raw frame at a time."""

import itertools
import os

import numpy as np
import pytest

from offline_zoo import atari_env, parts, processors
from offline_zoo.logs import play


class Slow:
  """An agent for the run loop that takes given actions and remembers what it saw."""

  statistics: dict[str, float] = {}  # noqa: RUF012

  def __init__(self, actions):
    self._actions = iter(actions)
    self._processor = processors.AtariProcessor()
    self.stacks, self.rewards = [], []

  def reset(self, rng_key=None):
    pass

  def step(self, timestep):
    processed = self._processor(timestep)
    if processed is not None:
      if not processed.first():
        self.rewards.append(processed.reward)
      if not processed.last():
        self.stacks.append(processed.observation)
        self._action = next(self._actions)
    return self._action


class Sticky:
  """An environment whose actions stick, frame by frame; without them it draws nothing."""

  def __init__(self, game_name: str, probability: float, seed: int):
    self._environment = atari_env.AtariEnv(game_name, sticky_action_probability=0.0, seed=7)
    self._probability, self._rng, self._last = probability, np.random.RandomState(seed), 0

  def reset(self):
    return self._environment.reset()

  def step(self, action):
    if self._rng.random_sample() >= self._probability:
      self._last = action
    return self._environment.step(self._last)


@pytest.mark.parametrize('game_name, seed', [('breakout', 1), ('ms_pacman', 4)])
def test_play_is_the_run_loops(game_name: str, seed: int):
  game = play.Game(game_name)
  actions = np.random.default_rng(seed).integers(game.num_actions, size=2000).tolist()
  environment = Sticky(game_name, 0.25, seed)
  slow = Slow(actions)
  for _, timestep, _, _ in parts.run_loop(slow, environment):
    if timestep.last():
      break
  game.start(99)  # another episode before
  game.step(1)
  game.start(seed)
  for action, stack, reward in zip(actions, slow.stacks, slow.rewards, strict=False):
    np.testing.assert_array_equal(game.frame, stack[..., -1])
    np.testing.assert_array_equal(game.observation(), stack)
    got, ended = game.step(action)
    assert got == reward
    if ended:
      break
  assert ended and action is actions[len(slow.rewards) - 1]
  assert len(slow.stacks) == len(slow.rewards) > 100
  assert sum(slow.rewards) > 0


@pytest.mark.parametrize('game_name', ['breakout', 'freeway', 'ms_pacman', 'pong', 'qbert'])
def test_an_episode_is_the_same_whatever_was_played_before(game_name: str):
  def episode(game: play.Game, seed: int) -> list[tuple[bytes, float, bool]]:
    rng = np.random.default_rng(seed)
    game.start(seed)
    return [(game.frame.tobytes(), *game.step(rng.integers(game.num_actions))) for _ in range(100)]

  game = play.Game(game_name)
  first, second = episode(game, 5), episode(game, 6)
  assert first != second
  assert episode(game, 5) == first
  assert episode(play.Game(game_name), 6) == second


def test_a_sticky_action_is_as_likely_as_in_the_emulator():
  """In Freeway the chicken walks up at each frame but those that repeat to do nothing."""

  game = play.Game('freeway', sticky_action_probability=0.6)
  environment = atari_env.AtariEnv('freeway', sticky_action_probability=0.6, seed=1)

  def rate(ram, play_step) -> float:
    rows = []
    for action in [0, 1] * 300:
      before = int(ram()[14])
      play_step(action)
      rows.append(int(ram()[14]) - before)
    return np.mean(np.array(rows) > 0)

  game.start(1)
  environment.reset()
  ours = rate(game.ram, game.step)
  emulators = rate(environment.ram, lambda a: [environment.step(a) for _ in range(4)])
  assert ours == pytest.approx(emulators, abs=0.07) and 0.1 < ours < 0.95


def test_bad_arguments():
  with pytest.raises(ValueError, match='sticky_action_probability must lie'):
    play.Game('pong', sticky_action_probability=1.5)


def test_episodes_end_at_the_limit(monkeypatch):
  assert 4 * play.MAX_STEPS_PER_EPISODE == parts.MAX_FRAMES_PER_EPISODE
  monkeypatch.setattr(play, 'MAX_STEPS_PER_EPISODE', 7)
  game = play.Game('pong')
  game.start(0)
  assert [game.step(0)[1] for _ in range(7)] == [False] * 6 + [True]


def test_results_come_in_order_and_a_killed_process_is_told_of():
  endless = play.in_processes(abs, itertools.count(-5), num_processes=2)
  assert list(itertools.islice(endless, 7)) == [5, 4, 3, 2, 1, 0, 1]
  endless.close()
  with pytest.raises(OSError, match='a process that played was killed'):
    list(play.in_processes(os._exit, [1], num_processes=1))
