"""How much of what acting and learning alone allow, acting and learning in turns reaches.

  python -m benchmarks.online [--agent=dqn] [--environment_name=pong] [--rounds=10]
  python -m benchmarks.online --peer=/tmp/peer_dopamine/bin/python

In turns: `learn` of an online learner, which plays four agent steps and logs them before each
update; the same steps alone; the same updates alone. With all actions the network's. With a peer,
the same of Dopamine's DQN in its own loop, in the same rounds; peers/README.md makes its
environment.
"""

import argparse
import itertools
import pathlib
import time

import jax
import numpy as np

from benchmarks.peers import protocol
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
  parser.add_argument('--peer', help="the Python of Dopamine's environment")
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
  while learner.epsilon:  # which an episode keeps that began in the warm-up
    learner.learn(1)
  print(
    f'{args.warmup_steps:,} steps of warm-up and compiling: {time.perf_counter() - start:.0f} s'
  )

  def learn() -> None:
    learner.learn(args.updates)

  # After these two, steps and updates are again as the schedule has them.
  def act() -> None:
    for _ in range(STEPS * args.updates):
      learner.play_step()

  def update() -> None:
    for _ in range(args.updates):
      learner.learn_step()

  functions = {'together': learn, 'acting': act, 'learning': update}

  def ours(what: str) -> float:
    start = time.perf_counter()
    functions[what]()
    return time.perf_counter() - start

  loops = {f'{args.agent} here': ours}
  if args.peer:
    peer = protocol.Peer(
      args.peer, 'dopamine_play.py', f'--environment_name={args.environment_name}',
      f'--warmup_steps={args.warmup_steps}', f'--capacity={args.replay_capacity}',
    )  # fmt: skip

    def theirs(what: str) -> float:
      return peer.ask({'do': what, 'updates': args.updates})['seconds']

    loops["Dopamine's dqn"] = theirs
    print(peer.ready['versions'])

  seconds = {name: {what: np.zeros(args.rounds) for what in functions} for name in loops}
  for number in range(-1, args.rounds):  # the first one warms up
    for (name, loop), what in itertools.product(loops.items(), functions):
      seconds[name][what][number] = loop(what) / args.updates

  print(
    f'\n{args.environment_name}, {jax.devices()[0].device_kind}, {args.rounds} rounds of '
    f'{args.updates} updates, {STEPS} agent steps each\n'
  )
  print(f'| ms an update | {" | ".join(functions)} | sum over together | agent steps/s |')
  print('|' + '---|' * (len(functions) + 3))
  for name, times in seconds.items():
    ratios = (times['acting'] + times['learning']) / times['together']
    medians = [f'{1e3 * np.median(times[what]):.1f}' for what in functions]
    print(
      f'| {name} | {" | ".join(medians)} '
      f'| {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) '
      f'| {STEPS / np.median(times["together"]):.0f} |'
    )
  if args.peer:
    one, other = (times['together'] for times in seconds.values())
    print(f'\nDopamine over ours, together: {np.median(other / one):.2f}')


if __name__ == '__main__':
  main()
