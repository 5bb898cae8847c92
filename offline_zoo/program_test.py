"""Tests for program.py: flags, and what only a command line can get wrong."""

import dataclasses
import subprocess
import sys

import pytest
from absl import flags

from offline_zoo import program


@dataclasses.dataclass(frozen=True)
class Config:
  test_an_int: int = 3  # updates; somebody 2020
  test_a_float: float = 0.5
  test_a_bool: bool = False
  test_a_path: str | None = None  # where
  test_a_list: tuple[int, ...] | None = None  # which


def test_flags_from_a_config():
  program.define_flags(Config)
  values = flags.FLAGS
  try:
    values(['program'])
    assert program.config_from_flags(Config) == Config()
    assert values['test_an_int'].help == 'updates; somebody 2020'
    values(['program', '--test_an_int=4', '--test_a_float=1e-3', '--test_a_bool',
            '--test_a_path=x', '--test_a_list=1,5'])  # fmt: skip
    assert program.config_from_flags(Config) == Config(4, 1e-3, True, 'x', (1, 5))
    values(['program', '--test_a_list=1,b'])
    with pytest.raises(ValueError, match='--test_a_list: expected integers, got 1,b'):
      program.config_from_flags(Config)
    values(['program', '--test_a_path='])
    with pytest.raises(ValueError, match='--test_a_path=: expected a value'):
      program.config_from_flags(Config)
  finally:
    for field in dataclasses.fields(Config):
      delattr(flags.FLAGS, field.name)


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--jax_platform_name=gpuu', 'error: --jax_platform_name=gpuu: JAX finds no such device here'),
    ('--replay_dir=', 'error: --replay_dir=: expected a value, got nothing'),
    ('--shards=a', 'error: --shards: expected integers, got a'),
    ('pong', 'error: expected flags only, got pong'),
  ],
)
def test_what_only_a_command_line_can_get_wrong(flag: str, message: str):
  run = subprocess.run(
    [sys.executable, '-m', 'offline_zoo.dqn.run_atari', flag],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert run.returncode == 1
  assert message in run.stderr and 'Traceback' not in run.stderr
