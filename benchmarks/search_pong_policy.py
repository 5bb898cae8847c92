"""Finds the constants of the demo logs' Pong policy by cross-entropy search.

  python -m benchmarks.search_pong_policy

A candidate's score is its mean return over games with some rates of random actions, each cut after
2,500 agent steps, so that winning soon counts. Every generation plays games of its own. The search
is noisy: generations after the first few move the constants about as much as luck does.
"""

import argparse
import time

import ale_py
import numpy as np

from offline_zoo.logs import demo_policies

START = np.array([10.0, 8.0, 122.0, 0.48, 10.3, 132.0])
SPREAD = np.array([4.0, 4.0, 20.0, 0.3, 3.0, 10.0])
LEAST_SPREAD = np.array([0.3, 0.3, 2.0, 0.03, 0.3, 2.0])
RANDOM_RATES = (0.0, 0.03, 0.06, 0.1)


def play(constants, seed: int, random_rate: float, max_steps: int) -> tuple[float, int]:
  """Return and agent steps of one game under sticky actions."""
  ale = ale_py.ALEInterface()
  ale.setInt('random_seed', seed)
  ale.setFloat('repeat_action_probability', 0.25)
  rom = ale_py.roms.get_rom_path('pong')
  assert rom is not None  # ships with ale-py
  ale.loadROM(rom)
  actions = ale.getMinimalActionSet()
  rng = np.random.default_rng(seed)
  policy = demo_policies.PongPolicy(constants)
  total, steps = 0.0, 0
  while steps < max_steps and not ale.game_over():
    action = policy(ale.getRAM())
    if rng.random() < random_rate:
      action = int(rng.integers(len(actions)))
    total += sum(ale.act(actions[action]) for _ in range(4))
    steps += 1
  return total, steps


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--minutes', type=float, default=5.0)
  parser.add_argument('--population', type=int, default=20)
  parser.add_argument('--num_elites', type=int, default=5)
  parser.add_argument('--seed', type=int, default=1)
  args = parser.parse_args()

  ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
  rng = np.random.default_rng(args.seed)
  mean, spread = START, SPREAD
  start, generation = time.monotonic(), 0
  while time.monotonic() - start < 60 * args.minutes:
    candidates = mean + spread * rng.standard_normal((args.population, len(mean)))
    seeds = 1000 * generation + np.arange(len(RANDOM_RATES))
    scores = np.array(
      [
        np.mean([play(c, int(s), e, 2500)[0] for s, e in zip(seeds, RANDOM_RATES, strict=True)])
        for c in candidates
      ]
    )
    elites = candidates[np.argsort(scores)[-args.num_elites :]]
    mean, spread = elites.mean(axis=0), elites.std(axis=0) + LEAST_SPREAD
    generation += 1
    print(f'{generation}: mean score {scores.mean():.1f}, constants {mean.round(2).tolist()}')

  print('| random rate | mean return | std | min | max | steps a game |\n|--|--|--|--|--|--|')
  for random_rate in (0.0, 0.01, 0.02, 0.03, 0.05, 0.1):
    games = [play(mean, 10**6 + i, random_rate, 27_000) for i in range(16)]
    returns = np.array([score for score, _ in games])
    steps = np.mean([steps for _, steps in games])
    print(
      f'| {random_rate} | {returns.mean():.1f} | {returns.std():.1f} | {returns.min():.0f} | '
      f'{returns.max():.0f} | {steps:.0f} |'
    )


if __name__ == '__main__':
  main()
