"""Made-up log shards for tests: one of traps, and a two-state problem for the agents.

In the problem, action a leads to state a; in state 1, action 1 ends the episode instead. A state is
told by the grey of its frame.
"""

import os
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from offline_zoo import processors, replay
from offline_zoo.logs import dqn_replay

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
