"""Tests for networks.py: shapes, initialisation, and values against convolutions written out."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_zoo import networks

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def network():
  return networks.dqn_network(6)


@pytest.fixture(scope='module')
def params(network):
  return network.init(jax.random.PRNGKey(0), jnp.zeros((1, 84, 84, 4), jnp.uint8))


@pytest.fixture(scope='module')
def frames():
  return jax.random.randint(jax.random.PRNGKey(1), (3, 84, 84, 4), 0, 256).astype(jnp.uint8)


def test_parameters_are_the_nature_networks_with_same_padding(params):
  shapes = {module: (p['w'].shape, p['b'].shape) for module, p in params.items()}
  assert list(shapes.values()) == [
    ((8, 8, 4, 32), (32,)),
    ((4, 4, 32, 64), (64,)),
    ((3, 3, 64, 64), (64,)),
    ((7744, 512), (512,)),
    ((512, 6), (6,)),
  ]


def test_initialisation_is_glorot_uniform_with_zero_biases(params):
  for p in params.values():
    *window, num_in, num_out = p['w'].shape
    limit = np.sqrt(6 / (np.prod(window) * (num_in + num_out)))
    assert np.abs(p['w']).max() <= limit * (1 + 1e-6)
    assert np.abs(p['w']).max() > 0.99 * limit
    assert np.std(p['w']) == pytest.approx(limit / np.sqrt(3), rel=0.05)
    assert not p['b'].any()


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
  """All windows under TensorFlow's SAME rule: [B, out, out, size * size * C]."""
  out = -(-x.shape[1] // stride)
  total = max((out - 1) * stride + size - x.shape[1], 0)
  pad = (total // 2, total - total // 2)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  window = stride * jnp.arange(out)[:, None] + jnp.arange(size)[None]  # [out, size]
  x = x[:, window[:, None, :, None], window[None, :, None, :]]  # [B, out, out, size, size, C]
  return x.reshape(*x.shape[:3], -1)


def written_out(params: hk.Params, frames: jax.Array) -> jax.Array:
  """The network as matrix products alone."""
  x = frames.astype(jnp.float32) / 255
  conv1, conv2, conv3, hidden, head = params.values()
  for layer, size, stride in ((conv1, 8, 4), (conv2, 4, 2), (conv3, 3, 1)):
    w = layer['w'].reshape(-1, layer['w'].shape[-1])
    x = jnp.maximum(patches(x, size, stride) @ w + layer['b'][None, None, None], 0)
  x = jnp.maximum(x.reshape(len(x), -1) @ hidden['w'] + hidden['b'][None], 0)
  return x @ head['w'] + head['b'][None]


def test_outputs_and_gradients_equal_those_of_the_network_written_out(network, params, frames):
  # Biases that are not zero, so that a misplaced one would show.
  params = jax.tree.map(lambda x: x + 0.01, params)

  def losses(apply):
    return jax.value_and_grad(lambda p: jnp.sum(jnp.square(apply(p, frames))))(params)

  np.testing.assert_allclose(
    network.apply(params, frames).q_values, written_out(params, frames), rtol=1e-5, atol=1e-6
  )
  value, grads = losses(lambda p, x: network.apply(p, x).q_values)
  want_value, want_grads = losses(written_out)
  np.testing.assert_allclose(value, want_value, rtol=1e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def biased(network: hk.Transformed, frames: jax.Array) -> hk.Params:
  """Initial parameters, but for biases: random ones, as they would be after some learning."""
  params = jax.jit(network.init)(jax.random.PRNGKey(0), frames)
  rng = np.random.default_rng(0)
  for layer in params.values():
    layer['b'] = rng.normal(scale=0.1, size=layer['b'].shape).astype(np.float32)
  return params


def test_the_quantile_network_written_out(frames):
  network = networks.quantile_network(6, 5)
  params = biased(network, frames)
  want = written_out(params, frames).reshape(3, 5, 6)
  got = network.apply(params, frames)
  np.testing.assert_allclose(got.dist_q, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.q_values, want.mean(axis=1), rtol=1e-4, atol=1e-5)


def test_the_multi_head_network_written_out(frames):
  network = networks.multi_head_network(6, 5)
  params = biased(network, frames)
  want = written_out(params, frames).reshape(3, 6, 5)
  got = network.apply(params, frames)
  np.testing.assert_allclose(got.q_heads, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.q_values, want.mean(axis=2), rtol=1e-4, atol=1e-5)


def test_the_behaviour_network_written_out(frames):
  """It takes grey levels as they are."""
  network = networks.behaviour_network(6)
  params = biased(network, frames)
  got = network.apply(params, frames)
  for stream, outputs in (('q', got.q_values), ('behaviour', got.behaviour_logits)):
    names = ('conv2_d', 'conv2_d_1', 'conv2_d_2', f'{stream}_hidden', stream)
    layers = {name: params[name] for name in names}
    want = written_out(layers, 255 * frames.astype(jnp.float32))
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-3)


def test_white_is_one_and_black_is_zero():
  levels = networks.preprocess(jnp.array([0, 51, 255], jnp.uint8))
  np.testing.assert_allclose(levels, [0, 0.2, 1], rtol=1e-6)


ATOMS = np.linspace(-2, 5, 21, dtype=np.float32)


@pytest.mark.parametrize(
  'make, output, white',
  [
    (lambda **kwargs: networks.dqn_network(6, **kwargs), 'q_values', 1),
    (lambda **kwargs: networks.quantile_network(6, 5, **kwargs), 'dist_q', 1),
    (lambda **kwargs: networks.categorical_network(6, ATOMS, **kwargs), 'q_logits', 1),
    (lambda **kwargs: networks.multi_head_network(6, 5, **kwargs), 'q_heads', 1),
    (lambda **kwargs: networks.policy_network(6, **kwargs), 'logits', 1),
    (lambda **kwargs: networks.behaviour_network(6, **kwargs), 'q_values', 255),
    (lambda **kwargs: networks.actor_critic_network(6, **kwargs), 'policy_logits', 255),
  ],
)
def test_averages_of_white_are_white_but_where_padding_darkens_them(make, output, white):
  """By hand, a row of SAME's last map of 11 pixels has a sum of 9.6875 where VALID's are all 1.

  Its first map is 3/4 at both ends and 1 elsewhere; its second begins with 11/16 and ends with
  15/16, 7/16.
  """
  frames = jnp.full((1, 84, 84, 4), 255, jnp.uint8)
  for kwargs, num_features, share in (
    ({'padding': 'VALID'}, 7 * 7 * 64, 1),
    ({}, 11 * 11 * 64, (9.6875 / 11) ** 2),
  ):
    network = make(**kwargs)
    params = {
      name: {
        'w': jnp.full(p['w'].shape, 1 / np.prod(p['w'].shape[:-1])),
        'b': jnp.zeros_like(p['b']),
      }
      for name, p in jax.eval_shape(network.init, jax.random.PRNGKey(0), frames).items()
    }
    assert {len(p['w']) for p in params.values() if p['w'].shape[1:] == (512,)} == {num_features}
    values = getattr(network.apply(params, frames), output)
    np.testing.assert_allclose(values, share * white, rtol=1e-4)


@pytest.mark.parametrize(
  'make, limit_times_root_fan_in, outputs',
  [
    (lambda: networks.quantile_network(6, 50), 3**0.25, {'dist_q': (3, 50, 6)}),
    (lambda: networks.categorical_network(6, ATOMS), 3**0.25, {'q_logits': (3, 6, 21)}),
    (lambda: networks.multi_head_network(6, 20), 3**0.25, {'q_heads': (3, 6, 20)}),
    (lambda: networks.policy_network(6), 1.0, {'logits': (3, 6)}),
    (lambda: networks.behaviour_network(6), 1.0, {'behaviour_logits': (3, 6)}),
    (lambda: networks.actor_critic_network(6), 1.0, {'policy_logits': (3, 6)}),
  ],
)
def test_the_other_networks(make, limit_times_root_fan_in, outputs, frames):
  network = make()
  params = jax.jit(network.init)(jax.random.PRNGKey(0), frames)
  for p in params.values():
    limit = limit_times_root_fan_in / np.sqrt(np.prod(p['w'].shape[:-1]))
    assert 0.99 * limit < np.abs(p['w']).max() <= limit * (1 + 1e-6)
    assert not p['b'].any()
  result = jax.jit(network.apply)(params, frames)
  if 'logits' not in outputs:  # a policy has no values
    assert result.q_values.shape == (3, 6)
  for name, shape in outputs.items():
    assert getattr(result, name).shape == shape
  if 'dist_q' in outputs:
    np.testing.assert_allclose(result.q_values, result.dist_q.mean(axis=1), rtol=1e-5, atol=1e-7)
  if 'q_logits' in outputs:
    want = (jax.nn.softmax(result.q_logits) * ATOMS[None, None]).sum(axis=-1)
    np.testing.assert_allclose(result.q_values, want, rtol=1e-5, atol=1e-6)
  if 'q_heads' in outputs:
    np.testing.assert_allclose(result.q_values, result.q_heads.mean(axis=-1), rtol=1e-5, atol=1e-7)
  for stream in {'behaviour', 'policy'} & params.keys():  # streams share the convolutions alone
    without = {**params, stream: jax.tree.map(jnp.zeros_like, params[stream])}
    other = jax.jit(network.apply)(without, frames)
    np.testing.assert_array_equal(other.q_values, result.q_values)
    name = f'{stream}_logits'
    assert not getattr(other, name).any() and getattr(result, name).any()
    assert len(params) == 3 + 2 * 2
