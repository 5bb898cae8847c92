"""Offline CRR: critic-regularised regression (Wang et al. 2020, arXiv 2006.15134), discrete.

  y = r + discount * sum_a' p_target(a'|s') Q_target(s', a')
  A = Q(s, a) - sum_a' p(a'|s) Q(s, a')      f(A) = min(exp(A / beta), bound), or 1[A > 0], or 1
  loss = (y - Q(s, a))^2 / 2 - f(A) log p(a|s) + weight * (log sum_a' exp Q(s, a') - Q(s, a))

The last term is CQL's. Tianshou adds it, with a weight of 10, because CRR alone failed on Atari.

Differences from the paper, which is about continuous actions:

* Expectations over actions are exact, where it takes means over samples of the policy.
* The critic has expected values, not distributions of returns; and CQL's term, as above.

Differences from Tianshou's example on Atari, whose values these are:

* Each example has its own f(A). There the product of f(A) [B, 1] and log p [B] is a matrix [B, B],
  whose mean is the product of their means, so that the advantages weight nothing.
* f(A) is held constant, as in the paper and in Acme. There gradients flow through it into both
  streams, and where exp(A / beta) overflows they are NaN.
* Acts epsilon-greedily on the policy; there by sampling from it, as `sample_actions` does.
* SAME padding in the convolutions, as in Dopamine and batch_rl; there VALID. Biases start at zero;
  there PyTorch draws them.
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


def advantage_weights(
  q_tm1: jax.Array,
  policy_logits_tm1: jax.Array,
  a_tm1: jax.Array,
  mode: str,
  beta: float,
  max_weight: float,
) -> jax.Array:
  """Computes f(A), the weights [B] of the logged actions' log-likelihood.

  Args:
    q_tm1: [B, A] online values of the states acted in; no gradient flows through the weights.
    policy_logits_tm1: [B, A] online logits of the policy there; likewise.
    a_tm1: [B] the logged actions.
    mode: exp, binary or all.
    beta: temperature of exp.
    max_weight: bound of exp.
  """
  # Differences first: of large values, the small one of two sums would be rounding.
  over = rlax.batched_index(q_tm1, a_tm1, keepdims=True) - q_tm1
  advantages = jax.lax.stop_gradient(jnp.sum(jax.nn.softmax(policy_logits_tm1) * over, axis=-1))
  match mode:
    case 'exp':
      return jnp.minimum(jnp.exp(advantages / beta), max_weight)
    case 'binary':
      return (advantages > 0).astype(jnp.float32)
    case 'all':
      return jnp.ones_like(advantages)
  raise ValueError(f'expected exp, binary or all, got {mode}')


def loss(
  q_tm1: jax.Array,
  policy_logits_tm1: jax.Array,
  a_tm1: jax.Array,
  r_t: jax.Array,
  discount_t: jax.Array,
  q_target_t: jax.Array,
  policy_logits_target_t: jax.Array,
  weights: jax.Array,
  min_q_weight: float,
) -> jax.Array:
  """Computes the critic's, the actor's and the conservative loss, added up, per example [B].

  Wang et al. 2020, with exact expectations over actions; Kumar et al. 2020, equation 4 (CQL(H)).

  Args:
    q_tm1: [B, A] online values of the states acted in.
    policy_logits_tm1: [B, A] online logits of the policy there.
    a_tm1: [B] the logged actions.
    r_t: [B] rewards.
    discount_t: [B] discounts, 0 where the episode ended.
    q_target_t: [B, A] target-network values of the next states; no gradient flows into them.
    policy_logits_target_t: [B, A] target-network logits of the next states; likewise.
    weights: [B] of the log-likelihood; see `advantage_weights`.
    min_q_weight: of the conservative loss.
  """
  tables = [q_tm1, policy_logits_tm1, q_target_t, policy_logits_target_t]
  chex.assert_rank([*tables, a_tm1, r_t, discount_t, weights], [2] * len(tables) + [1] * 4)
  chex.assert_equal_shape(tables)
  policy_target_t = jax.nn.softmax(policy_logits_target_t)
  td_errors = jax.vmap(rlax.expected_sarsa)(
    q_tm1, a_tm1, r_t, discount_t, q_target_t, policy_target_t
  )
  log_policy = jax.nn.log_softmax(policy_logits_tm1)
  conservative = jax.nn.logsumexp(q_tm1, axis=-1) - rlax.batched_index(q_tm1, a_tm1)
  return (
    rlax.l2_loss(td_errors)
    - weights * rlax.batched_index(log_policy, a_tm1)
    + min_q_weight * conservative
  )


class Crr:
  """Learns from a replay, acts epsilon-greedily on the likeliest action, or by sampling."""

  def __init__(
    self,
    *,
    network: hk.Transformed,
    optimizer: optax.GradientTransformation,
    data: replay.ReplayData | None,
    processor: processors.AtariProcessor,
    batch_size: int,
    target_network_update_period: int,
    mode: str,
    beta: float,
    max_weight: float,
    min_q_weight: float,
    sample_actions: bool,
    eval_epsilon: float,
    rng_key: jax.Array,
  ):
    """Initialises the learner.

    Args:
      network: of outputs with `.q_values` and `.policy_logits`, without apply rng.
      optimizer: of the online parameters.
      data: what to learn from, if anything; may be replaced between calls of `learn`.
      processor: turns raw timesteps into stacks of frames.
      batch_size: of an update.
      target_network_update_period: updates between copies of online to target parameters.
      mode: how advantages weight the log-likelihood; see `advantage_weights`.
      beta: temperature of mode `exp`.
      max_weight: bound of mode `exp`.
      min_q_weight: of the conservative loss.
      sample_actions: whether to act by sampling from the policy, not by its likeliest action.
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

      def mean_loss(online_params: hk.Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        online_tm1 = network.apply(online_params, batch.s_tm1)
        target_t = network.apply(state.target_params, batch.s_t)
        q_tm1, policy_logits_tm1 = online_tm1.q_values, online_tm1.policy_logits
        weights = advantage_weights(q_tm1, policy_logits_tm1, batch.a_tm1, mode, beta, max_weight)
        losses = loss(
          q_tm1,
          policy_logits_tm1,
          batch.a_tm1,
          batch.r_t,
          batch.discount_t,
          target_t.q_values,
          target_t.policy_logits,
          weights,
          min_q_weight,
        )
        return jnp.mean(losses), (q_tm1, weights)

      value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
      (mean, (q_tm1, weights)), grads = value_and_grad(state.online_params)
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
        'weight': jnp.mean(weights),
      }
      return LearnerState(rng_key, online_params, target_params, opt_state, num_updates), metrics

    def act(
      online_params: hk.Params, rng_key: jax.Array, s_t: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Returns the next key, an epsilon-greedy or sampled action and the largest value."""
      rng_key, epsilon_key, action_key, policy_key = jax.random.split(rng_key, 4)
      online_t = network.apply(online_params, s_t[None])
      q_t, policy_logits_t = online_t.q_values[0], online_t.policy_logits[0]
      action = jnp.argmax(policy_logits_t)
      if sample_actions:
        action = jax.random.categorical(policy_key, policy_logits_t)
      random_action = jax.random.randint(action_key, (), 0, len(q_t))
      is_random = jax.random.uniform(epsilon_key) < eval_epsilon
      return rng_key, jnp.where(is_random, random_action, action), jnp.max(q_t)

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
