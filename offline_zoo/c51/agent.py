"""Offline C51: categorical distributional Q-learning (Bellemare et al. 2017, arXiv 1707.06887).

  Q(s, a) = sum_i z_i p_i(s, a)        p = softmax(logits), on 51 fixed atoms z from -10 to 10
  target  = projection onto z of r + discount * z, with the probabilities p_target(s', a*)
  loss    = cross entropy(target, p(s, a))              a* = argmax_a' Q_target(s', a')

With `double_q` the online network chooses a*, as in Double DQN.

Differences from the paper:

* Learns from logged play alone, as batch_rl trains it: uniform replay, its values. DQN Zoo, which
  learns online, copies the target every 2,500 updates, clips gradients to a norm of 10, and draws
  biases.
* Adam is Optax's. TensorFlow's, which batch_rl uses, adds epsilon before it corrects the bias of v,
  which is as if epsilon were 31.6 times larger at first.
* SAME padding in the convolutions, as in Dopamine and batch_rl; Mnih et al. use VALID.
* Each batch is drawn from all shards in memory: all there are, if they fit. batch_rl has five of
  fifty in memory, others in each iteration, and draws a batch from one of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import dm_env
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rlax

from offline_zoo import atari_data, parts, processors, replay


class LearnerState(NamedTuple):
  """All that `learn` changes."""

  rng_key: jax.Array
  online_params: hk.Params
  target_params: hk.Params
  opt_state: optax.OptState
  num_updates: jax.Array  # [] int32


def loss(
  atoms: jax.Array,
  q_logits_tm1: jax.Array,
  a_tm1: jax.Array,
  r_t: jax.Array,
  discount_t: jax.Array,
  q_selector_t: jax.Array,
  q_logits_target_t: jax.Array,
) -> jax.Array:
  """Computes the cross entropy with the projected target, per example [B].

  Bellemare et al. 2017, algorithm 1. What the target puts beyond the atoms goes to the outermost
  ones.

  Args:
    atoms: [N] the values that carry probability, ascending.
    q_logits_tm1: [B, A, N] online logits of the states acted in.
    a_tm1: [B] the logged actions.
    r_t: [B] rewards.
    discount_t: [B] discounts, 0 where the episode ended.
    q_selector_t: [B, A] means of the next states that choose the next action: the target network's,
      or the online network's for double Q-learning.
    q_logits_target_t: [B, A, N] target-network logits of the next states; no gradient flows into
      them or into the choice.
  """
  chex.assert_rank(
    [atoms, q_logits_tm1, a_tm1, r_t, discount_t, q_selector_t, q_logits_target_t],
    [1, 3, 1, 1, 1, 2, 3],
  )
  chex.assert_equal_shape([q_logits_tm1, q_logits_target_t])
  batched = jax.vmap(rlax.categorical_double_q_learning, in_axes=(None, 0, 0, 0, 0, None, 0, 0))
  return batched(
    atoms, q_logits_tm1, a_tm1, r_t, discount_t, atoms, q_logits_target_t, q_selector_t
  )


class C51:
  """Learns from a replay, acts epsilon-greedily on the means of the distributions."""

  def __init__(
    self,
    *,
    network: hk.Transformed,
    optimizer: optax.GradientTransformation,
    data: replay.ReplayData | None,
    processor: processors.AtariProcessor,
    batch_size: int,
    target_network_update_period: int,
    atoms: np.ndarray,
    double_q: bool,
    eval_epsilon: float,
    rng_key: jax.Array,
  ):
    """Initialises the learner.

    Args:
      network: of outputs with `.q_values` and `.q_logits`, without apply rng.
      optimizer: of the online parameters.
      data: what to learn from, if anything; may be replaced between calls of `learn`.
      processor: turns raw timesteps into stacks of frames.
      batch_size: of an update.
      target_network_update_period: updates between copies of online to target parameters.
      atoms: [N] float32, those that the network has.
      double_q: whether the online network chooses the next action, rather than the target network.
      eval_epsilon: probability of a uniformly random action in `step`.
      rng_key: of initialisation, sampling and, until `reset` is given another, acting.
    """
    self.data = data
    self.processor = processor

    def initial_state(rng_key: jax.Array) -> LearnerState:
      """Draws the network's parameters; the state before the first update."""
      rng_key, init_key = jax.random.split(rng_key)
      observation = jnp.zeros((1, *atari_data.OBSERVATION_SHAPE), jnp.uint8)
      online_params = jax.jit(network.init)(init_key, observation)
      return LearnerState(
        rng_key=rng_key,
        online_params=online_params,
        target_params=jax.tree.map(jnp.copy, online_params),  # donated state must not share arrays
        opt_state=jax.jit(optimizer.init)(online_params),
        num_updates=jnp.zeros((), jnp.int32),
      )

    def update(
      state: LearnerState, data: replay.ReplayData
    ) -> tuple[LearnerState, dict[str, jax.Array]]:
      """Takes one gradient step on one batch; returns the metrics too."""
      rng_key, sample_key = jax.random.split(state.rng_key)
      batch = replay.sample(data, sample_key, batch_size)

      def mean_loss(online_params: hk.Params) -> tuple[jax.Array, jax.Array]:
        online_tm1 = network.apply(online_params, batch.s_tm1)
        target_t = network.apply(state.target_params, batch.s_t)
        selector_t = network.apply(online_params, batch.s_t) if double_q else target_t
        losses = loss(
          jnp.asarray(atoms),
          online_tm1.q_logits,
          batch.a_tm1,
          batch.r_t,
          batch.discount_t,
          selector_t.q_values,
          target_t.q_logits,
        )
        return jnp.mean(losses), online_tm1.q_values

      (mean, q_tm1), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.online_params)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
      online_params = optax.apply_updates(state.online_params, updates)
      num_updates = state.num_updates + 1
      target_params = optax.periodic_update(
        online_params, state.target_params, num_updates, target_network_update_period
      )
      metrics = {
        'loss': mean,
        'q_logged_action': jnp.mean(rlax.batched_index(q_tm1, batch.a_tm1)),
        'q_max': jnp.mean(jnp.max(q_tm1, axis=-1)),
      }
      return LearnerState(rng_key, online_params, target_params, opt_state, num_updates), metrics

    def act(
      online_params: hk.Params, rng_key: jax.Array, s_t: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Returns the next key, an epsilon-greedy action and the greedy one's value."""
      rng_key, epsilon_key, action_key = jax.random.split(rng_key, 3)
      q_t = network.apply(online_params, s_t[None]).q_values[0]
      random_action = jax.random.randint(action_key, (), 0, len(q_t))
      is_random = jax.random.uniform(epsilon_key) < eval_epsilon
      return rng_key, jnp.where(is_random, random_action, jnp.argmax(q_t)), jnp.max(q_t)

    self.initial_state, self.update, self.act = initial_state, update, act
    self._state = initial_state(rng_key)
    self._learn = parts.learn_loop(update)
    self._act = jax.jit(act)
    self.reset(jax.random.fold_in(rng_key, 2))  # 0 and 1 are what `split` gives

  # What follows is the same text in every agent, so that each file can be read alone.

  def learn(self, num_updates: int) -> Mapping[str, float]:
    """Makes this many updates; returns the mean of each metric over them."""
    self._state, metrics = self._learn(self._state, self.data, num_updates)
    return metrics

  def reset(self, rng_key: jax.Array | None = None) -> None:
    """Begins an episode; with a key, all acting from now on is a function of it."""
    self.processor.reset()
    self._action = 0
    self._value = 0.0
    if rng_key is not None:
      self._act_key = rng_key

  def step(self, timestep: dm_env.TimeStep) -> int:
    """Takes a raw timestep; returns a new action, or between decisions the last one again."""
    processed = self.processor(timestep)
    if processed is not None and not processed.last():
      self._act_key, action, value = self._act(
        self._state.online_params, self._act_key, processed.observation
      )
      self._action, self._value = int(action), float(value)
    return self._action

  def get_state(self) -> LearnerState:
    """Copies the learner's state, into NumPy arrays."""
    return jax.tree.map(np.array, self._state)

  def set_state(self, state: LearnerState) -> None:
    """Goes on from a state that `get_state` gave."""
    self._state = jax.tree.map(jnp.array, state)

  @property
  def statistics(self) -> Mapping[str, float]:
    """Gives `state_value`: the largest action value where the agent last decided."""
    return {'state_value': self._value}
