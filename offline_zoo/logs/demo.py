r"""Logs real play in the DQN Replay Dataset's format, so that there is data without a download.

  python -m offline_zoo.logs.demo --environment_name=pong --replay_dir=/tmp/pong_logs

Freeway, Pong and Breakout are played by scripted policies (demo_policies.py) that act at random at
a rate drawn for each episode, so that returns spread from poor to good. Every other game is played
uniformly at random. With --policy_checkpoint an agent of ours plays what it has learnt, with
the ROM that its run had:

  python -m offline_zoo.logs.demo --environment_name=pong --replay_dir=/tmp/pong_logs \
    --policy_checkpoint=runs/dqn/pong/1/checkpoint --epsilon=0.2

Rewards are logged raw. An episode that is cut at the frame limit is logged as
ended, as it is in the public data. The same flags give the same rows, and on the same kind of
processor, by which isal chooses how to compress, the same bytes.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from offline_zoo import atari_data, program
from offline_zoo.logs import demo_policies, dqn_replay, play, recorded


@dataclasses.dataclass(frozen=True)
class Config:
  """What to log; each field is a flag."""

  # What to log

  environment_name: str = 'pong'  # snake_case name of a game, see atari_data.py
  num_transitions: int = 100_000  # agent steps to log, blank rows before episodes not counted
  replay_dir: str | None = None  # where to; default, of default logs: where --replay_dir=demo looks
  policy: str | None = None  # scripted or random; default: scripted for the games that have one
  policy_checkpoint: str | None = None  # of a run: its agent plays, greedily but for epsilon
  checkpoint: str = 'last'  # there: last; best, by the run's own evaluations; or 7 for step_7
  run_seed: int | None = None  # which seed's agent, if several learnt at once; default: the first
  epsilon: float | None = None  # rate of random actions; default: 0, or scripted policies' own
  recorded_path: str | None = None  # writes recorded play here, of whole episodes, and no shards
  shard_capacity: int = 25_000  # rows of a shard, blank ones included
  sticky_action_probability: float = 0.25  # per emulator frame; Machado et al. 2018
  seed: int = 1  # of emulator and policy
  num_processes: int = play.NUM_PROCESSES  # that play; no influence on what is logged
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    has_policy = atari_data.game(self.environment_name).name in demo_policies.POLICIES
    program.check_positive(self, 'num_transitions', 'num_processes')
    program.check_not_negative(self, 'seed')
    program.check_in_unit_interval(self, 'sticky_action_probability')
    good = self.policy in (None, 'random', 'scripted')
    program.check(self, 'policy', good, 'scripted or random')
    good = self.policy != 'scripted' or has_policy
    program.check(self, 'policy', good, f'only for {", ".join(demo_policies.POLICIES)}')
    has_agent = self.policy_checkpoint is not None
    good = self.policy is None or not has_agent
    program.check(self, 'policy', good, 'none beside --policy_checkpoint')
    good = has_agent or self.checkpoint == 'last'
    program.check(self, 'checkpoint', good, '--policy_checkpoint beside it')
    good = has_agent or self.run_seed is None
    program.check(self, 'run_seed', good, '--policy_checkpoint beside it')
    if self.epsilon is not None:
      program.check_in_unit_interval(self, 'epsilon')
      acts = has_agent or (has_policy and self.policy != 'random')
      program.check(self, 'epsilon', acts, 'nothing where all actions are random')
    good = self.recorded_path is None or self.replay_dir is None
    program.check(self, 'replay_dir', good, 'none beside --recorded_path')


class _Trained(NamedTuple):
  """An agent as a checkpoint had it, which is read once: its run may go on meanwhile.

  Attributes:
    name, config: see `trained_agent.Trained`.
    params: of its network, NumPy arrays.
  """

  name: str
  config: Any
  params: Any

  def policy(self, num_actions: int) -> Callable[[play.Game], int]:
    """What it does, in a process of its own."""
    jax.config.update('jax_platforms', 'cpu')  # several processes could not share an accelerator
    act = _act(self.name, self.config, num_actions)
    params, key = jax.device_put((self.params, jax.random.PRNGKey(0)))
    return lambda game: int(act(params, key, game.observation())[1])


@functools.lru_cache
def _act(name: str, config: Any, num_actions: int) -> Callable:
  from offline_zoo import trained_agent  # takes seconds, which few need

  return jax.jit(trained_agent.make(name, config, num_actions).act)


def _make_policy(
  config: Config, rng: np.random.Generator
) -> tuple[Callable[[play.Game], int] | None, float]:
  """The policy of an episode, if no agent is to play, and its rate of random actions."""
  if config.policy != 'random' and config.environment_name in demo_policies.POLICIES:
    make_policy, max_epsilon = demo_policies.POLICIES[config.environment_name]
    policy, epsilon = make_policy(), rng.uniform(0.0, max_epsilon)
    return lambda game: policy(game.ram()), epsilon if config.epsilon is None else config.epsilon
  return None, 1.0


def play_episode(
  config: Config, index: int, trained: _Trained | None = None, keeps_rows: bool = True
) -> tuple[recorded.Episode, dqn_replay.EpisodeRows | None]:
  """Plays one episode, a function of its arguments.

  Args:
    config: what to play.
    index: the episode's number.
    trained: the agent that plays, if any.
    keeps_rows: False: gives no rows, which take 7 kB a step.
  """
  rng = np.random.default_rng((config.seed, index))
  rom_dir = trained.config.rom_dir if trained else None
  game = play.game(config.environment_name, config.sticky_action_probability, rom_dir)
  seed = int(rng.integers(2**31))
  if trained is None:
    policy, epsilon = _make_policy(config, rng)
  else:
    policy, epsilon = trained.policy(game.num_actions), config.epsilon or 0.0
  checksums, ended = recorded.Checksums(), False
  frames, actions, choices, rewards = [], [], [], []
  game.start(seed)
  while not ended:
    frame = game.frame
    # The policy looks at every step, also at those that chance decides.
    choice = action = policy(game) if policy else -1
    if rng.random() < epsilon:
      action = int(rng.integers(game.num_actions))
    actions.append(action)
    choices.append(action == choice)  # also where an action drawn at random is the policy's
    reward, ended = game.step(action)
    rewards.append(reward)
    checksums.add(frame, action, reward, ended)
    if keeps_rows:
      frames.append(frame)
  episode = recorded.Episode(
    seed,
    epsilon,
    True,
    np.array(actions, np.uint8),
    np.array(choices, np.uint8),
    np.array(checksums.values, np.uint32),
  )
  if not keeps_rows:
    return episode, None
  terminals = np.zeros(len(rewards), np.uint8)
  terminals[-1] = 1
  rows = dqn_replay.EpisodeRows(
    np.stack(frames),
    episode.actions.astype(np.int32),
    np.array(rewards, np.float32),
    terminals,
    recorded.probabilities(episode, game.num_actions),
  )
  return episode, rows


def _restore(config: Config) -> _Trained | None:
  """Reads the agent that is to play, if any."""
  if config.policy_checkpoint is None:
    return None
  from offline_zoo import trained_agent  # takes seconds, which few need

  trained = trained_agent.restore(
    config.policy_checkpoint, config.checkpoint, eval_epsilon=0.0, seed=config.run_seed,
    flag='policy_checkpoint',
  )  # fmt: skip
  game, learnt = atari_data.game(config.environment_name).name, trained.config.environment_name
  samples = getattr(trained.config, 'sample_actions', False)
  program.check(config, 'policy_checkpoint', learnt == game, f'an agent of {game}, not {learnt}')
  # What is logged as an action's probability would be false.
  program.check(config, 'policy_checkpoint', not samples, 'no agent with --sample_actions')
  params = jax.tree.map(np.asarray, trained.agent.get_state().online_params)
  return _Trained(trained.name, trained.config, params)


def _play_episodes(config: Config, trained: _Trained | None, keeps_rows: bool) -> Generator:
  """Episodes 0, 1, 2, ...; see `play_episode`."""
  function = functools.partial(play_episode, config, trained=trained, keeps_rows=keeps_rows)
  return play.in_processes(function, itertools.count(), config.num_processes)


def record(config: Config, path: pathlib.Path) -> recorded.Recording:
  """Plays whole episodes of `num_transitions` rows or more, and writes them as recorded play.

  Raises:
    ValueError: its checkpoint is no agent that can be logged here.
    FileExistsError: there is something at `path` already.
    OSError: it cannot be written.
  """
  from offline_zoo import results  # with Orbax, which processes that play do not need

  trained = _restore(config)
  results.check_path('recorded_path', path, is_directory=False)
  if os.path.lexists(path):
    raise FileExistsError(f'--recorded_path={path}: exists')
  rom_dir = trained.config.rom_dir if trained else None
  header = recorded.make_header(
    config.environment_name, config.sticky_action_probability, True, rom_dir
  )
  recording = recorded.Recording(header)
  with (
    contextlib.closing(_play_episodes(config, trained, keeps_rows=False)) as episodes,
    program.progress_bar(config.num_transitions, 'playing', 'transition') as bar,
  ):
    while recording.num_steps < config.num_transitions:
      recording.add(next(episodes)[0])
      bar.update(recording.num_steps - bar.n)
  results.write_atomically(path, recording.content())
  logging.info(
    'Recorded %d transitions of %s, %d episodes, in %s: %.3f bytes each',
    recording.num_steps, config.environment_name, recording.num_episodes, path,
    path.stat().st_size / recording.num_steps,
  )  # fmt: skip
  return recording


def write_logs(config: Config, replay_dir: pathlib.Path) -> None:
  """Plays and logs until `num_transitions` rows, blank ones not counted, are in shards.

  The directory appears when it is complete.

  Raises:
    ValueError: its checkpoint is no agent that can be logged here.
    FileExistsError: there is something at `replay_dir` already.
  """
  trained = _restore(config)
  returns = []
  start = time.monotonic()
  with (
    dqn_replay.new_directory(replay_dir) as partial,
    contextlib.closing(_play_episodes(config, trained, keeps_rows=True)) as episodes,
    program.progress_bar(config.num_transitions, 'playing', 'transition') as bar,
  ):
    writer = dqn_replay.ShardWriter(partial, config.shard_capacity, with_prob=True)
    while writer.num_transitions < config.num_transitions:
      _, rows = next(episodes)
      writer.add_episode(rows, config.num_transitions)
      if writer.num_transitions < config.num_transitions:
        returns.append(float(rows.rewards.sum()))
      bar.update(writer.num_transitions - bar.n)
    writer.close()
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
      'No demo logs yet: playing %d transitions of %s, to be kept in %s',
      config.num_transitions, environment_name, replay_dir,
    )  # fmt: skip
    try:
      write_logs(config, replay_dir)
    except OSError:
      if not replay_dir.exists():  # else another process has just made them: the same ones
        raise
  return replay_dir


def main(config: Config) -> None:
  if config.recorded_path is not None:
    record(config, pathlib.Path(config.recorded_path))
    return
  if config.replay_dir is not None:
    write_logs(config, pathlib.Path(config.replay_dir))
    return
  # Every run with --replay_dir=demo will learn from these: not what one call's flags make of them.
  default = dataclasses.replace(
    Config(config.environment_name), num_processes=config.num_processes, debug=config.debug
  )
  program.check(config, 'replay_dir', config == default, 'a directory, beside flags of what to log')
  write_logs(config, default_dir(config.environment_name))


if __name__ == '__main__':
  program.run(main, Config)
