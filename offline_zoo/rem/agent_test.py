"""Tests for the REM agent: its loss against recorded ones, identities, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing
from offline_zoo.dqn import agent as dqn_agent

from . import agent, run_atari


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


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_one_head_is_dqn(golden, case: str):
  """REM and Ensemble-DQN are the same then: the only mixture is that head."""
  _, heads, (a_tm1, r_t, discount_t, heads_target) = recorded(golden, case)
  mixtures = agent.random_mixtures(jax.random.PRNGKey(0), 1, 1)
  np.testing.assert_array_equal(mixtures, jnp.eye(1))

  def rem(q_tm1):
    target = heads_target[..., :1]
    return agent.loss(q_tm1[..., None], a_tm1, r_t, discount_t, target, mixtures)

  def dqn(q_tm1):
    target = heads_target[..., 0]
    return dqn_agent.loss(q_tm1, a_tm1, r_t, discount_t, target, target)

  q_tm1 = heads[..., 0]
  np.testing.assert_allclose(rem(q_tm1), dqn(q_tm1), rtol=1e-6)
  grads = [jax.grad(lambda q, f=f: jnp.mean(f(q)))(q_tm1) for f in (rem, dqn)]
  np.testing.assert_allclose(*grads, rtol=1e-6)


def make_agent(data: replay.ReplayData, **settings) -> agent.Rem:
  def network(frames):
    q_heads = testing.table('q', frames, 2, 3)
    return networks.MultiHeadNetworkOutputs(q_values=jnp.mean(q_heads, axis=-1), q_heads=q_heads)

  settings = {'num_heads': 3, 'num_mixtures': 1, 'ensemble': False, **settings}
  return testing.make_agent(agent.Rem, network, data, **settings)


@pytest.mark.parametrize('ensemble, num_mixtures', [(False, 1), (False, 2), (True, 1)])
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, monkeypatch, ensemble, num_mixtures):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online, target = np.random.default_rng(0).normal(size=(2, 2, 2, 3)).astype(np.float32)
  mixtures = agent.random_mixtures(jax.random.PRNGKey(5), 3, num_mixtures)

  def fixed_mixtures(rng_key, num_heads, number):
    assert (num_heads, number) == (3, num_mixtures)
    return mixtures

  monkeypatch.setattr(agent, 'random_mixtures', fixed_mixtures)

  def mean_loss(q):
    weights = jnp.eye(3) if ensemble else mixtures
    losses = agent.loss(q[s_tm1], batch.a_tm1, batch.r_t, batch.discount_t, target[s_t], weights)
    return jnp.mean(losses)

  learner = make_agent(data, ensemble=ensemble, num_mixtures=num_mixtures)
  got = testing.after_an_update(learner, {'q': online}, {'q': target})['q']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)


def test_mixtures_are_new_in_every_update_and_do_not_share_the_batchs_key(whole_batch, monkeypatch):
  data, _ = whole_batch
  keys = []
  mix, sample = agent.random_mixtures, replay.sample
  for owner, name, function in ((agent, 'random_mixtures', mix), (replay, 'sample', sample)):

    def note(*args, function=function):
      keys.append(next(x for x in args if isinstance(x, jax.Array)))
      return function(*args)

    monkeypatch.setattr(owner, name, note)
  learner = make_agent(data)

  @jax.jit
  def update(state):
    state, _ = learner.update(state, data)
    return state, keys[-2:]

  state, used = learner.initial_state(jax.random.PRNGKey(0)), []
  for _ in range(3):
    state, pair = update(state)
    used += pair
  assert len({np.asarray(key).tobytes() for key in used}) == 6


@pytest.mark.parametrize('ensemble', [False, True])
def test_learn_reaches_the_optimal_values_of_an_mdp(tmp_path, ensemble: bool):
  testing.write_logs(tmp_path)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  learner = make_agent(data, ensemble=ensemble, optimizer=optax.sgd(2.0))
  learner.learn(1200)
  # Every mixture reaches them, so every head does.
  q_heads = learner.get_state().online_params['~']['q']
  want = np.broadcast_to(testing.optimal_values()[..., None], q_heads.shape)
  np.testing.assert_allclose(q_heads, want, atol=2e-3)


def test_an_ensemble_of_mixtures_is_refused():
  with pytest.raises(ValueError, match='--num_mixtures=2: expected 1: --ensemble mixes no heads'):
    run_atari.Config(ensemble=True, num_mixtures=2)
