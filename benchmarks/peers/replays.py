"""Serves another library's replay, filled with logged play, to a benchmark driver.

This runs in the library's own virtual environment (README.md says how to make it) and imports
nothing of ours. The protocol is made of lines:

  out  {"ready": true, "versions": {...}, "bytes_per_transition": 7068.0, ...}
  in   200                                how many batches of 32 to sample now
  out  {"updates": 200, "seconds": 9.87}

  python replays.py --library=tianshou --replay_dir=.../replay_logs

Libraries: tianshou (ReplayBuffer), d3rlpy (ReplayBuffer of episodes), dopamine
(OutOfGraphReplayBuffer). Each holds single frames and stacks four when it samples. Counted are the
arrays that hold transitions.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

import numpy as np
from dopamine_dqn import read_rows

STACK = 4
BATCH_SIZE = 32
PACKAGES = {'tianshou': 'tianshou', 'd3rlpy': 'd3rlpy', 'dopamine': 'dopamine-rl'}


def tianshou_buffer(rows, num_rows):
  """Returns Tianshou's replay with these rows."""
  from tianshou.data import Batch, ReplayBuffer

  buffer = ReplayBuffer(
    size=num_rows, stack_num=STACK, ignore_obs_next=True, save_only_last_obs=True
  )
  for frame, action, reward, terminal, last in rows:
    buffer.add(
      Batch(
        obs=frame[None],  # of which the last is saved
        act=action,
        rew=float(reward),
        terminated=bool(terminal),
        truncated=bool(last and not terminal),
        obs_next=frame[None],
        info={},
      )
    )
  return buffer


def tianshou(rows, num_rows):
  """Returns a function that samples a batch, and the bytes held."""
  from tianshou.data import Batch

  buffer = tianshou_buffer(rows, num_rows)

  def sample():
    batch, _ = buffer.sample(BATCH_SIZE)
    assert batch.obs.shape == batch.obs_next.shape == (BATCH_SIZE, STACK, 84, 84)

  def num_bytes(batch):
    values = (batch[key] for key in batch.get_keys())
    return sum(num_bytes(value) if isinstance(value, Batch) else value.nbytes for value in values)

  return sample, num_bytes(buffer._meta)


def d3rlpy(rows, num_rows):
  """Returns a function that samples a batch, and the bytes held."""
  import d3rlpy.dataset as dataset

  episodes: list[dataset.Episode] = []
  columns: tuple[list, ...] = ([], [], [])
  for frame, action, reward, terminal, last in rows:
    for column, value in zip(columns, (frame[None], [action], [reward]), strict=True):
      column.append(value)
    if last:
      observations, actions, rewards = map(np.array, columns)
      episodes.append(
        dataset.Episode(observations, actions, rewards.astype(np.float32), bool(terminal))
      )
      columns = ([], [], [])
  buffer = dataset.ReplayBuffer(
    dataset.FIFOBuffer(limit=num_rows),
    episodes=episodes,
    transition_picker=dataset.FrameStackTransitionPicker(n_frames=STACK),
  )

  def sample():
    batch = buffer.sample_transition_batch(BATCH_SIZE)
    assert batch.observations.shape == batch.next_observations.shape == (BATCH_SIZE, STACK, 84, 84)

  num_bytes = sum(
    array.nbytes for e in episodes for array in (e.observations, e.actions, e.rewards)
  )
  return sample, num_bytes


def dopamine(rows, num_rows):
  """Returns a function that samples a batch, and the bytes held."""
  from dopamine.tf.replay_memory import circular_replay_buffer

  buffer = circular_replay_buffer.OutOfGraphReplayBuffer(
    observation_shape=(84, 84),
    stack_size=STACK,
    replay_capacity=num_rows + 4 * 1000,  # with room for its padding of episodes
    batch_size=BATCH_SIZE,
    update_horizon=1,
    gamma=0.99,
  )
  for frame, action, reward, terminal, last in rows:
    buffer.add(frame, action, reward, terminal, episode_end=bool(last))

  def sample():
    batch = buffer.sample_transition_batch()
    assert batch[0].shape == batch[3].shape == (BATCH_SIZE, 84, 84, STACK)

  capacity = len(buffer._store['action'])
  return sample, sum(array.nbytes for array in buffer._store.values()) * num_rows / capacity


def main():
  """Serves batches until the input ends."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--library', choices=PACKAGES, required=True)
  parser.add_argument('--replay_dir', type=pathlib.Path, required=True)
  parser.add_argument('--transitions', type=int, default=50_000)
  args = parser.parse_args()

  reply = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # libraries may print

  rows = []
  for row in read_rows(args.replay_dir):
    rows.append(row)
    if len(rows) == args.transitions:
      break
  rows[-1] = (*rows[-1][:-1], True)
  sample, num_bytes = {'tianshou': tianshou, 'd3rlpy': d3rlpy, 'dopamine': dopamine}[args.library](
    rows, len(rows)
  )
  for _ in range(20):
    sample()
  package = PACKAGES[args.library]
  versions = {
    'python': platform.python_version(),
    package: importlib.metadata.version(package),
    'numpy': np.__version__,
  }
  ready = {
    'ready': True,
    'versions': versions,
    'transitions': len(rows),
    'bytes_per_transition': num_bytes / len(rows),
  }
  print(json.dumps(ready), file=reply)
  for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
      sample()
    print(json.dumps({'updates': int(line), 'seconds': time.perf_counter() - start}), file=reply)


if __name__ == '__main__':
  main()
