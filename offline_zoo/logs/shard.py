"""What every format of logged play gives: shards of rows, one row an agent step.

Row i holds a frame, the action taken at it, the reward that followed and whether the episode ended
then; the next frame is row i + 1. Three rows of zeros, frame included, stand before each episode's
first frame. Only a format's own module knows how that lies on disk.
"""

import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np

from offline_zoo.atari_data import STACK_SIZE

NUM_PADDING_ROWS = STACK_SIZE - 1  # of zeros, before each episode's first frame
MAX_ACTION = 255  # what the replay has room for
# What `terminal` is in an episode's last row: the episode ended with it, or it was cut, and what
# followed is in no row.
TERMINAL, CUT = 1, 2


@dataclasses.dataclass(frozen=True)
class Rows:
  """The n usable rows of a shard, without their frames.

  Attributes:
    action: [n] int32, index into the game's minimal action set.
    reward: [n] float32, as logged.
    terminal: [n] uint8, TERMINAL or CUT on an episode's last row, 0 on others.
    num_frames: how many frames are read: those of these rows, and in some formats others after
      them, which are of no use, so that damage is found.
    probability: [n] float32, of the action under the policy that acted, 0 in the rows before an
      episode; [0] where the logs do not say.
  """

  action: np.ndarray
  reward: np.ndarray
  terminal: np.ndarray
  num_frames: int
  probability: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))


class LogShard(Protocol):
  """A shard on disk, whatever its format; cheap to make, and nothing is read until it is asked."""

  @property
  def number(self) -> int:
    """The shard's number, by which flags and messages name it."""

  @property
  def kind(self) -> str:
    """What it is one of, in words."""

  def path(self, name: str) -> pathlib.Path:
    """The file with the observation, action, reward, terminal or prob of each row, for messages."""

  def has_probabilities(self) -> bool:
    """Whether it says how likely the logged actions were under the policy that acted."""

  def fingerprint(self) -> Any:
    """What changes when a file of the shard does; of the kinds that JSON gives back unchanged."""

  def read_small_files(self, num_actions: int | None, max_rows: int | None = None) -> Rows:
    """Reads all but the frames, within seconds, and checks it: see `check_rows`.

    Args:
      num_actions: the size of the game's action set, if it is known.
      max_rows: how many of the first rows to keep; all of them if None.

    Raises:
      OSError: a file is missing, or is not a regular one.
      ValueError: one is not as the format says. The message names it, in one line.
    """

  def read_frames(self, num_frames: int) -> Iterator[np.ndarray]:
    """Yields the frames [K, 84, 84] uint8, C-contiguous, valid until the next are asked for.

    Args:
      num_frames: how many there are, as `read_small_files` said.

    Raises:
      OSError, ValueError: as `read_small_files` does, and if there are not so many.
    """


class FormatError(ValueError):
  """Its message says what is wrong with which file, in one line."""


def expect(condition: object, path: pathlib.Path | str, expected: str, got: object) -> None:
  """Checks something about a file, or about what else a message may name first.

  Raises:
    FormatError: it is not so.
  """
  if not condition:
    raise FormatError(f'{path}: expected {expected}, got {got}')


def check_actions(shard: LogShard, actions: np.ndarray, num_actions: int | None) -> None:
  """Checks that actions [n] are of a set of this size, if it is known.

  Raises:
    FormatError: one is not.
  """
  top = MAX_ACTION if num_actions is None else num_actions - 1
  expected = f'actions 0 to {top} (are these the logs of another game?)'
  _check(shard, 'action', actions, (actions >= 0) & (actions <= top), expected)


def check_rows(shard: LogShard, rows: Rows, num_actions: int | None) -> None:
  """Checks what usable rows hold.

  Raises:
    FormatError: an action outside 0 .. num_actions - 1, a terminal flag other than 0 and 1, a
      reward that is not finite, or a probability outside [0, 1].
  """
  check_actions(shard, rows.action, num_actions)
  _check(shard, 'terminal', rows.terminal, rows.terminal <= 1, 'flags 0 or 1')
  _check(shard, 'reward', rows.reward, np.isfinite(rows.reward), 'finite rewards')
  is_probability = (rows.probability >= 0) & (rows.probability <= 1)
  _check(shard, 'prob', rows.probability, is_probability, 'probabilities')


def _check(shard: LogShard, name: str, column: np.ndarray, good: np.ndarray, expected: str) -> None:
  if not good.all():
    row = np.argmin(good)
    expect(False, shard.path(name), expected, f'{column[row]} in row {row}')


def open_regular(path: pathlib.Path) -> BinaryIO:
  """Opens a file to be read; another than a regular one could keep its reader waiting forever.

  Raises:
    FileNotFoundError: there is none.
    OSError: it is not a regular file, or cannot be opened.
  """
  try:
    # Without O_NONBLOCK, opening a FIFO would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: a file of this shard is missing') from None
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(f'{path}: expected a regular file')
  return open(descriptor, 'rb')
