"""In-agent preprocessing of raw Atari timesteps.

The run loop and the environment deal in raw emulator frames, so that statistics, videos and episode
limits see the real game. An agent passes each raw timestep through an `AtariProcessor`, which
answers every fourth one with the stack of frames that the network sees, and otherwise None, meaning
"repeat your last action".
"""

import cv2
import dm_env
import numpy as np

from offline_zoo.atari_data import FRAME_SHAPE, NUM_ACTION_REPEATS, STACK_SIZE

# Frames are tiny: handing them to OpenCV's thread pool costs more than resizing them.
cv2.setNumThreads(0)


def resize(frame: np.ndarray) -> np.ndarray:
  """Area-averages a grayscale frame to [84, 84] uint8, as the logged frames were made."""
  return cv2.resize(frame, FRAME_SHAPE[::-1], interpolation=cv2.INTER_AREA)


class AtariProcessor:
  """Action repeat, max-pooling, resizing and stacking of raw Atari timesteps.

  Bit for bit what Dopamine's `AtariPreprocessing` and its stack of four give, which made the
  frames of the DQN Replay Dataset: the pixelwise maximum of the last two raw grayscale frames of an
  action repeat, resized by area to 84x84; the stack before an episode's first frame is all zeros.

  An episode that ends inside an action repeat answers at once. Its observation then shows what
  Dopamine's two screen buffers hold: the third raw frame of a repeat goes to the first buffer, the
  fourth to the second, and after the repeat the first holds their maximum. So an end on raw frame 1
  or 2 repeats the previous observation, an end on frame 3 is the maximum of that frame and the
  fourth frame of the previous repeat. Episodes cut by the run loop's frame limit end likewise.
  """

  def __init__(self):
    self.reset()

  def reset(self) -> None:
    """Forgets the episode. A first timestep does that by itself."""
    self._stack = np.zeros((STACK_SIZE, *FRAME_SHAPE), np.uint8)
    self._screens: list[np.ndarray] = []
    self._repeat = 0
    self._reward = 0.0
    self._discount = 1.0

  def __call__(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep | None:
    """Takes one raw timestep of frame [210, 160] uint8.

    Returns:
      None while the last action is to be repeated. Else a timestep with observation
      [84, 84, 4] uint8, newest frame last, the sum of the raw rewards since the
      previous one (None on an episode's first) and the product of their discounts.
    """
    frame = timestep.observation
    if timestep.first():
      self.reset()
      self._screens = [frame, np.zeros_like(frame)]
      return self._emit(timestep)._replace(reward=None, discount=None)

    self._reward += timestep.reward
    self._discount *= timestep.discount
    self._repeat += 1
    screen = self._repeat - (NUM_ACTION_REPEATS - 1)  # 0 and 1: the repeat's last two frames
    if screen >= 0:
      self._screens[screen] = frame
    if self._repeat == NUM_ACTION_REPEATS or timestep.last():
      return self._emit(timestep)
    return None

  def _emit(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep:
    self._screens[0] = np.maximum(*self._screens)
    newest = resize(self._screens[0])[None]
    # A new array each time: whoever keeps an observation keeps that moment.
    self._stack = np.concatenate([self._stack[1:], newest])
    processed = timestep._replace(
      observation=np.moveaxis(self._stack, 0, -1), reward=self._reward, discount=self._discount
    )
    self._repeat, self._reward, self._discount = 0, 0.0, 1.0
    return processed
