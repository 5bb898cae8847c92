"""Logs that need no download: the miniature DQN replay, and demo logs.

The miniature DQN replay is what online DQNs of ours played while they learnt, from random play to
their best. It lies beside this file as recorded play, miniature/<game>.play, of the games that
`miniature_games` lists; the main README says how it was made. A run that learns from it expands it
first and keeps the shards in $XDG_CACHE_HOME/offline_zoo/miniature.
"""

import pathlib

import google_crc32c
from absl import logging

from offline_zoo import program
from offline_zoo.logs import demo, play, recorded

RECORDINGS = pathlib.Path(__file__).parent / 'miniature'
NAMES = (None, 'miniature', 'demo')  # what --replay_dir may be instead of a directory
_SHARD_CAPACITY = 25_000


def miniature_games() -> list[str]:
  """Lists the games that the miniature replay has."""
  return sorted(path.stem for path in RECORDINGS.glob('*.play'))


def find(replay_dir: str | None, environment_name: str) -> pathlib.Path:
  """Says where logs are, or will be once they are needed.

  Args:
    replay_dir: a directory; or 'miniature'; or 'demo'; None: the miniature replay of a game that it
      has, else demo logs.
    environment_name: of the game.

  Raises:
    ValueError: the miniature replay has no such game.
    FileNotFoundError: the user has no home directory to keep them in.
  """
  if replay_dir not in NAMES:
    return pathlib.Path(replay_dir or '')
  games = miniature_games()
  if replay_dir == 'demo' or (replay_dir is None and environment_name not in games):
    return demo.default_dir(environment_name)
  if environment_name not in games:
    raise ValueError(
      f'--replay_dir=miniature: there is no {environment_name}; expected {", ".join(games)}, or '
      '--replay_dir=demo'
    )
  home = program.user_cache_dir()
  if home is None:
    raise FileNotFoundError('--replay_dir: there is no home directory for its logs; name one')
  # Another version of the recording is expanded to another place.
  checksum = google_crc32c.value(_recording(environment_name).read_bytes())
  return home / 'miniature' / f'{environment_name}-{checksum:08x}'


def find_or_make(replay_dir: str | None, environment_name: str) -> pathlib.Path:
  """The directory of the logs that a run learns from, which are made first if they are our own.

  Args:
    replay_dir: see `find`.
    environment_name: see `find`.

  Raises:
    ValueError, OSError: see `find` and `recorded.expand`.
  """
  directory = find(replay_dir, environment_name)
  if replay_dir not in NAMES or directory.exists():
    return directory
  if directory == demo.default_dir(environment_name):
    return demo.find_or_make(environment_name)
  logging.info('The miniature DQN replay of %s: expanding it to %s', environment_name, directory)
  try:
    recorded.expand(_recording(environment_name), directory, _SHARD_CAPACITY, play.NUM_PROCESSES)
  except ValueError as error:
    raise type(error)(f'{error}; --replay_dir=demo needs no recording') from error
  except OSError:
    if not directory.exists():  # else another process has just made them: the same ones
      raise
  return directory


def _recording(environment_name: str) -> pathlib.Path:
  return RECORDINGS / f'{environment_name}.play'
