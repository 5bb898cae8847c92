"""Formats of logged play, and what makes it: readers, writers, demo logs."""

import os
import pathlib
from collections.abc import Sequence

from offline_zoo.logs import dqn_replay, rl_unplugged, shard


def exist(replay_dir: str | os.PathLike) -> bool:
  """Tells whether there is a directory that `open_shards` takes, or such a run of RL Unplugged."""
  return os.path.isdir(replay_dir) or bool(rl_unplugged.open_published(replay_dir))


def open_shards(replay_dir: str | os.PathLike) -> Sequence[shard.LogShard]:
  """Lists the shards in a replay directory, in ascending order of their numbers.

  Args:
    replay_dir: a directory with shards of one format, or, where there are several runs of RL
      Unplugged in one, <directory>/run_<run>.

  Raises:
    OSError: no such directory, no shard in it, or a file is missing.
    ValueError: there are files of several formats, runs or sets.
  """
  found: list[Sequence[shard.LogShard]] = [
    dqn_replay.open_shards(replay_dir),
    rl_unplugged.open_published(replay_dir),
    rl_unplugged.open_prepared(replay_dir),
  ]
  found = [shards for shards in found if shards]
  if not found:
    directory = pathlib.Path(replay_dir)
    if not directory.exists():
      raise FileNotFoundError(f'{directory}: no such replay directory')
    if not directory.is_dir():
      raise NotADirectoryError(f'{directory}: expected a directory')
    raise FileNotFoundError(
      f'{directory}: no log shards here; looked for files such as $store$_observation_ckpt.0.gz, '
      'run_1-00000-of-00050 or rlu_atari_checkpoints_ordered-checkpoint_00.tfrecord-00000-of-00001'
    )
  if len(found) > 1:
    kinds = ' and '.join(shards[0].kind for shards in found)
    raise ValueError(f'{replay_dir}: expected logs of one kind, got {kinds}')
  return found[0]
