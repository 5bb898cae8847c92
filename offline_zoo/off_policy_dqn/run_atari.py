"""Trains off-policy n-step DQN on logged Atari play and evaluates it after each iteration."""

import dataclasses
import functools
import pathlib

import jax
import optax
from absl import logging

from offline_zoo import (
  atari_env,
  evaluation,
  networks,
  parts,
  processors,
  program,
  replay,
  results,
  seeds,
)
from offline_zoo.logs import bundled

from . import agent


@dataclasses.dataclass(frozen=True)
class Config:
  """The experiment. Each field is a flag, and its comment the help.

  "Paper" is Agarwal et al. 2020, as its code has it. batch_rl counts agent steps, of which there
  are four to an update: its 250,000 an iteration and target period of 8,000 are the 62,500 and
  2,000 here.
  """

  # Game and data

  environment_name: str = 'pong'  # snake_case name of a game, see atari_data.py
  replay_dir: str | None = None  # directory of log shards; or miniature, or demo; default: the
  # miniature DQN replay of a game that it has, else demo logs, made if missing
  shards: tuple[int, ...] | None = None  # numbers of the shards to load; default: all
  max_rows_per_shard: int | None = None  # first rows of each shard to load (CQL's 1%: 10000)
  first_fraction: float | None = None  # keeps this part of each shard's episodes, the first ones
  max_random_transitions: int | None = None  # drawn in whole logged episodes (papers' 1%: 500000)
  min_episode_return: float | None = None  # keeps whole episodes that return as much, as logged
  top_fraction: float | None = None  # this part of the rows: the best whole episodes, and ties
  replay_cache_dir: str | None = None  # keeps encoded shards; default: ~/.cache; none: does not
  replay_memory_gb: float | None = None  # 10^9 bytes; default: GPU's free less 2; CPU's free / 2

  # Results

  results_csv_path: str | None = None  # default: runs/<agent>/<game>/<seed>/results.csv
  checkpoint_dir: str | None = None  # default: checkpoint, beside the CSV
  keep_checkpoints: str = 'last'  # the last two; best: and the best-evaluated one; all: every one
  tensorboard_dir: str | None = None  # gets the CSV's columns too, in <agent>/<game>/<seed>
  video_dir: str | None = None  # gets an evaluation episode an iteration, in <agent>/<game>/<seed>

  # Protocol

  seed: int = 1  # of initialisation, sampling and evaluation
  num_seeds: int = 1  # how many learn at once, from --seed on; parts of the logs follow --seed
  num_iterations: int = 200  # paper
  num_updates_per_iteration: int = 62_500  # gradient updates; paper
  eval_steps: int = 125_000  # agent steps after each iteration, in whole episodes; paper
  eval_epsilon: float = 0.001  # probability of a random action in evaluation; paper
  sticky_action_probability: float = 0.25  # per emulator frame; Machado et al. 2018
  rom_dir: str | None = None  # of ROMs to evaluate with, see roms.py; default: the emulator's own

  # Learning

  batch_size: int = 32  # transitions an update; paper
  padding: str = 'SAME'  # of convolutions; Dopamine and batch_rl; Mnih et al.: VALID
  n_step: int = 5  # horizon of the return; n17s/batch_rl's off_policy_dqn.gin
  discount: float = 0.99  # of one agent step; paper
  max_abs_reward: float | None = 1.0  # bound of each reward, either way; none: raw rewards; paper
  target_network_update_period: int = 2_000  # gradient updates; paper
  target_epsilon: float = 0.001  # epsilon of the policy in the ratios; n17s/batch_rl's epsilon_eval
  min_ratio: float = 0.99  # lower bound of a step's importance ratio; n17s/batch_rl's code
  max_ratio: float = 1.01  # upper bound of a step's importance ratio; n17s/batch_rl's code
  first_ratio: bool = True  # first step's ratio is a factor too; n17s/batch_rl's code
  learning_rate: float = 0.00025  # of centered RMSProp; n17s/batch_rl's off_policy_dqn.gin
  rmsprop_decay: float = 0.95  # n17s/batch_rl's off_policy_dqn.gin
  rmsprop_epsilon: float = 0.00001  # inside the square root; n17s/batch_rl's off_policy_dqn.gin

  # Machine

  num_eval_workers: int | None = None  # processes; default: up to cores - 1; 0: none, in turns
  jax_platform_name: str | None = None  # cpu or cuda; default: JAX's choice
  compilation_cache_dir: str | None = None  # keeps compiled code; default: ~/.cache; none: does not
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    program.check_experiment(self)
    program.check(self, 'padding', self.padding in ('SAME', 'VALID'), 'SAME or VALID')
    program.check_positive(
      self, 'batch_size', 'n_step', 'max_abs_reward', 'target_network_update_period',
      'learning_rate', 'rmsprop_epsilon',
    )  # fmt: skip
    program.check_in_unit_interval(self, 'discount', 'rmsprop_decay')
    program.check_in_unit_interval(self, 'target_epsilon')
    program.check_not_negative(self, 'min_ratio')
    enough = self.max_ratio >= self.min_ratio
    program.check(self, 'max_ratio', enough, f'at least --min_ratio={self.min_ratio}')


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """Centered RMSProp as TensorFlow has it, which the paper used: its mean square starts at 1."""
  return optax.rmsprop(
    config.learning_rate,
    decay=config.rmsprop_decay,
    eps=config.rmsprop_epsilon,
    initial_scale=1.0,
    centered=True,
  )


def make_agent(
  config: Config, num_actions: int, data: replay.ReplayData | None
) -> agent.OffPolicyDqn:
  """Makes the agent as the flags say, at the beginning of its learning.

  Args:
    config: the flags.
    num_actions: the size of the game's action set.
    data: what to learn from; None for an agent that only acts.
  """
  return agent.OffPolicyDqn(
    network=networks.dqn_network(num_actions, config.padding),
    optimizer=make_optimizer(config),
    data=data,
    processor=processors.AtariProcessor(),
    batch_size=config.batch_size,
    target_network_update_period=config.target_network_update_period,
    target_epsilon=config.target_epsilon,
    min_ratio=config.min_ratio,
    max_ratio=config.max_ratio,
    first_ratio=config.first_ratio,
    eval_epsilon=config.eval_epsilon,
    rng_key=jax.random.PRNGKey(config.seed),
  )


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  run = results.Results(config, agent_name=pathlib.Path(__file__).parent.name)

  make_environment = functools.partial(
    atari_env.AtariEnv,
    config.environment_name,
    sticky_action_probability=config.sticky_action_probability,
    rom_dir=config.rom_dir,
  )
  num_actions = make_environment(seed=0).action_spec().num_values
  logs = replay.Logs(
    bundled.find_or_make(config.replay_dir, config.environment_name),
    config.shards,
    n_step=config.n_step,
    discount=config.discount,
    max_abs_reward=config.max_abs_reward,
    num_actions=num_actions,
    max_rows_per_shard=config.max_rows_per_shard,
    first_fraction=config.first_fraction,
    max_random_transitions=config.max_random_transitions,
    min_episode_return=config.min_episode_return,
    top_fraction=config.top_fraction,
    with_probabilities=True,
    cache_dir=replay.cache_dir(config.replay_cache_dir),
    memory_gb=config.replay_memory_gb,
    num_resident_shards=run.progress.num_resident_shards,
    seed=config.seed,
  )
  logging.info('Replay: %s', logs.describe())
  note = atari_env.rom_note(config.environment_name, config.rom_dir)
  if note and config.replay_dir not in bundled.NAMES:
    logging.warning(note)

  # Each iteration gives it its data; another reference would keep the first one's in memory.
  one: parts.Learner = make_agent(config, num_actions, None)
  learner = one if config.num_seeds == 1 else seeds.Seeds(one, parts.seeds(config))

  progress = run.resume(learner, logs)
  make_actor = functools.partial(make_agent, config, num_actions, None)
  evaluator = evaluation.Evaluator(
    config, run, learner, make_actor, make_environment, logs.mean_episode_return
  )
  # SIGTERM and Ctrl-C leave the block at the next good moment.
  with parts.StopSignal() as stop, evaluator:
    while progress.iteration <= config.num_iterations:
      learner.data = logs.resident(progress.iteration, config.num_iterations)
      parts.learn_iteration(learner, progress, config.num_updates_per_iteration, stop)
      evaluator.evaluate(progress, stop)  # with workers: beside the next iteration's learning
    evaluator.finish(stop)
  if stop.requested:
    evaluator.save_unfinished(progress)


if __name__ == '__main__':
  program.run(main, Config)
