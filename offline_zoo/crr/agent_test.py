"""Tests for the CRR agent: its loss against recorded ones, identities, and what it learns."""

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing
from offline_zoo.bc import agent as bc_agent

from . import agent, run_atari

MODES = {'exp': ('exp', 1.0, 20.0), 'exp_b05_r5': ('exp', 0.5, 5.0)} | {
  mode: (mode, 1.0, 20.0) for mode in ('binary', 'all')
}


def recorded(golden, case: str):
  want = np.load(golden / 'losses' / f'crr_{case}.npz', allow_pickle=False)
  keys = ('action', 'reward', 'discount', 'q_target_next', 'actor_target_logits_next')
  online = [jnp.asarray(want[k]) for k in ('q', 'actor_logits')]
  return want, online, [jnp.asarray(want[k]) for k in keys]


def losses(q, logits, rest, mode: str, min_q_weight: float) -> jax.Array:
  weights = agent.advantage_weights(q, logits, rest[0], *MODES[mode])
  return agent.loss(q, logits, *rest, weights, min_q_weight)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('case', ['random', 'edge'])
def test_weights_equal_recorded_ones(golden, case: str, mode: str):
  want, (q, logits), rest = recorded(golden, case)
  got = agent.advantage_weights(q, logits, rest[0], *MODES[mode])
  # XLA flushes what is below 1.2e-38 to zero.
  np.testing.assert_allclose(got, want[f'{mode}_weight'], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize('min_q_weight', [0.0, 10.0])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('case', ['random', 'edge'])
def test_losses_and_gradients_equal_recorded_ones(golden, case, mode, min_q_weight: float):
  """Critic, conservative loss and likelihood are Tianshou's, weights the paper's: `paper_*`."""
  want, (q, logits), rest = recorded(golden, case)
  actor = want[f'{mode}_actor_loss'].astype(np.float64)
  per_example = want['critic_loss'] + actor + min_q_weight * want['cql_loss']
  np.testing.assert_allclose(
    losses(q, logits, rest, mode, min_q_weight), per_example, rtol=1e-5, atol=1e-6
  )
  grads = jax.grad(
    lambda q, logits: jnp.mean(losses(q, logits, rest, mode, min_q_weight)), argnums=(0, 1)
  )(q, logits)
  names = f'paper_grad_q_w{min_q_weight:.0f}', f'paper_{mode}_grad_actor_logits'
  for grad, name in zip(grads, names, strict=True):
    assert (np.abs(grad - want[name]) <= 1e-6 * np.abs(want[name]).max()).all()


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_mode_all_equals_tianshous_batch(golden, case: str):
  """Where its defects make no difference."""
  want, (q, logits), rest = recorded(golden, case)
  for weight, key in ((10.0, 'tianshou_all'), (0.0, 'tianshou_all_w0')):
    mean = jnp.mean(losses(q, logits, rest, 'all', weight))
    np.testing.assert_allclose(mean, want[f'{key}_loss_mean'], rtol=1e-5)


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_mode_all_without_the_conservative_loss_is_bc_and_a_critic(golden, case: str):
  want, (q, logits), rest = recorded(golden, case)
  clone = bc_agent.loss(logits, rest[0], 0.0)
  together = losses(q, logits, rest, 'all', 0.0)
  np.testing.assert_allclose(together, want['critic_loss'] + clone, rtol=1e-5, atol=1e-6)
  grads = [
    jax.grad(lambda x, f=f: jnp.mean(f(x)))(logits)
    for f in (lambda x: losses(q, x, rest, 'all', 0.0), lambda x: bc_agent.loss(x, rest[0], 0.0))
  ]
  np.testing.assert_allclose(*grads, rtol=1e-6)


def test_a_huge_advantage_has_the_largest_weight_and_finite_gradients():
  q, logits = jnp.array([[400.0, 0.0]]), jnp.array([[0.0, 2.0]])
  rest = [jnp.zeros(1, int), jnp.zeros(1), jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros((1, 2))]
  assert agent.advantage_weights(q, logits, rest[0], 'exp', 1.0, 20.0).item() == 20
  grads = jax.grad(lambda q, x: losses(q, x, rest, 'exp', 0.0)[0], argnums=(0, 1))(q, logits)
  np.testing.assert_allclose(grads[0], [[400.0, 0.0]])
  np.testing.assert_allclose(grads[1], 20 * (jax.nn.softmax(logits) - jnp.array([[1.0, 0.0]])))


SETTINGS = {
  'mode': 'exp', 'beta': 1.0, 'max_weight': 20.0, 'min_q_weight': 0.0, 'sample_actions': False
}  # fmt: skip


def make_agent(data: replay.ReplayData, **settings) -> agent.Crr:
  def network(frames):
    return networks.ActorCriticNetworkOutputs(
      testing.table('q', frames, 2), testing.table('logits', frames, 2)
    )

  return testing.make_agent(agent.Crr, network, data, **{**SETTINGS, **settings})


@pytest.mark.parametrize('mode', MODES)
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, mode: str):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  names = ('q', 'logits')
  tables = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
  online, target = (dict(zip(names, x, strict=True)) for x in (tables[:2], tables[2:]))
  rest = (batch.a_tm1, batch.r_t, batch.discount_t, target['q'][s_t], target['logits'][s_t])

  def mean_loss(x):
    return jnp.mean(losses(x['q'][s_tm1], x['logits'][s_tm1], rest, mode, 0.7))

  kind, beta, max_weight = MODES[mode]
  learner = make_agent(data, mode=kind, beta=beta, max_weight=max_weight, min_q_weight=0.7)
  got = testing.after_an_update(learner, online, target)
  grads = jax.grad(mean_loss)(online)
  for name in names:
    np.testing.assert_allclose(got[name], online[name] - grads[name], rtol=1e-5)
  weights = agent.advantage_weights(
    got['q'][s_tm1], got['logits'][s_tm1], batch.a_tm1, kind, beta, max_weight
  )
  assert learner.learn(1)['weight'] == pytest.approx(float(jnp.mean(weights)), rel=1e-5)


def fixed_point(rates: np.ndarray, weight) -> tuple[np.ndarray, np.ndarray]:
  """The policy and its values where the policy is that of the logs, weighted: by iteration."""
  q = np.zeros((2, 2))
  policy = rates
  for _ in range(3000):
    values = (policy * q).sum(axis=1)
    q = testing.REWARDS + testing.DISCOUNT * np.array([values, [values[0], 0.0]])
    weighted = rates * weight(q - (policy * q).sum(axis=1, keepdims=True))
    policy = 0.9 * policy + 0.1 * weighted / weighted.sum(axis=1, keepdims=True)
  return policy, q


@pytest.mark.parametrize('mode', ['exp', 'all'])
def test_learn_reaches_the_known_policy_of_an_mdp(tmp_path, mode: str):
  testing.write_logs(tmp_path, num_transitions=1000, rate_of_action_1=0.3)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  optimizer = optax.sgd(optax.exponential_decay(1.0, 600, 0.2))
  learner = make_agent(data, mode=mode, beta=0.5, batch_size=64, optimizer=optimizer)
  learner.learn(1800)
  params = learner.get_state().online_params['~']
  weight = {'exp': lambda a: np.minimum(np.exp(a / 0.5), 20), 'all': np.ones_like}[mode]
  rates = testing.logged_rates(data)
  policy, q = fixed_point(rates, weight)
  np.testing.assert_allclose(jax.nn.softmax(params['logits']), policy, atol=0.02)
  np.testing.assert_allclose(params['q'], q, atol=0.02)
  if mode == 'exp':  # the better actions are taken more often than they are logged
    assert (policy[:, 1] > rates[:, 1] + 0.05).all()


def test_acting_follows_the_policy_and_not_the_values(tmp_path):
  testing.write_logs(tmp_path)
  data = replay.load(tmp_path)
  params = {'q': np.array([[5.0, 0.0]] * 2), 'logits': np.log([[0.3, 0.7]] * 2)}
  counts = {}
  for sample_actions in (False, True):
    learner = make_agent(data, sample_actions=sample_actions)
    learner.set_state(learner.get_state()._replace(online_params={'~': params}))
    actions = []
    for _ in range(300):
      learner.reset()
      actions.append(learner.step(dm_env.restart(np.full((210, 160), 10, np.uint8))))
      assert learner.statistics['state_value'] == 5
    counts[sample_actions] = np.bincount(actions, minlength=2).tolist()
  assert counts[False] == [0, 300]
  assert 60 < counts[True][0] < 120


@pytest.mark.parametrize(
  'name, value', [('mode', 'max'), ('beta', 0.0), ('max_weight', -1.0), ('min_q_weight', -1.0)]
)
def test_bad_weights_are_refused(name: str, value):
  with pytest.raises(ValueError, match=rf'--{name}={value}: expected'):
    run_atari.Config(**{name: value})
