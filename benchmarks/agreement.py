"""How often agents, as their runs left them, do in logged states what was logged there.

  python -m benchmarks.agreement --replay_dir=<logs> runs/cql/pong/1 runs/bcq/pong/1

Each run is named by the directory of its CSV, with its checkpoint in it. States are drawn
uniformly from the logs' valid rows; agents act as in evaluation, random actions included. A policy
that always does the most frequent action agrees in all of that action's states and in none else.
"""

import argparse
import importlib
import pathlib
from typing import Any

import jax
import numpy as np

from offline_zoo import atari_env, checkpoints, replay

BATCH_SIZE = 100


def restored(run: pathlib.Path, data: replay.ReplayData) -> tuple[dict[str, Any], Any]:
  """A run's flags, and its agent as its newest checkpoint has it."""
  checkpoint = checkpoints.Checkpoints(run / 'checkpoint').restore()
  if checkpoint is None:
    raise SystemExit(f'{run / "checkpoint"}: no checkpoint here')
  identity = checkpoint.record['identity']
  module = importlib.import_module(f'offline_zoo.{identity["agent"]}.run_atari')
  flags: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v for k, v in identity['flags'].items()
  }
  environment = atari_env.AtariEnv(flags['environment_name'], seed=0)
  agent = module.make_agent(module.Config(**flags), environment.action_spec().num_values, data)
  agent.set_state(checkpoint.state(agent.get_state()))
  return flags, agent


def actions(agent: Any, data: replay.ReplayData, rows: np.ndarray) -> np.ndarray:
  """What the agent does in the states of these rows."""
  params = agent.get_state().online_params

  @jax.jit
  def act(data, rows, rng_key):
    s_tm1 = replay.gather(data, rows).s_tm1
    rng_keys = jax.random.split(rng_key, len(rows))
    _, chosen, _ = jax.vmap(agent.act, (None, 0, 0))(params, rng_keys, s_tm1)
    return chosen

  batches = np.split(rows, len(rows) // BATCH_SIZE)
  keys = jax.random.split(jax.random.PRNGKey(0), len(batches))
  return np.concatenate([act(data, *batch) for batch in zip(batches, keys, strict=True)])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('runs', nargs='+', type=pathlib.Path, metavar='run')
  parser.add_argument('--replay_dir', required=True)
  parser.add_argument('--states', type=int, default=10_000, help=f'a multiple of {BATCH_SIZE}')
  args = parser.parse_args()

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  data = replay.load(args.replay_dir)
  valid = np.asarray(replay.valid_rows(data))
  rows = np.random.default_rng(0).choice(valid, args.states, replace=False)
  logged = np.asarray(replay.gather(data, rows).a_tm1)
  chosen, names = [], []
  for run in args.runs:
    flags, agent = restored(run, data)
    chosen.append(actions(agent, data, rows))
    names.append(f'{run}, {int(agent.get_state().num_updates):,} updates')
  meanings = atari_env.AtariEnv(flags['environment_name'], seed=0).action_meanings
  print('| logged action | of the states | ' + ' | '.join(names) + ' |')
  print('|---' * (2 + len(names)) + '|')
  for action, meaning in [*enumerate(meanings), (None, 'any')]:
    here = np.ones(len(rows), bool) if action is None else logged == action
    if here.any():
      cells = [f'{(chosen_by == logged)[here].mean():.0%}' for chosen_by in chosen]
      print(f'| {meaning} | {here.mean():.1%} | {" | ".join(cells)} |')


if __name__ == '__main__':
  main()
