"""What tests share: made-up log shards, a two-state problem, and every agent, found by listing.

In the problem, action a leads to state a; in state 1, action 1 ends the episode instead. A state is
told by the grey of its frame.
"""

import contextlib
import functools
import gzip
import importlib
import inspect
import itertools
import os
import pathlib
import struct
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import cv2
import google_crc32c
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from offline_zoo import evaluation, networks, parts, processors, replay
from offline_zoo.logs import dqn_replay, rl_unplugged
from offline_zoo.logs.shard import NUM_PADDING_ROWS

# Every directory with an agent.py is an agent, and what tests say of all agents holds for it.
AGENTS = sorted(path.parent.name for path in pathlib.Path(__file__).parent.glob('*/agent.py'))

REWARDS = np.array([[0.0, -0.2], [0.3, 1.0]])
DISCOUNT = 0.9


def optimal_values() -> np.ndarray:
  """Q* [2, 2], in closed form: end in state 1, since 0.3 + 0.9 * v0 is less than 1; go there."""
  v1 = 1.0
  v0 = REWARDS[0, 1] + DISCOUNT * v1
  return np.array([[DISCOUNT * v0, v0], [REWARDS[1, 0] + DISCOUNT * v0, v1]])


def write_logs(
  directory: str | os.PathLike, num_transitions: int = 400, rate_of_action_1: float = 0.5
) -> None:
  """Logs a policy that takes action 1 at a rate, with the probabilities of its actions."""
  writer = dqn_replay.ShardWriter(directory, capacity=150, with_prob=True)
  rng = np.random.default_rng(0)
  while writer.num_transitions < num_transitions:
    writer.start_episode()
    state, ended = 0, False
    while not ended:
      action = int(rng.random() < rate_of_action_1)
      ended = state == 1 and action == 1
      frame = np.full((84, 84), 10 * (state + 1), np.uint8)
      probability = rate_of_action_1 if action else 1 - rate_of_action_1
      writer.add(frame, action, REWARDS[state, action], ended, probability)
      state = action
  writer.close()


def states(frames: jax.Array) -> jax.Array:
  """The states [B] that stacks of frames [B, 84, 84, 4] end with."""
  return frames[:, 0, 0, -1].astype(jnp.int32) // 10 - 1


def table(name: str, frames: jax.Array, *shape: int) -> jax.Array:
  """In a Haiku network: a row [B, *shape] of a learnt table, all zeros at first, for each state."""
  return hk.get_parameter(name, (2, *shape), init=jnp.zeros)[states(frames)]


def logged_rates(data: replay.ReplayData) -> np.ndarray:
  """How often each action is logged in each state, among the rows that can be sampled: [2, 2]."""
  batch = replay.gather(data, replay.valid_rows(data))
  counts = np.zeros((2, 2))
  np.add.at(counts, (np.asarray(states(batch.s_tm1)), np.asarray(batch.a_tm1)), 1)
  return counts / counts.sum(axis=1, keepdims=True)


def make_agent(agent_class: type, network: Callable, data: replay.ReplayData, **settings) -> Any:
  """A greedy agent that learns what a function of frames looks up, by plain gradient descent."""
  return agent_class(
    **{
      'network': hk.without_apply_rng(hk.transform(network)),
      'optimizer': optax.sgd(1.0),
      'data': data,
      'processor': processors.AtariProcessor(),
      'batch_size': 32,
      'target_network_update_period': 20,
      'eval_epsilon': 0.0,
      'rng_key': jax.random.PRNGKey(0),
      **settings,
    }
  )


def after_an_update(learner: Any, online: dict, target: dict) -> dict[str, np.ndarray]:
  """The learnt tables, by name, after one update that begins with these."""
  state = learner.get_state()
  learner.set_state(state._replace(online_params={'~': online}, target_params={'~': target}))
  learner.learn(1)
  return learner.get_state().online_params['~']


def run_atari(agent: str) -> types.ModuleType:
  """Imports an agent's experiment; `.agent` is its algorithm."""
  return importlib.import_module(f'offline_zoo.{agent}.run_atari')


def agent_class(agent_module: types.ModuleType) -> type:
  """Finds the class of an agent.py: the one that can learn."""
  (found,) = (
    member
    for member in vars(agent_module).values()
    if inspect.isclass(member) and hasattr(member, 'learn')
  )
  return found


def known_flags(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
  """Leaves out the values of flags that a Config does not have."""
  return {name: value for name, value in values.items() if hasattr(config_class, name)}


def small_torso(x: jax.Array, w_init: Any, padding: str) -> jax.Array:
  """Stands in for `networks.nature_torso`: some of the pixels, which need no compiling to speak of.

  With it checkpoints are of a megabyte, and an update takes milliseconds.
  """
  del w_init, padding
  return x[:, ::12, ::12].reshape(len(x), -1)


def _make_small(max_frames: int, make_agent: Callable[[], Any]) -> Any:
  # For good: this process is a worker.
  networks.nature_torso = small_torso
  parts.MAX_FRAMES_PER_EPISODE = max_frames
  return make_agent()


class _SmallWorkers(evaluation.Workers):
  def __init__(self, num_workers, make_agent, *args):
    small = functools.partial(_make_small, parts.MAX_FRAMES_PER_EPISODE, make_agent)
    super().__init__(num_workers, small, *args)


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
  """Compiles in less time what then takes longer: for tests that run little of much."""
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', False)


@contextlib.contextmanager
def small_torsos() -> Iterator[None]:
  """Puts the small torso in place, here and in the workers of a run's evaluations.

  There, episodes have the same limit as here.
  """
  with (
    mock.patch.object(networks, 'nature_torso', small_torso),
    mock.patch.object(evaluation, 'Workers', _SmallWorkers),
  ):
    yield


def write_noise(directory: str | os.PathLike, num_shards: int) -> None:
  """Logs noise of four actions: shards that share no tile, so that each takes as much memory."""
  rng = np.random.default_rng(0)
  for index in range(num_shards):
    terminal = np.zeros(120, np.uint8)
    terminal[20::30] = 1
    shard = dqn_replay.Shard(
      observation=rng.integers(256, size=(120, 84, 84), dtype=np.uint8),
      action=rng.integers(4, size=120, dtype=np.int32),
      reward=rng.integers(-2, 3, size=120).astype(np.float32),
      terminal=terminal,
      prob=np.full(120, 0.25, np.float32),
      add_count=119,
    )
    dqn_replay.ShardFiles(directory, index).write(shard)


def make_shard(num_rows: int, capacity: int | None = None, **columns) -> dqn_replay.Shard:
  """A shard whose frame in row i is filled with i + 1; rows past `num_rows` hold traps."""
  capacity = capacity or num_rows + 1
  rows = {
    'observation': np.zeros((capacity, 84, 84), np.uint8)
    + np.arange(1, capacity + 1, dtype=np.uint8)[:, None, None],
    'action': np.zeros(capacity, np.int32),
    'reward': np.zeros(capacity, np.float32),
    'terminal': np.zeros(capacity, np.uint8),
  }
  rows['action'][num_rows:] = -7
  rows['reward'][num_rows:] = np.nan
  rows['terminal'][num_rows:] = 205
  for name, values in columns.items():
    rows[name][: len(values)] = values
  return dqn_replay.Shard(**rows, add_count=num_rows)


def serialise_example(features: dict[str, list]) -> bytes:
  """A `tf.train.Example` with lists of bytes, int or float."""
  example = rl_unplugged._Example()
  kinds = {bytes: 'bytes_list', int: 'int64_list', float: 'float_list'}
  for name, values in features.items():
    feature = example.features.feature[name]
    if values:
      getattr(feature, kinds[type(values[0])]).value.extend(values)
  return example.SerializeToString(deterministic=True)


def tfrecord(content: bytes) -> bytes:
  """A record of a TFRecord file."""

  def checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

  length = struct.pack('<Q', len(content))
  return length + checksum(length) + content + checksum(content)


def write_rl_unplugged(path: pathlib.Path, shard: dqn_replay.Shard) -> None:
  """Writes a shard, up to its last episode's end, as a published file of RL Unplugged."""
  ends = np.flatnonzero(shard.terminal[: shard.num_rows]) + 1
  with gzip.open(path, 'wb', compresslevel=1) as file:
    for start, end in itertools.pairwise([0, *ends]):
      rows = slice(start + NUM_PADDING_ROWS, end)
      frames = shard.observation[rows]
      pngs = [cv2.imencode('.png', frame)[1].tobytes() for frame in frames]
      features = {
        'observations': [*pngs, pngs[0]],  # the terminal state is in no log shard
        'actions': [*shard.action[rows].tolist(), 0],
        'unclipped_rewards': [*shard.reward[rows].tolist(), 0.0],
        'discounts': [1.0] * len(frames) + [0.0],
      }
      file.write(tfrecord(serialise_example(features)))
