"""Lets an agent learn online: it plays, records what it plays, and learns from its last play.

  python -m offline_zoo.online.run_atari --agent=dqn --environment_name=freeway

Beside the CSV, config.json and checkpoints of every run it leaves all that was played, as recorded
play, of which logs/recorded.py makes shards to learn from offline.
"""

import dataclasses
import functools
import importlib
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from offline_zoo import atari_data, atari_env, evaluation, parts, playing, program, replay, results
from offline_zoo.logs import play, recorded
from offline_zoo.logs.shard import NUM_PADDING_ROWS

from . import growing_replay, learner

AGENTS = ('dqn', 'qrdqn', 'rem', 'c51', 'random')
RECORDING = 'recorded.play'  # beside the CSV


@dataclasses.dataclass(frozen=True)
class Config:
  """The experiment. Each field is a flag, and its comment the help.

  "Dopamine" is its DQN as its dqn.gin sets it (Castro et al. 2018), and as batch_rl's does, whose
  DQN logged the DQN Replay Dataset.
  """

  # Game and agent

  environment_name: str = 'pong'  # snake_case name of a game, see atari_data.py
  agent: str = 'dqn'  # dqn, qrdqn, rem or c51, as its directory has it; or random, which learns
  # nothing, and of what follows on acting has zeta_exponent, warmup_steps and steps_per_update only
  agent_flags: str | None = None  # other values than its run_atari has: '--n_step=5 --discount=0.9'

  # Results

  results_csv_path: str | None = None  # default: runs/online_<agent>/<game>/<seed>/results.csv
  checkpoint_dir: str | None = None  # default: checkpoint, beside the CSV
  keep_checkpoints: str = 'last'  # two; best: also that of the best evaluation; all: every one
  tensorboard_dir: str | None = None  # gets the CSV's columns too, in online_<agent>/<game>/<seed>
  video_dir: str | None = None  # gets an evaluation episode an iteration, likewise
  log_probabilities: bool = False  # records which actions were the policy's own, too

  # Protocol

  seed: int = 1  # of initialisation, play, sampling and evaluation
  num_iterations: int = 200  # Dopamine
  num_updates_per_iteration: int = 62_500  # gradient updates; Dopamine
  eval_steps: int = 125_000  # agent steps after each iteration, in whole episodes; Dopamine
  eval_epsilon: float = 0.001  # probability of a random action in evaluation; Dopamine
  sticky_action_probability: float = 0.25  # per emulator frame; Machado et al. 2018
  rom_dir: str | None = None  # of ROMs to play, see roms.py; default: the emulator's own

  # Acting

  steps_per_update: int = 4  # agent steps; Dopamine
  replay_capacity: int = 1_000_000  # rows, 7,062 bytes each, blank ones included; Dopamine
  warmup_steps: int = 20_000  # agent steps, all random, before the first update's; Dopamine
  epsilon_decay_steps: int = 250_000  # agent steps from epsilon 1 to the final one; Dopamine, but
  # that an episode keeps the rate that it begins with
  final_epsilon: float = 0.01  # probability that a random action begins; Dopamine
  zeta_exponent: float | None = None  # a random action lasts n steps, at odds of n^-this; none: one

  # Machine

  num_processes: int = play.NUM_PROCESSES  # that play again what a resumed run has played
  jax_platform_name: str | None = None  # cpu or cuda; default: JAX's choice
  compilation_cache_dir: str | None = None  # keeps compiled code; default: ~/.cache; none: does not
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    program.check_run(self)
    if self.results_csv_path is not None:
      is_free = os.path.basename(self.results_csv_path) != RECORDING
      program.check(self, 'results_csv_path', is_free, 'another name: the recording has this one')
    program.check(self, 'agent', self.agent in AGENTS, ', '.join(AGENTS))
    program.check_positive(
      self, 'steps_per_update', 'replay_capacity', 'warmup_steps', 'epsilon_decay_steps',
      'num_processes',
    )  # fmt: skip
    program.check_in_unit_interval(self, 'final_epsilon')
    if self.zeta_exponent is not None:
      program.check(self, 'zeta_exponent', self.zeta_exponent > 1, 'more than 1')
    agents = agent_config(self)
    least = 4 + (agents.n_step if agents else 1)  # with fewer, there is nothing to sample
    program.check(self, 'warmup_steps', self.warmup_steps >= least, f'{least} or more')
    # Blank rows of a new episode may have come since; two episodes.
    least = max(least + NUM_PADDING_ROWS, 2 * growing_replay.ROWS_PER_EPISODE)
    program.check(self, 'replay_capacity', self.replay_capacity >= least, f'{least} or more')

  @property
  def num_seeds(self) -> int:
    """Is no flag: each seed plays and learns from a replay of its own."""
    return 1


class _RandomState(NamedTuple):
  """What a `_Random` learns: nothing."""

  online_params: dict
  num_updates: jax.Array  # [] int32


class _Random:
  """The functions of an agent that acts at random and learns nothing."""

  def __init__(self, num_actions: int):
    self._num_actions = num_actions

  def initial_state(self, rng_key: jax.Array) -> _RandomState:
    del rng_key
    return _RandomState({}, jnp.zeros((), jnp.int32))

  def update(self, state: _RandomState, data: replay.ReplayData) -> tuple[_RandomState, dict]:
    del data
    return state._replace(num_updates=state.num_updates + 1), {}

  def act(self, online_params: dict, rng_key: jax.Array, s_t: jax.Array) -> tuple:
    del online_params, s_t
    rng_key, action_key = jax.random.split(rng_key)
    return rng_key, jax.random.randint(action_key, (), 0, self._num_actions), jnp.zeros(())


# Flags of an agent's experiment that choose logs; and evaluation is not beside learning here.
_FOREIGN = (
  'replay_dir', 'shards', 'max_rows_per_shard', 'first_fraction', 'max_random_transitions',
  'min_episode_return', 'top_fraction', 'replay_cache_dir', 'replay_memory_gb', 'num_eval_workers',
)  # fmt: skip


def agent_config(config: Config) -> Any:
  """Makes the Config of the agent, with --agent_flags; None for random play, which has none.

  Raises:
    ValueError: one is unknown, has a bad value, or is no agent's business here.
  """
  if config.agent == 'random':
    return None
  config_class = importlib.import_module(f'offline_zoo.{config.agent}.run_atari').Config
  try:
    agents = program.parse_config(config_class, config.agent_flags or '')
    for field in dataclasses.fields(config_class):
      if getattr(agents, field.name) != field.default:
        foreign = field.name in _FOREIGN or hasattr(config, field.name)
        program.check(agents, field.name, not foreign, "only what is the agent's own")
  except ValueError as error:
    raise ValueError(f'--agent_flags: {program.first_line(error)}') from error
  return dataclasses.replace(agents, seed=config.seed, eval_epsilon=config.eval_epsilon)


def make_agent(config: Config, num_actions: int, data: Any = None) -> Any:
  """Makes the agent as the flags say, at the beginning of its learning.

  Args:
    config: the flags.
    num_actions: the size of the game's action set.
    data: what to learn from, if it is to learn by itself.

  Raises:
    ValueError: it is random play, which learns nothing.
  """
  program.check(config, 'agent', config.agent != 'random', 'one that learns')
  module = importlib.import_module(f'offline_zoo.{config.agent}.run_atari')
  return module.make_agent(agent_config(config), num_actions, data)


def make_learner(config: Config, num_actions: int) -> learner.OnlineLearner:
  """Makes the learner as the flags say, at the beginning of its learning.

  Args:
    config: the flags.
    num_actions: the size of the game's action set.

  Raises:
    ValueError: there is too little memory for the replay.
  """
  if config.agent == 'random':
    agent: Any = _Random(num_actions)
    greedy, final_epsilon = agent, 1.0
    # From which nothing is sampled.
    data = growing_replay.GrowingReplay(
      2 * growing_replay.ROWS_PER_EPISODE, n_step=1, discount=0.0, max_abs_reward=None
    )
  else:
    agent = make_agent(config, num_actions)
    greedy = make_agent(dataclasses.replace(config, eval_epsilon=0.0), num_actions)
    final_epsilon = config.final_epsilon
    agents = agent_config(config)
    data = growing_replay.GrowingReplay(
      config.replay_capacity, n_step=agents.n_step, discount=agents.discount,
      max_abs_reward=agents.max_abs_reward,
    )  # fmt: skip
  return learner.OnlineLearner(
    agent=agent,
    greedy_act=greedy.act,
    header=recorded.make_header(
      config.environment_name,
      config.sticky_action_probability,
      config.log_probabilities,
      config.rom_dir,
    ),
    schedule=learner.Schedule(
      config.warmup_steps,
      config.epsilon_decay_steps,
      final_epsilon,
      config.steps_per_update,
      config.zeta_exponent,
    ),
    replay=data,
    rom_dir=config.rom_dir,
    seed=config.seed,
  )


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  run = results.Results(config, agent_name=f'online_{config.agent}')

  def make_environment(seed: int) -> atari_env.AtariEnv:
    return atari_env.AtariEnv(
      config.environment_name,
      sticky_action_probability=config.sticky_action_probability,
      rom_dir=config.rom_dir,
      seed=seed,
    )

  agent = make_learner(config, make_environment(seed=0).action_spec().num_values)
  recording = run.directory / RECORDING

  progress = run.resume(agent, None)
  if not agent.num_steps and recording.exists():  # no checkpoint goes on from it
    kept = recording.with_name(f'{RECORDING}.{time.time_ns()}')
    recording.rename(kept)
    logging.warning('%s: there was one already, which is now %s', recording, kept)
  logging.info('Recording: %s', recording)

  def save() -> None:
    # First the recording, which may hold more than the checkpoint knows of.
    results.write_atomically(recording, agent.recording(), f'.{RECORDING}.partial')
    run.save(agent.get_state(), progress)

  if progress.iteration <= config.num_iterations:
    agent.start(recording, config.num_processes)
  with parts.StopSignal() as stop:  # SIGTERM and Ctrl-C leave the block at the next good moment
    while progress.iteration <= config.num_iterations:
      parts.learn_iteration(agent, progress, config.num_updates_per_iteration, stop)
      play_episodes = functools.partial(playing.play_episodes, [agent], [make_environment(seed=0)])
      row = evaluation.evaluate(
        play_episodes, config.eval_steps, config.seed, progress.iteration, stop,
        run.video_path(config.seed, progress.iteration),
      )  # fmt: skip
      # Those of the warm-up too, which no update follows.
      row['frame'] = atari_data.NUM_ACTION_REPEATS * agent.num_steps
      progress.finish_iteration(config, {config.seed: row}, agent.take_mean_return())
      save()
  if stop.requested:
    save()  # what was played and learnt in the iteration under way


if __name__ == '__main__':
  program.run(main, Config)
