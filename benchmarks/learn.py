"""Updates a second of every agent, beside other libraries' and beside the bound of this machine.

  python -m benchmarks.learn --peers tianshou=<python> d3rlpy=<python> dopamine=<python>

benchmarks/peers/README.md says how to make the environments whose Pythons these are; without them,
ours run alone. In each round every learner makes the same number of updates of 32 transitions, each
peer right after the learner of ours that does the same work: the same algorithm with the same
padding. `LEARNERS` says which, and how often each passes through its network. All sample from the
same logs: ours from one resident shard, peers from its first 5,000 transitions in their replays.

The bound is the time that an update's floating-point operations, as XLA counts them, take at the
rate measured here for a large matrix product, plus the time that its least memory traffic takes at
the bandwidth measured here for a large sum; see `least_bytes`. Where the time goes is read from a
trace, in which operations that run at the same time count in full; see `kinds`.
"""

import argparse
import dataclasses
import functools
import gzip
import importlib
import json
import pathlib
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import protocol
from offline_zoo import networks, parts, replay
from offline_zoo.logs import demo, open_shards

BATCH_SIZE = 32
NUM_ACTIONS = 6


class Learner(NamedTuple):
  """One of ours, and the peers that do the same work.

  Attributes:
    agent: its directory.
    padding: of the convolutions.
    passes: forward passes through the convolutions in an update, which makes one backward besides.
    peers: passes of each library's algorithm of the agent's name.
    settings: flags, where they are not the defaults.
    in_scan: whether its updates are a scan, as on a GPU, rather than a loop over a jitted one.
  """

  agent: str
  padding: str
  passes: int
  peers: Mapping[str, int] = {}
  settings: Mapping[str, Any] = {}
  in_scan: bool = False

  @property
  def name(self) -> str:
    flags = (f'--{name}={value}' for name, value in self.settings.items())
    return ' '.join([self.agent, *flags, *(['in a scan'] if self.in_scan else [])])


DOUBLE = {'double_q': True}
# Peers that have a flag for it, or always do so, choose the next action with the online network: so
# do ours beside them. What is left of extra passes is in their ways, not in the algorithms:
# Tianshou's BCQ and CRR, and d3rlpy's BCQ, pass through shared convolutions once for each head;
# d3rlpy's CQL passes, forward and backward, once more for its conservative term. peers/*_learn.py
# rid both libraries' QR-DQN of a third pass, which ours has no flag for. Nobody else has the rest.
LEARNERS = (
  Learner('dqn', 'VALID', 3, {'tianshou': 3, 'd3rlpy': 3}, DOUBLE),
  Learner('qrdqn', 'VALID', 2, {'tianshou': 2, 'd3rlpy': 2}),
  Learner('cql', 'VALID', 3, {'tianshou': 3, 'd3rlpy': 4}, DOUBLE),
  Learner('c51', 'VALID', 3, {'tianshou': 3}, DOUBLE),
  Learner('bcq', 'VALID', 3, {'tianshou': 5, 'd3rlpy': 5}),
  Learner('crr', 'VALID', 2, {'tianshou': 4}),
  Learner('bc', 'VALID', 1, {'tianshou': 1, 'd3rlpy': 1}),
  Learner('dqn', 'SAME', 2, {'dopamine': 2}),
  Learner('qrdqn', 'SAME', 2, {'dopamine': 2}),
  Learner('c51', 'SAME', 2, {'dopamine': 2}),
  Learner('cql', 'SAME', 2),
  Learner('bcq', 'SAME', 3),
  Learner('crr', 'SAME', 2),
  Learner('bc', 'SAME', 1),
  Learner('rem', 'SAME', 2),
  Learner('multi_network_rem', 'SAME', 2),  # each of four networks
  Learner('off_policy_dqn', 'SAME', 2),  # the target network's of six states for each transition
  Learner('dqn', 'SAME', 2, in_scan=True),  # the naive form, ten times slower
)


def make_learner(data: replay.ReplayData, learner: Learner = LEARNERS[7]) -> parts.Learner:
  """One of ours, at the beginning of its learning; by default DQN as it comes."""
  run_atari = importlib.import_module(f'offline_zoo.{learner.agent}.run_atari')
  config = dataclasses.replace(run_atari.Config(), **learner.settings)
  padded = {
    name: functools.partial(function, padding=learner.padding)
    for name, function in vars(networks).items()
    if name.endswith('_network')
  }
  backend = 'gpu' if learner.in_scan else jax.default_backend()
  with (
    mock.patch.dict(vars(networks), padded),
    mock.patch.object(jax, 'default_backend', lambda: backend),
  ):
    return run_atari.make_agent(config, NUM_ACTIONS, data)


def load(replay_dir: pathlib.Path, agent: str) -> replay.ReplayData:
  """One shard, as the agent wants it."""
  first = open_shards(replay_dir)[0].number
  if agent == 'off_policy_dqn':
    return replay.load(
      replay_dir, [first], num_actions=NUM_ACTIONS, n_step=5, with_probabilities=True
    )
  return replay.load(replay_dir, [first], num_actions=NUM_ACTIONS)


def lowered_update(learner: parts.Learner) -> jax.stages.Lowered:
  """The update as `learn` has it, so that compiling it again takes no time."""
  state = jax.eval_shape(learner.initial_state, jax.random.PRNGKey(0))
  return jax.jit(learner.update, donate_argnums=0).lower(state, learner.data)


def least_bytes(learner: parts.Learner, passes: int) -> int:
  """Of one update: what is too large for a cache to keep, which is all that has parameters' shapes.

  Passes forward and the one backward read the parameters, and the latter writes gradients. The
  optimiser reads gradients, and reads and writes parameters and its own state.
  """
  state = jax.eval_shape(learner.initial_state, jax.random.PRNGKey(0))
  parameters, optimizer_state = (
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    for tree in (state.online_params, state.opt_state)
  )
  return (passes + 2 + 3) * parameters + 2 * optimizer_state


def kind(name: str, operation: str) -> str:
  """Says what an operation of an update is for.

  Args:
    name: in XLA's compiled program and in a trace of it.
    operation: its text there, and that of the operations fused in it.
  """
  path = ''.join(re.findall('op_name="([^"]*)"', operation)[:1])  # of JAX's transformations
  if 'jit(sample' in path:
    return 'sampling'
  if re.search(r' (convolution|dot)\(', operation):
    return 'products forward' if 'jvp(' in path and 'transpose(' not in path else 'and backward'
  if 'copy' in name or 'transpose' in name:
    return 'layout'
  return 'rest of loss' if 'jvp(' in path else 'optimiser'


KINDS = (
  'products forward', 'and backward', 'rest of loss', 'layout', 'optimiser', 'sampling',
)  # fmt: skip


def shares(
  learner: parts.Learner, update: jax.stages.Compiled, num_updates: int
) -> dict[str, float]:
  """Traces updates: how much of the time that operations take is spent on each kind.

  Operations that run at the same time count in full.
  """
  program = update.as_text() or ''
  computations = dict(re.findall(r'^%(\S+) [^\n]*\{\n(.*?)^\}', program, re.M | re.S))
  kinds = {}
  for line in program[program.index('\nENTRY') :].splitlines():
    if match := re.match(r'\s+(?:ROOT )?%(\S+) = ', line):
      fused = re.search(r'calls=%([\w.\-]+)', line)
      kinds[match[1]] = kind(match[1], line + (computations[fused[1]] if fused else ''))
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory, create_perfetto_trace=True):
      learner.learn(num_updates)
    (path,) = pathlib.Path(directory).rglob('perfetto_trace.json.gz')
    with gzip.open(path) as stream:
      events = json.load(stream)['traceEvents']
  microseconds: Counter[str] = Counter()
  for event in events:
    if event.get('ph') == 'X' and event['name'] in kinds:
      microseconds[kinds[event['name']]] += event['dur']
  return {name: microseconds[name] / microseconds.total() for name in KINDS}


def seconds(function: Callable, *args: object) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def resident_gigabytes() -> float:
  """Memory that this process holds now (Linux)."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 1e9


def spread(values: np.ndarray, digits: int) -> str:
  return f'{np.median(values):.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--agents', nargs='*', metavar='agent', help='default: all ten')
  parser.add_argument('--peers', nargs='*', default=[], metavar='library=python')
  parser.add_argument('--replay_dir', help='Pong logs; default: the demo logs')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--updates', type=int, default=20, help='a round, of each learner')
  args = parser.parse_args()
  chosen = [x for x in LEARNERS if not args.agents or x.agent in args.agents]
  if unknown := set(args.agents or []) - {x.agent for x in chosen}:
    parser.error(f'--agents: there is no {", ".join(sorted(unknown))}')

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  replay_dir = pathlib.Path(args.replay_dir or demo.find_or_make('pong'))
  peers = {
    library: protocol.Peer(python, f'{library}_learn.py', f'--replay_dir={replay_dir}')
    for library, python in (peer.split('=', 1) for peer in args.peers)
  }
  data = {agent: load(replay_dir, agent) for agent in {x.agent for x in chosen}}
  square = jnp.ones((2048, 2048))
  product = jax.jit(lambda a: a @ a)
  vector = jnp.ones(2**26)
  add = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place, so that no pages are touched anew

  ours = [make_learner(data[x.agent], x) for x in chosen]
  # For each learner of ours: how to make n updates of it and of its peers, by who makes them.
  turns: list[dict[str, Callable[[int], float]]] = []
  for x, learner in zip(chosen, ours, strict=True):
    turns.append({'offline_zoo': functools.partial(seconds, learner.learn)})
    for library in x.peers.keys() & peers.keys():
      turns[-1][library] = functools.partial(peers[library].seconds, x.agent)

  nums_updates = [max(1, args.updates // 10) if x.in_scan else args.updates for x in chosen]

  for turn, num_updates in zip(turns, nums_updates, strict=True):  # compiles, and touches memory
    for make_updates in turn.values():
      make_updates(num_updates)
  product(square).block_until_ready()
  vector = add(vector)
  compiled: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  per_update: list[dict[str, list[float]]] = [{name: [] for name in turn} for turn in turns]
  product_seconds, add_seconds, resident = [], [], []
  for _ in range(args.rounds):
    for turn, num_updates, taken in zip(turns, nums_updates, per_update, strict=True):
      for name, make_updates in turn.items():
        taken[name].append(make_updates(num_updates) / num_updates)
    product_seconds.append(seconds(product, square))
    start = time.perf_counter()
    vector = add(vector).block_until_ready()
    add_seconds.append(time.perf_counter() - start)
    resident.append(resident_gigabytes())
  num_compiled = len(compiled)

  flop_rate = 2 * 2048**3 / np.median(product_seconds)
  bandwidth = 2 * vector.nbytes / np.median(add_seconds)
  print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}; batches of {BATCH_SIZE}, '
    f'{args.rounds} rounds of {args.updates} updates in turns (in a scan: a tenth of them); '
    f'{flop_rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s'
  )
  for library, peer in peers.items():
    versions = ', '.join(f'{name} {version}' for name, version in peer.ready['versions'].items())
    print(f'{library}: {versions}')
  print(
    '\nMedians of rounds (least to most). Passes are those through the convolutions, forward.\n\n'
    '| agent | padding | passes | updates/s | GFLOP | MB | of the bound | '
    + ''.join(f'faster than {library} by | passes | ' for library in peers)
  )
  print('|---|---|---|---|---|---|---|' + '---|---|' * len(peers))
  programs = []
  for x, learner, taken in zip(chosen, ours, per_update, strict=True):
    lowered = lowered_update(learner)
    programs.append(lowered)
    flops = (lowered.cost_analysis() or {})['flops']
    bytes_ = least_bytes(learner, x.passes)
    times = np.array(taken['offline_zoo'])
    share = (flops / flop_rate + bytes_ / bandwidth) / np.median(times)
    cells = [x.name, x.padding, str(x.passes), spread(1 / times, 1)]
    cells += [f'{flops / 1e9:.2f}', f'{bytes_ / 1e6:.0f}', f'{share:.0%}']
    for library in peers:
      theirs = taken.get(library)
      cells += [spread(np.array(theirs) / times, 2), str(x.peers[library])] if theirs else ['', '']
    print(f'| {" | ".join(cells)} |', flush=True)

  print('\nWhere the time of operations goes, in a trace:\n')
  print(f'| agent | padding | {" | ".join(KINDS)} |\n|---|---|{"---|" * len(KINDS)}')
  for x, learner, lowered in zip(chosen, ours, programs, strict=True):
    if not x.in_scan:  # whose operations a trace does not tell apart
      cells = [f'{s:.0%}' for s in shares(learner, lowered.compile(), 5).values()]
      print(f'| {x.name} | {x.padding} | {" | ".join(cells)} |', flush=True)
  print(
    f'\nCompilations during the rounds: {num_compiled}. Resident memory after the first round '
    f'{resident[0]:.3f} GB, after the last {resident[-1]:.3f} GB.'
  )


if __name__ == '__main__':
  main()
