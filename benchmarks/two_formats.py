"""Whether a run learns the same from RL Unplugged's files as from shards of the same play.

  python -m benchmarks.two_formats

Plays whole episodes of Freeway with the demo logs' policy, writes them in either format, trains CQL
with its laptop values on both and compares the CSVs, which must be equal bit for bit but for
timings.
"""

import argparse
import csv
import pathlib
import subprocess
import sys
import tempfile

from offline_zoo import testing
from offline_zoo.logs import demo, dqn_replay

_GAME = 'freeway'
_TIMINGS = {'updates_per_second', 'eval_frame_rate', 'seconds'}


def write_logs(directory: pathlib.Path, num_episodes: int) -> dict[str, pathlib.Path]:
  """Writes a shard in either format; returns their directories."""
  directories = {name: directory / name for name in ('dqn_replay', 'rl_unplugged')}
  writer = dqn_replay.ShardWriter(directories['dqn_replay'], 3_000 * num_episodes)
  for index in range(num_episodes):
    _, rows = demo.play_episode(demo.Config(environment_name=_GAME), index)
    assert rows is not None
    writer.add_episode(rows)
  writer.close()
  directories['rl_unplugged'].mkdir()
  (files,) = dqn_replay.open_shards(directories['dqn_replay'])
  path = directories['rl_unplugged'] / 'run_1-00000-of-00001'
  testing.write_rl_unplugged(path, files.read())
  return directories


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--episodes', type=int, default=2, help='of 2,046 transitions or so each')
  parser.add_argument('--updates', type=int, default=100)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    results = {}
    for kind, replay_dir in write_logs(pathlib.Path(name), args.episodes).items():
      path = pathlib.Path(name, f'run_{kind}', 'results.csv')
      command = [
        sys.executable, '-m', 'offline_zoo.cql.run_atari', f'--environment_name={_GAME}',
        '--flagfile=offline_zoo/cql/laptop.flags', f'--replay_dir={replay_dir}',
        '--num_iterations=2',
        f'--num_updates_per_iteration={args.updates // 2}', '--eval_steps=1',
        f'--results_csv_path={path}', '--replay_cache_dir=none',
      ]  # fmt: skip
      subprocess.run(command, check=True)
      with open(path, newline='') as file:
        rows = csv.DictReader(file)
        results[kind] = [{k: v for k, v in row.items() if k not in _TIMINGS} for row in rows]
  for row in results['dqn_replay']:
    print(row)
  if results['dqn_replay'] != results['rl_unplugged']:
    sys.exit(f'another CSV from rl_unplugged: {results["rl_unplugged"]}')
  print(f'the same CSV from both, {len(results["dqn_replay"])} rows')


if __name__ == '__main__':
  main()
