"""How fast logs are loaded, beside Python's gzip with np.load, as Dopamine and batch_rl load them.

  python -m benchmarks.replay_load enduro=/tmp/enduro_logs pong=/tmp/pong_logs

Takes turns between: gzip and np.load of all columns of all shards, one shard at a time, which stops
at NumPy arrays; ours with a cold cache, up to the encoded replay on the device and the cache on
disk; ours from that cache. The operating system has the files in memory. Prints MB of raw frames a
second, and in a process of its own the largest resident memory of a cold load.
"""

import argparse
import gzip
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from offline_zoo import replay
from offline_zoo.logs import dqn_replay


def gzip_and_numpy(replay_dir: pathlib.Path) -> int:
  """Loads shard after shard; returns bytes of frames."""
  num_bytes = 0
  for files in dqn_replay.open_shards(replay_dir):
    for name in ('observation', 'action', 'reward', 'terminal'):
      with gzip.open(files.path(name)) as file:
        array = np.load(file, allow_pickle=False)
      if name == 'observation':
        num_bytes += array.nbytes
      del array
  return num_bytes


def ours(replay_dir: pathlib.Path, cache_dir: pathlib.Path) -> None:
  jax.block_until_ready(replay.Logs(replay_dir, cache_dir=cache_dir).resident(0))


def seconds(function: Callable[[], object]) -> float:
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def peak_memory(replay_dir: pathlib.Path, connection) -> None:
  """Largest resident memory of this process, in GB, before and after a cold load (Linux)."""

  def peak() -> float:
    status = pathlib.Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024 / 1e9

  with tempfile.TemporaryDirectory() as cache:
    jax.numpy.zeros(1).block_until_ready()
    before = peak()
    ours(replay_dir, pathlib.Path(cache))
    connection.send((before, peak()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('logs', nargs='+', metavar='game=replay_dir')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()

  print(
    '| game | rows | gzip and np.load, MB/s | cold, MB/s | faster by | from the cache, MB/s | '
    'faster by | cached in, of cold | peak memory beyond start, GB | encoded, GB |'
  )
  print('|---' * 10 + '|', flush=True)
  for game, name in (argument.split('=', 1) for argument in args.logs):
    replay_dir = pathlib.Path(name)
    times: list[list[float]] = [[], [], []]
    for _ in range(args.rounds):
      times[0].append(seconds(lambda: gzip_and_numpy(replay_dir)))  # noqa: B023
      with tempfile.TemporaryDirectory() as cache:
        for i in (1, 2):
          times[i].append(seconds(lambda: ours(replay_dir, pathlib.Path(cache))))  # noqa: B023
    data = replay.load(replay_dir)
    num_bytes = sum(array.nbytes for array in jax.tree.leaves(data))
    num_rows = len(data.actions)
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context('spawn').Process(
      target=peak_memory, args=(replay_dir, sending)
    )
    process.start()
    before, after = receiving.recv()
    process.join()
    reference, cold, warm = np.array(times)
    rates = [84 * 84 * num_rows / 1e6 / np.median(t) for t in (reference, cold, warm)]
    print(
      f'| {game} | {num_rows:,} | {rates[0]:.0f} | {rates[1]:.0f} | '
      f'{np.median(reference / cold):.2f} | {rates[2]:.0f} | {np.median(reference / warm):.1f} | '
      f'{np.median(warm / cold):.3f} | {after - before:.2f} | {num_bytes / 1e9:.3f} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
