"""Downloads logged Atari play from the public datasets' buckets.

  python -m offline_zoo.download --source=rl_unplugged --environment_name=pong --run=1 --shards=0-4

The sources are `dqn_replay`, the DQN Replay Dataset (Agarwal et al. 2020), 60 games of 5 runs each,
and `rl_unplugged`, the same play of 46 games as RL Unplugged (Gulcehre et al. 2020) publishes it. A
run has about 50 shards of about a million transitions.

The bucket is listed through Google Cloud Storage's public JSON interface, and several files are
fetched at a time. A file takes its name when it is complete and has the checksum (CRC-32C) that the
listing says. Until then it is a hidden `.partial` file, from whose end the same command goes on
after a break. A file that is there already is checked, and fetched again if it differs.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import http.client
import json
import os
import pathlib
import re
import shutil
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import google_crc32c
from absl import logging

from offline_zoo import atari_data, program

NUM_RUNS = 5
TIMEOUT = 30.0  # seconds without an answer, or without a byte of it
FIRST_WAIT = 1.0  # seconds before the second attempt; each further wait is twice as long
MAX_ATTEMPTS = 5  # in a row that bring less than
WORTHWHILE = 2**20  # bytes
CHUNK_SIZE = 2**20  # bytes
MAX_PAGE_SIZE = 2**25  # bytes of a listing's page
MAX_PAGES = 1000
PASSING_STATUS = (408, 429, 500, 502, 503, 504)  # of HTTP: better luck next time

_T = TypeVar('_T')


class Source(NamedTuple):
  """Where a dataset is.

  Attributes:
    bucket: its name.
    prefix: what the names of a run's files begin with, given the game's directory and the run.
    pattern: regular expression of what they go on with; its group `shard` is the shard's number.
    advice: what to do when the bucket denies access.
  """

  bucket: str
  prefix: str
  pattern: str
  advice: str


SOURCES = {
  'dqn_replay': Source(
    bucket='atari-replay-datasets',
    prefix='dqn/{directory}/{run}/replay_logs/',
    # What is read here, and invalid_range for other readers.
    pattern=r'(?:\$store\$_(?:observation|action|reward|terminal)|add_count|invalid_range)_ckpt'
    r'\.(?P<shard>\d+)\.gz',
    advice='as public threads have reported since 2025; RL Unplugged has the same play of 46 '
    'games: --source=rl_unplugged',
  ),
  'rl_unplugged': Source(
    bucket='rl_unplugged',
    prefix='atari_episodes_ordered/{directory}/run_{run}-',
    pattern=r'(?P<shard>\d{5})-of-\d{5}',
    advice='though it is known as a public one; is a proxy in between? --base_url names a mirror',
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to download; each field is a flag."""

  source: str = 'rl_unplugged'  # or dqn_replay, whose bucket is reported to deny access
  environment_name: str = 'pong'  # snake_case name of a game, see atari_data.py
  run: int = 1  # of the 5 that logged each game
  shards: tuple[int, ...] | None = None  # default: all
  replay_dir: str | None = None  # where to; default: data/<source>/<Game>/<run>, and replay_logs
  # below it for dqn_replay, as in its bucket
  num_threads: int = 8  # files fetched at a time
  base_url: str = 'https://storage.googleapis.com'  # of the bucket's interface, or of a mirror's
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    program.check(self, 'source', self.source in SOURCES, ' or '.join(SOURCES))
    good = self.shards is None or len({*self.shards}) == len(self.shards)
    program.check(self, 'shards', good, 'each number once')
    program.check(self, 'run', 1 <= self.run <= NUM_RUNS, f'1 to {NUM_RUNS}')
    program.check_positive(self, 'num_threads')
    is_url = re.match(r'https?://', self.base_url) is not None
    program.check(self, 'base_url', is_url, 'an address that begins with https:// or http://')


class File(NamedTuple):
  """A file in a bucket.

  Attributes:
    name: its whole name, with slashes.
    size: in bytes.
    crc32c: its checksum, in Base64.
    generation: a number that is another when the file's content is.
    shard: the shard's number.
  """

  name: str
  size: int
  crc32c: str
  generation: int
  shard: int

  @property
  def basename(self) -> str:
    return self.name.rpartition('/')[2]

  @property
  def partial_name(self) -> str:
    """Names it as it is called here until it is complete."""
    return f'.{self.basename}.{self.generation}.partial'


# The network, which fails in passing or for good.


class _PassingError(Exception):
  """Something that another attempt may mend."""


class _Stopped(Exception):  # noqa: N818, no error
  """Another file's failure, or a signal, ends this one's transfer."""


def _attempt(operation: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
  """Does something on the network.

  Raises:
    urllib.error.HTTPError: the server's answer is a definite one.
    _PassingError: anything else.
  """
  try:
    return operation(*args, **kwargs)
  except urllib.error.HTTPError as error:
    error.close()
    if error.code not in PASSING_STATUS:
      raise
    raise _PassingError(f'HTTP status {error.code}') from error
  except (http.client.HTTPException, OSError) as error:
    reason = getattr(error, 'reason', error)
    if isinstance(reason, ssl.SSLCertVerificationError):
      raise
    raise _PassingError(str(reason) or type(reason).__name__) from error


def _persist(what: str, attempt: Callable[[], _T], stop: threading.Event, progress=lambda: 0) -> _T:
  """Attempts something until it is done.

  Args:
    what: it is about, for messages.
    attempt: raises _PassingError if another attempt may do better.
    stop: ends the waiting.
    progress: how many bytes are there, so that a file may take as many attempts as it needs as long
      as each brings something.

  Raises:
    OSError: it would take too many attempts.
  """
  num_failures, best = 0, progress()
  while True:
    try:
      return attempt()
    except _PassingError as error:
      if progress() >= best + WORTHWHILE:
        num_failures, best = 0, progress()
      num_failures += 1
      if num_failures == MAX_ATTEMPTS:
        raise OSError(
          f'{what}: {error}, after {MAX_ATTEMPTS} attempts; see that the network, and the proxy in '
          'https_proxy if there is one, work: the same command goes on from here'
        ) from error
      wait = FIRST_WAIT * 2 ** (num_failures - 1)
      logging.warning('%s: %s; trying again in %.0f s', what, error, wait)
    if stop.wait(wait):
      raise _Stopped


def _url(config: Config, name: str = '', **query: str | int) -> str:
  """Gives the address of a file in the bucket, or of the list of all."""
  path = urllib.parse.quote(f'/storage/v1/b/{SOURCES[config.source].bucket}/o')
  path += f'/{urllib.parse.quote(name, safe="")}' if name else ''
  return f'{config.base_url.rstrip("/")}{path}?{urllib.parse.urlencode(query)}'


def _refused(config: Config, error: urllib.error.HTTPError, name: str = '') -> OSError:
  """Makes the error to raise for a definite answer that is not what was asked for."""
  source = SOURCES[config.source]
  if error.code in (401, 403) or (error.code == 404 and not name):
    return PermissionError(
      f'the bucket {source.bucket} denies access (HTTP status {error.code}), {source.advice}'
    )
  if error.code in (404, 412):
    return OSError(
      f'{name}: was changed or removed in the bucket since it was listed; the same command fetches '
      'what is there now'
    )
  return OSError(f'{name or config.base_url}: HTTP status {error.code}')


# What is there.


def _pages(config: Config, prefix: str, delimiter: str = '') -> Iterator[dict[str, Any]]:
  """Lists the files whose names begin with a prefix, page by page.

  With a delimiter, those in deeper directories are not listed, but the directories are.
  """

  def get() -> dict[str, Any]:
    with _attempt(urllib.request.urlopen, _url(config, **query), timeout=TIMEOUT) as response:
      content = _attempt(response.read, MAX_PAGE_SIZE)
    try:
      page = json.loads(content)
    except ValueError as error:  # also of half a page
      raise _PassingError('expected a listing in JSON, got something else') from error
    if not isinstance(page, dict):
      raise ValueError(f'{config.base_url}: expected a listing, got {type(page).__name__}')
    return page

  query = {'prefix': prefix, 'fields': 'nextPageToken,prefixes,items(name,size,crc32c,generation)'}
  if delimiter:
    query['delimiter'] = delimiter
  for _ in range(MAX_PAGES):
    try:
      page = _persist(f'listing of {prefix} at {config.base_url}', get, threading.Event())
    except urllib.error.HTTPError as error:
      raise _refused(config, error) from error
    yield page
    if 'nextPageToken' not in page:
      return
    query['pageToken'] = page['nextPageToken']
  raise ValueError(f'{config.base_url}: the listing of {prefix} does not end')


def _missing(config: Config) -> FileNotFoundError:
  """Makes the error to raise when nothing is listed of a run."""
  source = SOURCES[config.source]
  games = source.prefix.partition('{')[0]
  directories = {
    pathlib.PurePosixPath(prefix).name
    for page in _pages(config, games, '/')
    for prefix in page.get('prefixes', [])
  }
  there = [game.name for game in atari_data.GAMES if game.directory in directories]
  if config.environment_name in there:
    return FileNotFoundError(
      f'--run={config.run}: the bucket {source.bucket} has no such run of {config.environment_name}'
    )
  near = difflib.get_close_matches(config.environment_name, there, cutoff=0)
  return FileNotFoundError(
    f'--environment_name={config.environment_name}: the bucket {source.bucket} has '
    f'{len(there)} games, but not this one; nearest are {", ".join(near)}; the other --source '
    'may have it'
  )


def find(config: Config) -> list[File]:
  """Lists the files of the chosen shards, in the order of the shards.

  Raises:
    PermissionError: the bucket denies access.
    FileNotFoundError: it lacks the game, the run or a shard.
    ValueError: the answer is no listing.
    OSError: no answer.
  """
  source, game = SOURCES[config.source], atari_data.game(config.environment_name)
  prefix = source.prefix.format(directory=game.directory, run=config.run)
  files: dict[int, list[File]] = {}
  for page in _pages(config, prefix):
    for item in page.get('items', []):
      try:
        match = re.fullmatch(re.escape(prefix) + source.pattern, item['name'])
        if match:
          shard = int(match['shard'])
          sums = (int(item['size']), str(item['crc32c']), int(item['generation']))
          files.setdefault(shard, []).append(File(item['name'], *sums, shard))
      except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
          f'{config.base_url}: expected name, size, crc32c and generation of each file in the '
          f'listing, got {item}'
        ) from error
  if not files:
    raise _missing(config)
  there = sorted(files)
  chosen = config.shards or there
  if missing := sorted({*chosen} - {*there}):
    raise FileNotFoundError(f'--shards: the bucket has no {missing} of this run; it has {there}')
  return [file for shard in chosen for file in files[shard]]


# Files.


def _size(path: pathlib.Path) -> int:
  """Tells a size in bytes; 0 of a file that is not there."""
  return path.stat().st_size if path.exists() else 0


def _has_content(path: pathlib.Path, file: File) -> bool:
  if not path.exists() or _size(path) != file.size:
    return False
  checksum = google_crc32c.Checksum()
  with open(path, 'rb') as content:
    while chunk := content.read(CHUNK_SIZE):
      checksum.update(chunk)
  return base64.b64encode(checksum.digest()).decode() == file.crc32c


def _receive(config: Config, file: File, partial: pathlib.Path, stop, count) -> None:
  """Fetches what a partial file lacks.

  Raises:
    _PassingError: some of it, or nothing, has come.
  """
  start = _size(partial)
  if partial.exists() and start >= file.size:
    return
  # As stored: without the word gzip, the server may decompress, and then knows no ranges.
  headers = {'Accept-Encoding': 'gzip', **({'Range': f'bytes={start}-'} if start else {})}
  url = _url(config, file.name, alt='media', ifGenerationMatch=file.generation)
  request = urllib.request.Request(url, headers=headers)
  try:
    response = _attempt(urllib.request.urlopen, request, timeout=TIMEOUT)
  except urllib.error.HTTPError as error:
    raise _refused(config, error, file.name) from error
  if response.status != http.HTTPStatus.PARTIAL_CONTENT and start:  # it is sent whole
    count(-start)
    start = 0
  with response, open(partial, 'ab' if start else 'wb') as content:
    while content.tell() <= file.size and (chunk := _attempt(response.read1, CHUNK_SIZE)):
      if stop.is_set():
        raise _Stopped
      content.write(chunk)
      count(len(chunk))
    content.flush()
    os.fsync(content.fileno())
    if content.tell() < file.size:
      raise _PassingError('the connection was cut')


def _fetch(config: Config, file: File, directory: pathlib.Path, stop, count) -> None:
  """Brings a file here, unless it is."""
  path = directory / file.basename
  if _has_content(path, file):
    count(file.size)
    return
  partial = directory / file.partial_name
  for _ in range(2):
    count(_size(partial))
    _persist(
      file.name,
      lambda: _receive(config, file, partial, stop, count),
      stop,
      lambda: _size(partial),
    )
    if _has_content(partial, file):
      os.replace(partial, path)
      return
    count(-_size(partial))
    partial.unlink()
  raise ValueError(
    f'{file.name}: came twice with another checksum than the bucket says; does the network, a '
    'proxy or the disk change data? Try again later, or another --replay_dir or --base_url'
  )


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
  """Keeps other downloads out of a directory."""
  with open(directory / '.lock', 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise BlockingIOError(f'{directory}: another download is under way there') from None
    yield


def _remove_outdated(files: list[File], directory: pathlib.Path) -> None:
  """Removes what has come of content that the bucket has no more."""
  wanted = {file.partial_name for file in files}
  for file in files:
    for partial in directory.glob(f'.{file.basename}.*.partial'):
      if partial.name not in wanted:
        partial.unlink()


def _size_here(file: File, directory: pathlib.Path) -> int:
  """Tells how much of a file seems to be here, in bytes."""
  whole = _size(directory / file.basename)
  return whole if whole == file.size else min(_size(directory / file.partial_name), file.size)


def download(config: Config, files: list[File], directory: pathlib.Path) -> None:
  """Brings files here, several at a time.

  Args:
    config: the flags.
    files: what `find` returned.
    directory: where to; it is made if need be.

  Raises:
    ValueError: a file's checksum is wrong time and again.
    OSError: the network fails, the disk is full, a file was changed in the bucket, ...
  """
  directory.mkdir(parents=True, exist_ok=True)
  with _locked(directory):
    _remove_outdated(files, directory)
    here = sum(_size_here(file, directory) for file in files)
    total = sum(file.size for file in files)
    free = shutil.disk_usage(directory).free
    if total - here > free:
      raise OSError(
        f'{directory}: {(total - here) / 1e9:.3g} GB are still to come and {free / 1e9:.3g} GB are '
        'free; make room, or choose fewer --shards or another --replay_dir'
      )
    logging.info(
      'Downloading %d files, %.3g GB, of which %.3g GB are here, to %s',
      len(files), total / 1e9, here / 1e9, directory,
    )  # fmt: skip
    stop, lock = threading.Event(), threading.Lock()
    with (
      program.progress_bar(total, 'downloading', 'B') as bar,
      concurrent.futures.ThreadPoolExecutor(config.num_threads) as executor,
    ):

      def count(num_bytes: int) -> None:
        with lock:
          bar.update(num_bytes)

      try:
        tasks = [executor.submit(_fetch, config, file, directory, stop, count) for file in files]
        for task in concurrent.futures.as_completed(tasks):
          task.result()
      except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
          raise OSError(
            f'{directory}: the disk is full; make room: the same command goes on from here'
          ) from error
        raise
      finally:  # of no effect when all is well
        stop.set()
        executor.shutdown(wait=False, cancel_futures=True)


def main(config: Config) -> None:
  game = atari_data.game(config.environment_name)
  files = find(config)
  default = pathlib.Path('data', config.source, game.directory, str(config.run))
  if config.source == 'dqn_replay':
    default /= 'replay_logs'  # by which reports tell that the logged rewards are clipped
  directory = pathlib.Path(config.replay_dir or default)
  download(config, files, directory)
  shards = f' --shards={",".join(map(str, config.shards))}' if config.shards else ''
  logging.info(
    'All there, with the right checksums. To train on them: '
    'python -m offline_zoo.dqn.run_atari --environment_name=%s --replay_dir=%s%s',
    game.name, directory, shards,
  )  # fmt: skip


if __name__ == '__main__':
  program.run(main, Config)
