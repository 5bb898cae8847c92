"""An agent as a checkpoint has it, to be evaluated, or to play what is logged."""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from offline_zoo import atari_env, checkpoints, parts


@dataclasses.dataclass(frozen=True)
class Trained:
  """An agent as a checkpoint has it.

  Attributes:
    name: of the agent.
    config: the flags of its run.
    seed: its own, which is one of the run's.
    environment: its game.
    make_environment: makes the game anew, with an argument `seed`.
    agent: acts as in evaluation.
    num_updates: that it has made.
    replay_checksum: of the logs that it learnt from, see `replay.Logs`; None: it learnt online.
  """

  name: str
  config: Any
  seed: int
  environment: atari_env.AtariEnv
  make_environment: Callable[..., atari_env.AtariEnv]
  agent: parts.Learner
  num_updates: int
  replay_checksum: int | None


def make(name: str, config: Any, num_actions: int) -> parts.Learner:
  """Makes an agent, by its name and the flags of its run, at the beginning of its learning."""
  return _run_atari(name).make_agent(config, num_actions, None)


def _run_atari(name: str) -> Any:
  package = 'online' if name.startswith('online_') else name
  return importlib.import_module(f'offline_zoo.{package}.run_atari')


def restore(
  checkpoint_dir: str | os.PathLike,
  which: str = 'last',
  rom_dir: str | None = None,
  eval_epsilon: float | None = None,
  seed: int | None = None,
  flag: str = 'checkpoint_dir',
) -> Trained:
  """Makes the agent of a run as a checkpoint has it; it needs no logs for that.

  Args:
    checkpoint_dir: of the run.
    which: 'last', 'best', or a number.
    rom_dir: see `atari_env.rom_path`; None: the run's own.
    eval_epsilon: rate of random actions in acting; None: the run's own.
    seed: which of the run's seeds, if several learnt at once; None: the first.
    flag: that named the directory, for a message.

  Raises:
    FileNotFoundError: there is no checkpoint, or no ROM.
    ValueError: there is none of that number or seed, or it is damaged, or of another version.
  """
  saved = checkpoints.Checkpoints(checkpoint_dir)
  if not saved.exist():
    raise FileNotFoundError(f'--{flag}={checkpoint_dir}: there is no checkpoint')
  checkpoint = saved.restore() if which == 'last' else saved.restore_one(which)
  assert checkpoint is not None
  try:
    identity = checkpoint.record['identity']
    name, flags = identity['agent'], identity['flags']
    if name == 'online_random':
      raise ValueError(f'{checkpoint.path}: random play, which has learnt nothing')
    config = _run_atari(name).Config(
      **{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
    )
  except (ImportError, KeyError, TypeError) as error:
    raise ValueError(
      f'{checkpoint.path}: not a checkpoint of this version of the package: {error!r}'
    ) from error
  if name.startswith('online_'):  # only what was learnt, not where the play was
    checkpoint = checkpoint.part('.learner')
  seeds = parts.seeds(config)
  seed = config.seed if seed is None else seed
  if seed not in seeds:
    raise ValueError(f'{checkpoint.path}: no seed {seed}; there are: {", ".join(map(str, seeds))}')
  if len(seeds) > 1:
    checkpoint = checkpoint.part(f'[{seeds.index(seed)}]')
  if eval_epsilon is not None:
    config = dataclasses.replace(config, eval_epsilon=eval_epsilon)
  make_environment = functools.partial(
    atari_env.AtariEnv,
    config.environment_name,
    sticky_action_probability=config.sticky_action_probability,
    rom_dir=rom_dir or config.rom_dir,
  )
  environment = make_environment(seed=0)
  agent = make(name, config, environment.action_spec().num_values)
  state = checkpoint.state(agent.get_state())
  agent.set_state(state)
  return Trained(
    name,
    config,
    seed,
    environment,
    make_environment,
    agent,
    int(state.num_updates),
    identity.get('replay_checksum'),
  )
