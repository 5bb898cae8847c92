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
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import protocol
from offline_zoo import parts, program, replay
from offline_zoo.logs import demo, open_shards

BATCH_SIZE = 32
NUM_ACTIONS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
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
  peers: Mapping[str, int] = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  in_scan: bool = False

  @property
  def name(self) -> str:
    flags = (f'--{name}={value}' for name, value in self.settings.items())
    return ' '.join([self.agent, *flags, *(['in a scan'] if self.in_scan else [])])


LIBRARIES = ('tianshou', 'd3rlpy', 'dopamine')
DQN = Learner('dqn', 'SAME', 2, {'dopamine': 2})
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
  DQN,
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


def make_learner(data: replay.ReplayData, learner: Learner = DQN) -> parts.Learner:
  """One of ours, at the beginning of its learning; DQN if not told."""
  run_atari = importlib.import_module(f'offline_zoo.{learner.agent}.run_atari')
  settings = {'padding': learner.padding, **learner.settings}
  config = dataclasses.replace(run_atari.Config(), **settings)
  backend = 'gpu' if learner.in_scan else jax.default_backend()
  with mock.patch.object(jax, 'default_backend', lambda: backend):
    return run_atari.make_agent(config, NUM_ACTIONS, data)


def load(replay_dir: pathlib.Path, agent: str) -> replay.ReplayData:
  """Loads one shard, as the agent wants it."""
  first = open_shards(replay_dir)[0].number
  settings = {'n_step': 5, 'with_probabilities': True} if agent == 'off_policy_dqn' else {}
  return replay.load(replay_dir, [first], num_actions=NUM_ACTIONS, **settings)


def lowered_update(learner: parts.Learner) -> jax.stages.Lowered:
  """The update as `learn` has it, so that compiling it again takes no time."""
  state = jax.eval_shape(learner.initial_state, jax.random.PRNGKey(0))
  options = parts.CPU_COMPILER_OPTIONS if jax.default_backend() == 'cpu' else None
  jitted = jax.jit(learner.update, donate_argnums=0, compiler_options=options)
  return jitted.lower(state, learner.data)


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
    # Some of the backward pass have lost their path.
    return 'products forward' if path and 'transpose(' not in path else 'and backward'
  if 'copy' in name or 'transpose' in name:
    return 'layout'
  return 'rest of loss' if 'jvp(' in path else 'optimiser'


KINDS = (
  'products forward', 'and backward', 'rest of loss', 'layout', 'optimiser', 'sampling',
)  # fmt: skip


def shares(learner: parts.Learner, num_updates: int) -> dict[str, float]:
  """Traces updates: how much of the time that operations take is spent on each kind.

  Operations that run at the same time count in full.
  """
  text = lowered_update(learner).compile().as_text() or ''
  computations = dict(re.findall(r'^%(\S+) [^\n]*\{\n(.*?)^\}', text, re.M | re.S))
  kinds = {}
  for line in text[text.index('\nENTRY') :].splitlines():
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


class Machine:
  """What it can do at most, measured again and again."""

  def __init__(self):
    self._square = jnp.ones((2048, 2048))
    self._product = jax.jit(lambda a: a @ a)
    self._vector = jnp.ones(2**26)
    self._add = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place: touches no pages anew
    self._seconds: list[tuple[float, float]] = []

  def measure(self) -> None:
    product = seconds(self._product, self._square)
    start = time.perf_counter()
    self._vector = self._add(self._vector).block_until_ready()
    self._seconds.append((product, time.perf_counter() - start))

  def rates(self) -> tuple[float, float]:
    """Gives medians: floating-point operations a second, and bytes a second."""
    product, add = np.median(self._seconds[1:], axis=0)  # the first ones compile
    return 2 * 2048**3 / product, 2 * self._vector.nbytes / add


def print_speeds(
  learners: Mapping[Learner, parts.Learner],
  per_update: Mapping[Learner, Mapping[str, list[float]]],
  machine: Machine,
) -> None:
  """Prints a table of updates a second, of the bound, and of peers' (seconds by round)."""
  flop_rate, bandwidth = machine.rates()
  libraries = [name for name in LIBRARIES if any(name in times for times in per_update.values())]
  print(f'\n{flop_rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s. Medians (least to most):\n')
  print(
    '| agent | padding | passes | updates/s | GFLOP | MB | of the bound | '
    + ''.join(f'faster than {library} by | passes | ' for library in libraries)
  )
  print('|---|---|---|---|---|---|---|' + '---|---|' * len(libraries))
  for x, learner in learners.items():
    ours = np.array(per_update[x]['ours'])
    flops = (lowered_update(learner).cost_analysis() or {})['flops']
    bytes_ = least_bytes(learner, x.passes)
    share = (flops / flop_rate + bytes_ / bandwidth) / np.median(ours)
    cells = [x.name, x.padding, str(x.passes), spread(1 / ours, 1)]
    cells += [f'{flops / 1e9:.2f}', f'{bytes_ / 1e6:.0f}', f'{share:.0%}']
    for library in libraries:
      theirs = np.array(per_update[x].get(library, []))
      cells += [spread(theirs / ours, 2), str(x.peers[library])] if theirs.size else ['', '']
    print(f'| {" | ".join(cells)} |', flush=True)


def print_shares(learners: Mapping[Learner, parts.Learner]) -> None:
  """Prints a table of where the time goes."""
  print('\nWhere the time of operations goes, in a trace:\n')
  print(f'| agent | padding | {" | ".join(KINDS)} |\n|---|---|{"---|" * len(KINDS)}')
  for x, learner in learners.items():
    if not x.in_scan:
      cells = [f'{share:.0%}' for share in shares(learner, num_updates=5).values()]
      print(f'| {x.name} | {x.padding} | {" | ".join(cells)} |', flush=True)


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

  program.use_one_heap()
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  replay_dir = pathlib.Path(args.replay_dir or demo.find_or_make('pong'))
  peers = {
    library: protocol.Peer(python, f'{library}_learn.py', f'--replay_dir={replay_dir}')
    for library, python in (peer.split('=', 1) for peer in args.peers)
  }
  learners = {x: make_learner(load(replay_dir, x.agent), x) for x in chosen}
  machine = Machine()

  # Seconds an update by round, of each of ours and of its peers.
  per_update: dict[Learner, dict[str, list[float]]] = {x: {} for x in chosen}

  def take_turns() -> None:
    for x, learner in learners.items():
      num_updates = max(1, args.updates // 10) if x.in_scan else args.updates
      times = {'ours': seconds(learner.learn, num_updates)}
      for library in (name for name in peers if name in x.peers):
        times[library] = peers[library].seconds(x.agent, num_updates)
      for name, time_taken in times.items():
        per_update[x].setdefault(name, []).append(time_taken / num_updates)
    machine.measure()

  take_turns()  # compiles, and touches memory
  for times in per_update.values():
    times.clear()
  compiled: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  resident = []
  for _ in range(args.rounds):
    take_turns()
    resident.append(resident_gigabytes())
  num_compiled = len(compiled)

  print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.rounds} rounds of '
    f'{args.updates} updates (in a scan: a tenth of them) of batches of {BATCH_SIZE}, in turns'
  )
  for library, peer in peers.items():
    versions = ', '.join(f'{name} {version}' for name, version in peer.ready['versions'].items())
    print(f'{library}: {versions}')
  print_speeds(learners, per_update, machine)
  if jax.default_backend() == 'cpu':  # elsewhere all are scans, which a trace does not tell apart
    print_shares(learners)
  print(
    f'\nCompilations during the rounds: {num_compiled}. Resident memory after the first round '
    f'{resident[0]:.3f} GB, after the last {resident[-1]:.3f} GB.'
  )


if __name__ == '__main__':
  main()
