"""Programs: flags from a Config, their checks, start-up, the progress bar, the user's cache."""

import ctypes
import dataclasses
import inspect
import itertools
import logging as std_logging
import math
import os
import pathlib
import re
import shlex
import signal
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from tqdm import tqdm

MAX_INT = 2**31 - 1  # what device counters and shapes hold

# Flags.


class _OptionalNumberParser(flags.ArgumentParser):
  """Reads a number, or the word none as None."""

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser
    self.syntactic_help = f'{parser.syntactic_help} or none'

  def parse(self, argument: Any) -> Any:
    return None if argument in (None, 'none') else self._parser.parse(argument)

  def flag_type(self) -> str:
    return self._parser.flag_type()


def _make_flag(name: str, kind: Any, default: Any, text: str) -> flags.Flag:
  """Makes an absl flag for a field of this type, which may be a union with None."""
  optional = types.NoneType in typing.get_args(kind)
  if optional:
    kind, _ = typing.get_args(kind)
  if kind is bool:
    return flags.BooleanFlag(name, default, text)
  if typing.get_origin(kind) is tuple:
    list_parser = flags.ListParser()
    list_parser.syntactic_help = 'numbers and ranges, such as 0-3,7'
    return flags.Flag(list_parser, flags.CsvListSerializer(','), name, default, text)
  if kind is str:
    parser: flags.ArgumentParser = flags.ArgumentParser()
    parser.syntactic_help = 'a string'
  else:
    parser = flags.IntegerParser() if kind is int else flags.FloatParser()
    if optional:
      parser = _OptionalNumberParser(parser)
  return flags.Flag(parser, flags.ArgumentSerializer(), name, default, text)


def _help_texts(config_class: type) -> dict[str, tuple[str, str]]:
  """Reads each field's group and help from the comments in a Config's source.

  A field's help is the comment on its line and on the lines right below it. A comment that stands
  alone between blank lines begins a group.
  """
  texts: dict[str, tuple[str, str]] = {}
  group, field = 'Flags', None
  for line in inspect.getsource(config_class).splitlines():
    if match := re.match(r'  (\w+): [^#]*(?:# (.*))?$', line):
      field = match[1]
      texts[field] = (group, match[2] or '')
    elif (match := re.match(r'  # (.*)$', line)) and field is None:
      group = match[1]
    elif match and field is not None:
      texts[field] = (group, f'{texts[field][1]} {match[1]}')
    else:
      field = None
  return texts


def define_flags(
  config_class: type, arguments: str | None = None, flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Defines an absl flag for each field of a Config dataclass; returns the names of their groups.

  The flag has the field's name and default; its help text and group are comments in the class, see
  `dqn/run_atari.py`. Types are int, float, bool, str and tuple[int, ...] (a list of numbers and
  ranges, such as 0-3,7), each also with `| None`, for which a number's flag takes the word none.
  The field `arguments`, if any, has no flag.
  """
  texts = _help_texts(config_class)
  for field in dataclasses.fields(config_class):
    if field.name == arguments:
      continue
    group, text = texts.get(field.name, ('Flags', ''))
    flag = _make_flag(field.name, field.type, field.default, text)
    flags.DEFINE_flag(flag, flag_values, module_name=group)
  return list(dict.fromkeys(group for group, _ in texts.values()))


def _integers(name: str, items: list[str]) -> tuple[int, ...]:
  """The integers of a flag such as --shards=0-3,7, in its order."""
  # So few digits that no range fills the memory.
  matches = [re.fullmatch(r'([0-9]{1,6})(?:-([0-9]{1,6}))?', item) for item in items]
  ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in matches if m]
  if not all(matches) or not all(ranges) or not items:
    got = ','.join(items) or 'nothing'
    raise ValueError(f'--{name}: expected numbers and ascending ranges such as 0-3,7, got {got}')
  return tuple(itertools.chain(*ranges))


def config_from_flags(
  config_class: type, flag_values: flags.FlagValues = flags.FLAGS, /, **arguments: tuple[str, ...]
) -> Any:
  """Makes the Config that the parsed flags ask for, with a field of `arguments` that are no flags.

  Raises:
    ValueError: a flag has an empty value, or a list flag holds other than integers and ranges.
  """
  values: dict[str, Any] = {**arguments}
  for field in dataclasses.fields(config_class):
    if field.name in arguments:
      continue
    value = flag_values[field.name].value
    if value == '':
      raise ValueError(f'--{field.name}=: expected a value, got nothing')
    if isinstance(value, list):
      value = _integers(field.name, value)
    values[field.name] = value
  return config_class(**values)


def parse_config(config_class: type, text: str) -> Any:
  """Makes a Config from flags in one string, such as '--n_step=5 --discount=0.9'.

  Raises:
    ValueError: one is unknown, or has a bad value, or something else is there.
  """
  flag_values = flags.FlagValues()
  define_flags(config_class, flag_values=flag_values)
  try:
    _, *rest = flag_values(['', *shlex.split(text)])
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest:
    raise ValueError(f'expected flags only, got {" ".join(rest)}')
  return config_from_flags(config_class, flag_values)


# Checks that a Config makes of itself; each raises a ValueError that names the flag.


def check(config: Any, name: str, good: bool, expected: str) -> None:
  """Checks a flag: `good` says whether its value is as `expected`."""
  if not good:
    raise ValueError(f'--{name}={getattr(config, name)}: expected {expected}')


def check_positive(config: Any, *names: str) -> None:
  """Checks that flags are more than 0, or None, and that a device's int32 holds the integers."""
  for name in names:
    value = getattr(config, name)
    check(config, name, value is None or value > 0, 'more than 0')
    if isinstance(value, int):
      check(config, name, value <= MAX_INT, f'at most {MAX_INT}')
    elif value is not None:
      check(config, name, value < float('inf'), 'a finite number')


def check_in_unit_interval(config: Any, *names: str) -> None:
  """Checks that flags lie in [0, 1]."""
  for name in names:
    check(config, name, 0 <= getattr(config, name) <= 1, 'a number in [0, 1]')


def check_not_negative(config: Any, *names: str) -> None:
  """Checks that flags are finite and 0 or more."""
  for name in names:
    check(config, name, 0 <= getattr(config, name) < float('inf'), '0 or more')


def check_run(config: Any) -> None:
  """Checks the flags that every run has, whatever it learns from."""
  check_positive(config, 'num_iterations', 'num_updates_per_iteration', 'eval_steps')
  check_in_unit_interval(config, 'eval_epsilon', 'sticky_action_probability')
  check(config, 'seed', 0 <= config.seed < 2**32, '0 or more, and less than 2^32')
  kinds = ('last', 'all', 'best')
  check(config, 'keep_checkpoints', config.keep_checkpoints in kinds, ', '.join(kinds))


def check_experiment(config: Any) -> None:
  """Checks the flags that every agent's experiment has."""
  check_run(config)
  check_positive(
    config, 'num_seeds', 'max_rows_per_shard', 'replay_memory_gb', 'first_fraction',
    'max_random_transitions', 'top_fraction',
  )  # fmt: skip
  good = config.seed + config.num_seeds <= 2**32
  check(config, 'num_seeds', good, 'that --seed and those after it are less than 2^32')
  for name in ('first_fraction', 'top_fraction'):
    check(config, name, (getattr(config, name) or 0) <= 1, 'at most 1')
  min_episode_return = config.min_episode_return
  finite = min_episode_return is None or math.isfinite(min_episode_return)
  check(config, 'min_episode_return', finite, 'a finite number')
  workers = config.num_eval_workers
  check(config, 'num_eval_workers', workers is None or workers >= 0, '0 or more')


# What a program shows and keeps.


def progress_bar(total: int | None, description: str, unit: str, initial: int = 0) -> tqdm:
  """Shows a bar on a terminal, nothing elsewhere. Bytes, the unit B, go up in kB, MB and GB.

  Without a total it only counts.
  """
  return tqdm(
    total=total, initial=initial, desc=description, unit=unit, unit_scale=unit == 'B',
    leave=False, disable=None, dynamic_ncols=True,
  )  # fmt: skip


def user_cache_dir() -> pathlib.Path | None:
  """Finds where to keep what can be made again: $XDG_CACHE_HOME/offline_zoo.

  None without a home directory.
  """
  try:
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  except RuntimeError:  # HOME is not set, and the user is not listed
    return None
  return pathlib.Path(home, 'offline_zoo')


def printable(text: str) -> str:
  """Replaces what could steer a terminal, as names and contents of files can."""
  return ''.join(c if c.isprintable() or c == '\n' else '\N{REPLACEMENT CHARACTER}' for c in text)


def first_line(error: BaseException) -> str:
  """Puts what an error says in one line that a terminal can be given."""
  return printable(str(error).strip().split('\n')[0][:500])


# Start-up.


def _is_for_users(record: std_logging.LogRecord) -> bool:
  record.msg, record.args = printable(record.getMessage()), ()
  # Libraries' warnings pass. Orbax's do not: a failing save logs a page of tracebacks and raises.
  ours = pathlib.Path(record.pathname).is_relative_to(pathlib.Path(__file__).parent)
  return ours or (record.levelno >= std_logging.WARNING and 'orbax' not in record.pathname)


def set_malloc_option(option: int, value: int) -> None:
  """Sets an option of malloc.h, where malloc is glibc's."""
  if mallopt := getattr(ctypes.CDLL(None), 'mallopt', None):
    mallopt(option, value)


def use_one_heap() -> None:
  """Lets threads that start from now on share the main one's heap, where malloc is glibc's.

  Heaps of their own are given back to the system whenever they are empty, whatever is asked of it
  (see `parts._keep_freed_memory`). For REM over four networks, whose update then is given 87 MB of
  empty pages anew, that is a sixth of its processor time.
  """
  set_malloc_option(-8, 1)  # M_ARENA_MAX


def _set_up_jax(jax_platform_name: str | None) -> None:
  use_one_heap()
  if jax_platform_name:
    jax.config.update('jax_platforms', jax_platform_name)
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:
    raise ValueError(
      f'--jax_platform_name={jax_platform_name}: JAX finds no such device here'
      + (f': {first_line(error)}' if first_line(error) else '; expected cpu, or cuda on a GPU')
    ) from error
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  # Otherwise recent NVIDIA GPUs multiply in TF32, with 10 bits of mantissa.
  jax.config.update('jax_default_matmul_precision', 'float32')


def _keep_what_is_compiled(flag: str | None) -> None:
  """Lets JAX keep what it compiles where --compilation_cache_dir says, for the next run.

  What is loaded again is what was compiled, so results are the same. $JAX_COMPILATION_CACHE_DIR,
  JAX's own way to name a directory, holds where the flag is not given.
  """
  if flag == 'none':
    jax.config.update('jax_enable_compilation_cache', False)
    return
  name = 'jax_compilation_cache_dir'
  directory = flag or getattr(jax.config, name)
  try:
    if directory is None and (home := user_cache_dir()) is not None:
      directory = home / 'compiled'
    if directory is None:
      raise FileNotFoundError('no home directory')
    os.makedirs(directory, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()
  except OSError as error:
    if flag:
      raise OSError(f'--compilation_cache_dir={flag}: cannot be written: {error}') from error
    logging.warning(
      'No place to keep what JAX compiles: it is compiled in every run, for some seconds; see '
      '--compilation_cache_dir (%s)', first_line(error),
    )  # fmt: skip
    jax.config.update('jax_enable_compilation_cache', False)
    return
  jax.config.update(name, str(directory))
  # A start compiles a hundred small programs, which together take seconds.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def _parse(argv: list[str], groups: list[str]) -> list[str]:
  """Parses flags; for --help shows what the program is and its flags, group by group."""
  if {'-h', '-help', '--help', '--helpshort'} & set(argv[1:]):
    print(sys.modules['__main__'].__doc__)
    for group in groups:
      print(flags.FLAGS.module_help(group))
    print("\nAll flags, those of absl's logging too: --helpfull")
    sys.exit(0)
  return app.parse_flags_with_usage(argv)


def run(main: Callable[[Any], None], config_class: type, *, arguments: str | None = None) -> None:
  """Runs a program's `main(config)` with a Config from the command line.

  Args:
    main: the program. JAX is set up before it if the Config has `jax_platform_name` and
      `compilation_cache_dir`.
    config_class: a dataclass with a field `debug`, whose fields become flags.
    arguments: its field, a tuple of strings, for what is on the command line and no flag; without
      one, there may be nothing of the kind.

  What is wrong with the input (ValueError, OSError), with the learning (FloatingPointError) or with
  the machine's memory ends the program with one line and exit code 1; `--debug` shows the traceback
  as well.
  """
  groups = define_flags(config_class, arguments)

  def start(argv: list[str]) -> None:
    # An exit, rather than sudden death, so that half-written files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.set_verbosity(logging.INFO)
    message = None
    try:
      signal.signal(signal.SIGINT, signal.default_int_handler)  # see offline_zoo/__init__.py
      if len(argv) > 1 and arguments is None:
        raise ValueError(f'expected flags only, got {" ".join(argv[1:])}')
      config = config_from_flags(
        config_class, **({arguments: tuple(argv[1:])} if arguments else {})
      )
      if not config.debug:
        logging.get_absl_handler().addFilter(_is_for_users)
      if hasattr(config, 'jax_platform_name'):
        _set_up_jax(config.jax_platform_name)
        _keep_what_is_compiled(config.compilation_cache_dir)
      main(config)
    except (FloatingPointError, MemoryError, OSError, ValueError, jax.errors.JaxRuntimeError) as e:
      if flags.FLAGS.debug:
        raise
      message = f'error: {first_line(e) or type(e).__name__}'
    except KeyboardInterrupt:
      message = 'interrupted'
    if message:  # not inside `except`, which would keep emulators alive until the interpreter's end
      print(message, file=sys.stderr)
      sys.exit(1)

  app.run(start, flags_parser=lambda argv: _parse(argv, groups))
