"""Tests for seeds.py: several seeds learn as each of them alone."""

import chex
import jax
import numpy as np
import pytest

from offline_zoo import parts, replay, seeds, testing

pytestmark = pytest.mark.usefixtures('compiled_quickly')
SEEDS = (2, 3, 5)


@pytest.fixture(scope='module', autouse=True)
def small_torso():
  """Networks that take next to no time."""
  with testing.small_torsos():
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp('noise')
  testing.write_noise(directory, 1)
  return replay.load(directory, num_actions=4)


def make_agent(agent: str, data) -> parts.Learner:
  module = testing.run_atari(agent)
  return module.make_agent(module.Config(batch_size=4), 4, data)


@pytest.mark.parametrize('agent', ['dqn', 'bc'])
def test_fifty_updates_together_are_those_in_turn(agent, data, monkeypatch):
  """But for the last digits, since products of several matrices at once add up in another order."""
  one = make_agent(agent, data)
  with monkeypatch.context() as patch:
    patch.setattr(seeds, 'learn_together', None)
    in_turn = seeds.Seeds(one, SEEDS)
  want = in_turn.learn(50)
  # On accelerators they learn together, in a scan.
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(seeds, 'learn_in_turn', None)
  together = seeds.Seeds(one, SEEDS)
  metrics = together.learn(50)
  assert metrics.keys() == want.keys()
  for name, values in metrics.items():
    np.testing.assert_allclose(values, want[name], rtol=1e-4)
    assert len({*values}) == len(SEEDS)
  chex.assert_trees_all_close(together.get_state(), in_turn.get_state(), rtol=1e-4, atol=1e-4)


def test_a_state_is_gone_on_from(data):
  learner = seeds.Seeds(make_agent('dqn', data), SEEDS[:2])
  learner.learn(2)
  state = learner.get_state()
  kept = jax.tree.map(np.copy, state)
  learner.learn(2)
  end = learner.get_state()
  learner.set_state(state)
  learner.learn(2)
  chex.assert_trees_all_equal(learner.get_state(), end)
  chex.assert_trees_all_equal(state, kept)
  assert [int(of_seed.num_updates) for of_seed in end] == [4, 4]
