"""What sampling costs: batches a second, beside other libraries', and its share of the DQN update.

  python -m benchmarks.replay_sample --peers tianshou=<venv>/bin/python d3rlpy=<venv>/bin/python

Takes turns between batches of 32 that are only sampled, inside jit as in the update, whole updates
of the DQN agent, and batches of the peers' replays (peers/README.md says how to make their
environments). All hold the same 50,000 transitions of Pong demo logs.
"""

import argparse
import time

import jax
import numpy as np

from benchmarks import learn
from benchmarks.peers import protocol
from offline_zoo import replay
from offline_zoo.logs import demo, open_shards


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--replay_dir', help='Pong logs; default: the demo logs')
  parser.add_argument('--peers', nargs='*', default=[], metavar='library=python')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--updates', type=int, default=40, help='a round')
  args = parser.parse_args()

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  replay_dir = args.replay_dir or demo.find_or_make('pong')
  numbers = [shard.number for shard in open_shards(replay_dir)]
  logs = replay.Logs(replay_dir, numbers[:2])  # 50,000 rows
  data = logs.resident(0)
  peers = {
    library: protocol.Peer(
      python, 'replays.py', f'--library={library}', f'--replay_dir={replay_dir}'
    )
    for library, python in (peer.split('=', 1) for peer in args.peers)
  }
  agent = learn.make_learner(data)
  sample = jax.jit(lambda data, key: replay.sample(data, key, learn.BATCH_SIZE))
  key = jax.random.PRNGKey(0)
  jax.block_until_ready(sample(data, key))
  agent.learn(args.updates)
  sampling, updating = [], []
  peers_sampling: dict[str, list[float]] = {library: [] for library in peers}
  for _ in range(args.rounds):
    keys = jax.random.split(key, args.updates + 1)
    key = keys[0]
    start = time.perf_counter()
    for sample_key in keys[1:]:
      jax.block_until_ready(sample(data, sample_key))
    sampling.append((time.perf_counter() - start) / args.updates)
    updating.append(learn.seconds(agent.learn, args.updates) / args.updates)
    for library, peer in peers.items():
      peers_sampling[library].append(peer.ask(args.updates)['seconds'] / args.updates)
  share = np.array(sampling) / np.array(updating)
  num_bytes = sum(array.nbytes for array in jax.tree.leaves(data)) / len(data.actions)
  print(
    f'{jax.devices()[0].device_kind}, median of {args.rounds} rounds of {args.updates} batches\n\n'
    '| replay | bytes a transition | larger by | batches of 32 a second | slower by |\n'
    '|---|---|---|---|---|\n'
    f'| offline_zoo | {num_bytes:.1f} | | {1 / np.median(sampling):.0f} | |'
  )
  for library, peer in peers.items():
    theirs = np.array(peers_sampling[library])
    version = ' '.join(f'{n} {v}' for n, v in peer.ready['versions'].items() if library in n)
    size = peer.ready['bytes_per_transition']
    print(
      f'| {version} | {size:.0f} | {size / num_bytes:.0f} | {1 / np.median(theirs):.0f} | '
      f'{np.median(theirs / np.array(sampling)):.2f} |'
    )
  print(
    f'\nSampling takes {1e3 * np.median(sampling):.2f} ms, {np.median(share):.1%} '
    f'({share.min():.1%} to {share.max():.1%}) of a DQN update, {1e3 * np.median(updating):.1f} ms'
  )


if __name__ == '__main__':
  main()
