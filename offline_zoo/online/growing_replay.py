"""A replay that grows while an agent acts, and in the end forgets its oldest rows.

It gives the `replay.ReplayData` that logged play gives, of arrays of a fixed size, so that an
agent's `update` neither knows that they grow nor is compiled anew.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from offline_zoo import replay
from offline_zoo.atari_data import FRAME_SHAPE
from offline_zoo.encoding import frame_store
from offline_zoo.logs.shard import NUM_PADDING_ROWS

# Shorter episodes than of 4 seconds, on average, would make it forget sooner than it must.
ROWS_PER_EPISODE = 64


@functools.partial(jax.jit, donate_argnums=0)
def _write(columns: dict[str, Any], row: jax.Array, values: dict[str, Any]) -> dict[str, Any]:
  """Writes a row in place."""
  return jax.tree.map(
    lambda column, value: jax.lax.dynamic_update_index_in_dim(column, value, row, 0),
    columns,
    values,
  )


class GrowingReplay:
  """The last `capacity` rows that were added, three blank ones before each episode's first.

  Row t of all, counted from 0, lies at t mod capacity, and the first n + 3 of these places are
  repeated behind the last one: thus each window of rows that `replay.gather` looks at is in one
  piece. Frames are kept as they are, 7,056 bytes each.

  Attributes:
    capacity: as it was made with.
  """

  def __init__(self, capacity: int, *, n_step: int, discount: float, max_abs_reward: float | None):
    """Makes room for everything.

    Args:
      capacity: in rows, at least 128 and n_step + 7.
      n_step: see `replay.ReplayData`.
      discount: see `replay.ReplayData`.
      max_abs_reward: see `replay.ReplayData`.

    Raises:
      ValueError: there is too little memory.
    """
    self.capacity = capacity
    self._num_repeated = n_step + NUM_PADDING_ROWS
    self._settings: dict[str, Any] = {
      'n_step': n_step,
      'discount': discount,
      'max_abs_reward': max_abs_reward,
    }
    self._num_rows = self._oldest_row = 0
    # Of each episode, oldest first: its first row after the blank ones, and the row after its last.
    self._firsts: collections.deque[int] = collections.deque()
    self._ends: collections.deque[int] = collections.deque()
    self._max_episodes = capacity // ROWS_PER_EPISODE
    num_places = capacity + self._num_repeated
    needed = num_places * FRAME_SHAPE[0] * FRAME_SHAPE[1]
    if jax.default_backend() == 'cpu' and needed > psutil.virtual_memory().available:
      raise ValueError(
        f'--replay_capacity={capacity}: needs {needed / 1e9:.1f} GB of memory; there are '
        f'{psutil.virtual_memory().available / 1e9:.1f} GB free'
      )
    self._columns: dict[str, Any] = {
      'frames': jnp.zeros((num_places, *FRAME_SHAPE), jnp.uint8),
      'actions': jnp.zeros(num_places, jnp.uint8),
      'rewards': jnp.zeros(num_places, jnp.float32),
      'terminals': jnp.zeros(num_places, bool),
    }

  def start_episode(self) -> None:
    """Adds the blank rows that stand before an episode's first frame."""
    for _ in range(NUM_PADDING_ROWS):
      self._add(np.zeros(FRAME_SHAPE, np.uint8), 0, 0.0, False)
    self._firsts.append(self._num_rows)
    self._ends.append(self._num_rows)
    if len(self._firsts) > self._max_episodes:
      self._firsts.popleft()
      self._ends.popleft()

  def add(self, frame: np.ndarray, action: int, reward: float, terminal: bool) -> None:
    """Adds a row of the episode: its frame [84, 84], what was done there, and what followed."""
    self._add(frame, action, reward, terminal)
    self._ends[-1] = self._num_rows
    while self._ends[0] <= self._oldest_row:
      self._firsts.popleft()
      self._ends.popleft()

  def _add(self, frame: np.ndarray, action: int, reward: float, terminal: bool) -> None:
    values = {
      'frames': frame,
      'actions': np.uint8(action),
      'rewards': np.float32(reward),
      'terminals': np.bool_(terminal),
    }
    place = self._num_rows % self.capacity
    self._columns = _write(self._columns, np.int32(place), values)
    if place < self._num_repeated:
      self._columns = _write(self._columns, np.int32(place + self.capacity), values)
    self._num_rows += 1
    self._oldest_row = max(self._oldest_row, self._num_rows - self.capacity)

  def data(self) -> replay.ReplayData:
    """Gives what there is to sample from, until the next row is added.

    As in logged play, transitions end before the newest row, and none begins in the oldest three.
    """
    firsts = np.maximum(self._firsts, self._oldest_row + NUM_PADDING_ROWS)
    ends = np.minimum(self._ends, self._num_rows - self._settings['n_step'])
    # The first row that begins a lap of places; episodes are in two parts there.
    lap = NUM_PADDING_ROWS
    lap += (self._num_rows - lap) // self.capacity * self.capacity
    firsts = np.concatenate([firsts, np.maximum(firsts, lap)])
    ends = np.concatenate([np.minimum(ends, lap), ends])
    lengths = np.maximum(ends - firsts, 0)
    places = (firsts - NUM_PADDING_ROWS) % self.capacity + NUM_PADDING_ROWS
    run_ends = np.full(2 * self._max_episodes, lengths.sum(), np.int32)
    run_offsets = np.zeros(2 * self._max_episodes, np.int32)
    run_ends[: len(lengths)] = np.cumsum(lengths)
    run_offsets[: len(lengths)] = places - (run_ends[: len(lengths)] - lengths)
    return replay.ReplayData(
      frames=frame_store.RawFrames(self._columns['frames']),
      actions=self._columns['actions'],
      rewards=self._columns['rewards'],
      terminals=self._columns['terminals'],
      probabilities=None,
      run_ends=jnp.asarray(run_ends),
      run_offsets=jnp.asarray(run_offsets),
      **self._settings,
    )
