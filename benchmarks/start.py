"""Seconds from the command to the first update, and where they go.

  python -m benchmarks.start --agent=cql [--rounds=5]

Each round starts the program anew, by turns with an empty compilation cache and with the one that
the start before has filled. The demo logs are encoded beforehand, as they are from the second start
on. Prints medians.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import numpy as np

from offline_zoo.logs import demo

# What begins where the one before ends.
STAGES = ('imports', 'device, emulator', 'logs', 'agent', 'results', 'first update')
# Runs an agent's program until its first update is done; says when each stage ended.
CHILD = """
import importlib, json, os, sys, time
times = []
def ends(function):
  def timed(*args, **kwargs):
    answer = function(*args, **kwargs)
    times.append(time.time())
    return answer
  return timed
agent = sys.argv.pop(1)
module = importlib.import_module(f'offline_zoo.{agent}.run_atari')
from offline_zoo import atari_env, parts, program, replay, results
times.append(time.time())
def first_update(learner, *args):
  learner.learn(1)
  times.append(time.time())
  print(json.dumps(times), flush=True)
  os._exit(0)
atari_env.AtariEnv.action_spec = ends(atari_env.AtariEnv.action_spec)
replay.Logs.resident = ends(replay.Logs.resident)
module.make_agent = ends(module.make_agent)
results.Results.resume = ends(results.Results.resume)
parts.learn_iteration = first_update
program.run(module.main, module.Config)
"""


def start(agent: str, *flags: str) -> np.ndarray:
  """Seconds that each stage takes in a new process."""
  with tempfile.TemporaryDirectory() as directory:
    command = [sys.executable, '-c', CHILD, agent, f'--results_csv_path={directory}/results.csv']
    began = time.time()
    run = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
  if run.returncode:
    raise RuntimeError(run.stderr)
  times = json.loads(run.stdout.splitlines()[-1])
  # The shards are asked for twice: before the agent is made and in the loop of iterations.
  del times[5]
  return np.diff([began, *times])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--agent', default='cql')
  parser.add_argument('--environment_name', default='pong')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()

  demo.find_or_make(args.environment_name)
  flags = (f'--environment_name={args.environment_name}', '--replay_dir=demo')
  start(args.agent, *flags, '--compilation_cache_dir=none')  # encodes the logs
  seconds: dict[str, list[np.ndarray]] = {'empty cache': [], 'warm cache': []}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as cache:
      for rounds in seconds.values():
        rounds.append(start(args.agent, *flags, f'--compilation_cache_dir={cache}'))
  print(f'{args.agent} on {args.environment_name}, {args.rounds} rounds\n')
  print('| seconds | ' + ' | '.join(STAGES) + ' | together |')
  print('|' + '---|' * (len(STAGES) + 2))
  for name, rounds in seconds.items():
    stages = np.median(rounds, axis=0)
    together = np.median(np.sum(rounds, axis=1))
    print(f'| {name} | ' + ' | '.join(f'{x:.2f}' for x in stages) + f' | {together:.2f} |')


if __name__ == '__main__':
  main()
