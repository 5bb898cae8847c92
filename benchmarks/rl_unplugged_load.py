"""How fast RL Unplugged's episodes are read, beside Tianshou's converter.

  python -m benchmarks.rl_unplugged_load enduro=/tmp/enduro_logs pong=/tmp/pong_logs \
    --peer_python=/tmp/peer_tensorflow/bin/python --converter=convert_rl_unplugged_atari.py

Writes the first shard of logs as a published file and reads it: without the frames, as is done
first; with the frames, decoded; and into the encoded replay. Counted are frames a second of wall
time, and of the processor time of all threads, which is what one core does in a second. Tianshou's
converter reads another form of the dataset, in which each transition has eight PNGs, into
compressed HDF5; it gets the first transitions of the same play, and each of these counts as one
frame. Medians of rounds in turns.
"""

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable

import cv2
import jax
import numpy as np

from offline_zoo import replay, testing
from offline_zoo.logs import dqn_replay, rl_unplugged

_PEER = pathlib.Path(__file__).parent / 'peers' / 'tianshou_rl_unplugged.py'


def write_transitions(path: pathlib.Path, shard: dqn_replay.Shard, number: int) -> None:
  """Writes the first transitions of a shard in the older form of RL Unplugged."""
  pngs = [cv2.imencode('.png', frame)[1].tobytes() for frame in shard.observation[: number + 10]]
  with gzip.open(path, 'wb', compresslevel=1) as file:
    for row in range(3, number + 3):
      features: dict[str, list] = {
        'o_t': pngs[row - 3 : row + 1],
        'o_tp1': pngs[row - 2 : row + 2],
        'a_t': [int(shard.action[row])],
        'a_tp1': [int(shard.action[row + 1])],
        'r_t': [float(shard.reward[row])],
        'd_t': [1.0 - float(shard.terminal[row])],
        'episode_id': [0],
        'episode_return': [0.0],
      }
      file.write(testing.tfrecord(testing.serialise_example(features)))


def seconds(function: Callable[[], object]) -> tuple[float, float]:
  """Wall and processor time."""
  wall, cpu = time.perf_counter(), time.process_time()
  function()
  return time.perf_counter() - wall, time.process_time() - cpu


def peer_seconds(command: list[str]) -> tuple[float, float]:
  environment = {**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'}
  result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
  times = json.loads(result.stdout.splitlines()[-1])
  return times['seconds'], times['cpu_seconds']


def measure(replay_dir: str, args: argparse.Namespace) -> tuple[float, dict[str, np.ndarray]]:
  """Bytes a frame, and what is read a second by which task, of wall and of processor time."""
  shard = dqn_replay.ShardFiles(replay_dir, 0).read()
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, 'run_1-00000-of-00050')
    testing.write_rl_unplugged(path, shard)
    (ours,) = rl_unplugged.open_published(directory)
    num_frames = len(ours.read_small_files(None).action)
    tasks: dict[str, Callable[[], tuple[float, float]]] = {
      'all but frames': lambda: seconds(lambda: ours.read_small_files(None)),
      'frames': lambda: seconds(lambda: sum(map(len, ours.read_frames(num_frames)))),
      'encoded replay': lambda: seconds(lambda: jax.block_until_ready(replay.load(directory))),
    }
    numbers = dict.fromkeys(tasks, num_frames)
    if args.peer_python:
      transitions = pathlib.Path(directory, 'transitions')
      write_transitions(transitions, shard, args.num_transitions)
      command = [
        args.peer_python, str(_PEER), f'--converter={args.converter}',
        f'--transitions={transitions}', f'--num_transitions={args.num_transitions}',
      ]  # fmt: skip
      tasks["Tianshou's converter"] = lambda: peer_seconds(command)
      numbers["Tianshou's converter"] = args.num_transitions
    times: dict[str, list[tuple[float, float]]] = {what: [] for what in tasks}
    for _ in range(args.rounds):
      for what, task in tasks.items():
        times[what].append(task())
    rates = {what: numbers[what] / np.median(times[what], axis=0) for what in tasks}
    return path.stat().st_size / num_frames, rates


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('logs', nargs='+', metavar='game=replay_dir')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--peer_python')
  parser.add_argument('--converter')
  parser.add_argument('--num_transitions', type=int, default=2000, help='for the converter')
  args = parser.parse_args()

  print('| game | bytes a frame | what | frames a second | of one core |')
  print('|---' * 5 + '|', flush=True)
  for game, replay_dir in (argument.split('=', 1) for argument in args.logs):
    num_bytes, rates = measure(replay_dir, args)
    for what, (wall, cpu) in rates.items():
      print(f'| {game} | {num_bytes:.0f} | {what} | {wall:,.0f} | {cpu:,.0f} |', flush=True)


if __name__ == '__main__':
  main()
