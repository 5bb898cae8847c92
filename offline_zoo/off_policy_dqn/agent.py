"""Off-policy n-step DQN: returns weighted by importance ratios, as n17s/batch_rl has it.

Per-decision importance sampling (Precup et al. 2000), with ratios clipped to near 1:

  pi(.|s)  epsilon-greedy on Q_target        rho_k = clip(pi(a_k|s_k) / p_k, 0.99, 1.01)
  y = sum_k discount^k rho_0 ... rho_k r_k + discount^n max_a' Q_target(s_n, a')
  loss = Huber(y - Q(s_0, a_0))              p_k the logged probability of a_k

It needs logs that have these probabilities: those made here do, the DQN Replay Dataset does not.

Differences from per-decision importance sampling, all of them that code's:

* rho_0 is a factor too, though Q(s_0, a_0) is given a_0; with `first_ratio` off it is not.
* What is bootstrapped is not weighted, and is a maximum rather than an expectation under pi.

Difference from that code: each batch is drawn from all shards in memory, which are all there are if
they fit. There one of fifty is in memory at first and five later, and a batch is drawn from one.
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


def importance_weights(
  a: jax.Array,
  probability: jax.Array,
  q_target: jax.Array,
  epsilon: float,
  min_ratio: float,
  max_ratio: float,
  first_ratio: bool,
) -> jax.Array:
  """Computes rho_0 ... rho_k, the weight [B, n] of the reward at each step k of a window.

  Args:
    a: [B, n] the logged actions.
    probability: [B, n] of the logged actions under the policy that acted.
    q_target: [B, n, A] target-network values of the states acted in: pi is greedy on them but for
      epsilon. Of equal values the first is the greedy one's.
    epsilon: probability with which pi draws from all actions.
    min_ratio: lower bound of a step's ratio.
    max_ratio: upper bound of a step's ratio.
    first_ratio: whether rho_0 is a factor.
  """
  chex.assert_rank([a, probability, q_target], [2, 2, 3])
  random = epsilon / q_target.shape[-1]
  policy = jnp.where(a == jnp.argmax(q_target, axis=-1), 1 - epsilon + random, random)
  ratios = jnp.clip(policy / probability, min_ratio, max_ratio)
  if not first_ratio:
    ratios = ratios.at[:, 0].set(1.0)
  return jnp.cumprod(ratios, axis=1)


def loss(
  q_tm1: jax.Array,
  a_tm1: jax.Array,
  r: jax.Array,
  discount: jax.Array,
  weights: jax.Array,
  discount_t: jax.Array,
  q_target_t: jax.Array,
) -> jax.Array:
  """Computes the Huber loss of the weighted n-step Q-learning error, per example [B].

  Args:
    q_tm1: [B, A] online values of the windows' first states.
    a_tm1: [B] the actions logged there.
    r: [B, n] rewards.
    discount: [B, n] theirs, 0 after the end of the episode.
    weights: [B, n] theirs too; see `importance_weights`. No gradient flows into them.
    discount_t: [B] discounts of what follows the window, 0 where the episode ended.
    q_target_t: [B, A] target-network values of the states after the windows; no gradient flows into
      them.
  """
  chex.assert_rank(
    [q_tm1, a_tm1, r, discount, weights, discount_t, q_target_t], [2, 1, 2, 2, 2, 1, 2]
  )
  chex.assert_equal_shape([q_tm1, q_target_t])
  chex.assert_equal_shape([r, discount, weights])
  returns = jnp.sum(discount * weights * r, axis=1)
  td_errors = jax.vmap(rlax.q_learning)(q_tm1, a_tm1, returns, discount_t, q_target_t)
  return rlax.huber_loss(td_errors, delta=1.0)


class OffPolicyDqn:
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
    target_epsilon: float,
    min_ratio: float,
    max_ratio: float,
    first_ratio: bool,
    eval_epsilon: float,
    rng_key: jax.Array,
  ):
    """Initialises the learner.

    Args:
      network: of outputs with `.q_values`, without apply rng.
      optimizer: of the online parameters.
      data: what to learn from, with probabilities; may be replaced between calls of `learn`.
      processor: turns raw timesteps into stacks of frames.
      batch_size: of an update.
      target_network_update_period: updates between copies of online to target parameters.
      target_epsilon: of the policy pi that returns are to be of; see `importance_weights`.
      min_ratio: bound of a step's importance ratio.
      max_ratio: likewise.
      first_ratio: whether the first step's ratio is a factor.
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
      batch = replay.sample_windows(data, sample_key, batch_size)

      q_target = hk.BatchApply(lambda s: network.apply(state.target_params, s).q_values)(batch.s)
      weights = importance_weights(
        batch.a,
        batch.probability,
        q_target[:, :-1],
        target_epsilon,
        min_ratio,
        max_ratio,
        first_ratio,
      )

      def mean_loss(online_params: hk.Params) -> tuple[jax.Array, jax.Array]:
        q_tm1 = network.apply(online_params, batch.s[:, 0]).q_values
        losses = loss(
          q_tm1,
          batch.a[:, 0],
          batch.r,
          batch.discount,
          weights,
          batch.discount_t,
          q_target[:, -1],
        )
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
        'q_logged_action': jnp.mean(rlax.batched_index(q_tm1, batch.a[:, 0])),
        'q_max': jnp.mean(jnp.max(q_tm1, axis=-1)),
        'weight': jnp.average(weights, weights=batch.discount > 0),  # of steps before an end
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
