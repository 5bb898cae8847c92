"""Small hand-written behaviour policies that read the emulator's RAM.

They play Pong and Breakout well enough to log demonstration data from. The caller supplies the
exploration (a random action with probability eps, eps drawn per episode, see `*_EPS`), so the
policies are deterministic and re-plan at every step from what RAM says, whoever acted last.

Both games read a paddle potentiometer that the emulator turns by a fixed amount per frame while a
direction is held; the paddle on screen then follows the potentiometer with a lag (it covers half
of the distance at each update). Holding a direction for one agent step (4 frames) moves it by more
than a Pong paddle's length, so chasing the ball overshoots. Both policies therefore predict where
the ball will cross the paddle's line and search over the next few moves with that model.
"""

import functools
import itertools

import numpy as np

FRAME_SKIP = 4  # raw frames per agent step
STICKY = 0.25  # probability that the emulator repeats the previous action in a raw frame
POT_SPEED = 5.8  # potentiometer units (pixels) per raw frame while a direction is held
LOOKAHEAD = 3  # agent steps searched exhaustively before the ball arrives

# Episode-level exploration: eps is drawn uniformly from [0, hi] at the start of each episode.
PONG_EPS_HIGH = 0.2
BREAKOUT_EPS_HIGH = 0.2

NOOP, FIRE, RIGHT, LEFT = 0, 1, 2, 3  # indices shared by both games' minimal action sets


def _signed(byte: int) -> int:
  """Reads a RAM byte as a two's complement number."""
  return int(byte) - 256 if byte > 127 else int(byte)


@functools.cache
def _move_sequences(steps: int, last_move: int) -> tuple[np.ndarray, np.ndarray]:
  """All sequences of moves in (0, -1, 1), one column per raw frame, and their changes of move."""
  moves = np.array(list(itertools.product((0, -1, 1), repeat=steps)), np.float64)
  changes = np.count_nonzero(np.diff(moves, axis=1, prepend=last_move), axis=1)
  return np.repeat(moves, FRAME_SKIP, axis=1), changes


def _plan(
    paddle: float,
    pot: float,
    last_move: int,
    target: float,
    frames: int,
    update_every: int,
    settle: float,
    change_cost: float,
    limits: tuple[float, float],
) -> int:
  """Chooses the move (-1, 0 or 1) that best brings the paddle to `target` in `frames` frames.

  Args:
    paddle: Where the paddle is drawn now.
    pot: Where it would come to rest if nothing were pressed.
    last_move: The previous move, which sticky actions may prolong.
    target: Where the paddle should be.
    frames: Raw frames until it should be there.
    update_every: Raw frames between two updates of the paddle's position.
    settle: Distance that is close enough while there is still time to correct it.
    change_cost: Distance that a change of move has to gain. Sticky actions delay each change by a
      random number of frames, so a paddle at rest in the right place is worth more.
    limits: Range of the potentiometer.

  Returns:
    The direction in which to turn the potentiometer.
  """
  if frames > LOOKAHEAD * FRAME_SKIP:
    return 0 if abs(target - pot) < settle else int(np.sign(target - pot))
  moves, changes = _move_sequences(-(-frames // FRAME_SKIP), last_move)
  # Sticky actions make the executed move a lagged copy of the chosen one; plan with its mean.
  velocity, pots, paddles = float(last_move), pot, paddle
  for frame in range(frames):
    velocity = (1 - STICKY) * moves[:, frame] + STICKY * velocity
    pots = np.clip(pots + POT_SPEED * velocity, *limits)
    if frame % update_every == 0:
      paddles = (paddles + pots) / 2
  # NOOP sequences come first, so they win ties.
  return int(moves[np.argmin(np.abs(paddles - target) + change_cost * changes), 0])


class PongPolicy:
  """Returns the ball with the part of the paddle that the opponent finds hardest to answer.

  The offset of the ball on the paddle sets its vertical speed: from -2 (upper edge) through 0
  (centre) to 2 (lower edge), in pixels per frame. The opponent follows the ball slightly slower
  than 2 pixels per frame, so an edge shot beats it when the ball bounces at the right distance.
  Measured over random edge shots, that is a downward shot from the upper half of the court and an
  upward shot from just below it; from further down neither wins, so the centre returns it safely.

  FIRE is never pressed: it makes the ball faster, which costs more than it brings.
  """

  # RAM addresses.
  BALL_X = 49
  BALL_Y = 54  # 0 while no ball is in play
  BALL_VX = 58  # signed; positive when the ball moves left
  BALL_VY = 56  # signed; positive when it moves down
  PADDLE_Y = 51  # own (right) paddle, upper edge

  PADDLE_X = 188  # the ball turns when it reaches this column
  TOP, BOTTOM = 46, 206  # rows at which the ball turns
  LIMITS = (38.0, 204.0)  # range of the potentiometer

  # Found by search.py, in this order: ball offsets on the paddle for a downward, an upward and a
  # safe return; rows that separate the three; tolerance while waiting; cost of a change of move; resting position.
  CONSTANTS = (13.5, -0.5, 6.5, 128.0, 162.0, 4.0, 2.0, 125.0)

  def __init__(self, constants: tuple[float, ...] = CONSTANTS):
    """Creates the policy.

    Args:
      constants: Replacement for `CONSTANTS`, used by the search.
    """
    (self._down_aim, self._up_aim, self._safe_aim, self._down_row, self._up_row, self._settle,
     self._change_cost, self._home) = constants
    self.reset()

  def reset(self) -> None:
    """Starts a new episode."""
    self._paddle: float | None = None
    self._last_move = 0

  def __call__(self, ram: np.ndarray) -> int:
    """Returns the index into the minimal action set for this step.

    Args:
      ram: The emulator's 128 bytes of memory.
    """
    paddle = float(ram[self.PADDLE_Y])
    # The potentiometer itself is not visible at this point of the game's two-frame cycle, but half
    # of the paddle's last displacement predicts what is left to cover to within 2 pixels.
    previous = paddle if self._paddle is None else self._paddle
    pot = float(np.clip(paddle + 0.5 * (paddle - previous), *self.LIMITS))
    self._paddle = paddle

    x, vx = int(ram[self.BALL_X]), -_signed(ram[self.BALL_VX])
    if ram[self.BALL_Y] == 0 or vx <= 0 or x >= self.PADDLE_X:
      frames, target = 100, self._home  # nothing to return yet: wait in the middle
    else:
      frames = -(-(self.PADDLE_X - x) // vx)
      row = self._crossing_row(int(ram[self.BALL_Y]), _signed(ram[self.BALL_VY]), frames)
      if row < self._down_row:
        aim = self._down_aim
      elif row < self._up_row:
        aim = self._up_aim
      else:
        aim = self._safe_aim
      target = float(np.clip(row - aim, *self.LIMITS))
    move = _plan(paddle, pot, self._last_move, target, frames, 2, self._settle, self._change_cost,
                 self.LIMITS)
    self._last_move = move
    return {0: NOOP, -1: RIGHT, 1: LEFT}[move]  # in Pong, RIGHT is up and LEFT is down

  def _crossing_row(self, y: int, vy: int, frames: int) -> int:
    """Follows the ball for `frames` frames, bouncing off the walls as the game does."""
    for _ in range(frames):
      if (vy < 0 and y < self.TOP) or (vy > 0 and y >= self.BOTTOM):
        vy = -vy
        y += int(np.sign(vy))
      y += vy
    return y


class BreakoutPolicy:
  """Catches the ball where it will come down, and serves whenever no ball is in play."""

  # RAM addresses.
  BALL_X = 99
  BALL_Y = 101  # 0 while no ball is in play; grows downwards
  PADDLE_X = 72  # left edge of the paddle
  POT = 70  # paddle potentiometer; grows to the left

  PADDLE_Y = 177  # the ball turns in this row
  LEFT_WALL, RIGHT_WALL = 57, 199  # columns at which the ball turns
  LIMITS = (55.0, 191.0)  # range of the paddle's position
  POT_ORIGIN = 235  # position of the paddle = POT_ORIGIN - POT

  AIM = 8.0  # ball offset on the paddle: the middle, which is the safest
  SETTLE = 6.0  # tolerance while waiting

  def __init__(self, aim: float = AIM, settle: float = SETTLE):
    self._aim = aim
    self._settle = settle
    self.reset()

  def reset(self) -> None:
    """Starts a new episode."""
    self._ball: tuple[int, int] | None = None
    self._last_move = 0

  def __call__(self, ram: np.ndarray) -> int:
    """Returns the index into the minimal action set for this step.

    Args:
      ram: The emulator's 128 bytes of memory.
    """
    x, y = int(ram[self.BALL_X]), int(ram[self.BALL_Y])
    previous, self._ball = self._ball, (x, y) if y else None
    if y == 0:
      self._last_move = 0
      return FIRE
    dx, dy = (x - previous[0], y - previous[1]) if previous else (0, 0)
    if dy > 0 and y < self.PADDLE_Y:
      frames = max(1, round((self.PADDLE_Y - y) * FRAME_SKIP / dy))
      x = self._reflect(x + dx * frames / FRAME_SKIP)
    else:
      frames = 100  # on its way up: stay below it
    target = float(np.clip(x - self._aim, *self.LIMITS))
    pot = float(np.clip(self.POT_ORIGIN - int(ram[self.POT]), *self.LIMITS))
    move = _plan(float(ram[self.PADDLE_X]), pot, self._last_move, target, frames, 1,
                 self._settle, 0.0, self.LIMITS)
    self._last_move = move
    return {0: NOOP, -1: LEFT, 1: RIGHT}[move]

  def _reflect(self, x: float) -> float:
    """Folds a straight path back between the side walls."""
    width = self.RIGHT_WALL - self.LEFT_WALL
    x = (x - self.LEFT_WALL) % (2 * width)
    return self.LEFT_WALL + min(x, 2 * width - x)


# Game: its policy, and the highest rate of random actions; an episode's is uniform below it.
POLICIES = {'pong': (PongPolicy, PONG_EPS_HIGH), 'breakout': (BreakoutPolicy, BREAKOUT_EPS_HIGH)}
