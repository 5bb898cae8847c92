"""Wall time of an iteration over the longer of its learning and its evaluating, which overlap.

  python -m benchmarks.iteration [--agent=dqn] [--updates=200] [--eval_steps=8000]

Runs an agent's program on Freeway's demo logs with as many evaluation workers as it chooses by
itself. An iteration ends, as here measured, when its row is logged; the first, and those after
learning's end, overlap with nothing and do not count. Prints medians.
"""

import argparse
import csv
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from offline_zoo.logs import demo


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--agent', default='dqn')
  parser.add_argument('--updates', type=int, default=200, help='an iteration')
  parser.add_argument('--eval_steps', type=int, default=8_000)
  parser.add_argument('--iterations', type=int, default=8)
  args = parser.parse_args()

  replay_dir = demo.find_or_make('freeway')
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, 'results.csv')
    process = subprocess.Popen(
      [
        sys.executable, '-m', f'offline_zoo.{args.agent}.run_atari', '--environment_name=freeway',
        f'--replay_dir={replay_dir}', f'--num_iterations={args.iterations}',
        f'--num_updates_per_iteration={args.updates}', f'--eval_steps={args.eval_steps}',
        f'--results_csv_path={path}',
      ],
      stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    ends = [time.monotonic() for line in process.stderr if '] iteration ' in line]
    if process.wait() != 0:
      raise SystemExit('the run failed')
    with open(path, newline='') as file:
      rows = list(csv.DictReader(file))

  learning = np.array([args.updates / float(row['updates_per_second']) for row in rows])
  evaluating = np.array([float(row['seconds']) for row in rows]) - learning
  # An iteration is evaluated while the next one learns.
  longer = np.maximum(learning[1:], evaluating[:-1])[1:]
  wall = np.diff(ends)[:-1]
  print('| learning | evaluating beside it | the longer | iteration | over the longer |')
  print('|---|---|---|---|---|')
  medians = [np.median(x) for x in (learning[1:], evaluating[:-1], longer, wall)]
  cells = [f'{x:.1f} s' for x in medians]
  print(f'| {" | ".join(cells)} | {np.median(wall / longer):.2f} |')


if __name__ == '__main__':
  main()
