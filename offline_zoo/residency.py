"""How many shards of logs are on the device at a time, and what that takes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import psutil

from offline_zoo.encoding import frame_store
from offline_zoo.encoding import shards as encoded_shards

# Of the accelerator's free memory, what is left to network, optimiser and activations by default.
_ACCELERATOR_MARGIN = 2e9


class Plan(NamedTuple):
  """How many of some shards are on the device at a time, and what that takes.

  Attributes:
    num_shards: how many are resident.
    num_sets: how many sets of them are on the device: one, and if shards change the next one too.
    num_rows: of a set, at most.
    shapes: shape and dtype of each array of a set.
  """

  num_shards: int
  num_sets: int
  num_rows: int
  shapes: dict[str, tuple[tuple[int, ...], np.dtype]]

  @property
  def num_bytes(self) -> int:
    """Counts the bytes of one set."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())


def _plan_of(
  logs: encoded_shards.EncodedLogs,
  num_runs: Sequence[int],
  num_shards: int,
  with_probabilities: bool,
) -> Plan:
  """Plans what so many resident shards take, whichever they are; exact for all of them.

  Args:
    logs: all shards.
    num_runs: of each shard, how many runs of valid rows it has.
    num_shards: how many are resident.
    with_probabilities: whether those of the logged actions are.
  """
  num_rows = [len(shard.actions) for shard in logs.shards]
  if num_shards == len(logs.shards):
    tiles, blocks, bands, rows, runs = *logs.num_used, sum(num_rows), sum(num_runs)
  else:
    sizes = np.column_stack([logs.num_used_by_each, num_rows, num_runs])
    *most, rows, runs = map(int, np.sort(sizes, axis=0)[::-1][:num_shards].sum(axis=0))
    tiles, blocks, bands = map(min, most, logs.num_used)
  tile_bytes, block_bytes, band_bytes = map(frame_store.id_bytes, (tiles, blocks, bands))
  tile_words, block_ids, band_ids = frame_store.ITEM_SIZES
  shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
    'tiles': ((tiles, tile_words), np.dtype(np.uint32)),
    'blocks': ((blocks, block_ids, tile_bytes), np.dtype(np.uint8)),
    'bands': ((bands, band_ids, block_bytes), np.dtype(np.uint8)),
    'frames': ((rows, frame_store.NUM_BANDS, band_bytes), np.dtype(np.uint8)),
    'actions': ((rows,), np.dtype(np.uint8)),
    'rewards': ((rows,), np.result_type(*(shard.rewards.dtype for shard in logs.shards))),
    'terminals': ((rows,), np.dtype(bool)),
    'run_ends': ((runs,), np.dtype(np.int32)),
    'run_offsets': ((runs,), np.dtype(np.int32)),
  }
  if with_probabilities:
    shapes['probabilities'] = ((rows,), np.dtype(np.float32))
  return Plan(num_shards, 1 if num_shards == len(logs.shards) else 2, rows, shapes)


def plan(
  logs: encoded_shards.EncodedLogs,
  num_runs: Sequence[int],
  memory_gb: float | None,
  wanted: int | None,
  with_probabilities: bool,
) -> Plan:
  """Plans with as many shards as fit, or with the number that is wanted.

  Args:
    logs: all shards.
    num_runs: of each shard, how many runs of valid rows it has.
    memory_gb: 10^9 bytes that there are; None for the default, see `replay.Logs`.
    wanted: the number of resident shards; None for as many as fit.
    with_probabilities: whether those of the logged actions are resident.

  Raises:
    ValueError: there is too little memory, or there are fewer shards.
  """
  budget = _default_memory() if memory_gb is None else 1e9 * memory_gb
  total = len(logs.shards)
  if wanted is not None and wanted > total:
    raise ValueError(
      f'--replay_dir: {wanted} shards were resident in this run, and now there are {logs.numbers}'
    )
  for number in range(total, 0, -1) if wanted is None else [wanted]:
    found = _plan_of(logs, num_runs, number, with_probabilities)
    needed = found.num_sets * found.num_bytes
    if needed <= budget:
      return found
  raise ValueError(
    f'--replay_memory_gb={budget / 1e9:.4g}: too little; expected at least {needed / 1e9:.4g} for '
    f'{found.num_shards} of {total} shards at a time'
  )


def _default_memory() -> float:
  """Chooses how many bytes resident data may take if nothing is said: see `replay.Logs`."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use'] - _ACCELERATOR_MARGIN
  return psutil.virtual_memory().available / 2
