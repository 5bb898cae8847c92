"""How much of what an agent has learnt with is dead: units that no state makes active.

  python -m benchmarks.live_units runs/dqn/pong/1/checkpoint ...

The agent of each checkpoint sees states of random play, of its own game, always the same ones. Of
each hidden layer it is said how many of its units (a convolution's: channels) are above zero in any
of these states, and of how many. Parameters of a dead unit have no gradient. Of an agent that has
several networks, a unit counts that is live in any of them.
"""

import argparse
import collections
import pathlib

import haiku as hk
import jax
import numpy as np

from offline_zoo import trained_agent

FRAMES_BETWEEN = 40  # two states; before the first one of an episode, whose stack has blank frames
HIDDEN_UNITS = 512


def live_units(checkpoint: pathlib.Path, num_states: int) -> dict[str, np.ndarray]:
  """Says which units [N] of each layer, by its name, are above zero in any of so many states.

  Raises:
    FileNotFoundError, ValueError: as `trained_agent.restore`.
  """
  trained = trained_agent.restore(checkpoint, eval_epsilon=1.0)
  agent, environment = trained.agent, trained.make_environment(seed=0)
  outputs: dict[str, list[np.ndarray]] = collections.defaultdict(list)

  def record(method, args, kwargs, context):
    output = method(*args, **kwargs)
    module, is_call = context.module, context.method_name == '__call__'
    is_hidden = isinstance(module, hk.Linear) and module.output_size == HIDDEN_UNITS
    if is_call and (is_hidden or isinstance(module, hk.Conv2D)):
      units = np.asarray(output).reshape(-1, output.shape[-1])
      outputs[module.module_name].append(np.asarray(np.any(units > 0, axis=0)))
    return output

  agent.reset(jax.random.key(0))
  timestep, frame = environment.reset(), 0
  while min(map(len, outputs.values()), default=0) < num_states:
    if timestep.last():
      agent.reset()
      timestep, frame = environment.reset(), 0
    if frame >= FRAMES_BETWEEN and frame % FRAMES_BETWEEN < 4:  # one of the four has a decision
      with jax.disable_jit(), hk.intercept_methods(record):
        action = agent.step(timestep)
    else:
      action = agent.step(timestep)
    timestep, frame = environment.step(action), frame + 1
  return {name: np.any(states, axis=0) for name, states in outputs.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('checkpoints', nargs='+', type=pathlib.Path, help='directories of runs')
  parser.add_argument('--num_states', type=int, default=100)
  args = parser.parse_args()
  if args.num_states < 1:
    parser.error(f'--num_states={args.num_states}: expected 1 or more')
  for checkpoint in args.checkpoints:
    layers = live_units(checkpoint, args.num_states)
    text = (f'{name} {live.sum()}/{len(live)}' for name, live in layers.items())
    print(f'{checkpoint}: ' + ', '.join(text), flush=True)


if __name__ == '__main__':
  main()
