"""Frames a second of evaluation with so many workers, and what workers cost the learning beside it.

  python -m benchmarks.evaluate [--workers=0,1,2] [--rounds=3] [--learn]

Plays a policy of random parameters (Freeway's episodes are all of one length) in turns with each
number of workers, 0 being this process, and prints medians. `--learn` measures updates a second
instead, alone and beside one worker that plays; both on as many cores as `taskset` leaves.
"""

import argparse
import contextlib
import functools
import threading

import numpy as np

from benchmarks import learn
from offline_zoo import atari_env, evaluation, playing, program, replay
from offline_zoo.dqn import run_atari
from offline_zoo.logs import demo


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--environment_name', default='freeway')
  parser.add_argument('--workers', default='0,1,2')
  parser.add_argument('--eval_steps', type=int, default=16_000)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--learn', action='store_true')
  parser.add_argument('--updates', type=int, default=60, help='a round of --learn')
  args = parser.parse_args()

  program._set_up_jax('cpu')
  program._keep_what_is_compiled(None)
  config = run_atari.Config(environment_name=args.environment_name)
  make_environment = functools.partial(atari_env.AtariEnv, args.environment_name)
  num_actions = make_environment(seed=0).action_spec().num_values
  make_agent = functools.partial(run_atari.make_agent, config, num_actions, None)
  agent = make_agent()
  params = agent.get_state().online_params
  size = evaluation.group_size(args.eval_steps)

  if args.learn:
    agent.data = replay.load(demo.find_or_make(args.environment_name), num_actions=num_actions)
    agent.learn(1)
    rates: dict[str, list[float]] = {'alone': [], 'beside a worker': []}
    with contextlib.closing(evaluation.Workers(1, make_agent, make_environment, size)) as workers:
      workers.play(params, 1, 0, 0)
      for number in range(1, args.rounds + 1):
        learnt = threading.Event()
        play = functools.partial(workers.play, params, 10**9, 0, number, cancelled=learnt.is_set)
        seconds = learn.seconds(agent.learn, args.updates)
        rates['alone'].append(args.updates / seconds)
        thread = threading.Thread(target=play)
        thread.start()
        seconds = learn.seconds(agent.learn, args.updates)
        rates['beside a worker'].append(args.updates / seconds)
        learnt.set()
        thread.join()
    print('| DQN learns | updates/s, median (min to max) |\n|---|---|')
    for name, values in rates.items():
      print(f'| {name} | {np.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |')
    ratios = np.array(rates['beside a worker']) / np.array(rates['alone'])
    print(f'\nSlowed to {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}).')
    return

  numbers = [int(number) for number in args.workers.split(',')]
  players = playing.Players(agent, make_environment, size)
  players.set_params(params)
  players.play((0, 0, 0), num_steps=1)
  frame_rates: dict[int, list[float]] = {number: [] for number in numbers}
  results = []
  with contextlib.ExitStack() as stack:
    pools = {
      number: stack.enter_context(
        contextlib.closing(evaluation.Workers(number, make_agent, make_environment, size))
      )
      for number in numbers
      if number
    }
    for pool in pools.values():
      pool.play(params, 1, 0, 0)
    for number in range(1, args.rounds + 1):
      for count in numbers:
        if count:
          result = pools[count].play(params, args.eval_steps, 0, number)
        else:
          result = evaluation.evaluate(players.play, args.eval_steps, 0, number)
        assert result is not None
        frame_rates[count].append(result.pop('eval_frame_rate'))
        del result['eval_seconds']
        results.append((number, result))
  same = all(result == dict(results)[number] for number, result in results)
  print('| workers | frames/s, median (min to max) | of those of the first |\n|---|---|---|')
  first = np.array(frame_rates[numbers[0]])
  for count, values in frame_rates.items():
    print(
      f'| {count} | {np.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f}) | '
      f'{np.median(np.array(values) / first):.2f} |'
    )
  print(f'\nAll gave the same: {same}.')


if __name__ == '__main__':
  main()
