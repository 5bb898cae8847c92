"""Plays whole episodes, several of them together, and says what is counted of each."""

import collections
import contextlib
import copy
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import cv2
import dm_env
import jax
import numpy as np

from offline_zoo import atari_data, parts, seeds

_VIDEO_RATE = 60  # frames a second, the game's own


class Environment(Protocol):
  """A `dm_env.Environment` whose play can be made a function of a seed."""

  def seed(self, seed: int) -> None: ...
  def reset(self) -> dm_env.TimeStep: ...
  def step(self, action: int) -> dm_env.TimeStep: ...
  def render(self) -> np.ndarray: ...


@dataclasses.dataclass
class Episode:
  """What is counted of an episode, or of as much of it as has been played.

  Attributes:
    num_frames: raw ones after the first.
    episode_return: as the game scores.
    clipped_return: with each agent step's reward clipped to [-1, 1], as in training by default.
    statistics: sums, over the frames that it acted in, of what the agent says of its decisions.
    actions: in how many of these frames it did what.
  """

  num_frames: int = 0
  episode_return: float = 0.0
  clipped_return: float = 0.0
  statistics: dict[str, float] = dataclasses.field(default_factory=dict)
  actions: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
  _step_reward: float = 0.0

  @property
  def num_steps(self) -> int:
    """Counts agent steps, a cut-short last one included."""
    return -(-self.num_frames // atari_data.NUM_ACTION_REPEATS)

  def add(self, timestep: dm_env.TimeStep, agent: parts.Agent, action: int | None) -> None:
    """Counts a raw timestep in that the agent has seen, and its answer; None: it was the last."""
    if action is not None:
      self.actions[int(action)] += 1
      for name, value in agent.statistics.items():
        self.statistics[name] = self.statistics.get(name, 0.0) + value
    if timestep.first():
      return
    self.num_frames += 1
    self.episode_return += float(timestep.reward)
    self._step_reward += float(timestep.reward)
    if self.num_frames % atari_data.NUM_ACTION_REPEATS == 0 or timestep.last():
      self.clipped_return += min(max(self._step_reward, -1.0), 1.0)
      self._step_reward = 0.0


class Mp4:
  """Writes a video of frames at twice their size.

  Within a `with` block, at the end of which one that was not finished leaves nothing.
  """

  _SCALE = 2  # a coded pixel of colour then is a pixel of the game

  def __init__(self, path: pathlib.Path, frames_per_second: int):
    """Writes nothing yet.

    Args:
      path: of the MP4 file; its directory is made if need be.
      frames_per_second: at which it is shown.
    """
    self._path = path
    self._frames_per_second = frames_per_second
    self._partial = path.with_name(f'.{path.stem}.partial.mp4')
    self._writer: cv2.VideoWriter | None = None
    self._num_frames = 0

  def __enter__(self) -> 'Mp4':
    return self

  def __exit__(self, *unused) -> None:
    if self._writer is not None:
      self._writer.release()
    self._partial.unlink(missing_ok=True)

  def add(self, frame: np.ndarray) -> None:
    """Adds a frame [H, W, 3] uint8, red first."""
    frame = frame[..., ::-1].repeat(self._SCALE, axis=0).repeat(self._SCALE, axis=1)
    if self._writer is None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._writer = cv2.VideoWriter(
        str(self._partial), cv2.VideoWriter.fourcc(*'mp4v'), self._frames_per_second,
        (frame.shape[1], frame.shape[0]),
      )  # fmt: skip
    self._writer.write(frame)
    self._num_frames += 1

  def finish(self) -> None:
    """Gives the file its name.

    Raises:
      OSError: it could not be written.
    """
    assert self._writer is not None
    self._writer.release()
    # OpenCV tells of no error while it writes.
    written = cv2.VideoCapture(str(self._partial)).get(cv2.CAP_PROP_FRAME_COUNT)
    if written != self._num_frames:
      raise OSError(f'{self._path}: the video could not be written; is the disk full?')
    os.replace(self._partial, self._path)


def episode_seed(seed: int, iteration: int, number: int) -> tuple[int, jax.Array]:
  """Draws the emulator's seed and the agent's key for an episode of an evaluation."""
  sequence = np.random.SeedSequence((seed, iteration, number))
  environment_seed, key_seed = sequence.generate_state(2)
  return int(environment_seed), jax.random.PRNGKey(key_seed)


def play_episodes(
  agents: Sequence[parts.Agent],
  environments: Sequence[Environment],
  seeds: tuple[int, int, int],
  *,
  num_steps: float = math.inf,
  video_path: pathlib.Path | None = None,
  decide: Callable[[], None] = lambda: None,
  check: Callable[[], None] = lambda: None,
) -> dict[int, Episode]:
  """Plays whole episodes of consecutive numbers, a frame of each in turn.

  Args:
    agents: each acts in an episode.
    environments: one for each agent; reset first.
    seeds: the run's seed, the iteration and the first episode's number, see `episode_seed`.
    num_steps: an episode is given up once those before it have so many agent steps together.
    video_path: where to record the first episode, as MP4; None: nowhere.
    decide: is called when each agent has seen its frame; see `Players`.
    check: likewise, after it; what it raises ends the episodes.

  Returns:
    The episodes that were not given up, by number; the first one is among them.

  Raises:
    OSError: the video cannot be written.
  """
  seed, iteration, first = seeds
  episodes: dict[int, Episode] = {}
  loops = {}
  for number, (agent, environment) in enumerate(zip(agents, environments, strict=True), first):
    environment_seed, act_key = episode_seed(seed, iteration, number)
    environment.seed(environment_seed)
    agent.reset(act_key)
    episodes[number], loops[number] = Episode(), parts.run_loop(agent, environment)
  with contextlib.ExitStack() as stack:
    video = stack.enter_context(Mp4(video_path, _VIDEO_RATE)) if video_path else None
    while loops:
      seen = [(number, *next(loop)) for number, loop in loops.items()]
      decide()
      for number, _, timestep, agent, action in seen:
        episodes[number].add(timestep, agent, action)
        if timestep.last():
          del loops[number]
      if video is not None and seen[0][0] == first:
        video.add(environments[0].render())
      num_before = 0
      for number, episode in [*episodes.items()]:
        if num_before >= num_steps:
          del episodes[number]
          loops.pop(number, None)
        num_before += episode.num_steps
      check()
    if video is not None:
      video.finish()
  return episodes


class _Player:
  """Acts as every agent does in `step`, but that `Players` decides.

  Attributes:
    is_asking: whether the last timestep asks for a decision.
    observation: of the last decision, or the one asked for.
    act_key: of the next decision.
    action: the last one [], an array that is written to.
    value: what `act` says of it.
  """

  value: float

  def __init__(self, processor: parts.Processor, statistic: str):
    self._processor, self._statistic = copy.deepcopy(processor), statistic
    self.action = np.zeros((), int)

  def reset(self, rng_key: jax.Array | None = None) -> None:
    self._processor.reset()
    if rng_key is not None:
      self.act_key = np.asarray(rng_key)

  def step(self, timestep: dm_env.TimeStep) -> Any:
    """Returns where the action will be by the time that the run loop goes on."""
    processed = self._processor(timestep)
    self.is_asking = processed is not None and not processed.last()
    if processed is not None:
      self.observation = processed.observation
    return self.action

  @property
  def statistics(self) -> Mapping[str, float]:
    return {self._statistic: self.value}


class Players:
  """Plays several episodes together, with one pass of the network for a decision in each of them.

  They act as the agent does in its `step`. On CPU a pass for four takes half as long as four do,
  whose time goes into reading parameters. Its values differ from theirs in the last digits, so
  that episodes are a function of the number of players too; but not of who the other players are.
  """

  def __init__(
    self,
    agent: parts.Learner | seeds.Seeds,
    make_environment: Callable[..., Environment],
    num_players: int,
  ):
    """Makes players, who cannot play before `set_params`.

    Args:
      agent: whose functions act.
      make_environment: gives an environment; has an argument `seed`.
      num_players: how many episodes are played together.
    """
    (statistic,) = agent.statistics
    self._players = [_Player(agent.processor, statistic) for _ in range(num_players)]
    self._environments = [make_environment(seed=0) for _ in range(num_players)]

    def act(transposed_params, rng_keys, s_t):
      online_params = _transpose(transposed_params)
      return jax.vmap(agent.act, in_axes=(None, 0, 0))(online_params, rng_keys, s_t)

    self._act = jax.jit(act)

  def set_params(self, online_params: Any) -> None:
    """Acts with these parameters, NumPy arrays, from now on."""
    # XLA on CPU multiplies few rows by a large matrix twice as fast if that lies transposed.
    transposed = jax.tree.map(lambda x: np.array(x, order='C'), _transpose(online_params))
    self._params = jax.device_put(transposed)

  def play(self, seeds: tuple[int, int, int], **settings: Any) -> dict[int, Episode]:
    """Plays as many episodes as there are players; see `play_episodes`."""
    return play_episodes(self._players, self._environments, seeds, decide=self._decide, **settings)

  def _decide(self) -> None:
    asking = [index for index, player in enumerate(self._players) if player.is_asking]
    if not asking:
      return
    # Always for all, since another number of rows would be another sum of products.
    keys = np.stack([player.act_key for player in self._players])
    observations = np.stack([player.observation for player in self._players])
    keys, actions, values = map(np.asarray, self._act(self._params, keys, observations))
    for index in asking:
      player = self._players[index]
      player.act_key, player.action[()] = keys[index], actions[index]
      player.value, player.is_asking = float(values[index]), False


def _transpose(params: Any) -> Any:
  return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, params)
