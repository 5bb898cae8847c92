"""Logs real play in the format of the DQN Replay Dataset, so that there is data without a download.

  python -m offline_zoo.logs.demo --environment_name=pong --replay_dir=/tmp/pong_logs

Freeway, Pong and Breakout are played by scripted policies (demo_policies.py) that act at random at
a rate drawn for each episode, so that returns spread from poor to good. Every other game is played
uniformly at random. Rewards are logged raw. An episode that is cut at the frame limit is logged as
ended, as it is in the public data. The same flags give the same rows, and on the same kind of
processor, by which isal chooses how to compress, the same bytes.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Generator
from typing import NamedTuple

import dm_env
import numpy as np
from absl import logging

from offline_zoo import atari_data, atari_env, parts, processors, program
from offline_zoo.logs import demo_policies, dqn_replay


@dataclasses.dataclass(frozen=True)
class Config:
  """What to log; each field is a flag."""

  # What to log

  environment_name: str = 'pong'  # snake_case name of a game, see atari_data.py
  num_transitions: int = 100_000  # agent steps to log, blank rows before episodes not counted
  replay_dir: str | None = None  # where to; default: where run_atari looks without --replay_dir
  policy: str | None = None  # scripted or random; default: scripted for the games that have one
  shard_capacity: int = 25_000  # rows of a shard, blank ones included
  sticky_action_probability: float = 0.25  # per emulator frame; Machado et al. 2018
  seed: int = 1  # of emulator and policy
  num_processes: int = min(os.cpu_count() or 1, 8)  # that play; no influence on what is logged
  debug: bool = False  # tracebacks for errors


class Episode(NamedTuple):
  """An episode of T agent steps: frames [T, 84, 84], actions, rewards, terminals, probs [T].

  Probabilities are of the actions under the mixture of the policy and random actions.
  """

  frames: np.ndarray
  actions: np.ndarray
  rewards: np.ndarray
  terminals: np.ndarray
  probs: np.ndarray


class _Recorder:
  """An agent for the run loop that follows a policy and remembers what happened."""

  def __init__(self, environment: atari_env.AtariEnv, policy, epsilon: float, rng):
    self._environment = environment
    self._policy = policy
    self._epsilon = epsilon
    self._rng = rng
    self._num_actions = environment.action_spec().num_values
    self._processor = processors.AtariProcessor()
    self._frames: list[np.ndarray] = []
    self._actions: list[int] = []
    self._rewards: list[float] = []
    self._probs: list[float] = []
    self.statistics: dict[str, float] = {}

  def reset(self, rng_key=None) -> None:
    del rng_key

  def step(self, timestep: dm_env.TimeStep) -> int:
    processed = self._processor(timestep)
    if processed is None:
      return self._actions[-1]
    if not processed.first():
      self._rewards.append(processed.reward)
    if processed.last():
      return 0
    self._frames.append(processed.observation[..., -1])
    # The policy looks at every step, also at those that chance decides.
    choice = action = self._policy(self._environment.ram()) if self._policy else 0
    if self._rng.random() < self._epsilon:
      action = int(self._rng.integers(self._num_actions))
    self._actions.append(action)
    # Also where an action drawn at random is the policy's.
    chosen = 1 - self._epsilon if action == choice else 0.0
    self._probs.append(chosen + self._epsilon / self._num_actions)
    return action

  def episode(self) -> Episode:
    terminals = np.zeros(len(self._rewards), np.uint8)
    terminals[-1] = 1
    return Episode(
      np.stack(self._frames),
      np.array(self._actions, np.int32),
      np.array(self._rewards, np.float32),
      terminals,
      np.array(self._probs, np.float32),
    )


# Starting an emulator takes as long as playing a quarter of an episode.
_make_environment = functools.lru_cache(atari_env.AtariEnv)


def play_episode(config: Config, index: int) -> Episode:
  """Plays one episode, a function of its arguments."""
  rng = np.random.default_rng((config.seed, index))
  environment = _make_environment(
    config.environment_name, sticky_action_probability=config.sticky_action_probability, seed=0
  )
  environment.seed(int(rng.integers(2**31)))
  policy, epsilon = None, 1.0
  if config.policy != 'random' and config.environment_name in demo_policies.POLICIES:
    make_policy, max_epsilon = demo_policies.POLICIES[config.environment_name]
    policy, epsilon = make_policy(), rng.uniform(0.0, max_epsilon)
  recorder = _Recorder(environment, policy, epsilon, rng)
  for _, timestep, _, _ in parts.run_loop(recorder, environment):
    if timestep.last():
      break
  return recorder.episode()


def _start_worker() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
  atexit.register(_make_environment.cache_clear)  # ale-py complains of emulators left over

  def end_with_parent() -> None:  # also when it is killed
    if parent := multiprocessing.parent_process():
      parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()


def play_episodes(config: Config) -> Generator[Episode, None, None]:
  """Plays episodes 0, 1, 2, ... in several processes, in order, some ahead of the caller."""
  executor = concurrent.futures.ProcessPoolExecutor(
    config.num_processes, multiprocessing.get_context('spawn'), _start_worker
  )
  try:
    indices = itertools.count()
    pending: collections.deque[concurrent.futures.Future[Episode]] = collections.deque()
    while True:
      while len(pending) < 2 * config.num_processes:
        pending.append(executor.submit(play_episode, config, next(indices)))
      yield pending.popleft().result()
  finally:
    executor.shutdown(cancel_futures=True)


def write_logs(config: Config, replay_dir: pathlib.Path) -> None:
  """Plays and logs until `num_transitions` rows, blank ones not counted, are in shards.

  The directory appears when it is complete.

  Raises:
    ValueError: a bad value in `config`.
    FileExistsError: there is something at `replay_dir` already.
  """
  atari_data.game(config.environment_name)
  for name in ('num_transitions', 'num_processes'):
    if getattr(config, name) < 1:
      raise ValueError(f'--{name}={getattr(config, name)}: expected at least 1')
  if config.policy not in (None, 'random', 'scripted'):
    raise ValueError(f'--policy={config.policy}: expected scripted or random')
  if config.policy == 'scripted' and config.environment_name not in demo_policies.POLICIES:
    raise ValueError(f'--policy=scripted: only for {", ".join(demo_policies.POLICIES)}')
  if replay_dir.exists() and (not replay_dir.is_dir() or any(replay_dir.iterdir())):
    raise FileExistsError(f'--replay_dir={replay_dir}: exists and is not an empty directory')
  if os.path.ismount(replay_dir):  # which cannot be replaced
    raise OSError(f'--replay_dir={replay_dir}: is a mount point; name a directory in it')

  partial = replay_dir.with_name(f'.{replay_dir.name}.partial-{uuid.uuid4().hex[:8]}')
  writer = dqn_replay.ShardWriter(partial, config.shard_capacity, with_prob=True)
  returns = []
  start = time.monotonic()
  try:
    with (
      contextlib.closing(play_episodes(config)) as episodes,
      program.progress_bar(config.num_transitions, 'playing', 'transition') as bar,
    ):
      while writer.num_transitions < config.num_transitions:
        episode = next(episodes)
        writer.start_episode()
        for row in zip(*episode, strict=True):
          writer.add(*row)
          if writer.num_transitions == config.num_transitions:
            break
        else:
          returns.append(float(episode.rewards.sum()))
        bar.update(writer.num_transitions - bar.n)
    writer.close()
    os.rename(partial, replay_dir)
  except concurrent.futures.process.BrokenProcessPool as error:
    raise OSError(f'a process that played was killed; is memory short? {error}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  seconds = time.monotonic() - start
  logging.info(
    'Logged %d transitions of %s to %s in %.1f s, %.0f a second: %s',
    writer.num_transitions, config.environment_name, replay_dir, seconds,
    writer.num_transitions / seconds,
    f'{len(returns)} whole episodes, returns from {min(returns):.0f} to {max(returns):.0f}, '
    f'mean {np.mean(returns):.1f}' if returns else 'no whole episode',
  )  # fmt: skip


def default_dir(environment_name: str) -> pathlib.Path:
  """Where a game's demo logs are kept: $XDG_CACHE_HOME/offline_zoo/demo_logs/<game>.

  Raises:
    FileNotFoundError: the user has no home directory.
  """
  home = program.user_cache_dir()
  if home is None:
    raise FileNotFoundError('--replay_dir: there is no home directory for demo logs; name one')
  return home / 'demo_logs' / environment_name


def find_or_make(environment_name: str) -> pathlib.Path:
  """The directory of a game's demo logs, which are made first if they are missing."""
  config = Config(environment_name=environment_name)
  replay_dir = default_dir(environment_name)
  if not replay_dir.exists():
    logging.info(
      'No --replay_dir and no demo logs yet: playing %d transitions of %s, to be kept in %s',
      config.num_transitions, environment_name, replay_dir,
    )  # fmt: skip
    try:
      write_logs(config, replay_dir)
    except OSError:
      if not replay_dir.exists():  # else another process has just made them: the same ones
        raise
  return replay_dir


def main(config: Config) -> None:
  write_logs(config, pathlib.Path(config.replay_dir or default_dir(config.environment_name)))


if __name__ == '__main__':
  program.run(main, Config)
