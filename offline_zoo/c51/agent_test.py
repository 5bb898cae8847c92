"""Tests for the C51 agent: its loss against recorded ones, identities, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rlax

from offline_zoo import networks, replay, testing

from . import agent, run_atari


def means(logits: jax.Array, atoms: np.ndarray) -> jax.Array:
  return jax.nn.softmax(logits) @ atoms


def recorded(golden, case: str):
  """What was recorded, its atoms, and the logged columns of its batch."""
  want = np.load(golden / 'losses' / f'c51_{case}.npz', allow_pickle=False)
  # Those that run_atari makes are nearer to what they should be: the middle one is 0.
  ours = np.linspace(-want['vmax'], want['vmax'], len(want['support']), dtype=np.float32)
  np.testing.assert_allclose(ours, want['support'], atol=1.5e-6)
  return want, want['support'], [jnp.asarray(want[k]) for k in ('action', 'reward', 'discount')]


@pytest.mark.parametrize('case', ['random', 'edge', 'gamma1', 'support'])
def test_losses_and_gradients_equal_recorded_ones(golden, case: str):
  """Dopamine's JAX and TensorFlow (through batch_rl) agents', and DQN Zoo's."""
  want, atoms, batch = recorded(golden, case)
  selector = means(want['target_logits_next'], atoms)
  np.testing.assert_array_equal(jnp.argmax(selector, axis=-1), want['next_action'])
  target = jnp.asarray(want['target_logits_next'])

  def losses(logits):
    return agent.loss(atoms, logits, *batch, selector, target)

  logits = jnp.asarray(want['logits'])
  grads = jax.grad(lambda logits: jnp.mean(losses(logits)))(logits)
  # Dopamine rounds the spacing of its atoms otherwise, in TensorFlow to 1e-6 of it.
  for prefix, rtol, atol in (('rlax_', 1e-5, 1e-6), ('', 1e-5, 2e-6), ('tf_', 5e-5, 1e-5)):
    np.testing.assert_allclose(losses(logits), want[f'{prefix}loss'], rtol=rtol, atol=0)
    want_grads = want[f'{prefix}grad_logits']
    np.testing.assert_allclose(grads, want_grads, rtol=0, atol=atol * np.abs(want_grads).max())


@pytest.mark.parametrize('case', ['random', 'edge'])
def test_double_losses_and_gradients_equal_recorded_ones(golden, case: str):
  want, atoms, batch = recorded(golden, case)
  selector = means(want['logits_next'], atoms)
  np.testing.assert_array_equal(jnp.argmax(selector, axis=-1), want['double_next_action'])
  target = jnp.asarray(want['target_logits_next'])

  def losses(logits):
    return agent.loss(atoms, logits, *batch, selector, target)

  logits = jnp.asarray(want['logits'])
  np.testing.assert_allclose(losses(logits), want['double_loss'], rtol=1e-5, atol=0)
  grads = jax.grad(lambda logits: jnp.mean(losses(logits)))(logits)
  atol = 1e-6 * np.abs(want['double_grad_logits']).max()
  np.testing.assert_allclose(grads, want['double_grad_logits'], rtol=0, atol=atol)


def test_the_targets_own_means_make_it_rlaxs_categorical_q_learning(golden):
  want, atoms, batch = recorded(golden, 'random')
  logits, target = jnp.asarray(want['logits']), jnp.asarray(want['target_logits_next'])
  rlaxs = jax.vmap(rlax.categorical_q_learning, in_axes=(None, 0, 0, 0, 0, None, 0))
  ours = agent.loss(atoms, logits, *batch, means(target, atoms), target)
  np.testing.assert_allclose(ours, rlaxs(atoms, logits, *batch, atoms, target), rtol=1e-6)


def test_no_gradient_flows_into_the_target(golden):
  want, atoms, batch = recorded(golden, 'random')

  def mean_loss(selector, target):
    return jnp.mean(agent.loss(atoms, jnp.asarray(want['logits']), *batch, selector, target))

  target = jnp.asarray(want['target_logits_next'])
  for grads in jax.grad(mean_loss, argnums=(0, 1))(means(target, atoms), target):
    assert not grads.any()


ATOMS = np.linspace(-1, 1, 9, dtype=np.float32)


def make_agent(data: replay.ReplayData, atoms: np.ndarray = ATOMS, **settings) -> agent.C51:
  def network(frames):
    logits = testing.table('logits', frames, 2, len(atoms))
    return networks.CategoricalNetworkOutputs(q_values=means(logits, atoms), q_logits=logits)

  return testing.make_agent(agent.C51, network, data, atoms=atoms, **settings)


@pytest.mark.parametrize('double_q', [False, True])
def test_an_update_is_a_gradient_step_on_the_loss(whole_batch, double_q: bool):
  data, batch = whole_batch
  s_tm1, s_t = testing.states(batch.s_tm1), testing.states(batch.s_t)
  online = np.random.default_rng(0).normal(size=(2, 2, 9)).astype(np.float32)
  target = online[:, ::-1] + np.linspace(0, 0.1, 9, dtype=np.float32)  # another action is best
  selector = means(online if double_q else target, ATOMS)

  def mean_loss(logits):
    logged = (batch.a_tm1, batch.r_t, batch.discount_t)
    return jnp.mean(agent.loss(ATOMS, logits[s_tm1], *logged, selector[s_t], target[s_t]))

  learner = make_agent(data, double_q=double_q)
  got = testing.after_an_update(learner, {'logits': online}, {'logits': target})['logits']
  np.testing.assert_allclose(got, online - jax.grad(mean_loss)(online), rtol=1e-5)


@pytest.mark.parametrize('double_q', [False, True])
def test_learn_reaches_the_known_distributions_of_an_mdp(tmp_path, double_q: bool):
  """Values on atoms are certain; a value between two is shared by them, and only by them."""
  testing.write_logs(tmp_path)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  # The optimal values are 0.63, 0.7, 0.93 and 1.
  atoms = np.array([-1.0, 0.0, 0.6, 0.7, 0.9, 1.0], np.float32)
  learner = make_agent(data, atoms, double_q=double_q, optimizer=optax.adam(0.1))
  learner.learn(1200)
  probabilities = jax.nn.softmax(learner.get_state().online_params['~']['logits'])
  want = np.zeros((2, 2, 6))
  want[0, 0, 2:4] = 0.7, 0.3  # 0.63
  want[0, 1, 3] = 1.0
  want[1, 0, 4:6] = 0.7, 0.3  # 0.93
  want[1, 1, 5] = 1.0
  np.testing.assert_allclose(probabilities, want, atol=5e-3)
  np.testing.assert_allclose(probabilities @ atoms, testing.optimal_values(), atol=2e-3)


@pytest.mark.parametrize('name, value', [('num_atoms', 1), ('vmax', 0.0)])
def test_bad_atoms_are_refused(name: str, value: float):
  with pytest.raises(ValueError, match=rf'--{name}={value}: expected'):
    run_atari.Config(**{name: value})
