"""Plays games by agent steps, as the public data was logged, in several processes.

What `parts.run_loop`, `atari_env` and `processors` do a raw frame at a time, for whoever needs only
what is logged: pixels are read where they count.

Actions stick as they do in the emulator (see `atari_env.AtariEnv`): at each frame, with a
probability, the action of the frame before is repeated. But each episode draws from a generator of
its own, so that it is the same whatever was played before.
"""

import atexit
import collections
import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import numpy as np

from offline_zoo import atari_data, atari_env, parts, processors

NUM_PROCESSES = min(len(os.sched_getaffinity(0)), 8)  # that play, if no flag says otherwise
MAX_STEPS_PER_EPISODE = parts.MAX_FRAMES_PER_EPISODE // atari_data.NUM_ACTION_REPEATS

Item = TypeVar('Item')
Result = TypeVar('Result')


class Game:
  """A game played by agent steps of four frames: Dopamine's preprocessing, bit for bit.

  Attributes:
    emulator: ale-py's.
    num_actions: the size of the minimal action set.
    screens: [2, 210, 160] uint8 in most games, a step's last two raw frames.
    frame: [84, 84] uint8, what the last step led to; means nothing after an episode's end.
  """

  def __init__(
    self,
    environment_name: str,
    sticky_action_probability: float = 0.25,
    rom_dir: str | None = None,
  ):
    """Starts the emulator; the arguments and errors are those of `atari_env.AtariEnv`."""
    if not 0 <= sticky_action_probability <= 1:
      raise ValueError(
        f'sticky_action_probability must lie in [0, 1], got {sticky_action_probability}'
      )
    self._environment = atari_env.AtariEnv(
      environment_name, sticky_action_probability=0.0, rom_dir=rom_dir, seed=0
    )
    self._sticky_action_probability = sticky_action_probability
    self.emulator = self._environment.emulator
    self._actions = self.emulator.getMinimalActionSet()
    self.num_actions = len(self._actions)
    self.screens = np.zeros((2, *self.emulator.getScreenDims()), np.uint8)
    # To load the ROM again, as a new seed asks of the emulator, takes as long as 150 agent steps.
    self._first_frame = processors.resize(self._environment.reset().observation)
    self._first_state = self.emulator.cloneSystemState()

  def start(self, seed: int) -> None:
    """Begins an episode that is a function of this seed, less than 2^32, and of the actions."""
    # Without the reset, something of what was played before is left in Q*bert.
    self.emulator.reset_game()
    self.emulator.restoreSystemState(self._first_state)
    self._rng = np.random.RandomState(seed)  # whose numbers NumPy does not change any more
    self._last_action = self._actions[0]  # to do nothing
    self.frame = self._first_frame
    self._stack = [np.zeros_like(self.frame)] * (atari_data.STACK_SIZE - 1) + [self.frame]
    self._num_steps = 0

  def step(self, action: int) -> tuple[float, bool]:
    """Plays an agent step; returns the raw reward and whether the episode ended."""
    reward = 0.0
    sticks = (
      self._rng.random_sample(atari_data.NUM_ACTION_REPEATS) < self._sticky_action_probability
    )
    for repeat, stick in enumerate(sticks.tolist(), -atari_data.NUM_ACTION_REPEATS):
      if not stick:
        self._last_action = self._actions[action]
      reward += self.emulator.act(self._last_action)
      if self.emulator.game_over(with_truncation=False):
        return reward, True
      if repeat >= -2:
        self.emulator.getScreenGrayscale(self.screens[repeat])
    self.frame = processors.resize(np.maximum(*self.screens))
    self._stack = [*self._stack[1:], self.frame]
    self._num_steps += 1
    return reward, self._num_steps == MAX_STEPS_PER_EPISODE

  def observation(self) -> np.ndarray:
    """Stacks the last frames as a network sees them: [84, 84, 4] uint8, newest last."""
    return np.stack(self._stack, axis=-1)

  def ram(self) -> np.ndarray:
    """Reads the console's memory, [128] uint8."""
    return self._environment.ram()


@functools.lru_cache
def game(
  environment_name: str,
  sticky_action_probability: float,
  rom_dir: str | None = None,
) -> Game:
  """Makes a `Game`, once: starting an emulator takes as long as playing a quarter of an episode."""
  return Game(environment_name, sticky_action_probability, rom_dir)


atexit.register(game.cache_clear)  # ale-py complains of emulators left over


def _start_worker() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

  def end_with_parent() -> None:  # also when it is killed
    if parent := multiprocessing.parent_process():
      parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()


def in_processes(
  function: Callable[[Item], Result], items: Iterable[Item], num_processes: int
) -> Generator[Result, None, None]:
  """Applies a function to items in several processes; yields results in order.

  Some are made ahead of the caller. The number of processes has no influence on results.

  Args:
    function: can be pickled.
    items: may be endless.
    num_processes: at least 1.

  Raises:
    OSError: a process was killed.
  """
  executor = concurrent.futures.ProcessPoolExecutor(
    num_processes, multiprocessing.get_context('spawn'), _start_worker
  )
  try:
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    for item in items:
      pending.append(executor.submit(function, item))
      if len(pending) == 2 * num_processes:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise OSError(f'a process that played was killed; is memory short? {error}') from error
  finally:
    executor.shutdown(cancel_futures=True)
