"""On which games does a laptop see learning? CQL at its laptop values on a little of each.

  python -m benchmarks.laptop_scan [--games freeway ms_pacman ...] [--directory=runs/scan]

For each game: 50,000 transitions of demo logs (Freeway's are those of `run.sh`, of all others
uniformly random play), 5,000 updates of CQL with `offline_zoo/cql/laptop.flags`, evaluated after
each 1,000 with 1% of random actions, so that no policy waits for ever for a game to begin. Prints a
table: the mean of the logged episodes, of the last evaluation and of the best one, and what random
play and people score. The same command goes on where it was stopped.
"""

import argparse
import csv
import pathlib
import subprocess
import sys

from offline_zoo import atari_data

GAMES = (
  'freeway', 'ms_pacman', 'asterix', 'breakout', 'space_invaders', 'boxing', 'qbert', 'seaquest',
  'assault', 'beam_rider',
)  # fmt: skip
ROOT = pathlib.Path(__file__).parents[1]


def run(module: str, *flags: str) -> None:
  """Runs a program of the package from the checkout; its errors are its own."""
  subprocess.run([sys.executable, '-m', f'offline_zoo.{module}', *flags], cwd=ROOT, check=True)


def scan(game: str, directory: pathlib.Path) -> list[dict[str, str]]:
  """Logs a game and learns from it, as far as that is not done; returns the CSV's rows."""
  logs, results = directory / game / 'logs', directory / game / 'cql' / 'results.csv'
  if not logs.exists():
    policy = [] if game == 'freeway' else ['--policy=random']
    flags = [f'--environment_name={game}', '--num_transitions=50000', f'--replay_dir={logs}']
    run('logs.demo', *flags, *policy)
  run(
    'cql.run_atari', f'--environment_name={game}', f'--replay_dir={logs}',
    '--flagfile=offline_zoo/cql/laptop.flags', '--num_iterations=5', '--eval_epsilon=0.01',
    f'--results_csv_path={results}',
  )  # fmt: skip
  with open(results, newline='') as file:
    return list(csv.DictReader(file))


def row(game: str, rows: list[dict[str, str]]) -> str:
  """The game's row of the table, as Markdown."""
  scores = [float(x['eval_episode_return']) for x in rows]
  logged, data = float(rows[-1]['dataset_episode_return']), atari_data.game(game)
  cells = [
    game, *(f'{x:.1f}' for x in (logged, scores[-1], scores[-1] - logged)),
    f'{scores[-1] - data.random_score:.1f}' if data.random_score is not None else '',
    f'{max(scores):.1f}', rows[-1]['eval_num_episodes'],
    *('' if x is None else f'{x:g}' for x in (data.random_score, data.human_score)),
  ]  # fmt: skip
  return f'| {" | ".join(cells)} |'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--games', nargs='+', default=GAMES)
  parser.add_argument('--directory', type=pathlib.Path, default=pathlib.Path('runs/scan'))
  arguments = parser.parse_args()
  table = [
    '| game | logged | last | over logged | over random | best | episodes | random | human |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for game in arguments.games:
    table.append(row(game, scan(game, arguments.directory.resolve())))
  print('\n'.join(table))


if __name__ == '__main__':
  main()
