"""Times Tianshou's converter of RL Unplugged's transitions on a file of these.

This runs in an environment with TensorFlow, h5py, requests and tqdm, on the file
examples/offline/convert_rl_unplugged_atari.py of Tianshou's repository:

  python tianshou_rl_unplugged.py --converter=convert_rl_unplugged_atari.py \
    --transitions=run_1-00000-of-00100 --num_transitions=2000

Prints one line of JSON with the seconds of wall and of processor time. Tianshou itself, and with it
PyTorch, is not needed: of its `Batch`, the converter asks no more than what a plain object gives,
faster. Nothing is downloaded.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
import types
from typing import Any


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--converter', required=True)
  parser.add_argument('--transitions', required=True)
  parser.add_argument('--num_transitions', type=int, required=True)
  args = parser.parse_args()

  data: Any = types.ModuleType('tianshou.data')
  data.Batch = types.SimpleNamespace
  sys.modules.update({'tianshou': types.ModuleType('tianshou'), 'tianshou.data': data})
  sys.path.append(os.path.dirname(os.path.abspath(args.converter)))
  converter: Any = importlib.import_module(pathlib.Path(args.converter).stem)
  converter.download = lambda url, path: None

  with tempfile.TemporaryDirectory() as directory:
    wall, cpu = time.perf_counter(), time.process_time()
    converter.process_shard('', args.transitions, f'{directory}/out.hdf5', args.num_transitions)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  print(json.dumps({'seconds': wall, 'cpu_seconds': cpu}))


if __name__ == '__main__':
  main()
