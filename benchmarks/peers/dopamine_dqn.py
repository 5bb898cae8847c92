"""Serves Dopamine's own JAX DQN learner to a benchmark driver, over stdin and stdout.

This runs in a virtual environment of its own (README.md says how to make it) and imports nothing
of ours. The agent, its train step, its replay memory and its sampling are Dopamine's, untouched;
only hyperparameters are set, and the memory is filled from logged play.

The protocol is made of lines, so that a driver can take turns between this learner and another:

  out  {"ready": true, "versions": {...}, ...}    once, after compiling and warming up
  in   200                                        how many updates to run now, a positive integer
  out  {"updates": 200, "seconds": 9.87}          after the device has finished them

The end of the input ends the process. Everything else goes to stderr.

  python dopamine_dqn.py --replay_dir=.../Breakout/1/replay_logs
"""

import argparse
import gzip
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import time
import types

import numpy as np

# Dopamine's Atari module imports OpenAI's baselines, which dopamine-rl does not declare. Only its
# environments for PPO use it, and no environment is made here, so empty modules will do.
for _name in ('baselines', 'baselines.common', 'baselines.common.atari_wrappers'):
  sys.modules[_name] = types.ModuleType(_name)

FRAME_SHAPE = (84, 84)
PADDING_ROWS = 3  # blank rows that the logs put before each episode's first frame
PACKAGES = (
  'dopamine-rl',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'numpy',
  'tensorflow-cpu',
  'tfp-nightly',
)
SETTINGS = {  # gin names; RMSProp as in Dopamine's configuration of the Nature paper's DQN
  'ReplayBuffer.batch_size': 32,
  'create_optimizer.name': 'rmsprop',
  'create_optimizer.learning_rate': 2.5e-4,
  'create_optimizer.beta2': 0.95,  # the decay: Dopamine hands it to optax under this name
  'create_optimizer.eps': 1e-5,
  'create_optimizer.centered': True,
}


def read_array(replay_dir, name, shard):
  """Reads one array of one shard.

  Args:
    replay_dir: Path of the directory of log shards.
    name: The array's name, such as `$store$_action`.
    shard: The shard's number.

  Returns:
    The array; pickled content is refused.
  """
  with gzip.open(replay_dir / f'{name}_ckpt.{shard}.gz', 'rb') as stream:
    return np.load(stream, allow_pickle=False)


def read_rows(replay_dir):
  """Yields the logged steps of a replay directory, in the order of their shards.

  Rows from the write position on are stale and left out, as is the blank padding: Dopamine's memory
  pads each stack itself.

  Args:
    replay_dir: Path of the directory of log shards.

  Yields:
    Tuples (frame [84, 84] uint8, action, reward, terminal, last), where last says that the next
    tuple, if any, does not continue this one.
  """
  names = (re.fullmatch(r'add_count_ckpt\.(\d+)\.gz', path.name) for path in replay_dir.iterdir())
  shards = sorted(int(match[1]) for match in names if match)
  if not shards:
    raise FileNotFoundError(f'No log shards in {replay_dir}.')
  for shard in shards:
    frames, actions, rewards, terminals = (
      read_array(replay_dir, f'$store$_{name}', shard)
      for name in ('observation', 'action', 'reward', 'terminal')
    )
    if frames.shape[1:] != FRAME_SHAPE or frames.dtype != np.uint8:
      raise ValueError(f'Shard {shard} holds frames {frames.dtype}{list(frames.shape)}.')
    if not len(frames) == len(actions) == len(rewards) == len(terminals):
      raise ValueError(f'The arrays of shard {shard} differ in length.')
    usable = int(read_array(replay_dir, 'add_count', shard)) % len(frames)
    since_start = 0
    for row in range(usable):
      terminal = bool(terminals[row])
      blank = not (frames[row].any() or actions[row] or rewards[row] or terminal)
      if not (blank and since_start < PADDING_ROWS):
        last = terminal or row == usable - 1
        yield frames[row], int(actions[row]), float(rewards[row]), terminal, last
      since_start = 0 if terminal else since_start + 1


def fill(agent, replay_dir, transitions):
  """Stores logged steps in the agent's memory, the way the agent stores its own.

  Args:
    agent: A Dopamine agent.
    replay_dir: Path of the directory of log shards.
    transitions: Stop at this many in the memory; there are fewer where the directory has fewer.
      Dopamine counts the last transition of an episode once for each length of its stack.
  """
  memory = agent._replay  # pylint: disable=protected-access
  for frame, action, reward, terminal, last in read_rows(replay_dir):
    if action >= agent.num_actions:
      raise ValueError(f'A logged action is {action}; there are {agent.num_actions} actions.')
    agent._store_transition(  # pylint: disable=protected-access
      frame, action, reward, terminal, episode_end=last
    )
    if memory.add_count >= transitions:
      return
  print(f'{replay_dir} has only {memory.add_count} transitions.', file=sys.stderr)


def make_agent(num_actions, capacity, seed):
  """Makes Dopamine's DQN agent for Atari, set to train at each of its steps.

  Args:
    num_actions: How many actions the network values.
    capacity: How many transitions the memory holds.
    seed: Seed of the network's parameters and of the sampling.

  Returns:
    The agent.
  """
  import gin
  from dopamine.jax import networks
  from dopamine.jax.agents.dqn import dqn_agent

  for name, value in SETTINGS.items():
    gin.bind_parameter(name, value)
  gin.bind_parameter('ReplayBuffer.max_capacity', capacity)
  return dqn_agent.JaxDQNAgent(
    num_actions=num_actions,
    observation_shape=FRAME_SHAPE,
    stack_size=4,
    network=networks.NatureDQNNetwork,
    gamma=0.99,
    update_horizon=1,
    min_replay_history=0,
    update_period=1,  # unit: agent steps; 4 when it plays
    target_update_period=2000,  # unit: agent steps, here updates
    optimizer='rmsprop',
    summary_writer=None,
    loss_type='huber',
    seed=seed,
  )


def train(agent, updates):
  """Runs updates, each with its own sampling, and waits until the device has finished them.

  Args:
    agent: A Dopamine agent with a filled memory.
    updates: How many to run.

  Returns:
    Seconds that they took.
  """
  import jax

  start = time.perf_counter()
  for _ in range(updates):
    agent._train_step()  # pylint: disable=protected-access
  jax.block_until_ready((agent.online_params, agent.optimizer_state))
  return time.perf_counter() - start


def main():
  """Serves updates until the input ends."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--replay_dir', type=pathlib.Path, required=True, help='log shards')
  parser.add_argument('--transitions', type=int, default=5000, help='how many to load, at most')
  parser.add_argument('--num_actions', type=int, default=6)
  parser.add_argument('--warmup', type=int, default=20, help='updates before the ready line')
  parser.add_argument('--seed', type=int, default=1)
  args = parser.parse_args()

  # Libraries may print: from here on, file descriptor 1 is stderr and only `reply` has stdout.
  reply = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)

  agent = make_agent(args.num_actions, args.transitions, args.seed)
  fill(agent, args.replay_dir, args.transitions)
  train(agent, args.warmup)

  import jax

  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  print(
    json.dumps(
      {
        'ready': True,
        'versions': {'python': platform.python_version(), **versions},
        'device': jax.devices()[0].device_kind,
        'transitions': agent._replay.add_count,  # pylint: disable=protected-access
      }
    ),
    file=reply,
  )
  for line in sys.stdin:
    updates = int(line)
    if updates < 1:
      raise ValueError(f'Asked for {updates} updates.')
    seconds = train(agent, updates)
    print(json.dumps({'updates': updates, 'seconds': seconds}), file=reply)


if __name__ == '__main__':
  main()
