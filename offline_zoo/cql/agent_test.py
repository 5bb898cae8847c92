"""Tests for the CQL agent: its loss against recorded ones, identities, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing
from offline_zoo.qrdqn import agent as qrdqn_agent

from . import agent, run_atari


def in_rlax_order(table: np.ndarray) -> jax.Array:
  """[B, A, N], as recorded, to [B, N, A]."""
  return jnp.swapaxes(jnp.asarray(table), 1, 2)


def recorded(golden, case: str):
  want = np.load(golden / 'losses' / f'cql_{case}.npz', allow_pickle=False)
  return want, [jnp.asarray(want[k]) for k in ('action', 'reward', 'discount')]


@pytest.mark.parametrize('alpha', [1, 10])
@pytest.mark.parametrize('double_q', [False, True])
@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_recorded_ones(golden, case: str, double_q: bool, alpha: int):
  """`single`: the authors' code; `double`: Tianshou and d3rlpy."""
  want, batch = recorded(golden, case)
  name = 'double' if double_q else 'single'
  selector = in_rlax_order(want['z_online_next' if double_q else 'z_target_next'])
  target = in_rlax_order(want['z_target_next'])

  def losses(z_online, alpha):
    return agent.loss(in_rlax_order(z_online), *batch, selector, target, alpha)

  z_online = jnp.asarray(want['z_online'])
  np.testing.assert_allclose(losses(z_online, 0.0), want[f'{name}_qr_loss'], rtol=1e-5, atol=0)
  per_example = want[f'{name}_qr_loss'].astype(np.float64) + alpha * want['ref64_cql_loss']
  np.testing.assert_allclose(losses(z_online, float(alpha)), per_example, rtol=1e-5, atol=0)
  mean = jnp.mean(losses(z_online, float(alpha)))
  for key in (f'{name}_w{alpha}_loss_mean', f'ref64_{name}_w{alpha}_loss_mean'):
    np.testing.assert_allclose(mean, want[key], rtol=1e-5)
  if double_q:
    np.testing.assert_allclose(mean, want[f'd3rlpy_double_w{alpha}_loss_mean'], rtol=1e-5)
  next_action = jnp.argmax(jnp.mean(selector, axis=1), axis=-1)
  np.testing.assert_array_equal(next_action, want[f'{name}_next_action'])
  grads = jax.grad(lambda z: jnp.mean(losses(z, float(alpha))))(z_online)
  want_grads = want[f'{name}_w1_grad_z_online']
  if alpha == 10:  # was recorded of `single` alone, but what alpha adds is the same
    want_grads = want_grads + (want['single_w10_grad_z_online'] - want['single_w1_grad_z_online'])
  atol = 1e-6 * np.abs(want_grads).max()
  np.testing.assert_allclose(grads, want_grads, rtol=0, atol=atol)


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_conservative_losses_equal_recorded_ones(golden, case: str):
  want, (a_tm1, _, _) = recorded(golden, case)
  q_tm1 = jnp.mean(in_rlax_order(want['z_online']), axis=1)
  losses = agent.conservative_loss(q_tm1, a_tm1)
  # Rows with Q in the hundreds cancel to a small loss, so the tolerance is of Q's size there.
  atol = 1e-6 * np.abs(q_tm1).max(axis=1)
  assert (np.abs(losses - want['ref64_cql_loss']) <= 1e-5 * np.abs(losses) + atol).all()


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_alpha_0_is_qrdqn(golden, case: str):
  want, batch = recorded(golden, case)
  target = in_rlax_order(want['z_target_next'])

  def cql(z):
    return jnp.mean(agent.loss(z, *batch, target, target, 0.0))

  def qrdqn(z):
    return jnp.mean(qrdqn_agent.loss(z, *batch, target))

  z = in_rlax_order(want['z_online'])
  results = [jax.value_and_grad(f)(z) for f in (cql, qrdqn)]
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
  np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)


def conservative_values(rates: np.ndarray, alpha: float) -> np.ndarray:
  """What CQL with one quantile converges to, by float64 gradient descent with exact targets.

  With one quantile the quantile loss is half the Huber loss, quadratic here.
  """
  q = np.zeros((2, 2))
  for _ in range(20_000):
    values = q.max(axis=1)
    targets = testing.REWARDS + testing.DISCOUNT * np.array([values, [values[0], 0.0]])
    policy = np.exp(q) / np.exp(q).sum(axis=1, keepdims=True)
    q -= 0.1 * (0.5 * rates * (q - targets) + alpha * (policy - rates))
  return q


def make_agent(data: replay.ReplayData, num_quantiles: int, **settings) -> agent.Cql:
  def network(frames):
    dist_q = testing.table('z', frames, num_quantiles, 2)
    return networks.QuantileNetworkOutputs(q_values=jnp.mean(dist_q, axis=1), dist_q=dist_q)

  return testing.make_agent(agent.Cql, network, data, **settings)


@pytest.mark.parametrize('double_q', [False, True])
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, double_q: bool):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online = np.random.default_rng(0).normal(size=(2, 5, 2)).astype(np.float32)
  target = online[..., ::-1] + 0.1  # another action is the best one
  selector = online if double_q else target

  def mean_loss(z):
    logged = (batch.a_tm1, batch.r_t, batch.discount_t)
    return jnp.mean(agent.loss(z[s_tm1], *logged, selector[s_t], target[s_t], 0.7))

  learner = make_agent(data, 5, alpha=0.7, double_q=double_q)
  got = testing.after_an_update(learner, {'z': online}, {'z': target})['z']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)


@pytest.mark.parametrize('alpha, double_q', [(0.0, False), (0.1, False), (0.1, True)])
def test_learn_reaches_the_known_values_of_an_mdp(tmp_path, alpha: float, double_q: bool):
  testing.write_logs(tmp_path, num_transitions=1000, rate_of_action_1=0.3)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  optimizer = optax.sgd(optax.exponential_decay(2.0, 500, 0.3))
  learner = make_agent(data, 1, alpha=alpha, double_q=double_q, optimizer=optimizer)
  learner.learn(2200)
  q = learner.get_state().online_params['~']['z'][:, 0]
  want = conservative_values(testing.logged_rates(data), alpha)
  np.testing.assert_allclose(q, want, atol=1e-3 if alpha == 0 else 0.02)
  if alpha == 0:
    np.testing.assert_allclose(want, testing.optimal_values(), atol=1e-6)
  else:
    assert np.abs(want - testing.optimal_values()).max() > 0.2


def test_a_negative_alpha_is_refused():
  with pytest.raises(ValueError, match=r'--alpha=-0\.1: expected 0 or more'):
    run_atari.Config(alpha=-0.1)
