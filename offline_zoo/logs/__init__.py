"""Formats of logged play, and what makes it: readers, writers, demo logs."""

import os
from collections.abc import Sequence

from offline_zoo.logs import dqn_replay, shard


def open_shards(replay_dir: str | os.PathLike) -> Sequence[shard.LogShard]:
  """Lists the shards in a replay directory, in ascending order of their numbers.

  Raises:
    OSError: no such directory, or no shard in it.
  """
  return dqn_replay.open_shards(replay_dir)
