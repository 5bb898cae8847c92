"""Haiku networks for Atari: a stack of frames in, a NamedTuple with `.q_values` out."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.nn import relu


class QNetworkOutputs(NamedTuple):
  """Attributes: q_values: [B, A] float32."""

  q_values: jax.Array


def preprocess(frames: jax.Array) -> jax.Array:
  """Scales uint8 grey levels to float32 in [0, 1]."""
  return frames.astype(jnp.float32) / 255.0


def nature_torso(frames: jax.Array, w_init: hk.initializers.Initializer) -> jax.Array:
  """The three convolutions of Mnih et al. 2015, flattened: [B, 84, 84, 4] uint8 to [B, 7744].

  SAME padding, as Dopamine and batch_rl have it (feature maps of 21, 11 and 11 pixels a side);
  Mnih et al., DQN Zoo and PyTorch code use VALID (20, 9 and 7 a side, 3136 features).

  On CPU these run ten times slower inside a loop body (jax issue 12868): see `parts.learn_loop`.
  """
  x = preprocess(frames)
  x = relu(hk.Conv2D(32, kernel_shape=8, stride=4, padding='SAME', w_init=w_init)(x))
  x = relu(hk.Conv2D(64, kernel_shape=4, stride=2, padding='SAME', w_init=w_init)(x))
  x = relu(hk.Conv2D(64, kernel_shape=3, stride=1, padding='SAME', w_init=w_init)(x))
  return hk.Flatten()(x)


def dqn_network(num_actions: int) -> hk.Transformed:
  """The Nature DQN network: convolutions, 512 hidden units, one value for each action.

  Initialised as Dopamine does it: Glorot uniform weights, that is
  U(-sqrt(6 / (fan_in + fan_out)), +same), and zero biases.
  """

  def network(frames: jax.Array) -> QNetworkOutputs:
    w_init = hk.initializers.VarianceScaling(1.0, 'fan_avg', 'uniform')
    x = relu(hk.Linear(512, w_init=w_init)(nature_torso(frames, w_init)))
    return QNetworkOutputs(q_values=hk.Linear(num_actions, w_init=w_init)(x))

  return hk.without_apply_rng(hk.transform(network))
