"""Tests for the REM agent: its loss against recorded ones, identities, and what it learns."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, processors, replay, testing
from offline_zoo.dqn import agent as dqn_agent
from offline_zoo.rem import agent


def recorded(golden, case: str):
  want = np.load(golden / 'losses' / f'rem_ensemble_{case}.npz', allow_pickle=False)
  batch = [jnp.asarray(want[k]) for k in ('action', 'reward', 'discount', 'heads_target_next')]
  return want, jnp.asarray(want['heads_online']), batch


@pytest.mark.parametrize('name', ['rem', 'ensemble'])
@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_batch_rls(golden, case: str, name: str):
  want, heads, batch = recorded(golden, case)
  mixtures = jnp.asarray(want['alpha']) if name == 'rem' else jnp.eye(200)
  losses = agent.loss(heads, *batch, mixtures)
  for key in (f'{name}_loss', f'ref64_{name}_loss'):
    np.testing.assert_allclose(losses, want[key], rtol=1e-5, atol=0)
  grads = jax.grad(lambda heads: jnp.mean(agent.loss(heads, *batch, mixtures)))(heads)
  want_grads = want[f'{name}_grad_heads_online']
  scale = np.abs(want_grads).max()
  np.testing.assert_allclose(grads, want_grads, rtol=0, atol=1e-6 * scale)
  greedy = jnp.argmax(jnp.mean(heads, axis=-1), axis=-1)
  np.testing.assert_array_equal(greedy, want['greedy_action'])


def test_mixtures_are_random_convex_combinations():
  mixtures = np.asarray(agent.random_mixtures(jax.random.PRNGKey(0), 200, 3))
  assert mixtures.shape == (200, 3) and (mixtures >= 0).all()
  np.testing.assert_allclose(mixtures.sum(axis=0), 1, rtol=1e-6)
  # Uniform draws over their sum, about 100: up to 1/100, with mean 1/200.
  assert 0.0095 < mixtures.max() < 0.0115
  assert not np.array_equal(mixtures[:, 0], mixtures[:, 1])
  np.testing.assert_array_equal(agent.random_mixtures(jax.random.PRNGKey(1), 1, 2), [[1.0, 1.0]])


def test_several_mixtures_are_averaged(golden):
  _, heads, batch = recorded(golden, 'random')
  mixtures = agent.random_mixtures(jax.random.PRNGKey(2), 200, 3)
  alone = [agent.loss(heads, *batch, mixtures[:, i : i + 1]) for i in range(3)]
  np.testing.assert_allclose(agent.loss(heads, *batch, mixtures), np.mean(alone, axis=0), rtol=1e-5)


@pytest.mark.parametrize('ensemble', [False, True])
def test_one_head_is_dqn(golden, ensemble: bool):
  _, heads, (a_tm1, r_t, discount_t, heads_target) = recorded(golden, 'random')
  mixtures = jnp.eye(1) if ensemble else agent.random_mixtures(jax.random.PRNGKey(0), 1, 1)

  def rem(q_tm1):
    target = heads_target[..., :1]
    return agent.loss(q_tm1[..., None], a_tm1, r_t, discount_t, target, mixtures)

  def dqn(q_tm1):
    return dqn_agent.loss(q_tm1, a_tm1, r_t, discount_t, heads_target[..., 0])

  q_tm1 = heads[..., 0]
  np.testing.assert_allclose(rem(q_tm1), dqn(q_tm1), rtol=1e-6)
  grads = [jax.grad(lambda q, f=f: jnp.mean(f(q)))(q_tm1) for f in (rem, dqn)]
  np.testing.assert_allclose(*grads, rtol=1e-6)


@pytest.mark.parametrize('ensemble', [False, True])
def test_learn_reaches_the_optimal_values_of_an_mdp(tmp_path, ensemble: bool):
  testing.write_logs(tmp_path)

  def network(frames):
    q_heads = testing.table('q', frames, 2, 3)
    return networks.MultiHeadNetworkOutputs(q_values=jnp.mean(q_heads, axis=-1), q_heads=q_heads)

  learner = agent.Rem(
    network=hk.without_apply_rng(hk.transform(network)),
    optimizer=optax.sgd(2.0),
    data=replay.load(tmp_path, discount=testing.DISCOUNT),
    processor=processors.AtariProcessor(),
    batch_size=32,
    target_network_update_period=20,
    num_heads=3,
    num_mixtures=1,
    ensemble=ensemble,
    eval_epsilon=0.0,
    rng_key=jax.random.PRNGKey(0),
  )
  learner.learn(1200)
  # Every mixture reaches them, so every head does.
  q_heads = learner.get_state().online_params['~']['q']
  want = np.broadcast_to(testing.optimal_values()[..., None], q_heads.shape)
  np.testing.assert_allclose(q_heads, want, atol=2e-3)
