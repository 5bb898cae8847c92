"""Logged play for other libraries: the rows of a directory of log shards, read with NumPy alone."""

import argparse
import gzip
import itertools
import json
import pathlib
import re

import numpy as np

FRAME_SHAPE = (84, 84)
STACK = 4
BATCH_SIZE = 32
PADDING_ROWS = 3  # blank rows that the logs put before each episode's first frame


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


def first_rows(replay_dir, num_rows):
  """Reads so many rows, or all if there are fewer or it is 0, as agents learn from them.

  That is, with rewards clipped to [-1, 1]. The last one ends an episode.
  """
  rows = [
    (frame, action, max(-1.0, min(reward, 1.0)), terminal, last)
    for frame, action, reward, terminal, last in itertools.islice(
      read_rows(replay_dir), num_rows or None
    )
  ]
  rows[-1] = (*rows[-1][:-1], True)
  return rows


def learner_parser(description):
  """Makes the parser of a script that serves learners: which logs, how much of them, which game.

  Args:
    description: The script's docstring, of which the first line is shown.
  """
  parser = argparse.ArgumentParser(description=description.splitlines()[0])
  parser.add_argument('--replay_dir', type=pathlib.Path, required=True, help='log shards')
  parser.add_argument('--transitions', type=int, default=5000, help='to load, at most; 0: all')
  parser.add_argument('--num_actions', type=int, default=6)
  parser.add_argument('--seed', type=int, default=1, help='of parameters and sampling')
  parser.add_argument(
    '--values',
    type=json.loads,
    default={'learning_rate': 5e-5, 'target_network_update_period': 2000},
    help="hyperparameters as JSON, by our flags' names; null: the library's own; not Dopamine's",
  )
  return parser
