"""Serves another library's replay, filled with logged play, to a benchmark driver.

This runs in the library's own virtual environment (README.md says how to make it) and imports
nothing of ours. A request is a number of batches of 32; see protocol.py.

  python replays.py --library=tianshou --replay_dir=.../replay_logs

Libraries: tianshou (ReplayBuffer), d3rlpy (ReplayBuffer of episodes), dopamine
(OutOfGraphReplayBuffer). Each holds single frames and stacks four when it samples. Counted are the
arrays that hold transitions.
"""

import argparse
import pathlib
import time

import numpy as np
import protocol
from logged_play import BATCH_SIZE, STACK, first_rows

PACKAGES = {'tianshou': 'tianshou', 'd3rlpy': 'd3rlpy', 'dopamine': 'dopamine-rl'}


def tianshou_buffer(rows, num_rows, seed=42):
  """Returns Tianshou's replay with these rows, which samples by a seed of its own."""
  from tianshou.data import Batch, ReplayBuffer

  buffer = ReplayBuffer(
    size=num_rows,
    stack_num=STACK,
    ignore_obs_next=True,
    save_only_last_obs=True,
    random_seed=seed,
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


def d3rlpy_buffer(rows, num_rows, picker=None):
  """Returns d3rlpy's replay with these rows, and its episodes.

  Args:
    rows: See `logged_play.read_rows`.
    num_rows: How many there are.
    picker: Makes transitions; d3rlpy's own of one step, which stacks frames, if None.
  """
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
    transition_picker=picker or dataset.FrameStackTransitionPicker(n_frames=STACK),
  )
  return buffer, episodes


def d3rlpy(rows, num_rows):
  """Returns a function that samples a batch, and the bytes held."""
  buffer, episodes = d3rlpy_buffer(rows, num_rows)

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

  replies = protocol.take_stdout()
  rows = first_rows(args.replay_dir, args.transitions)
  sample, num_bytes = {'tianshou': tianshou, 'd3rlpy': d3rlpy, 'dopamine': dopamine}[args.library](
    rows, len(rows)
  )
  for _ in range(20):
    sample()

  def answer(num_batches):
    start = time.perf_counter()
    for _ in range(num_batches):
      sample()
    return {'seconds': time.perf_counter() - start}

  facts = {'transitions': len(rows), 'bytes_per_transition': num_bytes / len(rows)}
  protocol.serve(replies, (PACKAGES[args.library], 'numpy'), facts, answer)


if __name__ == '__main__':
  main()
