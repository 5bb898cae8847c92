"""Offline REM over separate networks (Agarwal et al. 2020, arXiv 1907.04543).

And Ensemble-DQN, by one argument. As `rem`, but Q_k are K whole networks instead of heads of one:

  Q_mix(s, a) = sum_k alpha_k Q_k(s, a),   alpha a new random convex combination for each batch
  y = r + discount * max_a' Q_mix_target(s', a')        loss = Huber(y - Q_mix(s, a))

batch_rl has it as MultiNetworkDQNAgent, for which it gives no values: those here are its REM's.

Differences from the paper:

* SAME padding in the convolutions, as in Dopamine and batch_rl; Mnih et al. use VALID.
* One optimiser has all networks' parameters, stacked; batch_rl has a copy of it for each network,
  which for Adam, as for any that works entry by entry, is the same. An ensemble's gradients are 1/K
  of a lone DQN's, as batch_rl's are: under Adam, as if its epsilon were K times as large.
* Adam is Optax's, as in `rem`.
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
  q_networks_tm1: jax.Array,
  a_tm1: jax.Array,
  r_t: jax.Array,
  discount_t: jax.Array,
  q_networks_target_t: jax.Array,
  mixtures: jax.Array,
) -> jax.Array:
  """Computes the Huber loss of mixed values, averaged over mixtures, per example [B].

  Agarwal et al. 2020, equation 4. The maximum is taken over the mixed values of the target network.
  With the identity for `mixtures` each network is a mixture of its own: Ensemble-DQN.

  Args:
    q_networks_tm1: [B, A, K] online values of each network of the states acted in.
    a_tm1: [B] the logged actions.
    r_t: [B] rewards.
    discount_t: [B] discounts, 0 where the episode ended.
    q_networks_target_t: [B, A, K] target values of each network of the next states; no gradient
      flows into them.
    mixtures: [K, M], each column the weights of one mixture of networks, online and target.
  """
  chex.assert_rank(
    [q_networks_tm1, a_tm1, r_t, discount_t, q_networks_target_t, mixtures], [3, 1, 1, 1, 3, 2]
  )
  chex.assert_equal_shape([q_networks_tm1, q_networks_target_t])
  q_learning = jax.vmap(rlax.q_learning)  # over examples
  q_learning = jax.vmap(q_learning, in_axes=(-1, None, None, None, -1), out_axes=-1)  # mixtures
  td_errors = q_learning(
    q_networks_tm1 @ mixtures, a_tm1, r_t, discount_t, q_networks_target_t @ mixtures
  )
  return jnp.mean(rlax.huber_loss(td_errors, delta=1.0), axis=-1)


def random_mixtures(rng_key: jax.Array, num_networks: int, num_mixtures: int) -> jax.Array:
  """Draws convex combinations [num_networks, num_mixtures]: uniform draws divided by their sum."""
  # Never 0, which a single network's draw cannot be divided by.
  tiny = jnp.finfo(jnp.float32).tiny
  draws = jax.random.uniform(rng_key, (num_networks, num_mixtures), minval=tiny)
  return draws / jnp.sum(draws, axis=0, keepdims=True)


class MultiNetworkRem:
  """Learns from a replay, acts epsilon-greedily on the means over networks."""

  def __init__(
    self,
    *,
    network: hk.Transformed,
    optimizer: optax.GradientTransformation,
    data: replay.ReplayData | None,
    processor: processors.AtariProcessor,
    batch_size: int,
    target_network_update_period: int,
    num_networks: int,
    num_mixtures: int,
    ensemble: bool,
    eval_epsilon: float,
    rng_key: jax.Array,
  ):
    """Initialises the learner.

    Args:
      network: one of them, of outputs with `.q_values`, without apply rng.
      optimizer: of the online parameters.
      data: what to learn from, if anything; may be replaced between calls of `learn`.
      processor: turns raw timesteps into stacks of frames.
      batch_size: of an update.
      target_network_update_period: updates between copies of online to target parameters.
      num_networks: how many.
      num_mixtures: random convex combinations of networks for each batch.
      ensemble: Ensemble-DQN instead: each network learns from its own target.
      eval_epsilon: probability of a uniformly random action in `step`.
      rng_key: of initialisation, sampling and, until `reset` is given another, acting.
    """
    self.data = data
    self.processor = processor

    def initial_state(rng_key: jax.Array) -> LearnerState:
      """Draws the network's parameters; the state before the first update."""
      rng_key, init_key = jax.random.split(rng_key)
      observation = jnp.zeros((1, *atari_data.OBSERVATION_SHAPE), jnp.uint8)
      init = jax.jit(jax.vmap(network.init, in_axes=(0, None)))
      online_params = init(jax.random.split(init_key, num_networks), observation)
      return LearnerState(
        rng_key=rng_key,
        online_params=online_params,
        target_params=jax.tree.map(jnp.copy, online_params),  # donated state must not share arrays
        opt_state=jax.jit(optimizer.init)(online_params),
        num_updates=jnp.zeros((), jnp.int32),
      )

    def q_networks(params: hk.Params, frames: jax.Array) -> jax.Array:
      """Computes the values [B, A, num_networks], of parameters stacked along their first axis."""
      if jax.default_backend() != 'cpu':
        return jax.vmap(network.apply, in_axes=(0, None), out_axes=-1)(params, frames).q_values
      # On CPU, XLA runs the vmapped convolutions, which are grouped ones, five times slower.
      leaves, structure = jax.tree.flatten(params)
      each = [
        network.apply(jax.tree.unflatten(structure, unstacked), frames).q_values
        for unstacked in zip(*map(jnp.unstack, leaves), strict=True)
      ]
      return jnp.stack(each, axis=-1)

    def update(
      state: LearnerState, data: replay.ReplayData
    ) -> tuple[LearnerState, dict[str, jax.Array]]:
      """Takes one gradient step on one batch; returns the metrics too."""
      rng_key, sample_key, mixture_key = jax.random.split(state.rng_key, 3)
      batch = replay.sample(data, sample_key, batch_size)

      if ensemble:
        mixtures = jnp.eye(num_networks)
      else:
        mixtures = random_mixtures(mixture_key, num_networks, num_mixtures)

      def mean_loss(online_params: hk.Params) -> tuple[jax.Array, jax.Array]:
        q_networks_tm1 = q_networks(online_params, batch.s_tm1)
        q_networks_target_t = q_networks(state.target_params, batch.s_t)
        losses = loss(
          q_networks_tm1,
          batch.a_tm1,
          batch.r_t,
          batch.discount_t,
          q_networks_target_t,
          mixtures,
        )
        return jnp.mean(losses), jnp.mean(q_networks_tm1, axis=-1)

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
      q_t = jnp.mean(q_networks(online_params, s_t[None])[0], axis=-1)
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
