"""Updates a second of the DQN learner, beside Dopamine's and beside the bound of this machine.

  python -m benchmarks.learn --peer_python=<venv>/bin/python

Takes turns, in one process each, between our `learn`, the naive form of it (plain convolutions in a
scan) and, if `--peer_python` names the Python of an environment made as benchmarks/peers/README.md
says, Dopamine's JAX DQN on its own replay; all with SAME padding, batch 32 and the same logs.
Prints the median over rounds and the ratio to ours round by round.

The bound is the time that the update's matrix products take at the rate measured here for a large
one, plus the time that its least memory traffic takes at the bandwidth measured here for a large
sum; see `matmul_flops` and `least_bytes`.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from offline_zoo import replay
from offline_zoo.dqn import agent, run_atari
from offline_zoo.logs import demo, open_shards

BATCH_SIZE = 32
NUM_ACTIONS = 6
# Output positions, inputs to each and outputs at each, of the five layers with SAME padding.
LAYERS = (
  (21 * 21, 8 * 8 * 4, 32),
  (11 * 11, 4 * 4 * 32, 64),
  (11 * 11, 3 * 3 * 64, 64),
  (1, 11 * 11 * 64, 512),
  (1, 512, NUM_ACTIONS),
)


def matmul_flops() -> int:
  """Of one update: online and target values, and the gradients of weights and of inputs."""
  passes = [2 * BATCH_SIZE * positions * inputs * outputs for positions, inputs, outputs in LAYERS]
  # The first layer's inputs need no gradient.
  return 4 * sum(passes) - passes[0]


def least_bytes() -> int:
  """Of one update: what cannot stay in a cache, 4 bytes a number.

  Centered RMSProp reads online parameters, gradients and two moments and writes all but the
  gradients; the forward passes read online and target parameters, the backward pass reads the
  online ones and writes gradients. Activations are written and read once for each network, and
  their gradients once. Frames are a byte a pixel.
  """
  num_parameters = sum(inputs * outputs + outputs for _, inputs, outputs in LAYERS)
  activations = BATCH_SIZE * sum(positions * outputs for positions, _, outputs in LAYERS)
  return 4 * (11 * num_parameters + 6 * activations) + 2 * 2 * BATCH_SIZE * 84 * 84 * 4


def make_learner(data: replay.ReplayData) -> agent.Dqn:
  return run_atari.make_agent(run_atari.Config(), NUM_ACTIONS, data)


def seconds(function: Callable[[], object]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def resident_gigabytes() -> float:
  """Memory that this process holds now (Linux)."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 1e9


class Peer:
  """What a script in peers/ serves from another environment, one line of JSON a request."""

  def __init__(self, python: str, script: str, *flags: str):
    self._script = pathlib.Path(__file__).parent / 'peers' / script
    self._process = subprocess.Popen(
      [python, str(self._script), *flags],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    self.ready = self._answer()

  def _answer(self) -> dict:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'the peer ended; run {self._script} by hand to see why')
    return json.loads(line)

  def ask(self, request: object) -> dict:
    """Its answer to one line of JSON."""
    assert self._process.stdin is not None
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return self._answer()

  def seconds(self, number: int) -> float:
    """How long so many updates, or batches, took."""
    return self.ask(number)['seconds']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--replay_dir', help='Pong logs; default: the demo logs')
  parser.add_argument('--peer_python', help="the Python of the peer's environment")
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--updates', type=int, default=100, help='a round, of ours and the peer')
  parser.add_argument('--naive_updates', type=int, default=8, help='a round, of the naive form')
  args = parser.parse_args()

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  replay_dir = pathlib.Path(args.replay_dir or demo.find_or_make('pong'))
  # One shard is all that the peer holds, too.
  first = open_shards(replay_dir)[0].number
  data = replay.load(replay_dir, [first], num_actions=NUM_ACTIONS)
  ours = make_learner(data)
  square = jnp.ones((2048, 2048))
  product = jax.jit(lambda a: a @ a)
  vector = jnp.ones(2**26)
  add = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place, so that no pages are touched anew

  ours.learn(1)
  ours.learn(1)
  compiled: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  # While nothing else runs in this process, so that any growth is the learner's.
  ours.learn(args.updates)
  resident = [resident_gigabytes()]
  ours.learn(5 * args.updates)
  resident.append(resident_gigabytes())

  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):  # chooses the scan
    naive = make_learner(data)
  naive.learn(args.naive_updates)
  product(square).block_until_ready()
  vector = add(vector)
  peer = None
  if args.peer_python:
    peer = Peer(args.peer_python, 'dopamine_dqn.py', f'--replay_dir={replay_dir}')
  names = ['offline_zoo', 'plain convolutions in a scan', *(['dopamine'] if peer else [])]
  per_update: dict[str, list[float]] = {name: [] for name in names}
  product_seconds, add_seconds = [], []
  compiled.clear()
  for _ in range(args.rounds):
    per_update[names[0]].append(seconds(lambda: ours.learn(args.updates)) / args.updates)
    if peer:
      per_update[names[2]].append(peer.seconds(args.updates) / args.updates)
    product_seconds.append(seconds(lambda: product(square)))
    start = time.perf_counter()
    vector = add(vector).block_until_ready()
    add_seconds.append(time.perf_counter() - start)
    naive_seconds = seconds(lambda: naive.learn(args.naive_updates))
    per_update[names[1]].append(naive_seconds / args.naive_updates)

  device = jax.devices()[0].device_kind
  print(f'DQN, SAME padding, batch {BATCH_SIZE}, {device}, jax {jax.__version__}')
  print(f'{args.rounds} rounds of {args.updates} updates (naive: {args.naive_updates}), in turns')
  if peer:
    print(
      'peer: ' + ', '.join(f'{name} {version}' for name, version in peer.ready['versions'].items())
    )
  print('\n| learner | updates/s, median (min to max) | ours is faster by, median (min to max) |')
  print('|---|---|---|')
  for name in names:
    rates = 1 / np.array(per_update[name])
    ratios = np.array(per_update[name]) / np.array(per_update[names[0]])
    print(
      f'| {name} | {np.median(rates):.1f} ({rates.min():.1f} to {rates.max():.1f}) | '
      f'{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) |'
    )
  flop_rate = 2 * 2048**3 / np.median(product_seconds)
  bandwidth = 2 * vector.nbytes / np.median(add_seconds)
  flop_time, byte_time = matmul_flops() / flop_rate, least_bytes() / bandwidth
  time_taken = np.median(per_update[names[0]])
  print(
    f'\nBound: {matmul_flops() / 1e9:.2f} GFLOP at {flop_rate / 1e9:.0f} GFLOP/s is '
    f'{1e3 * flop_time:.1f} ms, {least_bytes() / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s is '
    f'{1e3 * byte_time:.1f} ms; an update takes {1e3 * time_taken:.1f} ms: '
    f'{(flop_time + byte_time) / time_taken:.0%} of the bound is reached.'
  )
  print(f'Compilations during the rounds: {len(compiled)}.')
  print(
    f'Resident memory after {args.updates} updates {resident[0]:.3f} GB, after '
    f'{6 * args.updates} {resident[1]:.3f} GB.'
  )


if __name__ == '__main__':
  main()
