"""Tests for the BCQ agent: its loss against recorded ones, identities, and what it learns."""

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing

from . import agent, run_atari

WEIGHTS = {'threshold': 0.3, 'behaviour_weight': 1.0, 'logits_penalty': 0.01}
ONLINE = ('q_online', 'imitation_logits')
REST = ('action', 'reward', 'discount', 'q_online_next', 'imitation_logits_next', 'q_target_next')


def recorded(golden, case: str):
  want = np.load(golden / 'losses' / f'bcq_{case}.npz', allow_pickle=False)
  return want, [jnp.asarray(want[k]) for k in ONLINE], [jnp.asarray(want[k]) for k in REST]


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_the_authors(golden, case: str):
  want, online, rest = recorded(golden, case)
  td_losses = agent.loss(*online, *rest, threshold=0.3, behaviour_weight=0.0, logits_penalty=0.0)
  for key in ('q_loss', 'ref64_q_loss'):
    np.testing.assert_allclose(td_losses, want[key], rtol=1e-5, atol=0)
  behaviour = agent.loss(*online, *rest, threshold=0.3, behaviour_weight=1.0, logits_penalty=0.0)
  per_example = want['q_loss'].astype(np.float64) + want['ref64_imitation_loss']
  np.testing.assert_allclose(behaviour, per_example, rtol=1e-5, atol=0)

  def mean_loss(q, logits):
    return jnp.mean(agent.loss(q, logits, *rest, **WEIGHTS))

  for key in ('loss_mean', 'tianshou_loss_mean', 'ref64_loss_mean'):
    np.testing.assert_allclose(mean_loss(*online), want[key], rtol=1e-5)
  grads = jax.grad(mean_loss, argnums=(0, 1))(*online)
  for grad, name in zip(grads, ('grad_q_online', 'grad_imitation_logits'), strict=True):
    atol = 1e-6 * np.abs(want[name]).max()
    np.testing.assert_allclose(grad, want[name], rtol=0, atol=atol)
    np.testing.assert_allclose(grad, want[f'tianshou_{name}'], rtol=0, atol=atol)


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_masks_and_greedy_actions_equal_the_authors(golden, case: str):
  want, (q, logits), rest = recorded(golden, case)
  for q_values, behaviour_logits, mask, action in (
    (q, logits, want['mask_s'], want['action_s']),
    (rest[3], rest[4], want['mask_next'], want['next_action']),
  ):
    masked = agent.masked_values(q_values, behaviour_logits, 0.3)
    np.testing.assert_array_equal(masked > -jnp.inf, mask)
    np.testing.assert_array_equal(jnp.argmax(masked, axis=-1), action)


def test_a_threshold_that_single_precision_rounds_to_1_is_refused():
  with pytest.raises(ValueError, match=r'--threshold=0\.99999999: expected'):
    run_atari.Config(threshold=0.99999999)


def test_the_threshold_itself_is_not_allowed():
  logits = jnp.log(jnp.array([0.5, 0.25, 0.2500001 * 1.01]))
  masked = agent.masked_values(jnp.zeros(3), logits, 0.5)
  np.testing.assert_array_equal(masked > -jnp.inf, [True, False, True])


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_threshold_0_and_no_behaviour_loss_is_double_dqn(golden, case: str):
  _, (q_tm1, logits), rest = recorded(golden, case)
  a_tm1, r_t, discount_t, q_t, _, q_target_t = rest

  def bcq(q):
    losses = agent.loss(q, logits, *rest, threshold=0.0, behaviour_weight=0.0, logits_penalty=0.0)
    return jnp.mean(losses)

  def double_dqn(q):
    rows = jnp.arange(len(q))
    targets = r_t + discount_t * q_target_t[rows, jnp.argmax(q_t, axis=-1)]
    return jnp.mean(optax.losses.huber_loss(q[rows, a_tm1], targets))

  results = [jax.value_and_grad(f)(q_tm1) for f in (bcq, double_dqn)]
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
  np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


def make_agent(data: replay.ReplayData, **settings) -> agent.Bcq:
  def network(frames):
    return networks.BehaviourNetworkOutputs(
      testing.table('q', frames, 2), testing.table('logits', frames, 2)
    )

  settings = {**WEIGHTS, **settings}
  return testing.make_agent(agent.Bcq, network, data, **settings)


def test_an_update_is_a_gradient_step_on_the_loss(whole_batch):
  """Online, action 1 is the better one but forbidden in state 0; the target has it otherwise."""
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online = {
    'q': np.array([[0.1, 0.5], [0.2, 0.4]], np.float32),
    'logits': np.array([[0.3, -2.0], [0.1, 0.2]], np.float32),
  }
  target = {'q': online['q'][:, ::-1] + 0.1, 'logits': online['logits'][::-1]}
  weights = {'threshold': 0.3, 'behaviour_weight': 0.7, 'logits_penalty': 0.2}

  def mean_loss(tables):
    q, logits = tables['q'], tables['logits']
    logged = (batch.a_tm1, batch.r_t, batch.discount_t)
    next_tables = (online['q'][s_t], online['logits'][s_t], target['q'][s_t])
    return jnp.mean(agent.loss(q[s_tm1], logits[s_tm1], *logged, *next_tables, **weights))

  got = testing.after_an_update(make_agent(data, **weights), online, target)
  grads = jax.grad(mean_loss)(online)
  for name in online:
    np.testing.assert_allclose(got[name], online[name] - grads[name], rtol=1e-5)


@pytest.mark.parametrize('threshold', [0.0, 0.3])
def test_learn_reaches_the_constrained_values_of_an_mdp(tmp_path, threshold: float):
  """Action 1 is logged at 0.15, 0.18 times as often as action 0: a threshold of 0.3 forbids it."""
  testing.write_logs(tmp_path, num_transitions=1500, rate_of_action_1=0.15)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  learner = make_agent(
    data,
    threshold=threshold,
    batch_size=64,
    logits_penalty=0.0,
    optimizer=optax.sgd(optax.exponential_decay(2.0, 500, 0.2)),
  )
  learner.learn(2000)
  params = learner.get_state().online_params['~']
  if threshold:
    # Only action 0 is ever chosen: state 0 for ever, worth nothing.
    want = testing.REWARDS + testing.DISCOUNT * np.array([[0.0, 0.3], [0.0, 0.0]])
  else:
    want = testing.optimal_values()
  np.testing.assert_allclose(params['q'], want, atol=5e-3)
  rates = np.exp(params['logits']) / np.exp(params['logits']).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(rates, testing.logged_rates(data), atol=0.02)


def test_acting_obeys_the_mask(tmp_path):
  testing.write_logs(tmp_path)
  data = replay.load(tmp_path)
  frame = np.full((210, 160), 10, np.uint8)
  for threshold, action in ((0.0, 1), (0.3, 0)):
    learner = make_agent(data, threshold=threshold)
    params = {'q': np.array([[0.0, 5.0]] * 2), 'logits': np.array([[0.0, -2.0]] * 2)}
    learner.set_state(learner.get_state()._replace(online_params={'~': params}))
    assert learner.step(dm_env.restart(frame)) == action


@pytest.mark.parametrize(
  'name, value', [('threshold', 1.0), ('threshold', -0.1), ('behaviour_weight', -1.0)]
)
def test_bad_weights_are_refused(name: str, value: float):
  with pytest.raises(ValueError, match=rf'--{name}={value}: expected'):
    run_atari.Config(**{name: value})
