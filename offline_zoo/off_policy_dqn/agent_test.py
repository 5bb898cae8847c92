"""Tests for off-policy DQN: its loss against recorded ones, identities, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing
from offline_zoo.dqn import agent as dqn_agent

from . import agent, run_atari

RATIOS = {'target_epsilon': 0.001, 'min_ratio': 0.99, 'max_ratio': 1.01, 'first_ratio': True}


def recorded(golden, case: str):
  return np.load(golden / 'losses' / f'off_policy_dqn_{case}.npz', allow_pickle=False)


@pytest.mark.parametrize('case', ['random', 'edge', 'h1'])
def test_weights_equal_recorded_ones(golden, case: str):
  want = recorded(golden, case)
  args = (want['traj_action'], want['traj_prob'], want['q_target_traj'], float(want['epsilon']))
  weights = agent.importance_weights(*args, 0.99, 1.01, True)
  np.testing.assert_allclose(weights, want['weight'], rtol=1e-6)
  unclipped = agent.importance_weights(*args, 0.0, np.inf, True)
  np.testing.assert_allclose(unclipped, np.cumprod(want['ratio'], axis=1), rtol=1e-5)
  later = agent.importance_weights(*args, 0.99, 1.01, False)
  np.testing.assert_allclose(later, want['weight'] / want['clipped_ratio'][:, :1], rtol=1e-6)


@pytest.mark.parametrize('case', ['random', 'edge', 'h1'])
def test_losses_and_gradients_equal_recorded_ones(golden, case: str):
  """n17s/batch_rl's."""
  want = recorded(golden, case)
  weights = agent.importance_weights(
    want['traj_action'], want['traj_prob'], want['q_target_traj'], float(want['epsilon']),
    0.99, 1.01, True,
  )  # fmt: skip
  rest = [
    *(jnp.asarray(want[k]) for k in ('traj_reward', 'traj_discount')),
    weights,
    *(jnp.asarray(want[k]) for k in ('discount', 'q_target_next')),
  ]
  a_tm1 = want['traj_action'][:, 0]
  losses = agent.loss(want['q_online'], a_tm1, *rest)
  np.testing.assert_allclose(losses, want['loss'], rtol=1e-5, atol=0)
  q = jnp.asarray(want['q_online'])
  grads = jax.grad(lambda q: jnp.mean(agent.loss(q, a_tm1, *rest)))(q)
  atol = 1e-6 * np.abs(want['grad_q_online']).max()
  np.testing.assert_allclose(grads, want['grad_q_online'], rtol=0, atol=atol)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mdp')
  testing.write_logs(directory, rate_of_action_1=0.6)
  return replay.load(directory, n_step=3, discount=testing.DISCOUNT, with_probabilities=True)


def table(frames: jax.Array) -> networks.QNetworkOutputs:
  return networks.QNetworkOutputs(q_values=testing.table('q', frames, 2))


def make_agent(data: replay.ReplayData, **settings) -> agent.OffPolicyDqn:
  return testing.make_agent(agent.OffPolicyDqn, table, data, **{**RATIOS, **settings})


def q_table(learner) -> np.ndarray:
  return learner.get_state().online_params['~']['q']


@pytest.mark.parametrize('first_ratio', [True, False])
def test_an_update_is_a_gradient_step_on_the_loss(data, monkeypatch, first_ratio: bool):
  batch = replay.gather_windows(data, replay.valid_rows(data)[:50])
  monkeypatch.setattr(replay, 'sample_windows', lambda *_: batch)
  states = jnp.stack([testing.states(batch.s[:, i]) for i in range(4)], axis=1)
  online, target = np.random.default_rng(0).normal(size=(2, 2, 2)).astype(np.float32)
  weights = agent.importance_weights(
    batch.a, batch.probability, target[states[:, :3]], 0.2, 0.8, 1.3, first_ratio
  )

  def mean_loss(q):
    rest = (batch.r, batch.discount, weights, batch.discount_t, target[states[:, 3]])
    return jnp.mean(agent.loss(q[states[:, 0]], batch.a[:, 0], *rest))

  learner = make_agent(
    data, target_epsilon=0.2, min_ratio=0.8, max_ratio=1.3, first_ratio=first_ratio
  )
  got = testing.after_an_update(learner, {'q': online}, {'q': target})['q']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)
  # The target network has not changed yet, and nor have the weights.
  counts = np.asarray(batch.discount) > 0
  assert not counts.all()
  mean = np.asarray(weights)[counts].mean()
  assert learner.learn(1)['weight'] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
  'settings, num_updates',
  [
    ({'min_ratio': 1.0, 'max_ratio': 1.0}, 45),
    # Logs of a policy that is pi: greedy on the target's values, as they are before the first copy.
    ({'target_epsilon': 0.8, 'min_ratio': 0.0, 'max_ratio': 10.0}, 19),
  ],
)
def test_on_policy_or_with_ratios_of_1_it_is_n_step_dqn(data, settings, num_updates: int):
  """Action 1 is logged at 0.6, which is 1 - 0.8 + 0.8 / 2."""
  ours = make_agent(data, **settings)
  dqn = testing.make_agent(dqn_agent.Dqn, table, data, double_q=False)
  first = {'~': {'q': np.array([[0.0, 5.0], [0.0, 5.0]], np.float32)}}  # action 1 is greedy
  for learner in (ours, dqn):
    state = learner.get_state()
    learner.set_state(state._replace(online_params=first, target_params=first))
    learner.learn(num_updates)
  assert not np.allclose(q_table(dqn), first['~']['q'], atol=0.1)
  np.testing.assert_allclose(q_table(ours), q_table(dqn), rtol=1e-4)


def test_learn_reaches_the_weighted_fixed_point_of_an_mdp(data):
  """With ratios from the second step on, in bounds that keep errors below 1; by iteration here."""
  batch = replay.gather_windows(data, replay.valid_rows(data))
  states = np.stack([testing.states(batch.s[:, i]) for i in range(4)], axis=1)
  states[np.asarray(batch.discount_t) == 0, 3] = 0
  q = testing.optimal_values()  # there are other fixed points, where other actions are greedy
  for _ in range(200):
    greedy = np.asarray(batch.a) == q.argmax(axis=1)[np.clip(states[:, :3], 0, 1)]
    ratios = np.clip(np.where(greedy, 0.95, 0.05) / np.asarray(batch.probability), 0.8, 1.2)
    ratios[:, 0] = 1
    returns = (np.asarray(batch.r * batch.discount) * np.cumprod(ratios, axis=1)).sum(axis=1)
    targets = returns + np.asarray(batch.discount_t) * q.max(axis=1)[states[:, 3]]
    first = [(states[:, 0] == i) & (np.asarray(batch.a)[:, 0] == j) for i in (0, 1) for j in (0, 1)]
    q = np.array([targets[rows].mean() for rows in first]).reshape(2, 2)
  learner = make_agent(
    data,
    target_epsilon=0.1,
    min_ratio=0.8,
    max_ratio=1.2,
    first_ratio=False,
    batch_size=64,
    optimizer=optax.sgd(optax.exponential_decay(1.0, 300, 0.1)),
  )
  params = {'~': {'q': testing.optimal_values().astype(np.float32)}}
  learner.set_state(learner.get_state()._replace(online_params=params, target_params=params))
  learner.learn(1100)
  np.testing.assert_allclose(q_table(learner), q, atol=0.03)


@pytest.mark.parametrize(
  'name, value', [('min_ratio', -0.1), ('max_ratio', 0.5), ('target_epsilon', 1.5)]
)
def test_bad_ratios_are_refused(name: str, value: float):
  with pytest.raises(ValueError, match=rf'--{name}={value}: expected'):
    run_atari.Config(**{name: value})
