"""Tests for program.py: flags, and what only a command line can get wrong."""

import dataclasses
import importlib
import importlib.metadata
import logging
import math
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import pytest
from absl import flags

import offline_zoo
from offline_zoo import program, results

# What `python -m offline_zoo.dqn.run_atari` does, and says when it begins to import.
STARTED = """
import runpy, sys
sys.argv = ['-m', '--replay_dir=/nowhere']
print('started', flush=True)
runpy.run_module('offline_zoo.dqn.run_atari', run_name='__main__', alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Config:
  """Not a group, and no field:  # nor help."""

  # First group

  test_an_int: int = 3  # updates; somebody 2020
  test_a_float: float = 0.5
  test_a_bool: bool = False

  # Second group

  test_a_path: str | None = None  # where to, which takes
  # more than a line to say
  test_a_list: tuple[int, ...] | None = None  # which
  test_a_bound: float | None = 1.0  # how far


def test_flags_from_a_config():
  assert program.define_flags(Config) == ['First group', 'Second group']
  values = flags.FLAGS
  try:
    values(['program'])
    assert program.config_from_flags(Config) == Config()
    assert values['test_an_int'].help == 'updates; somebody 2020'
    assert values['test_a_path'].help == 'where to, which takes more than a line to say'
    assert 'test_a_bool' in values.module_help('First group')
    assert 'test_a_bool' not in values.module_help('Second group')
    values(['program', '--test_an_int=4', '--test_a_float=1e-3', '--test_a_bool',
            '--test_a_path=x', '--test_a_list=1,5'])  # fmt: skip
    assert program.config_from_flags(Config) == Config(4, 1e-3, True, 'x', (1, 5), 1.0)
    values(['program', '--test_a_bound=none', '--notest_a_bool'])
    assert program.config_from_flags(Config).test_a_bound is None
    values(['program', '--test_a_bound=2.5'])
    assert program.config_from_flags(Config).test_a_bound == 2.5
    with pytest.raises(flags.IllegalFlagValueError, match='test_a_bound=nothing'):
      values(['program', '--test_a_bound=nothing'])
    values(['program', '--test_a_list=1,b'])
    with pytest.raises(ValueError, match=r'--test_a_list: expected numbers and .*, got 1,b$'):
      program.config_from_flags(Config)
    values(['program', '--test_a_path='])
    with pytest.raises(ValueError, match='--test_a_path=: expected a value'):
      program.config_from_flags(Config)
  finally:
    for field in dataclasses.fields(Config):
      delattr(flags.FLAGS, field.name)


@pytest.mark.parametrize(
  'text, numbers',
  [
    ('5', (5,)),
    ('0-4', (0, 1, 2, 3, 4)),
    ('0-1,7', (0, 1, 7)),
    ('7, 0-1', (7, 0, 1)),
    ('2,1-3,2-2', (2, 1, 2, 3, 2)),
    ('00-01', (0, 1)),
    ('4-0', None),
    ('0-', None),
    ('-3', None),
    ('1--3', None),
    ('0-1-2', None),
    ('1,,2', None),
    ('1.5', None),
    ('0-999999999', None),
    ('1234567', None),
    ('٣', None),  # another alphabet's digit
    ('', None),
  ],
)
def test_lists_of_integers_and_ranges(text: str, numbers: tuple[int, ...] | None):
  items = flags.ListParser().parse(text)
  if numbers is not None:
    assert program._integers('shards', items) == numbers
  else:
    with pytest.raises(ValueError, match=f'--shards: .* such as 0-3,7, got {text or "nothing"}$'):
      program._integers('shards', items)


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--jax_platform_name=gpuu', 'error: --jax_platform_name=gpuu: JAX finds no such device here'),
    ('--replay_dir=', 'error: --replay_dir=: expected a value, got nothing'),
    ('--shards=a', 'error: --shards: expected numbers and ascending ranges such as 0-3,7, got a'),
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


def test_a_platform_that_is_not_there_is_explained():
  """JAX says nothing of it."""
  with (
    pytest.raises(ValueError) as error,
    mock.patch.object(jax, 'devices', side_effect=AssertionError),
  ):
    program._set_up_jax(None)
  assert str(error.value) == (
    '--jax_platform_name=None: JAX finds no such device here; expected cpu, or cuda on a GPU'
  )


def test_floats_are_multiplied_in_full_and_ranks_are_not_promoted():
  names = ('jax_default_matmul_precision', 'jax_numpy_rank_promotion')
  before = [getattr(jax.config, name) for name in names]
  try:
    for name, value in zip(names, ('bfloat16', 'allow'), strict=True):
      jax.config.update(name, value)
    program._set_up_jax(None)
    assert [getattr(jax.config, name) for name in names] == ['float32', 'raise']
  finally:
    for name, value in zip(names, before, strict=True):
      jax.config.update(name, value)


CACHE_SETTINGS = (
  'jax_compilation_cache_dir', 'jax_enable_compilation_cache',
  'jax_persistent_cache_min_compile_time_secs',
)  # fmt: skip


@pytest.fixture
def no_cache():
  """A JAX that has been told of no directory."""
  before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_what_jax_compiles_is_kept_in_the_users_cache_or_where_a_flag_says(
  no_cache, monkeypatch, tmp_path, caplog
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  default, other = tmp_path / 'offline_zoo' / 'compiled', tmp_path / 'of a flag'
  for flag, directory in ((None, default), (None, default), (str(other), other), (None, other)):
    program._keep_what_is_compiled(flag)
    kept = [getattr(jax.config, name) for name in CACHE_SETTINGS]
    assert kept == [str(directory), True, 0] and directory.is_dir()
  program._keep_what_is_compiled('none')
  assert not jax.config.jax_enable_compilation_cache
  assert not caplog.text


@pytest.mark.parametrize('home', ['/dev/null/home', None])
def test_nowhere_to_keep_what_jax_compiles_is_said_once(no_cache, monkeypatch, caplog, home):
  monkeypatch.setattr(program, 'user_cache_dir', lambda: home and pathlib.Path(home))
  program._keep_what_is_compiled(None)
  assert not jax.config.jax_enable_compilation_cache
  (message,) = caplog.messages
  assert 'No place to keep what JAX compiles' in message
  with pytest.raises(OSError, match='--compilation_cache_dir=/dev/null/x: cannot be written'):
    program._keep_what_is_compiled('/dev/null/x')


def test_help_lists_the_flags_in_groups_with_type_default_and_source():
  run = subprocess.run(
    [sys.executable, '-m', 'offline_zoo.dqn.run_atari', '--help'],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert run.stdout.startswith('Trains offline DQN on logged Atari play')
  groups = ['Game and data:', 'Results:', 'Protocol:', 'Learning:', 'Machine:']
  positions = [run.stdout.index(f'\n{group}\n') for group in groups]
  assert positions == sorted(positions)
  learning = run.stdout[positions[3] : positions[4]]
  for text in ('--batch_size: transitions an update; paper', "(default: '32')", '(an integer)'):
    assert text in learning
  module = importlib.import_module('offline_zoo.dqn.run_atari')
  for field in dataclasses.fields(module.Config):
    assert f'--{field.name}:' in run.stdout.replace('--[no]', '--'), field.name


@pytest.mark.parametrize('seconds', [0.2, 0.8, 1.6])
def test_ctrl_c_while_the_program_starts_leaves_no_traceback(seconds: float):
  process = subprocess.Popen(
    [sys.executable, '-c', STARTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout is not None and process.stdout.readline() == 'started\n'
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=60)
  assert process.returncode in (1, -signal.SIGINT)
  assert 'Traceback' not in error


def test_the_version_comes_from_the_package_which_need_not_be_installed(monkeypatch):
  version = importlib.metadata.version

  def of_others(name: str) -> str:
    if name.replace('-', '_') == 'offline_zoo':
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, 'version', of_others)
  assert results._session()['versions']['offline_zoo'] == offline_zoo.__version__


def test_what_steers_a_terminal_is_not_printed():
  assert program.first_line(ValueError('a\x1b[2Jb\x07\nc')) == 'a\ufffd[2Jb\ufffd'
  record = logging.makeLogRecord(
    {'msg': '%s: bad', 'args': ('x\x1b]0;y',), 'pathname': program.__file__}
  )
  assert program._is_for_users(record)
  assert record.getMessage() == 'x\ufffd]0;y: bad'


def test_there_may_be_no_home(monkeypatch):
  def home():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(pathlib.Path, 'home', home)
  assert program.user_cache_dir() is None
  monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
  assert program.user_cache_dir() == pathlib.Path('/somewhere/offline_zoo')


@dataclasses.dataclass(frozen=True)
class Checked:
  number: int | float | None = 1


def test_checks_name_the_flag():
  for good in (1, program.MAX_INT, 0.5, None):
    program.check_positive(Checked(good), 'number')
  for bad in (0, -1, program.MAX_INT + 1, 2**70, math.inf, math.nan, -0.5):
    with pytest.raises(ValueError, match=f'--number={bad}: expected'):
      program.check_positive(Checked(bad), 'number')
  for good in (0, 1, 0.5):
    program.check_in_unit_interval(Checked(good), 'number')
  for bad in (-0.1, 1.1, math.nan):
    with pytest.raises(ValueError, match=rf'--number={bad}: expected a number in \[0, 1\]'):
      program.check_in_unit_interval(Checked(bad), 'number')
  for bad in (-0.1, math.inf, math.nan):
    with pytest.raises(ValueError, match=f'--number={bad}: expected 0 or more'):
      program.check_not_negative(Checked(bad), 'number')
