"""A copy of an agent's directory is an agent of its own, without an edit."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from offline_zoo import testing

PACKAGE = pathlib.Path(__file__).parent
TRAIN = """
from offline_zoo import run_atari_test
for agent in ('qrdqn', 'myqrdqn'):
  run_atari_test.run_here(agent, {
    'environment_name': 'breakout', 'replay_dir': 'logs', 'replay_cache_dir': 'none',
    'results_csv_path': f'{agent}/results.csv', 'num_iterations': 1,
    'num_updates_per_iteration': 1, 'eval_steps': 1, 'eval_epsilon': 1.0,
    'num_eval_workers': 0,
  })
"""


def test_a_copied_directory_is_an_agent_of_its_own(tmp_path):
  """Its loss is doubled: it learns from that, the original does not, and all tests hold of it."""
  package = tmp_path / 'offline_zoo'
  shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(PACKAGE.parent / 'pyproject.toml', tmp_path)
  shutil.copytree(package / 'qrdqn', package / 'myqrdqn')
  text = (package / 'myqrdqn' / 'agent.py').read_text()
  assert text.count('  return batched(') == 1
  changed = text.replace('return batched(', 'return 2 * batched(')
  (package / 'myqrdqn' / 'agent.py').write_text(changed)
  testing.write_noise(tmp_path / 'logs', 1)

  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(tmp_path)}

  def python(*arguments: str) -> None:
    run = subprocess.run(
      [sys.executable, *arguments],
      cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr

  python('-c', TRAIN)
  losses = []
  for agent in ('qrdqn', 'myqrdqn'):
    config = json.loads((tmp_path / agent / 'config.json').read_text())
    assert config['agent'] == agent
    with open(tmp_path / agent / 'results.csv', newline='') as file:
      (row,) = csv.DictReader(file)
    losses.append(float(row['loss']))
  assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)
  tests = [f'offline_zoo/{name}_test.py' for name in ('agents', 'run_atari')]
  selected = 'myqrdqn'
  python('-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-k', selected, *tests)
