"""Tianshou's CQL, BCQ, BC and CRR and d3rlpy's CQL and BCQ, on the logs of a sweep of ours.

  python -m benchmarks.peers_study results/laptop.toml \\
    --peers tianshou=/tmp/peer_tianshou/bin/python d3rlpy=/tmp/peer_d3rlpy/bin/python

The sweep's file says which logs and seeds, how many updates and how what was learnt is evaluated;
peers/README.md, how to make the environments. Networks, replays, losses and updates are the
library's; what it says to be the best action is done in our games, with our preprocessing, random
actions and episodes, which are those of our runs of the same seed.

Each run is in a directory beside ours, <directory>/<data>/<library>_<algorithm>_<values>/<seed>:
results.csv and evaluation.csv as ours, config.json with the values and versions, and log.txt with
what the library says. Runs go one after the other; each takes as many threads as it is given cores,
see taskset(1); the sweep gives ours one. A run that is finished is not run again, one that was
stopped begins anew. Several of these commands may go on at a time: a run that is being run is left
to the other. Logs must be there: the sweep makes them.

Values are a library's own ("defaults", of its Atari examples: see OWN in peers/*_learn.py) or ours
("laptop", of offline_zoo/<agent>/laptop.flags, as far as it has such a knob):

                             ours       Tianshou              d3rlpy
                             laptop     laptop     defaults   laptop     defaults
  cql n_step                 10         10         1          10         1
      target copied every    200        200        500        200        2,000 updates
      Adam: step, epsilon    1e-4 1e-8  1e-4 1e-8  1e-4 1e-8  1e-4 1e-8  5e-5 3e-4
      alpha                  1          1          10         1          4
      quantiles              200        200        200        200        200
      grey levels            0 to 1     0 to 1     0 to 255   0 to 1     0 to 1
      next action by the     target     online     online     online     online network
  bcq n_step                 10         10         1          10         1
      target copied every    200        200        8,000      200        2,000 updates
      Adam: step, epsilon    1e-4 1e-8  1e-4 1e-8  6e-5 1e-8  1e-4 1e-8  5e-5 3e-4
      threshold              0.3        0.3        0.3        0.3        0.3
      penalty of 0.01 is of  logits     logits     logits     log-probabilities
      values                 means      means      means      means      200 quantiles
      grey levels            0 to 255   0 to 255   0 to 255   0 to 255   0 to 1
      hidden layers          two        two        two        one for values and policy
  crr n_step                 10         1          1
      target copied every    200        200        500 updates
      Adam: step, epsilon    1e-4 1e-8  1e-4 1e-8  1e-4 1e-8
      weight of CQL's loss   10         10         10
      exp(A) weights         its own    all examples alike, and a gradient goes through it
      grey levels            0 to 255   0 to 255   0 to 255
  bc  Adam: step, epsilon    1e-4 1e-8  1e-4 1e-8  1e-4 1e-8
      grey levels            0 to 1     0 to 1     0 to 255

All have batches of 32, VALID padding, a discount of 0.99, Huber losses with a bend at 1 (CRR:
squares) and rewards clipped to [-1, 1]. PyTorch draws their parameters as it does by default,
biases too, for which ours have zeros; weights of our BCQ, BC and CRR have the same distribution.
Before an episode's first frame Tianshou repeats it, where ours and d3rlpy's are black. Where the
end of a shard cuts an episode, ours leaves out the rows from which n steps are not logged. There
d3rlpy takes fewer steps, and so does Tianshou, with the value of the state before the one that it
has come to; that is 30 of the 50,000 rows of the laptop study's logs. Ours leaves out six rows
more, where shards begin within an episode; there the others' stacks begin as an episode's do.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from typing import IO, Any

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks.peers import protocol
from offline_zoo import (
  atari_env,
  evaluation,
  parts,
  playing,
  processors,
  program,
  replay,
  results,
)
from offline_zoo.logs import bundled
from offline_zoo.studies import evaluate, plan

ALGORITHMS = {'tianshou': ('cql', 'bcq', 'bc', 'crr'), 'd3rlpy': ('cql', 'bcq')}
VALUES = ('defaults', 'laptop')
# Flags of ours that a library may have a knob for.
KNOBS = (
  'learning_rate', 'adam_epsilon', 'n_step', 'target_network_update_period', 'num_quantiles',
  'alpha', 'threshold', 'logits_penalty', 'mode', 'beta', 'max_weight', 'min_q_weight',
)  # fmt: skip
# Of ours, those whose grey levels go in from 0 to 1.
UNIT_GREYS = ('cql', 'bc')
# Flags with which runs learn from a part of the logs.
PARTS = (
  'shards', 'max_rows_per_shard', 'first_fraction', 'max_random_transitions', 'min_episode_return',
  'top_fraction',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
  """A run of another library's.

  Attributes:
    run: as it would be one of ours: logs, evaluation, where its results are.
    library, python: which, and its environment's.
    algorithm: by the name of our agent.
    values: hyperparameters by our flags' names, and whether grey levels go in from 0 to 1; None:
      the library's own.
  """

  run: plan.Run
  library: str
  python: str
  algorithm: str
  values: dict[str, Any] | None


def laptop_values(agent: str) -> dict[str, Any]:
  """Reads an agent's laptop.flags: the values that a library may have a knob for."""
  module = importlib.import_module(f'offline_zoo.{agent}.run_atari')
  path = pathlib.Path(module.__file__ or '').with_name('laptop.flags')
  config = program.parse_config(module.Config, f'--flagfile={path}')
  values = {name: getattr(config, name) for name in KNOBS if hasattr(config, name)}
  return {**values, 'unit_greys': agent in UNIT_GREYS}


def tasks(
  runs: Sequence[plan.Run], peers: dict[str, str], algorithms: Sequence[str], values: Sequence[str]
) -> list[Task]:
  """Lists what is to be run on the logs and with the seeds of our runs.

  Raises:
    ValueError: runs learn from a part of the logs, or there is no last evaluation.
  """
  firsts: dict[tuple[str, int], plan.Run] = {}  # of our agents', which have this in common
  for run in runs:
    firsts.setdefault((run.data, run.config.seed), run)
    if chosen := [name for name in PARTS if getattr(run.config, name) is not None]:
      raise ValueError(f'{run.data}: --{chosen[0]}: other libraries learn from whole logs here')
    if not run.num_eval_episodes:
      raise ValueError('no evaluate; expected a number of episodes')

  def task(run: plan.Run, library: str, algorithm: str, name: str) -> Task:
    agent = f'{library}_{algorithm}_{name}'
    path = run.directory.parents[1] / agent / str(run.config.seed) / 'results.csv'
    config = dataclasses.replace(run.config, results_csv_path=str(path))
    own = laptop_values(algorithm) if name == 'laptop' else None
    if own is not None and (library, algorithm) == ('tianshou', 'crr'):
      del own['n_step']  # which it does not know
    run = dataclasses.replace(run, agent=agent, config=config)
    return Task(run, library, peers[library], algorithm, own)

  return [
    task(run, library, algorithm, name)
    for run in firsts.values()
    for library in peers
    for algorithm in ALGORITHMS[library]
    for name in values
    if algorithm in algorithms
  ]


class RepeatingProcessor(processors.AtariProcessor):
  """Repeats an episode's first frame where others have black ones before it."""

  def _emit(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep:
    processed = super()._emit(timestep)
    if timestep.first():
      self._stack[:] = self._stack[-1]  # of which the observation is a view
    return processed


class Players(playing.Players):
  """Plays as our agents do, but that another says what is best."""

  _act: Any  # which need not be jitted

  def __init__(
    self,
    best_actions: Callable[[bytes], list[int]],
    processor: processors.AtariProcessor,
    make_environment: Callable[..., atari_env.AtariEnv],
    num_players: int,
    epsilon: float,
  ):
    """Makes players.

    Args:
      best_actions: takes stacks, see `protocol.Learner`.
      processor: makes observations.
      make_environment: gives an environment; has an argument `seed`.
      num_players: how many episodes are played together.
      epsilon: probability of a uniformly random action.
    """
    agent: Any = types.SimpleNamespace(processor=processor, statistics={'value': 0.0}, act=None)
    super().__init__(agent, make_environment, num_players)
    num_actions = make_environment(seed=0).action_spec().num_values

    def act(rng_key, best_action):  # draws as our agents' `act` does
      rng_key, epsilon_key, action_key = jax.random.split(rng_key, 3)
      random_action = jax.random.randint(action_key, (), 0, num_actions)
      is_random = jax.random.uniform(epsilon_key) < epsilon
      return rng_key, jnp.where(is_random, random_action, best_action), 0.0

    act = jax.jit(jax.vmap(act))
    self._params = None

    def act_in(params, rng_keys, observations):
      del params
      stacks = np.moveaxis(observations, -1, 1)  # [N, 4, 84, 84]
      return act(rng_keys, np.array(best_actions(stacks.tobytes())))

    self._act = act_in


def mean_logged_return(replay_dir: pathlib.Path, config: Any) -> float:
  """Averages the returns of the logs' episodes, as our runs do."""
  cache_dir = replay.cache_dir(config.replay_cache_dir)
  return replay.Logs(replay_dir, cache_dir=cache_dir).mean_episode_return


def flags_of(task: Task) -> dict[str, Any]:
  """What makes a run the one that it is."""
  names = (
    'environment_name', 'replay_dir', 'seed', 'num_iterations', 'num_updates_per_iteration',
    'eval_steps', 'eval_epsilon', 'sticky_action_probability',
  )  # fmt: skip
  return {name: getattr(task.run.config, name) for name in names} | (task.values or {})


def is_finished(task: Task) -> bool:
  """Whether a run is not to be run again.

  Raises:
    ValueError: it had other flags or values.
  """
  if not plan.is_evaluated(task.run, task.run.num_updates):
    return False
  path = task.run.directory / 'config.json'
  was = json.loads(path.read_text())['flags']
  for name, value in flags_of(task).items():
    if was.get(name) != value:
      raise ValueError(
        f'{path}: {name} was {was.get(name)}, and is {value} now; move its directory'
      )
  return True


def learn(task: Task, stop: parts.StopSignal, log: IO[Any]) -> np.ndarray:
  """Runs all of a run; returns the returns of its last evaluation.

  Raises:
    RuntimeError: the library's process ended.
    FloatingPointError: its loss is NaN or infinite.
  """
  config, directory = task.run.config, task.run.directory
  make_environment = functools.partial(
    atari_env.AtariEnv,
    config.environment_name,
    sticky_action_probability=config.sticky_action_probability,
    rom_dir=config.rom_dir,
  )
  num_actions = make_environment(seed=0).action_spec().num_values
  replay_dir = bundled.find_or_make(config.replay_dir, config.environment_name)
  logged = mean_logged_return(replay_dir, config)
  peer = protocol.Peer(
    task.python, f'{task.library}_learn.py', f'--replay_dir={replay_dir}',
    '--transitions=0', f'--num_actions={num_actions}', f'--seed={config.seed}',
    f'--values={json.dumps(task.values)}', stderr=log,
  )  # fmt: skip
  with contextlib.closing(peer):
    about = {'agent': task.run.agent, 'flags': flags_of(task), 'peer': peer.ready}
    results.write_atomically(directory / 'config.json', json.dumps(about, indent=2) + '\n')
    repeats = peer.ready['first_frame_is_repeated']
    processor = RepeatingProcessor() if repeats else processors.AtariProcessor()

    def players(num_players: int) -> Players:
      best_actions = functools.partial(peer.actions, task.algorithm)
      return Players(best_actions, processor, make_environment, num_players, config.eval_epsilon)

    learner: Any = types.SimpleNamespace(
      learn=lambda num_updates: {'loss': peer.loss(task.algorithm, num_updates)}
    )
    play = players(evaluation.group_size(config.eval_steps)).play
    progress = parts.Progress()
    while progress.iteration <= config.num_iterations:
      parts.learn_iteration(learner, progress, config.num_updates_per_iteration, stop)
      evaluated = evaluation.evaluate(
        play, config.eval_steps, config.seed, progress.iteration, stop
      )
      del evaluated['eval_value']
      progress.finish_iteration(config, {config.seed: evaluated}, logged)
      results.CsvWriter(directory / 'results.csv').write(progress.rows)
    played = evaluate.play_in_groups(players, task.run.num_eval_episodes, seed=0)
    returns = evaluate.returns_of(played)
    trained: Any = types.SimpleNamespace(
      name=task.run.agent, config=config, seed=config.seed, num_updates=task.run.num_updates
    )
    text = evaluate.returns_csv(trained, returns, seed=0)
    results.write_atomically(directory / 'evaluation.csv', text)
  return returns


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('path', type=pathlib.Path, help='of the file that describes a sweep')
  parser.add_argument('--peers', nargs='+', required=True, metavar='library=python')
  parser.add_argument('--algorithms', nargs='+', default=ALGORITHMS['tianshou'])
  parser.add_argument('--values', nargs='+', choices=VALUES, default=VALUES)
  args = parser.parse_args()
  peers = dict(peer.partition('=')[::2] for peer in args.peers)
  for flag, given, known in (
    ('peers', peers, ALGORITHMS), ('algorithms', args.algorithms, ALGORITHMS['tianshou']),
  ):  # fmt: skip
    if unknown := set(given) - set(known):
      parser.error(f'--{flag}: there is no {", ".join(sorted(unknown))}')
  for python in peers.values():
    if shutil.which(python) is None:
      parser.error(f'--peers: there is no program {python!r}')
  logging.set_verbosity(logging.INFO)
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  try:
    every = tasks(plan.read(args.path), peers, args.algorithms, args.values)
  except (OSError, ValueError) as error:
    parser.error(str(error))

  failed = {}
  with parts.StopSignal() as stop:
    for task in every:
      stop.check()
      log_path = task.run.directory / 'log.txt'
      log = plan.lock(log_path)
      if log is None:
        logging.info('%s is being run', task.run)
        continue
      with log:
        try:
          if is_finished(task):
            continue
          logging.info('%s', task.run)
          returns = learn(task, stop, log)
        except (FloatingPointError, OSError, RuntimeError, ValueError) as error:
          failed[task.run] = error
          logging.warning('%s failed, see %s: %s', task.run, log_path, error)
        else:
          logging.info('%s: %.1f over %d episodes', task.run, returns.mean(), len(returns))
  if failed:
    sys.exit(f'{len(failed)} of {len(every)} runs failed: {", ".join(map(str, failed))}')


if __name__ == '__main__':
  main()
