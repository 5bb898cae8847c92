"""Tests for behaviour cloning: its loss against recorded ones, and what it learns."""

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing

from . import agent, run_atari


def recorded(golden, case: str):
  want = np.load(golden / 'losses' / f'bc_{case}.npz', allow_pickle=False)
  return want, jnp.asarray(want['logits']), jnp.asarray(want['action'])


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_tianshous(golden, case: str):
  want, logits, actions = recorded(golden, case)
  losses = agent.loss(logits, actions, 0.0)
  # A loss near 0 is rounded where the logits are: to float32's 6e-8 of 1.
  np.testing.assert_allclose(losses, want['loss'], rtol=1e-5, atol=1e-7)
  grads = jax.grad(lambda x: jnp.mean(agent.loss(x, actions, 0.0)))(logits)
  atol = 1e-6 * np.abs(want['grad_logits']).max()
  np.testing.assert_allclose(grads, want['grad_logits'], rtol=0, atol=atol)
  np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), want['greedy_action'])


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_penalised_losses_and_gradients_equal_d3rlpys(golden, case: str):
  want, logits, actions = recorded(golden, case)

  def mean_loss(x):
    return jnp.mean(agent.loss(x, actions, 0.5))

  np.testing.assert_allclose(mean_loss(logits), want['d3rlpy_loss_mean'], rtol=1e-5)
  penalties = jnp.mean(agent.loss(logits, actions, 0.5) - agent.loss(logits, actions, 0.0))
  np.testing.assert_allclose(penalties, want['d3rlpy_penalty_mean'], rtol=1e-5)
  atol = 1e-6 * np.abs(want['d3rlpy_grad_logits']).max()
  np.testing.assert_allclose(jax.grad(mean_loss)(logits), want['d3rlpy_grad_logits'], atol=atol)


def make_agent(data: replay.ReplayData, **settings) -> agent.Bc:
  def network(frames):
    return networks.PolicyNetworkOutputs(testing.table('logits', frames, 2))

  def make(*, target_network_update_period: int, **arguments) -> agent.Bc:
    del target_network_update_period  # what there is no use for
    return agent.Bc(**arguments)

  return testing.make_agent(make, network, data, **{'penalty': 0.0, **settings})


def logits(learner: agent.Bc) -> np.ndarray:
  return learner.get_state().online_params['~']['logits']


@pytest.mark.parametrize('penalty', [0.0, 0.7])
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, penalty: float):
  data, batch = whole_batch
  s_tm1 = testing.states(batch.s_tm1)
  online = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
  learner = make_agent(data, penalty=penalty)
  learner.set_state(learner.get_state()._replace(online_params={'~': {'logits': online}}))
  metrics = learner.learn(1)

  def mean_loss(x):
    return jnp.mean(agent.loss(x[s_tm1], batch.a_tm1, penalty))

  np.testing.assert_allclose(logits(learner), online - jax.grad(mean_loss)(online), rtol=1e-5)
  assert metrics['loss'] == pytest.approx(float(mean_loss(online)), rel=1e-5)
  right = online.argmax(axis=1)[s_tm1] == np.asarray(batch.a_tm1)
  assert metrics['accuracy'] == pytest.approx(right.mean())
  assert learner.get_state().num_updates == 1


@pytest.mark.parametrize('rate', [0.5, 0.15])
def test_learn_reaches_the_probabilities_of_the_logged_policy(tmp_path, rate: float):
  testing.write_logs(tmp_path, num_transitions=1500, rate_of_action_1=rate)
  data = replay.load(tmp_path)
  optimizer = optax.sgd(optax.exponential_decay(4.0, 300, 0.2))
  learner = make_agent(data, batch_size=128, optimizer=optimizer)
  metrics = [learner.learn(600) for _ in range(2)]
  policy = jax.nn.softmax(logits(learner))
  rates = testing.logged_rates(data)
  np.testing.assert_allclose(policy, rates, atol=0.01)
  np.testing.assert_allclose(rates[:, 1], rate, atol=0.05)
  if rate == 0.15:  # the same action is the likelier one in both states
    counts = np.bincount(np.asarray(data.actions[replay.valid_rows(data)]), minlength=2)
    assert metrics[1]['accuracy'] == pytest.approx(counts[0] / counts.sum(), abs=0.01)


def test_acting_takes_the_likeliest_action(tmp_path):
  testing.write_logs(tmp_path)
  learner = make_agent(replay.load(tmp_path))
  for table, action in ((np.log([[0.2, 0.8]] * 2), 1), (np.log([[0.7, 0.3]] * 2), 0)):
    learner.set_state(learner.get_state()._replace(online_params={'~': {'logits': table}}))
    learner.reset()
    assert learner.step(dm_env.restart(np.full((210, 160), 10, np.uint8))) == action
    assert learner.statistics['greedy_probability'] == pytest.approx(np.exp(table.max()))


def test_a_negative_penalty_is_refused():
  with pytest.raises(ValueError, match=r'--penalty=-0\.1: expected 0 or more'):
    run_atari.Config(penalty=-0.1)
