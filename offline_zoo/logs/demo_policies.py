"""Scripted behaviour policies for the demo logs.

Freeway's always walks up. Pong's and Breakout's read the ball and the paddle from RAM. Both predict
where the ball will cross the paddle's line, bounces included, and press a direction until the
paddle, led by its own speed, comes to rest near there. In both games the paddle follows a simulated
potentiometer with a lag, and a direction held for one agent step moves that by about 23 pixels, so
that a policy that merely chases the ball overshoots.
"""

from collections.abc import Callable

import numpy as np


def _signed(byte: np.uint8) -> int:
  return int(byte.astype(np.int8))


class PongPolicy:
  """Returns the ball off the paddle's edge, with FIRE held, which makes the ball fast.

  A pure function of the game but for the paddle's speed, which takes two readings.
  """

  # RAM addresses. The ball's y is 0 while there is none in play. Rows grow downwards.
  BALL_X, BALL_Y = 49, 54
  BALL_LEFTWARD, BALL_DOWNWARD = 58, 56  # signed, pixels a frame
  PADDLE_Y = 51  # upper edge of the right paddle
  # Geometry, in pixels.
  PADDLE_X = 188  # where the ball turns
  TOP, BOTTOM = 46, 206  # walls
  PADDLE_RANGE = (38, 204)

  # Found by cross-entropy search, see benchmarks/search_pong_policy.py: where on the paddle to take
  # a ball that comes in above and below SPLIT; the lead, in agent steps at the paddle's speed; the
  # distance that is near enough; and where to wait.
  CONSTANTS = (8.4, 8.0, 100.0, 0.68, 12.2, 133.5)

  def __init__(self, constants: tuple[float, ...] = CONSTANTS):
    self._upper_aim, self._lower_aim, self._split, self._lead, self._near, self._home = constants
    self._last_paddle: int | None = None

  def __call__(self, ram: np.ndarray) -> int:
    """The action, an index into the minimal action set, for this RAM [128] uint8."""
    paddle = int(ram[self.PADDLE_Y])
    speed = 0 if self._last_paddle is None else paddle - self._last_paddle
    self._last_paddle = paddle

    x, rightward = int(ram[self.BALL_X]), -_signed(ram[self.BALL_LEFTWARD])
    if ram[self.BALL_Y] and rightward > 0 and x < self.PADDLE_X:
      num_frames = -(-(self.PADDLE_X - x) // rightward)
      y = self._row_after(num_frames, int(ram[self.BALL_Y]), _signed(ram[self.BALL_DOWNWARD]))
      target = y - (self._upper_aim if y < self._split else self._lower_aim)
    else:
      target = self._home
    low, high = self.PADDLE_RANGE
    distance = min(max(target, low), high) - (paddle + self._lead * speed)
    if abs(distance) < self._near:
      return 1  # FIRE
    return 5 if distance > 0 else 4  # LEFTFIRE is down, RIGHTFIRE is up

  def _row_after(self, num_frames: int, y: int, downward: int) -> int:
    """The ball's row some frames later; it turns at the walls as the game turns it."""
    for _ in range(num_frames):
      if (y < self.TOP and downward < 0) or (y >= self.BOTTOM and downward > 0):
        downward = -downward
        y += 1 if downward > 0 else -1
      y += downward
    return y


class BreakoutPolicy:
  """Waits under the ball, goes to where it will come down, and serves when there is none."""

  # RAM addresses. The ball's y is 0 while there is none in play. Rows grow downwards.
  BALL_X, BALL_Y = 99, 101
  POTENTIOMETER = 70  # grows as the paddle goes left
  # Geometry, in pixels.
  PADDLE_Y = 177  # where the ball turns
  LEFT_WALL, RIGHT_WALL = 57, 199
  POTENTIOMETER_ORIGIN = 235  # minus the potentiometer: where the paddle's left edge comes to rest
  AIM = 8  # where on the paddle to take the ball: its middle
  NEAR = 10  # distance that is near enough

  def __init__(self):
    self._last_ball: tuple[int, int] | None = None

  def __call__(self, ram: np.ndarray) -> int:
    """The action, an index into the minimal action set, for this RAM [128] uint8."""
    x, y = int(ram[self.BALL_X]), int(ram[self.BALL_Y])
    last_ball, self._last_ball = self._last_ball, (x, y) if y else None
    if not y:
      return 1  # FIRE
    target: float = x
    if last_ball:
      rightward, downward = x - last_ball[0], y - last_ball[1]
      if downward > 0 and y < self.PADDLE_Y:
        target = self._reflect(x + rightward * (self.PADDLE_Y - y) / downward)
    rest = self.POTENTIOMETER_ORIGIN - int(ram[self.POTENTIOMETER])
    distance = target - self.AIM - rest
    if abs(distance) < self.NEAR:
      return 0  # NOOP
    return 2 if distance > 0 else 3  # RIGHT, LEFT

  def _reflect(self, x: float) -> float:
    """Folds a straight path back between the side walls."""
    width = self.RIGHT_WALL - self.LEFT_WALL
    x = (x - self.LEFT_WALL) % (2 * width)
    return self.LEFT_WALL + min(x, 2 * width - x)


class FreewayPolicy:
  """Walks up, whatever comes."""

  def __call__(self, ram: np.ndarray) -> int:
    """The action, an index into the minimal action set, for this RAM [128] uint8."""
    del ram
    return 1  # UP


# Game: its policy, and the largest rate of random actions. An episode's is uniform between 0 and
# that, so that returns spread: measured means without random actions are 21, 16 and 260. Pong's
# policy plays on a knife's edge: 5% of random actions cost it 20 points, and so does imitation
# that errs as often. Freeway forgives: the logs hold everything from random play to the policy's.
POLICIES: dict[str, tuple[Callable[[], Callable[[np.ndarray], int]], float]] = {
  'freeway': (FreewayPolicy, 1.0),
  'pong': (PongPolicy, 0.03),
  'breakout': (BreakoutPolicy, 0.2),
}
