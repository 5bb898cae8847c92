"""How much of what acting and learning alone allow, acting and learning in turns reaches.

  python -m benchmarks.online [--agent=dqn] [--environment_name=pong] [--rounds=10]

In turns: `learn` of an online learner, which plays four agent steps and logs them before each
update; the same steps alone; the same updates alone. With all actions the network's.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from offline_zoo import atari_env
from offline_zoo.online import run_atari

STEPS = 4


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--agent', default='dqn')
  parser.add_argument('--environment_name', default='pong')
  parser.add_argument('--replay_capacity', type=int, default=100_000)
  parser.add_argument('--warmup_steps', type=int, default=5_000)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--updates', type=int, default=50, help='a round')
  args = parser.parse_args()

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  config = run_atari.Config(
    agent=args.agent,
    environment_name=args.environment_name,
    replay_capacity=args.replay_capacity,
    warmup_steps=args.warmup_steps,
    epsilon_decay_steps=1,
    final_epsilon=0.0,
  )
  environment = atari_env.AtariEnv(args.environment_name, seed=0)
  learner = run_atari.make_learner(config, environment.action_spec().num_values)
  start = time.perf_counter()
  learner.start(pathlib.Path('none'), 1)
  learner.learn(1)
  print(
    f'{args.warmup_steps:,} steps of warm-up and compiling: {time.perf_counter() - start:.0f} s'
  )

  def learn() -> None:
    learner.learn(args.updates)

  def act() -> None:
    for _ in range(STEPS * args.updates):
      learner.play_step()
    # These are not of the schedule, which would otherwise wait for its updates.
    learner.num_steps -= STEPS * args.updates

  def update() -> None:
    for _ in range(args.updates):
      learner.learn_step()

  seconds: dict[str, list[float]] = {'together': [], 'acting': [], 'learning': []}
  for function in (learn, act, update):
    function()
  for _ in range(args.rounds):
    for name, function in zip(seconds, (learn, act, update), strict=True):
      start = time.perf_counter()
      function()
      seconds[name].append((time.perf_counter() - start) / args.updates)

  medians = {name: 1e3 * np.median(times) for name, times in seconds.items()}
  ratios = (np.array(seconds['acting']) + seconds['learning']) / seconds['together']
  print(
    f'{args.agent}, {args.environment_name}, {jax.devices()[0].device_kind}, '
    f'{args.rounds} rounds of {args.updates} updates, {STEPS} agent steps each'
  )
  print(', '.join(f'{name} {ms:.1f} ms an update' for name, ms in medians.items()))
  print(
    f'{1e3 / medians["together"]:.1f} updates/s, {1e3 * STEPS / medians["together"]:.0f} agent '
    f'steps/s; {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) of what the sum '
    'of acting and learning allows'
  )


if __name__ == '__main__':
  main()
