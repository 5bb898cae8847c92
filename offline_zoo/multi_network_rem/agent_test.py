"""Tests for REM over separate networks: recorded losses, identities, and what it learns."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing
from offline_zoo.dqn import agent as dqn_agent
from offline_zoo.rem import agent as rem_agent

from . import agent, run_atari


def recorded(golden, case: str):
  """What was recorded, and the values in our order: networks last."""
  want = np.load(golden / 'losses' / f'multi_network_rem_{case}.npz', allow_pickle=False)
  online, target = (jnp.moveaxis(want[k], 0, -1) for k in ('q_online', 'q_target_next'))
  return want, online, [*(jnp.asarray(want[k]) for k in ('action', 'reward', 'discount')), target]


CASES = [
  *(('random', name) for name in ('ensemble', 'rem', 'rem3', 'remNone')),
  *(('edge', name) for name in ('ensemble', 'rem', 'remOnehot')),
  *(('k1', name) for name in ('ensemble', 'rem')),  # one network
]


@pytest.mark.parametrize('case, name', CASES)
def test_losses_and_gradients_equal_batch_rls(golden, case: str, name: str):
  want, online, batch = recorded(golden, case)
  mixtures = jnp.eye(online.shape[-1]) if name == 'ensemble' else jnp.asarray(want[f'{name}_alpha'])
  losses = agent.loss(online, *batch, mixtures)
  np.testing.assert_allclose(losses, want[f'{name}_loss'], rtol=1e-5, atol=0)
  grads = jax.grad(lambda q: jnp.mean(agent.loss(q, *batch, mixtures)))(online)
  want_grads = np.moveaxis(want[f'{name}_grad_q_online'], 0, -1)
  np.testing.assert_allclose(grads, want_grads, rtol=0, atol=1e-6 * np.abs(want_grads).max())
  greedy = jnp.argmax(jnp.mean(online, axis=-1), axis=-1)
  np.testing.assert_array_equal(greedy, want['greedy_action'])


def test_the_loss_and_the_mixtures_are_rems(golden):
  _, online, batch = recorded(golden, 'random')
  mixtures = agent.random_mixtures(jax.random.PRNGKey(0), 4, 3)
  np.testing.assert_array_equal(mixtures, rem_agent.random_mixtures(jax.random.PRNGKey(0), 4, 3))
  np.testing.assert_array_equal(
    agent.loss(online, *batch, mixtures), rem_agent.loss(online, *batch, mixtures)
  )


def table(frames: jax.Array) -> networks.QNetworkOutputs:
  return networks.QNetworkOutputs(q_values=testing.table('q', frames, 2))


def make_agent(data: replay.ReplayData, **settings) -> agent.MultiNetworkRem:
  settings = {'num_networks': 3, 'num_mixtures': 1, 'ensemble': False, **settings}
  return testing.make_agent(agent.MultiNetworkRem, table, data, **settings)


def q_table(learner) -> np.ndarray:
  return learner.get_state().online_params['~']['q']


@pytest.mark.parametrize('ensemble, num_mixtures', [(False, 1), (False, 2), (True, 1)])
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, monkeypatch, ensemble, num_mixtures):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online, target = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
  mixtures = agent.random_mixtures(jax.random.PRNGKey(5), 3, num_mixtures)

  def fixed_mixtures(rng_key, num_networks, number):
    assert (num_networks, number) == (3, num_mixtures)
    return mixtures

  monkeypatch.setattr(agent, 'random_mixtures', fixed_mixtures)

  def mean_loss(q):
    weights = jnp.eye(3) if ensemble else mixtures
    q_tm1, q_t = (jnp.moveaxis(x, 0, -1) for x in (q[:, s_tm1], target[:, s_t]))
    return jnp.mean(agent.loss(q_tm1, batch.a_tm1, batch.r_t, batch.discount_t, q_t, weights))

  learner = make_agent(data, ensemble=ensemble, num_mixtures=num_mixtures)
  got = testing.after_an_update(learner, {'q': online}, {'q': target})['q']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)


# Batches in order, whatever the keys that draw them.


@pytest.fixture
def same_batches(tmp_path, monkeypatch):
  testing.write_logs(tmp_path)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  rows = replay.valid_rows(data)
  picked = rows[jax.random.randint(jax.random.PRNGKey(7), (32,), 0, len(rows))]
  monkeypatch.setattr(replay, 'sample', lambda data, *_: replay.gather(data, picked))
  return data


def start(learner, q: np.ndarray):
  params = {'~': {'q': q}}
  learner.set_state(learner.get_state()._replace(online_params=params, target_params=params))
  return learner


@pytest.mark.parametrize('ensemble', [False, True])
def test_one_network_is_dqn(same_batches, ensemble: bool):
  first = np.random.default_rng(1).normal(size=(2, 2)).astype(np.float32)
  optimizer = optax.adam(0.01)
  ours = make_agent(same_batches, num_networks=1, ensemble=ensemble, optimizer=optimizer)
  dqn = testing.make_agent(dqn_agent.Dqn, table, same_batches, double_q=False, optimizer=optimizer)
  start(ours, first[None]).learn(45)
  start(dqn, first).learn(45)
  np.testing.assert_allclose(q_table(ours)[0], q_table(dqn), rtol=1e-5)


@pytest.mark.parametrize(
  'optimizer', [lambda k: optax.sgd(0.5 * k), lambda k: optax.adam(0.01, eps=0.01 / k)]
)
def test_an_ensemble_is_as_many_dqns(same_batches, optimizer):
  """Its loss is the mean over K networks, so gradients are 1/K of a DQN's: SGD's step is K times
  DQN's, Adam's epsilon 1/K of it."""
  first = np.random.default_rng(1).normal(size=(3, 2, 2)).astype(np.float32)
  ours = make_agent(same_batches, ensemble=True, optimizer=optimizer(3))
  start(ours, first).learn(45)
  for q, want in zip(first, q_table(ours), strict=True):
    dqn = testing.make_agent(
      dqn_agent.Dqn, table, same_batches, double_q=False, optimizer=optimizer(1)
    )
    start(dqn, q).learn(45)
    np.testing.assert_allclose(q_table(dqn), want, rtol=1e-5)


@pytest.mark.parametrize('ensemble, backend', [(False, 'cpu'), (True, 'cpu'), (False, 'gpu')])
def test_learn_reaches_the_optimal_values_of_an_mdp(tmp_path, monkeypatch, ensemble, backend: str):
  """In both forms of the K passes; the one for accelerators runs on CPU as well."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  testing.write_logs(tmp_path)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  learner = make_agent(data, ensemble=ensemble, optimizer=optax.sgd(2.0))
  learner.learn(1200)
  want = np.broadcast_to(testing.optimal_values(), (3, 2, 2))
  np.testing.assert_allclose(q_table(learner), want, atol=2e-3)


@pytest.mark.usefixtures('compiled_quickly')
def test_networks_begin_apart_and_both_forms_of_their_passes_agree(tmp_path, monkeypatch):
  """With DQN's network, of which each network has parameters of its own."""
  testing.write_logs(tmp_path, num_transitions=60)
  data = replay.load(tmp_path)
  results = []
  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    learner = run_atari.make_agent(run_atari.Config(num_networks=2, batch_size=2), 2, data)
    params = learner.get_state().online_params
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(params))
    assert all(not np.array_equal(*p['w']) for p in params.values())
    frame = jax.random.randint(jax.random.PRNGKey(1), (84, 84, 4), 0, 256).astype(jnp.uint8)
    results.append(float(learner.act(params, jax.random.PRNGKey(0), frame)[2]))
    # One pass of three convolutions for all networks on an accelerator, one for each on CPU.
    act = jax.make_jaxpr(learner.act)(params, jax.random.PRNGKey(0), frame)
    assert str(act).count('conv_general_dilated[') == (3 if backend == 'gpu' else 6)
    network: hk.Transformed = networks.dqn_network(2)
    each = [network.apply(jax.tree.map(lambda x, k=k: x[k], params), frame[None]) for k in (0, 1)]
    mean = (each[0].q_values + each[1].q_values) / 2
    assert results[-1] == pytest.approx(float(jnp.max(mean)), rel=1e-4)
  assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_an_ensemble_of_mixtures_is_refused():
  with pytest.raises(ValueError, match='--num_mixtures=2: expected 1: --ensemble mixes no'):
    run_atari.Config(ensemble=True, num_mixtures=2)
