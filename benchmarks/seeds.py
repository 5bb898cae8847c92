"""Updates a second of one seed, of several together and of several in turn.

  python -m benchmarks.seeds --agent=dqn --num_seeds=5

In each round each makes the same number of updates of each of its seeds, of 32 transitions. A rate
counts the updates of one seed: at the same rate, five seeds make five times the updates. Processor
time is that of all threads, for an update of one seed.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from benchmarks import learn
from offline_zoo import seeds
from offline_zoo.logs import demo


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--agent', default='dqn')
  parser.add_argument('--num_seeds', type=int, default=5)
  parser.add_argument('--replay_dir', help='Pong logs; default: the demo logs')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--updates', type=int, default=20, help='a round, of each seed')
  args = parser.parse_args()

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  replay_dir = pathlib.Path(args.replay_dir or demo.find_or_make('pong'))
  data = learn.load(replay_dir, args.agent)
  agent = learn.make_learner(data, learn.Learner(args.agent, 'SAME', 0))
  learners = {
    f'{num_seeds} {how}': (learn_loop(agent.update), num_seeds)
    for how, learn_loop, num_seeds in (
      ('alone', seeds.learn_in_turn, 1),
      ('together', seeds.learn_together, args.num_seeds),
      ('in turn', seeds.learn_in_turn, args.num_seeds),
    )
  }
  states = {
    name: [agent.initial_state(jax.random.PRNGKey(seed)) for seed in range(num_seeds)]
    for name, (_, num_seeds) in learners.items()
  }
  taken: dict[str, list[tuple[float, float]]] = {name: [] for name in learners}
  for number in range(args.rounds + 1):
    for name, (learn_several, num_seeds) in learners.items():
      wall, processor = time.perf_counter(), time.process_time()
      states[name], _ = learn_several(states[name], data, args.updates)
      seconds = time.perf_counter() - wall, (time.process_time() - processor) / num_seeds
      if number:  # the first round compiles
        taken[name].append(seconds)

  print(
    f'{args.agent}, {jax.devices()[0].device_kind}, jax {jax.__version__}; {args.rounds} rounds of '
    f'{args.updates} updates, in turns. Medians (least to most):\n'
  )
  print(
    '| seeds | updates/s of each | of all | ms of processor time an update |\n|---|---|---|---|'
  )
  for name, (_, num_seeds) in learners.items():
    wall, processor = np.array(taken[name]).T / args.updates
    cells = [name, learn.spread(1 / wall, 1), f'{num_seeds / np.median(wall):.1f}']
    print(f'| {" | ".join([*cells, learn.spread(1e3 * processor, 1)])} |')


if __name__ == '__main__':
  main()
