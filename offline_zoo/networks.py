"""Haiku networks for Atari: a stack of frames in, a NamedTuple out, with `.q_values` if any."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import relu


class QNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A] float32."""

  q_values: jax.Array


class QuantileNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A], means over quantiles; dist_q: [B, num_quantiles, A]."""

  q_values: jax.Array
  dist_q: jax.Array


class CategoricalNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A], means of the distributions; q_logits: [B, A, num_atoms]."""

  q_values: jax.Array
  q_logits: jax.Array


class MultiHeadNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A], means over heads; q_heads: [B, A, num_heads]."""

  q_values: jax.Array
  q_heads: jax.Array


class PolicyNetworkOutputs(NamedTuple):
  """Attributes: logits: [B, A], unnormalised log-probabilities."""

  logits: jax.Array


class BehaviourNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A]; behaviour_logits: [B, A], unnormalised log-probabilities."""

  q_values: jax.Array
  behaviour_logits: jax.Array


class ActorCriticNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A]; policy_logits: [B, A], unnormalised log-probabilities."""

  q_values: jax.Array
  policy_logits: jax.Array


def preprocess(frames: jax.Array) -> jax.Array:
  """Scales uint8 grey levels to float32 in [0, 1]."""
  return frames.astype(jnp.float32) / 255.0


def nature_torso(x: jax.Array, w_init: hk.initializers.Initializer, padding: str) -> jax.Array:
  """Applies Mnih et al. 2015's convolutions, flattened: [B, 84, 84, 4] float32 to [B, 7744].

  With SAME padding, as Dopamine and batch_rl have it, feature maps are of 21, 11 and 11 pixels a
  side; with VALID, as Mnih et al., DQN Zoo and PyTorch code have it, of 20, 9 and 7: [B, 3136].

  On CPU these run ten times slower inside a loop body (jax issue 12868): see `parts.learn_loop`.
  """
  x = relu(hk.Conv2D(32, kernel_shape=8, stride=4, padding=padding, w_init=w_init)(x))
  x = relu(hk.Conv2D(64, kernel_shape=4, stride=2, padding=padding, w_init=w_init)(x))
  x = relu(hk.Conv2D(64, kernel_shape=3, stride=1, padding=padding, w_init=w_init)(x))
  return hk.Flatten()(x)


def _hidden(frames: jax.Array, w_init: hk.initializers.Initializer, padding: str) -> jax.Array:
  """Computes the DQN network's hidden units: [B, 84, 84, 4] uint8 to [B, 512] float32."""
  return relu(hk.Linear(512, w_init=w_init)(nature_torso(preprocess(frames), w_init, padding)))


def dqn_network(num_actions: int, padding: str = 'SAME') -> hk.Transformed:
  """Makes the Nature DQN network: convolutions, 512 hidden units, a value for each action.

  Initialised as Dopamine does it: Glorot uniform weights, that is
  U(-sqrt(6 / (fan_in + fan_out)), +same), and zero biases.
  """

  def network(frames: jax.Array) -> QNetworkOutputs:
    w_init = hk.initializers.VarianceScaling(1.0, 'fan_avg', 'uniform')
    x = _hidden(frames, w_init, padding)
    return QNetworkOutputs(q_values=hk.Linear(num_actions, w_init=w_init)(x))

  return hk.without_apply_rng(hk.transform(network))


def _batch_rl_init() -> hk.initializers.Initializer:
  """Scales by a variance of 1/sqrt(3), fan in: U(-sqrt(sqrt(3) / fan_in), +same)."""
  return hk.initializers.VarianceScaling(1.0 / 3.0**0.5, 'fan_in', 'uniform')


def quantile_network(num_actions: int, num_quantiles: int, padding: str = 'SAME') -> hk.Transformed:
  """Makes a DQN network with `num_quantiles` outputs for each action (Dabney et al. 2017).

  Initialised as batch_rl does it: variance scaling of 1/sqrt(3), fan in, uniform; zero biases.
  """

  def network(frames: jax.Array) -> QuantileNetworkOutputs:
    w_init = _batch_rl_init()
    x = _hidden(frames, w_init, padding)
    x = hk.Linear(num_quantiles * num_actions, w_init=w_init)(x)
    dist_q = x.reshape(-1, num_quantiles, num_actions)
    return QuantileNetworkOutputs(q_values=jnp.mean(dist_q, axis=1), dist_q=dist_q)

  return hk.without_apply_rng(hk.transform(network))


def categorical_network(
  num_actions: int, atoms: np.ndarray, padding: str = 'SAME'
) -> hk.Transformed:
  """Makes the DQN network with logits of a distribution for each action (Bellemare et al. 2017).

  Initialised as `quantile_network` is. `atoms` [num_atoms] are what the distributions are over.
  """

  def network(frames: jax.Array) -> CategoricalNetworkOutputs:
    w_init = _batch_rl_init()
    x = _hidden(frames, w_init, padding)
    x = hk.Linear(num_actions * len(atoms), w_init=w_init)(x)
    q_logits = x.reshape(-1, num_actions, len(atoms))
    return CategoricalNetworkOutputs(q_values=jax.nn.softmax(q_logits) @ atoms, q_logits=q_logits)

  return hk.without_apply_rng(hk.transform(network))


def multi_head_network(num_actions: int, num_heads: int, padding: str = 'SAME') -> hk.Transformed:
  """Makes a DQN network with `num_heads` values for each action (Agarwal et al. 2020).

  All heads share all layers but the last. Initialised as `quantile_network` is.
  """

  def network(frames: jax.Array) -> MultiHeadNetworkOutputs:
    w_init = _batch_rl_init()
    x = _hidden(frames, w_init, padding)
    x = hk.Linear(num_actions * num_heads, w_init=w_init)(x)
    q_heads = x.reshape(-1, num_actions, num_heads)
    return MultiHeadNetworkOutputs(q_values=jnp.mean(q_heads, axis=-1), q_heads=q_heads)

  return hk.without_apply_rng(hk.transform(network))


def policy_network(num_actions: int, padding: str = 'SAME') -> hk.Transformed:
  """Makes a DQN network whose outputs are a policy's logits.

  Weights as PyTorch initialises layers, which Tianshou leaves to it: U(-1/sqrt(fan_in), +same).
  Biases are zero here; PyTorch draws them like the weights.
  """

  def network(frames: jax.Array) -> PolicyNetworkOutputs:
    w_init = hk.initializers.VarianceScaling(1.0 / 3.0, 'fan_in', 'uniform')
    x = _hidden(frames, w_init, padding)
    return PolicyNetworkOutputs(logits=hk.Linear(num_actions, w_init=w_init)(x))

  return hk.without_apply_rng(hk.transform(network))


def _streams(frames: jax.Array, num_actions: int, padding: str, *names: str) -> list[jax.Array]:
  """Computes outputs [B, A] of streams, each with a hidden layer, that share the convolutions.

  Grey levels go in as they are, from 0 to 255. Weights are as in `policy_network`.
  """
  w_init = hk.initializers.VarianceScaling(1.0 / 3.0, 'fan_in', 'uniform')
  features = nature_torso(frames.astype(jnp.float32), w_init, padding)
  outputs = []
  for name in names:
    x = relu(hk.Linear(512, w_init=w_init, name=f'{name}_hidden')(features))
    outputs.append(hk.Linear(num_actions, w_init=w_init, name=name)(x))
  return outputs


def behaviour_network(num_actions: int, padding: str = 'SAME') -> hk.Transformed:
  """Makes a network of values and behaviour logits (Fujimoto et al. 2019).

  They share the convolutions; each has a hidden layer of its own.

  As in the authors' code, and unlike in the DQN network, grey levels go in as they are, from 0
  to 255. Weights as PyTorch initialises layers, which that code leaves to it: U(-1/sqrt(fan_in),
  +same). Biases are zero here; PyTorch draws them like the weights.
  """

  def network(frames: jax.Array) -> BehaviourNetworkOutputs:
    q, behaviour = _streams(frames, num_actions, padding, 'q', 'behaviour')
    return BehaviourNetworkOutputs(q_values=q, behaviour_logits=behaviour)

  return hk.without_apply_rng(hk.transform(network))


def actor_critic_network(num_actions: int, padding: str = 'SAME') -> hk.Transformed:
  """Makes a network of values and a policy's logits, as Tianshou's example of discrete CRR has it.

  In all but its outputs' names it is `behaviour_network`.
  """

  def network(frames: jax.Array) -> ActorCriticNetworkOutputs:
    q, policy = _streams(frames, num_actions, padding, 'q', 'policy')
    return ActorCriticNetworkOutputs(q_values=q, policy_logits=policy)

  return hk.without_apply_rng(hk.transform(network))
