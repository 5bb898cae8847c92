"""Tests for demo_policies.py: how the scripted policies play, and their geometry by hand."""

import numpy as np
import pytest

from offline_zoo.logs import demo, demo_policies


@pytest.mark.parametrize('game, at_least', [('freeway', 20), ('pong', 12), ('breakout', 100)])
def test_scripted_policies_play_well_without_random_actions(
  game: str, at_least: float, monkeypatch
):
  """Far above chance (0, -20 and 1)."""
  make_policy, _ = demo_policies.POLICIES[game]
  monkeypatch.setitem(demo_policies.POLICIES, game, (make_policy, 0.0))
  config = demo.Config(environment_name=game)
  returns = [demo.play_episode(config, i)[1].rewards.sum() for i in range(4)]
  assert np.mean(returns) >= at_least


def test_pongs_ball_bounces_off_both_walls():
  policy = demo_policies.PongPolicy()
  assert policy._row_after(10, 100, 2) == 120
  # Down to 206, where it turns with a step of one, and up again.
  assert policy._row_after(5, 202, 2) == 204 + 2 - 1 - 3 * 2
  # Up to 44, past the upper wall at 46, and down.
  assert policy._row_after(4, 48, -2) == 44 + 1 + 2 * 2


def test_breakouts_ball_is_reflected_between_the_walls():
  policy = demo_policies.BreakoutPolicy()
  assert policy._reflect(100) == 100
  assert policy._reflect(57 - 10) == 57 + 10
  assert policy._reflect(199 + 10) == 199 - 10
  assert policy._reflect(57 + 2 * 142 + 5) == 57 + 5


def test_without_a_ball_pong_waits_and_breakout_serves():
  ram = np.zeros(128, np.uint8)
  ram[51] = 133
  assert demo_policies.PongPolicy()(ram) == 1
  ram[51] = 60
  assert demo_policies.PongPolicy()(ram) == 5  # down
  assert demo_policies.BreakoutPolicy()(ram) == 1
