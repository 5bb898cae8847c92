"""The Arcade Learning Environment as a `dm_env.Environment` of raw frames.

One `step` is one emulator frame. Everything that makes raw frames into what a network sees (action
repeat, pooling, resizing, stacking) is the agent's business: see `processors.py`.
"""

import hashlib
import os
import pathlib

import ale_py
import ale_py.env
import dm_env
import numpy as np
from dm_env import specs

from offline_zoo import atari_data

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for each emulator

# The emulator would cut an episode at 108,000 frames by itself. `parts.run_loop` does that, so that
# the limit is one visible argument; the emulator's own is put out of the way.
_NO_FRAME_LIMIT = 2**31 - 1


def rom_path(environment_name: str, rom_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Finds a game's ROM and checks that it is one that the emulator can run.

  Args:
    environment_name: a game's name as in `atari_data`, such as 'ms_pacman'.
    rom_dir: a directory with `<environment_name>.bin`, such as `python -m offline_zoo.roms fetch`
      makes; None: the ROMs that come with the emulator.

  Raises:
    ValueError: unknown game, or the file is not one of the game's two ROMs in `atari_data`, or is
      one that today's emulator cannot run.
    FileNotFoundError: the directory has no such file.
  """
  game = atari_data.game(environment_name)
  if rom_dir is None:
    return pathlib.Path(ale_py.roms.__file__).with_name(f'{game.name}.bin')
  path = pathlib.Path(rom_dir) / f'{game.name}.bin'
  if not path.is_file():
    raise FileNotFoundError(
      f'--rom_dir={rom_dir}: no {path.name} there; python -m offline_zoo.roms fetch makes such a '
      'directory'
    )
  # The emulator would take anything, and may then end the process or not come back.
  md5 = _md5(path)
  known = [x for x in (game.rom_md5, game.logged_rom_md5) if x]
  if md5 not in known:
    raise ValueError(
      f'--rom_dir={rom_dir}: expected a known ROM of {game.name}, with the MD5 '
      f'{" or ".join(known)}, got {md5}'
    )
  if (game.name, md5) == ('defender', game.logged_rom_md5):
    raise ValueError(
      f"--rom_dir={rom_dir}: defender's ROM of atari-py 0.2.5 hangs in today's emulator; leave "
      '--rom_dir out'
    )
  return path


def rom_md5(environment_name: str, rom_dir: str | os.PathLike | None = None) -> str:
  """Gives the MD5, in hexadecimal digits, of the ROM that a game is played with.

  Raises:
    ValueError, FileNotFoundError: see `rom_path`.
  """
  return _md5(rom_path(environment_name, rom_dir))


def rom_note(environment_name: str, rom_dir: str | os.PathLike | None = None) -> str | None:
  """Says that a game's ROM is not the one that public data was logged with; None if it is.

  Raises:
    ValueError, FileNotFoundError: see `rom_path`.
  """
  game = atari_data.game(environment_name)
  if game.logged_rom_md5 in (None, rom_md5(environment_name, rom_dir)):
    return None
  return (
    f'The DQN Replay Dataset and RL Unplugged were logged with another ROM of {game.name} than is '
    'evaluated with here: python -m offline_zoo.roms fetch gets theirs, for --rom_dir'
  )


def _md5(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'md5').hexdigest()


class _Emulator(ale_py.env.AtariEnv):
  """Gymnasium's emulator with a ROM of our choice; its own choice must have ale-py's MD5."""

  def __init__(self, path: pathlib.Path, **settings):
    self._path = path
    super().__init__(**settings)

  def load_game(self) -> None:  # at the start and at each reset with a seed
    self.ale.loadROM(self._path)


class AtariEnv(dm_env.Environment):
  """An Atari 2600 game: raw grayscale frames, sticky actions, the minimal action set.

  Observations are the emulator's own grayscale screen, [210, 160] uint8 (a few games have more
  rows). Rewards are the game's score differences, not clipped. An episode ends, with discount 0,
  with the game and not with a life.

  Sticky actions (Machado et al. 2018, "Revisiting the ALE"): at every emulator frame, with
  probability `sticky_action_probability`, the emulator repeats the action of the frame before.
  """

  def __init__(
    self,
    environment_name: str,
    *,
    sticky_action_probability: float = 0.25,
    rom_dir: str | os.PathLike | None = None,
    seed: int,
  ):
    """Starts the emulator.

    Args:
      environment_name: a game's name as in `atari_data`, such as 'ms_pacman'.
      sticky_action_probability: in [0, 1].
      rom_dir: see `rom_path`.
      seed: non-negative; the emulator's random numbers are a function of it and of the actions.

    Raises:
      ValueError: unknown game, a ROM that `rom_path` refuses, or a probability outside [0, 1].
      FileNotFoundError: `rom_dir` has no such ROM.
    """
    if not 0 <= sticky_action_probability <= 1:
      raise ValueError(
        f'sticky_action_probability must lie in [0, 1], got {sticky_action_probability}'
      )
    self._env = _Emulator(
      rom_path(environment_name, rom_dir),
      game=environment_name,
      obs_type='grayscale',
      frameskip=1,
      repeat_action_probability=sticky_action_probability,
      full_action_space=False,
      max_num_frames_per_episode=_NO_FRAME_LIMIT,
    )
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

  @property
  def emulator(self) -> ale_py.ALEInterface:
    """Gives the emulator itself, to whoever plays without looking at every frame."""
    return self._env.ale

  def ram(self) -> np.ndarray:
    """Reads the console's memory, [128] uint8, as scripted behaviour policies do."""
    return self._env.ale.getRAM()

  def render(self) -> np.ndarray:
    """Shows the screen in colour, [210, 160, 3] uint8, for pictures and videos."""
    return self._env.ale.getScreenRGB()

  def close(self) -> None:
    self._env.close()
