"""Tests for the QR-DQN agent: its loss against recorded ones, identities, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing

from . import agent


def in_rlax_order(table: np.ndarray) -> jax.Array:
  """[B, A, N], as recorded, to [B, N, A]."""
  return jnp.swapaxes(table, 1, 2)


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_dopamines(golden, case: str):
  want = np.load(golden / 'losses' / f'qrdqn_{case}.npz', allow_pickle=False)
  batch = [jnp.asarray(want[k]) for k in ('action', 'reward', 'discount')]
  target = in_rlax_order(want['z_target_next'])

  def losses(z_online):
    return agent.loss(in_rlax_order(z_online), *batch, target)

  z_online = jnp.asarray(want['z_online'])
  for name in ('loss', 'rlax_loss', 'batch_rl_tf_loss', 'ref64_loss'):
    np.testing.assert_allclose(losses(z_online), want[name], rtol=1e-5, atol=0)
  grads = jax.grad(lambda z: jnp.mean(losses(z)))(z_online)
  scale = np.abs(want['grad_z_online']).max()
  np.testing.assert_allclose(grads, want['grad_z_online'], rtol=0, atol=1e-6 * scale)
  np.testing.assert_array_equal(jnp.argmax(jnp.mean(target, axis=1), -1), want['next_action'])


def test_a_loss_by_hand():
  # Two quantiles at 1/4 and 3/4, predicted 0 and 1; the target is 2 and 0.5 at the greedy action 1.
  losses = agent.loss(
    dist_q_tm1=jnp.array([[[0.0, 9.0], [1.0, 9.0]]]),
    a_tm1=jnp.array([0]),
    r_t=jnp.array([0.0]),
    discount_t=jnp.array([1.0]),
    dist_q_target_t=jnp.array([[[-5.0, 2.0], [5.0, 0.5]]]),
  )
  # Errors 2 and 0.5 of the first quantile, 1 and -0.5 of the second.
  first = (0.25 * 1.5 + 0.25 * 0.125) / 2
  second = (0.75 * 0.5 + 0.25 * 0.125) / 2
  np.testing.assert_allclose(losses, [first + second], rtol=1e-6)


def make_agent(data: replay.ReplayData, **settings) -> agent.QrDqn:
  def network(frames):
    dist_q = testing.table('z', frames, 5, 2)
    return networks.QuantileNetworkOutputs(q_values=jnp.mean(dist_q, axis=1), dist_q=dist_q)

  return testing.make_agent(agent.QrDqn, network, data, **settings)


def test_an_update_is_a_gradient_step_on_the_loss(whole_batch):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online = np.random.default_rng(0).normal(size=(2, 5, 2)).astype(np.float32)
  target = online[..., ::-1] + 0.1  # another action is the best one

  def mean_loss(z):
    losses = agent.loss(z[s_tm1], batch.a_tm1, batch.r_t, batch.discount_t, target[s_t])
    return jnp.mean(losses)

  got = testing.after_an_update(make_agent(data), {'z': online}, {'z': target})['z']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)


def test_learn_reaches_the_optimal_values_of_an_mdp(tmp_path):
  testing.write_logs(tmp_path)
  learner = make_agent(
    replay.load(tmp_path, discount=testing.DISCOUNT),
    optimizer=optax.sgd(optax.exponential_decay(4.0, 1000, 0.1)),
  )
  learner.learn(2500)
  # The problem is deterministic, so all quantiles of a return are equal.
  dist_q = learner.get_state().online_params['~']['z']
  want = np.broadcast_to(testing.optimal_values()[:, None], dist_q.shape)
  np.testing.assert_allclose(dist_q, want, atol=5e-3)
