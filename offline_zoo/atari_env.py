"""The Arcade Learning Environment as a `dm_env.Environment` of raw frames.

One `step` is one emulator frame. Everything that makes raw frames into what a network sees (action
repeat, pooling, resizing, stacking) is the agent's business: see `processors.py`.
"""

from typing import Any

import ale_py
import dm_env
import gymnasium as gym
import numpy as np
from dm_env import specs

from offline_zoo import atari_data

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for each emulator

# The emulator would cut an episode at 108,000 frames by itself. `parts.run_loop` does that, so that
# the limit is one visible argument; the emulator's own is put out of the way.
_NO_FRAME_LIMIT = 2**31 - 1


class AtariEnv(dm_env.Environment):
  """An Atari 2600 game: raw grayscale frames, sticky actions, the minimal action set.

  Observations are the emulator's own grayscale screen, [210, 160] uint8 (a few games have more
  rows). Rewards are the game's score differences, not clipped. An episode ends, with discount 0,
  with the game and not with a life.

  Sticky actions (Machado et al. 2018, "Revisiting the ALE"): at every emulator frame, with
  probability `sticky_action_probability`, the emulator repeats the action of the frame before.
  """

  def __init__(self, environment_name: str, *, sticky_action_probability: float = 0.25, seed: int):
    """Starts the emulator.

    Args:
      environment_name: a game's name as in `atari_data`, such as 'ms_pacman'.
      sticky_action_probability: in [0, 1].
      seed: non-negative; the emulator's random numbers are a function of it and of the actions.

    Raises:
      ValueError: unknown game, or a probability outside [0, 1].
    """
    if not 0 <= sticky_action_probability <= 1:
      raise ValueError(
        f'sticky_action_probability must lie in [0, 1], got {sticky_action_probability}'
      )
    self._env: Any = gym.make(
      atari_data.game(environment_name).gym_id,
      obs_type='grayscale',
      frameskip=1,
      repeat_action_probability=sticky_action_probability,
      full_action_space=False,
      max_num_frames_per_episode=_NO_FRAME_LIMIT,
      disable_env_checker=True,
    ).unwrapped  # the wrappers only check call order, which `dm_env` has its own rules for
    self.seed(seed)
    self._reset_next_step = True

  def seed(self, seed: int) -> None:
    """Makes all play from the next reset on a function of this seed and the actions."""
    self._seed: int | None = seed

  def reset(self) -> dm_env.TimeStep:
    # Only one reset seeds: a seed at each one would play the same episode over and over.
    frame, _ = self._env.reset(seed=self._seed)
    self._seed = None
    self._reset_next_step = False
    return dm_env.restart(frame)

  def step(self, action: int) -> dm_env.TimeStep:
    """Plays one emulator frame; `action` indexes the minimal action set."""
    if self._reset_next_step:
      return self.reset()
    frame, reward, terminated, truncated, _ = self._env.step(action)
    self._reset_next_step = terminated or truncated
    if terminated:
      return dm_env.termination(reward, frame)
    if truncated:
      return dm_env.truncation(reward, frame)
    return dm_env.transition(reward, frame)

  def observation_spec(self) -> specs.BoundedArray:
    return specs.BoundedArray(self._env.observation_space.shape, np.uint8, 0, 255, 'grayscale')

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(len(self.action_meanings), name='action')

  @property
  def action_meanings(self) -> list[str]:
    """Names the minimal action set, in the order that logged actions index it."""
    return self._env.get_action_meanings()

  @property
  def lives(self) -> int:
    """Counts the lives left, 0 in games that have none."""
    return self._env.ale.lives()

  def ram(self) -> np.ndarray:
    """Reads the console's memory, [128] uint8, as scripted behaviour policies do."""
    return self._env.ale.getRAM()

  def render(self) -> np.ndarray:
    """Shows the screen in colour, [210, 160, 3] uint8, for pictures and videos."""
    return self._env.ale.getScreenRGB()

  def close(self) -> None:
    self._env.close()
