"""Tests for the DQN agent: its loss against recorded ones, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing

from . import agent


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_dopamines(golden, case: str):
  want = np.load(golden / 'losses' / f'dqn_huber_{case}.npz', allow_pickle=False)
  keys = ('action', 'reward', 'discount', 'q_target_next', 'q_target_next')
  batch = [jnp.asarray(want[k]) for k in keys]
  losses = agent.loss(want['q_online'], *batch)
  np.testing.assert_allclose(losses, want['loss'], rtol=1e-5, atol=0)
  np.testing.assert_allclose(losses, want['ref64_loss'], rtol=1e-5, atol=0)
  grads = jax.grad(lambda q: jnp.mean(agent.loss(q, *batch)))(jnp.asarray(want['q_online']))
  for name in ('grad_q_online', 'tf_grad_q_online', 'ref64_grad_q_online'):
    np.testing.assert_allclose(grads, want[name], rtol=0, atol=1e-6 * np.abs(want[name]).max())


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_double_losses_and_gradients_equal_recorded_ones(golden, case: str):
  """The target is DQN Zoo's and Dopamine's; the loss is Dopamine's, which DQN Zoo's squares."""
  want = np.load(golden / 'losses' / f'double_dqn_{case}.npz', allow_pickle=False)
  keys = ('action', 'reward', 'discount', 'q_online_next', 'q_target_next')
  batch = [jnp.asarray(want[k]) for k in keys]
  losses = agent.loss(want['q_online'], *batch)
  np.testing.assert_allclose(losses, want['huber_loss'], rtol=1e-5, atol=0)
  grads = jax.grad(lambda q: jnp.mean(agent.loss(q, *batch)))(jnp.asarray(want['q_online']))
  atol = 1e-6 * np.abs(want['huber_grad_q_online']).max()
  np.testing.assert_allclose(grads, want['huber_grad_q_online'], rtol=0, atol=atol)
  # Where an error is not clipped, DQN Zoo's gradient and loss are the same.
  small = np.abs(want['td_error']) <= 1
  assert 0 < small.sum() < 16
  np.testing.assert_allclose(losses[small], want['zoo_b1_loss'][small], rtol=1e-5)


def test_a_loss_by_hand():
  # Errors: 1 + 0.5 * 4 - 2 = 1, and without a next state -3 - 0.5 = -3.5.
  losses = agent.loss(
    q_tm1=jnp.array([[2.0, 9.0], [9.0, 0.5]]),
    a_tm1=jnp.array([0, 1]),
    r_t=jnp.array([1.0, -3.0]),
    discount_t=jnp.array([0.5, 0.0]),
    q_selector_t=jnp.array([[0.0, 1.0], [100.0, 100.0]]),
    q_target_t=jnp.array([[7.0, 4.0], [100.0, 100.0]]),
  )
  np.testing.assert_array_equal(losses, [0.5, 3.5 - 0.5])


def test_no_gradient_flows_into_the_target():
  def mean_loss(q_selector_t, q_target_t):
    return jnp.mean(agent.loss(q_tm1, a_tm1, r_t, discount_t, q_selector_t, q_target_t))

  q_tm1, a_tm1, r_t, discount_t = jnp.ones((2, 3)), jnp.zeros(2, int), jnp.ones(2), jnp.ones(2)
  for grads in jax.grad(mean_loss, argnums=(0, 1))(jnp.ones((2, 3)), jnp.ones((2, 3))):
    assert not grads.any()


def test_shapes_are_checked():
  q, a, r, other = jnp.ones((2, 3)), jnp.zeros(2, int), jnp.ones(2), jnp.ones((2, 4))
  for arguments in ((q, a, r, r, q, other), (q, a, r, r, other, q), (q, a, r[:, None], r, q, q)):
    with pytest.raises(AssertionError):
      agent.loss(*arguments)


@pytest.fixture(scope='module')
def mdp_logs(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mdp')
  testing.write_logs(directory)
  return directory


def table(frames: jax.Array) -> networks.QNetworkOutputs:
  return networks.QNetworkOutputs(q_values=testing.table('q', frames, 2))


def make_agent(data: replay.ReplayData, network=table, **settings) -> agent.Dqn:
  return testing.make_agent(agent.Dqn, network, data, **{'double_q': False, **settings})


def q_table(dqn: agent.Dqn) -> np.ndarray:
  return dqn.get_state().online_params['~']['q']


@pytest.mark.parametrize('double_q', [False, True])
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, double_q: bool):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
  target = online[:, ::-1] + 0.1  # another action is the best one
  selector = online if double_q else target

  def mean_loss(q):
    logged = (batch.a_tm1, batch.r_t, batch.discount_t)
    return jnp.mean(agent.loss(q[s_tm1], *logged, selector[s_t], target[s_t]))

  learner = make_agent(data, double_q=double_q)
  got = testing.after_an_update(learner, {'q': online}, {'q': target})['q']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)


@pytest.mark.parametrize('backend, double_q', [('cpu', False), ('cpu', True), ('gpu', False)])
def test_learn_reaches_the_optimal_values_of_an_mdp(mdp_logs, monkeypatch, backend, double_q):
  """In both forms of `learn`; the one for accelerators runs on CPU as well."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  dqn = make_agent(replay.load(mdp_logs, discount=testing.DISCOUNT), double_q=double_q)
  metrics = [dqn.learn(100) for _ in range(6)]
  np.testing.assert_allclose(q_table(dqn), testing.optimal_values(), atol=1e-4)
  assert metrics[0]['loss'] > 1e-3 and metrics[-1]['loss'] < 1e-7
  # Batches are uniform over the logged rows, so mean metrics are means over those.
  batch = replay.gather(dqn.data, replay.valid_rows(dqn.data))
  states = testing.states(batch.s_tm1)
  q_max = testing.optimal_values().max(axis=1)[states].mean()
  assert metrics[-1]['q_max'] == pytest.approx(q_max, abs=0.02)
  q_logged = testing.optimal_values()[states, batch.a_tm1].mean()
  assert metrics[-1]['q_logged_action'] == pytest.approx(q_logged, abs=0.02)


def test_n_step_learning_reaches_the_behaviours_mixture(mdp_logs):
  """With n steps logged actions are followed: the fixed point is computed by iteration here."""
  data = replay.load(mdp_logs, n_step=3, discount=testing.DISCOUNT)
  batch = replay.gather(data, replay.valid_rows(data))
  s, a = np.asarray(testing.states(batch.s_tm1)), np.asarray(batch.a_tm1)
  s_next = np.where(batch.discount_t > 0, testing.states(batch.s_t), 0)
  q = np.zeros((2, 2))
  for _ in range(200):
    targets = batch.r_t + batch.discount_t * q.max(axis=1)[s_next]
    q = np.array([[targets[(s == i) & (a == j)].mean() for j in range(2)] for i in range(2)])
  dqn = make_agent(data, optimizer=optax.sgd(optax.exponential_decay(1.0, 400, 0.1)))
  dqn.learn(1500)
  # Targets vary, and the Huber loss is quadratic for all of them, so their mean is the solution.
  np.testing.assert_allclose(q_table(dqn), q, atol=0.02)


def test_both_forms_of_learn_agree(mdp_logs, monkeypatch):
  tables = []
  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    dqn = make_agent(replay.load(mdp_logs))
    tables.append((dqn.learn(30), q_table(dqn)))
  np.testing.assert_allclose(tables[0][1], tables[1][1], rtol=1e-6)
  assert tables[0][0] == pytest.approx(tables[1][0], rel=1e-5)
