"""Offline DQN: Q-learning from logged play alone (Agarwal et al. 2020, arXiv 1907.04543).

The algorithm is Mnih et al. 2015's.

  y = r + discount * max_a' Q_target(s', a')        loss = Huber(y - Q(s, a))

With `double_q` it is Double DQN (van Hasselt et al. 2015, arXiv 1509.06461):

  y = r + discount * Q_target(s', argmax_a' Q(s', a'))

Differences from the papers:

* SAME padding in the convolutions, as in Dopamine and batch_rl; Mnih et al. use VALID.
* The loss is the Huber loss of the error; Mnih et al. clip the error in its gradient, which is the
  same gradient. DQN Zoo's Double DQN clips it at 1/32 after it is divided by the batch size: for
  batches of 32 the same.
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
  q_tm1: jax.Array,
  a_tm1: jax.Array,
  r_t: jax.Array,
  discount_t: jax.Array,
  q_selector_t: jax.Array,
  q_target_t: jax.Array,
) -> jax.Array:
  """Computes the Huber loss of the Q-learning error, per example [B].

  Mnih et al. 2015, algorithm 1.

  Args:
    q_tm1: [B, A] online values of the states acted in.
    a_tm1: [B] the logged actions.
    r_t: [B] rewards.
    discount_t: [B] discounts, 0 where the episode ended.
    q_selector_t: [B, A] values of the next states that choose the next action: the target network's
      in DQN, the online network's in Double DQN.
    q_target_t: [B, A] target-network values of the next states; no gradient flows into them or into
      the choice.
  """
  tables = [q_tm1, q_selector_t, q_target_t]
  chex.assert_rank([*tables, a_tm1, r_t, discount_t], [2, 2, 2, 1, 1, 1])
  chex.assert_equal_shape(tables)
  td_errors = jax.vmap(rlax.double_q_learning)(
    q_tm1, a_tm1, r_t, discount_t, q_target_t, q_selector_t
  )
  return rlax.huber_loss(td_errors, delta=1.0)


class Dqn:
  """Learns from a replay, acts epsilon-greedily."""

  def __init__(
    self,
    *,
    network: hk.Transformed,
    optimizer: optax.GradientTransformation,
    data: replay.ReplayData | None,
    processor: processors.AtariProcessor,
    batch_size: int,
    target_network_update_period: int,
    double_q: bool,
    eval_epsilon: float,
    rng_key: jax.Array,
  ):
    """Initialises the learner.

    Args:
      network: of outputs with `.q_values`, without apply rng.
      optimizer: of the online parameters.
      data: what to learn from, if anything; may be replaced between calls of `learn`.
      processor: turns raw timesteps into stacks of frames.
      batch_size: of an update.
      target_network_update_period: updates between copies of online to target parameters.
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
        q_tm1 = network.apply(online_params, batch.s_tm1).q_values
        q_target_t = network.apply(state.target_params, batch.s_t).q_values
        q_selector_t = network.apply(online_params, batch.s_t).q_values if double_q else q_target_t
        losses = loss(q_tm1, batch.a_tm1, batch.r_t, batch.discount_t, q_selector_t, q_target_t)
        return jnp.mean(losses), q_tm1

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
