"""An agent that acts, records what it plays, and learns from a replay of it.

It is made of an agent's pure functions, which need not know that their data grows.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dm_env
import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from offline_zoo import parts, processors, program
from offline_zoo.logs import play, recorded, shard
from offline_zoo.online import growing_replay


class Schedule(NamedTuple):
  """When to act at random, and when to learn.

  Attributes:
    warmup_steps: agent steps, all of them random, before the first update's.
    epsilon_decay_steps: agent steps after these in which epsilon falls from 1, linearly.
    final_epsilon: what it falls to.
    steps_per_update: agent steps for each update.
    zeta_exponent: of how long a random action lasts, n steps with a probability proportional to
      n^-zeta_exponent (epsilon-z-greedy, Dabney et al. 2021); None: one step.
  """

  warmup_steps: int
  epsilon_decay_steps: int
  final_epsilon: float
  steps_per_update: int
  zeta_exponent: float | None = None

  def epsilon(self, num_steps: int) -> float:
    """Gives the rate at which random actions begin after so many agent steps."""
    done = min(max(num_steps - self.warmup_steps, 0) / self.epsilon_decay_steps, 1.0)
    return 1.0 + done * (self.final_epsilon - 1.0)

  def random_actions(
    self, rng: np.random.Generator, num_actions: int, epsilon: float
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws when an episode's random actions begin, when they last, and which they are.

    They are drawn for all steps that it may have, so that it is taken up anywhere.

    Args:
      rng: of the episode.
      num_actions: the size of the action set.
      epsilon: the rate at which random actions begin.

    Returns:
      [27,000] bool, of steps at which one begins; likewise, at which it lasts; [27,000] int64.
    """
    begins = rng.random(play.MAX_STEPS_PER_EPISODE) < epsilon
    lasts = np.zeros_like(begins)
    actions = rng.integers(num_actions, size=len(begins))
    if self.zeta_exponent is not None:
      durations = rng.zipf(self.zeta_exponent, len(begins)).tolist()
      for step in np.flatnonzero(begins).tolist():
        if not lasts[step]:
          end = step + durations[step]
          lasts[step + 1 : end], actions[step:end] = True, actions[step]
    return begins & ~lasts, lasts, actions


class OnlineState(NamedTuple):
  """All that a run goes on from, but for the episodes that have ended, which are recorded.

  Attributes:
    learner: the agent's state.
    num_episodes: [] int64, episodes that have ended.
    play_checksum: [] uint32, the CRC-32C of their actions and choices.
    num_steps: [] int64, agent steps, those of the episode under way included.
    episode_steps: [] int64, those of the episode under way.
    actions: [27,000] uint8, its actions, then zeros.
    choices: [27,000] uint8, its choices, see recorded.py.
    episode_checksum: [] uint32, the CRC-32C of its checksums, see recorded.py.
    returns: [2] float64, of the episodes that ended in this iteration: how many, sum of returns.
  """

  learner: Any
  num_episodes: np.ndarray
  play_checksum: np.ndarray
  num_steps: np.ndarray
  episode_steps: np.ndarray
  actions: np.ndarray
  choices: np.ndarray
  episode_checksum: np.ndarray
  returns: np.ndarray


class OnlineLearner:
  """A `parts.Trainable` whose `learn` acts before each update.

  Each episode is a function of the seed, of its number, and of what the agent has learnt; its
  epsilon is that of the schedule at its first step.
  """

  def __init__(
    self,
    *,
    agent: parts.Learner,
    greedy_act: Callable[..., Any],
    header: recorded.Header,
    schedule: Schedule,
    replay: growing_replay.GrowingReplay,
    rom_dir: str | None,
    seed: int,
  ):
    """Initialises the learner; it plays nothing before `start`.

    Args:
      agent: whose functions are used.
      greedy_act: its `act`, without random actions.
      header: of the recording.
      schedule: of acting and learning.
      replay: an empty one.
      rom_dir: see `atari_env.rom_path`.
      seed: of everything.
    """
    self._learn = parts.learn_loop(agent.update)
    self._act, self._greedy_act = jax.jit(agent.act), jax.jit(greedy_act)
    self._learner = agent.initial_state(jax.random.PRNGKey(seed))
    self._header, self._schedule, self._seed, self._rom_dir = header, schedule, seed, rom_dir
    self._replay = replay
    self._unused_key = jax.random.PRNGKey(0)  # what acts greedily draws nothing
    # Of the run; then of the episode under way.
    self.num_steps = self.num_episodes = self._play_checksum = 0
    self._returns = np.zeros(2)
    self._actions: list[int] = []
    self._choices: list[int] = []
    self._checksums = recorded.Checksums()
    self._processor = processors.AtariProcessor()
    self.reset(jax.random.fold_in(jax.random.PRNGKey(seed), 2))  # 0 and 1 are what `split` gives

  # Playing.

  def start(self, path: pathlib.Path, num_processes: int) -> None:
    """Plays again what was played before the state that was set, so that the replay holds it.

    Args:
      path: of the recording; it may hold more than that.
      num_processes: that play.

    Raises:
      OSError: the recording is missing, or a process was killed.
      ValueError: it is damaged, or of another run, or what was played does not come out again.
    """
    episodes = self._recorded_episodes(path) if self.num_steps else []
    self._recording = recorded.Recording(self._header)
    for episode in episodes:
      self._recording.add(episode)
    # Only what reaches into the replay; blank rows stand before each episode.
    num_rows = np.cumsum(
      [0, *(shard.NUM_PADDING_ROWS + len(episode.actions) for episode in episodes)]
    )
    forgotten = max(num_rows[-1] - self._replay.capacity, 0)
    first = int(np.searchsorted(num_rows, forgotten, side='right')) - 1
    played = recorded.play_again(
      path, self._header, episodes[first:], num_processes, self._rom_dir, first_number=first
    )
    with program.progress_bar(len(episodes) - first, 'playing again', 'episode') as bar:
      for rows in played:
        assert rows is not None
        self._replay.start_episode()
        for frame, action, reward, terminal, _ in zip(*rows, strict=True):
          self._replay.add(frame, int(action), float(reward), bool(terminal))
        bar.update()

    self._game = play.Game(  # its own, which nobody else plays
      self._header.environment_name, self._header.sticky_action_probability, self._rom_dir
    )
    steps = [*zip(self._actions, self._choices, strict=True)]
    self.num_steps -= len(steps)
    self._start_episode()
    for action, choice in steps:
      self._play_step(action, choice)
    if steps and self._episode_checksum() != self._expected_checksum:
      raise ValueError(
        f'{path}: the episode under way does not come out as it was played: with another emulator '
        'or OpenCV this run cannot go on'
      )

  def _recorded_episodes(self, path: pathlib.Path) -> list[recorded.Episode]:
    header, recording = recorded.read(path)
    for field in dataclasses.fields(header):
      was, expected = getattr(header, field.name), getattr(self._header, field.name)
      if was != expected:
        raise ValueError(
          f'{path}: its {field.name} is {was}, here it is {expected}: this run cannot go on'
        )
    episodes = [*itertools.islice(recording, self.num_episodes)]
    checksum = 0
    for episode in episodes:
      checksum = _extend(checksum, episode.actions, episode.choices)
    is_whole = len(episodes) == self.num_episodes and all(e.ended for e in episodes)
    if not is_whole or checksum != self._play_checksum:
      raise ValueError(f'{path}: not what the run played up to its checkpoint')
    return episodes

  def _episode_checksum(self) -> int:
    return google_crc32c.value(np.array(self._checksums.values, '<u4').tobytes())

  def _start_episode(self) -> None:
    rng = np.random.default_rng((self._seed, self.num_episodes))
    self._episode_seed = int(rng.integers(2**31))
    self.epsilon = self._schedule.epsilon(self.num_steps)
    self._begins, self._lasts, self._random_actions = self._schedule.random_actions(
      rng, self._header.num_actions, self.epsilon
    )
    self._actions, self._choices, self._return = [], [], 0.0
    self._checksums = recorded.Checksums()
    self._game.start(self._episode_seed)
    self._replay.start_episode()

  def play_step(self) -> None:
    """Acts once, and adds to replay and recording what that led to."""
    self._play_step(*self._choose())

  def _choose(self) -> tuple[int, int]:
    """The next action, and its choice as recorded.py has it, if that is asked for."""
    step, has_choices = len(self._actions), self._header.has_choices
    action = int(self._random_actions[step])
    if self._lasts[step]:
      return action, recorded.LASTING if has_choices else 0
    if self._begins[step] and not has_choices:
      return action, 0
    _, choice, _ = self._greedy_act(
      self._learner.online_params, self._unused_key, self._game.observation()
    )
    if not self._begins[step]:
      action = int(choice)
    return action, int(has_choices and action == int(choice))

  def _play_step(self, action: int, choice: int) -> None:
    frame = self._game.frame
    reward, ended = self._game.step(action)
    self._replay.add(frame, action, reward, ended)
    self._checksums.add(frame, action, reward, ended)
    self._actions.append(action)
    self._choices.append(choice)
    self._return += reward
    self.num_steps += 1
    if ended:
      episode = self._episode(ended)
      self._recording.add(episode)
      self._play_checksum = _extend(self._play_checksum, episode.actions, episode.choices)
      self.num_episodes += 1
      self._returns += (1, self._return)
      self._start_episode()

  def _episode(self, ended: bool) -> recorded.Episode:
    return recorded.Episode(
      self._episode_seed,
      self.epsilon,
      ended,
      np.array(self._actions, np.uint8),
      np.array(self._choices, np.uint8),
      np.array(self._checksums.values, np.uint32),
    )

  def recording(self) -> bytes:
    """Gives what the file of a recording of all that was played holds."""
    return self._recording.content(self._episode(ended=False) if self._actions else None)

  def take_mean_return(self) -> float:
    """Averages the returns of the episodes that ended since the last call; NaN: none did."""
    (number, total), self._returns = self._returns, np.zeros(2)
    return total / number if number else math.nan

  # Learning.

  def learn(self, num_updates: int) -> Mapping[str, float]:
    """Makes this many updates, and plays before each; returns the mean of each metric over them."""
    history: list[Mapping[str, float]] = []
    wanted = self._schedule.warmup_steps + (
      self._schedule.steps_per_update * int(self._learner.num_updates)
    )
    for _ in range(num_updates):
      wanted += self._schedule.steps_per_update
      while self.num_steps < wanted:
        self.play_step()
      history.append({**self.learn_step(), 'epsilon': self.epsilon})
    return {name: float(np.mean([metrics[name] for metrics in history])) for name in history[0]}

  def learn_step(self) -> Mapping[str, float]:
    """Makes an update, and plays nothing; returns the metrics."""
    self._learner, metrics = self._learn(self._learner, self._replay.data(), 1)
    return metrics

  def get_state(self) -> OnlineState:
    """Copies the state, into NumPy arrays."""

    def padded(steps: list[int]) -> np.ndarray:
      array = np.zeros(play.MAX_STEPS_PER_EPISODE, np.uint8)
      array[: len(steps)] = steps
      return array

    return OnlineState(
      learner=jax.tree.map(np.array, self._learner),
      num_episodes=np.array(self.num_episodes),
      play_checksum=np.array(self._play_checksum, np.uint32),
      num_steps=np.array(self.num_steps),
      episode_steps=np.array(len(self._actions)),
      actions=padded(self._actions),
      choices=padded(self._choices),
      episode_checksum=np.array(self._episode_checksum(), np.uint32),
      returns=self._returns.copy(),
    )

  def set_state(self, state: OnlineState) -> None:
    """Goes on from a state that `get_state` gave, once `start` is called."""
    self._learner = jax.tree.map(jnp.array, state.learner)
    self.num_episodes, self.num_steps = int(state.num_episodes), int(state.num_steps)
    self._play_checksum, self._returns = int(state.play_checksum), np.array(state.returns)
    self._actions, self._choices = (
      steps[: state.episode_steps].tolist() for steps in (state.actions, state.choices)
    )
    self._expected_checksum = int(state.episode_checksum)

  # Acting in evaluation, as every agent does.

  def reset(self, rng_key: jax.Array | None = None) -> None:
    """Begins an episode; with a key, all acting from now on is a function of it."""
    self._processor.reset()
    self._action = 0
    self._value = 0.0
    if rng_key is not None:
      self._act_key = rng_key

  def step(self, timestep: dm_env.TimeStep) -> int:
    """Takes a raw timestep; returns a new action, or between decisions the last one again."""
    processed = self._processor(timestep)
    if processed is not None and not processed.last():
      self._act_key, action, value = self._act(
        self._learner.online_params, self._act_key, processed.observation
      )
      self._action, self._value = int(action), float(value)
    return self._action

  @property
  def statistics(self) -> Mapping[str, float]:
    """Gives `state_value`: the largest action value where the agent last decided."""
    return {'state_value': self._value}


def _extend(checksum: int, *columns: np.ndarray) -> int:
  for column in columns:
    checksum = google_crc32c.extend(checksum, column.tobytes())
  return checksum
