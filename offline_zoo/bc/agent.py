"""Behaviour cloning: learns which actions were logged; %BC as in arXiv 2106.01345.

  loss = -log p(a|s) + penalty * mean_a' (log p(a'|s))^2        p = softmax(logits), acts by argmax

The penalty is d3rlpy's and is 0 unless asked for. With --top_fraction or --min_episode_return it
clones only the best logged episodes: the %BC of Chen et al. 2021.

Differences from Tianshou's example of imitation learning on Atari, whose values these are:

* SAME padding in the convolutions, as in Dopamine and batch_rl, and grey levels from 0 to 1; there
  VALID padding, and grey levels from 0 to 255.
* Biases start at zero; there PyTorch draws them.
* Acts epsilon-greedily with the protocol's epsilon; there without.
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
  opt_state: optax.OptState
  num_updates: jax.Array  # [] int32


def loss(logits_tm1: jax.Array, a_tm1: jax.Array, penalty: float) -> jax.Array:
  """Computes the negative log-likelihood of the logged actions, and the penalty, per example [B].

  Args:
    logits_tm1: [B, A] unnormalised log-probabilities of the states acted in.
    a_tm1: [B] the logged actions.
    penalty: weight of the mean over actions of the squared log-probability. d3rlpy, whose weight is
      0.5, calls it a penalty on logits, but squares PyTorch's, which are normalised.
  """
  chex.assert_rank([logits_tm1, a_tm1], [2, 1])
  log_policy = jax.nn.log_softmax(logits_tm1)
  squares = jnp.mean(jnp.square(log_policy), axis=-1)
  return penalty * squares - rlax.batched_index(log_policy, a_tm1)


class Bc:
  """Learns from a replay, acts epsilon-greedily; greedy is the likeliest action."""

  def __init__(
    self,
    *,
    network: hk.Transformed,
    optimizer: optax.GradientTransformation,
    data: replay.ReplayData | None,
    processor: processors.AtariProcessor,
    batch_size: int,
    penalty: float,
    eval_epsilon: float,
    rng_key: jax.Array,
  ):
    """Initialises the learner.

    Args:
      network: of outputs with `.logits`, without apply rng.
      optimizer: of the online parameters.
      data: what to learn from, if anything; may be replaced between calls of `learn`.
      processor: turns raw timesteps into stacks of frames.
      batch_size: of an update.
      penalty: weight of the squared log-probabilities.
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
        logits_tm1 = network.apply(online_params, batch.s_tm1).logits
        return jnp.mean(loss(logits_tm1, batch.a_tm1, penalty)), logits_tm1

      (mean, logits_tm1), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.online_params)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
      online_params = optax.apply_updates(state.online_params, updates)
      metrics = {
        'loss': mean,
        'accuracy': jnp.mean(jnp.argmax(logits_tm1, axis=-1) == batch.a_tm1),
      }
      return LearnerState(rng_key, online_params, opt_state, state.num_updates + 1), metrics

    def act(
      online_params: hk.Params, rng_key: jax.Array, s_t: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Returns the next key, an epsilon-greedy action and the greedy one's probability."""
      rng_key, epsilon_key, action_key = jax.random.split(rng_key, 3)
      policy_t = jax.nn.softmax(network.apply(online_params, s_t[None]).logits[0])
      random_action = jax.random.randint(action_key, (), 0, len(policy_t))
      is_random = jax.random.uniform(epsilon_key) < eval_epsilon
      action = jnp.where(is_random, random_action, jnp.argmax(policy_t))
      return rng_key, action, jnp.max(policy_t)

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
    """Gives `greedy_probability`: the likeliest action's where the agent last decided."""
    return {'greedy_probability': self._value}
