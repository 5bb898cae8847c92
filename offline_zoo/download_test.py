"""Tests for download.py, with a server here that answers as Google Cloud Storage does, or worse."""

import base64
import collections
import dataclasses
import fcntl
import http.server
import json
import pathlib
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

import google_crc32c
import numpy as np
import pytest

from offline_zoo import download
from offline_zoo.logs import dqn_replay
from offline_zoo.studies import runs

COLUMNS = ('observation', 'action', 'reward', 'terminal', 'add_count', 'invalid_range')


def dqn_name(shard: int, column: str, directory: str = 'Pong', run: int = 1) -> str:
  name = dqn_replay.ShardFiles('', shard).path(column).name
  return f'dqn/{directory}/{run}/replay_logs/{name}'


def rlu_name(shard: int, directory: str = 'Pong', run: int = 1) -> str:
  return f'atari_episodes_ordered/{directory}/run_{run}-{shard:05d}-of-00003'


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *args):
    pass

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    root, bucket, name = url.path.partition('/o')
    assert root == '/storage/v1/b/' + self.server.bucket and bucket
    self.name = urllib.parse.unquote(name[1:])
    self.start = 0
    if 'Range' in self.headers:
      self.start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
    self.server.requests.append((self.name, self.start))
    if faults := self.server.faults[self.name]:
      fault = faults.popleft()
      if fault(self):
        self.close_connection = True
        return
    if not self.name:
      self.answer(200, json.dumps(self.server.listing(query)).encode())
      return
    assert query['alt'] == 'media' and self.headers['Accept-Encoding'] == 'gzip'
    if self.name not in self.server.files:
      self.answer(404)
    elif int(query['ifGenerationMatch']) != self.server.generations[self.name]:
      self.answer(412)
    else:
      content = self.server.files[self.name][self.start :]
      self.answer(206 if self.start else 200, content)

  def answer(self, status: int, content: bytes = b'', length: int | None = None):
    self.send_response(status)
    self.send_header('Content-Length', str(len(content) if length is None else length))
    self.end_headers()
    self.wfile.write(content)


class Bucket(http.server.ThreadingHTTPServer):
  """A bucket in memory.

  Attributes:
    files: content by name.
    generations: likewise.
    requests: (name, first byte) of each; the name is empty for a listing.
    faults: by name, what is done in a request's place; each is for one request.
    page_size: of listings.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.bucket = 'atari-replay-datasets'
    self.files: dict[str, bytes] = {}
    self.generations: dict[str, int] = collections.defaultdict(lambda: 7)
    self.requests: list[tuple[str, int]] = []
    self.faults = collections.defaultdict(collections.deque)
    self.page_size = 1000
    self.released = threading.Event()

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_address[1]}'

  def listing(self, query: dict[str, str]) -> dict:
    prefix = query['prefix']
    names = sorted(name for name in self.files if name.startswith(prefix))
    if 'delimiter' in query:
      rests = [name.removeprefix(prefix) for name in names]
      return {'prefixes': sorted({prefix + r.partition('/')[0] + '/' for r in rests if '/' in r})}
    start = int(query.get('pageToken', 0))
    page = {'items': [self.item(name) for name in names[start : start + self.page_size]]}
    if not page['items']:
      return {}
    if start + self.page_size < len(names):
      page['nextPageToken'] = str(start + self.page_size)
    return page

  def item(self, name: str) -> dict[str, str]:
    checksum = google_crc32c.Checksum(self.files[name]).digest()
    return {
      'name': name,
      'size': str(len(self.files[name])),
      'crc32c': base64.b64encode(checksum).decode(),
      'generation': str(self.generations[name]),
    }

  def starts(self, name: str) -> list[int]:
    """Where the requests of a file began."""
    return [start for requested, start in self.requests if requested == name]


# Faults. Each says whether it has dealt with the request.


def status(code: int) -> Callable:
  return lambda handler: handler.answer(code) or True


def cut(num_bytes: int) -> Callable:
  """Sends so many bytes of what would be sent, and hangs up."""

  def fault(handler) -> bool:
    content = handler.server.files[handler.name][handler.start :]
    code = 206 if handler.start else 200
    handler.answer(code, content[:num_bytes], length=len(content))
    return True

  return fault


def stall(num_bytes: int) -> Callable:
  """Likewise, but does not hang up."""

  def fault(handler) -> bool:
    cut(num_bytes)(handler)
    return handler.server.released.wait()

  return fault


def damage(handler) -> bool:
  content = bytearray(handler.server.files[handler.name][handler.start :])
  content[len(content) // 2] ^= 1
  handler.answer(206 if handler.start else 200, bytes(content))
  return True


def ignore_range(handler) -> bool:
  handler.start = 0
  return False


def silence(handler) -> bool:
  return handler.server.released.wait()


def login_page(handler) -> bool:
  handler.answer(200, b'<html>Welcome to our hotel!</html>')
  return True


@pytest.fixture
def bucket(monkeypatch):
  """Two shards of Pong's run 1 in the format of the DQN Replay Dataset, and more around them."""
  monkeypatch.setattr(download, 'TIMEOUT', 0.5)
  monkeypatch.setattr(download, 'FIRST_WAIT', 0.01)
  server = Bucket()
  rng = np.random.default_rng(0)
  for shard in range(2):
    for column in COLUMNS:
      server.files[dqn_name(shard, column)] = rng.bytes(3000 + 100 * shard)
    server.files[dqn_name(shard, 'episode_end_indices')] = b'a pickle'
  for directory in ('Asterix', 'Asteroids', 'Boxing'):
    server.files[dqn_name(0, 'action', directory)] = b'something'
  server.files[dqn_name(0, 'action', run=11)] = b'of another run'
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield server
  server.released.set()
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture
def config(bucket, tmp_path):
  return download.Config(
    source='dqn_replay', replay_dir=str(tmp_path / 'logs'), base_url=bucket.url
  )


OBSERVATION = dqn_name(0, 'observation')


@pytest.fixture
def one_file(bucket, config):
  """What fetches no other than OBSERVATION: a `download` of it alone, over and over."""
  files = [file for file in download.find(config) if file.name == OBSERVATION]
  bucket.requests.clear()
  return lambda: download.download(config, files, pathlib.Path(config.replay_dir))


def here(config) -> dict[str, bytes]:
  """The files of the directory, but the lock."""
  directory = pathlib.Path(config.replay_dir)
  files = directory.iterdir() if directory.exists() else ()
  return {path.name: path.read_bytes() for path in files if path.name != '.lock'}


def there(bucket, *shards: int) -> dict[str, bytes]:
  names = [dqn_name(shard, column) for shard in shards for column in COLUMNS]
  return {name.rpartition('/')[2]: bucket.files[name] for name in names}


# What is fetched.


def test_a_run_of_the_dqn_replay_dataset(bucket, config, caplog):
  caplog.set_level('INFO', logger='absl')
  download.main(config)
  assert here(config) == there(bucket, 0, 1)
  assert len(bucket.requests) == 1 + 12
  assert 'Downloading 12 files, 3.66e-05 GB, of which 0 GB are here' in caplog.text
  assert (
    'python -m offline_zoo.dqn.run_atari --environment_name=pong '
    f'--replay_dir={config.replay_dir}\n'
  ) in caplog.text

  # What is there, and right, is not fetched again.
  bucket.requests.clear()
  download.main(config)
  assert bucket.requests == [('', 0)]
  dqn_replay.ShardFiles(config.replay_dir, 1).path('observation').write_bytes(bytes(3100))
  dqn_replay.ShardFiles(config.replay_dir, 0).path('action').unlink()
  download.main(config)
  assert here(config) == there(bucket, 0, 1)
  assert sorted(bucket.requests[1:]) == sorted(
    [('', 0), (dqn_name(1, 'observation'), 0), (dqn_name(0, 'action'), 0)]
  )


def test_chosen_shards(bucket, config, caplog):
  caplog.set_level('INFO', logger='absl')
  download.main(dataclasses.replace(config, shards=(1,)))
  assert here(config) == there(bucket, 1)
  assert f'--replay_dir={config.replay_dir} --shards=1\n' in caplog.text


def test_a_run_of_rl_unplugged(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  bucket.bucket = 'rl_unplugged'
  bucket.files = {rlu_name(shard, run=run): b'%d' % run * 9 for shard in range(3) for run in (1, 2)}
  config = download.Config(source='rl_unplugged', run=2, shards=(0, 2), base_url=bucket.url)
  download.main(config)
  default = dataclasses.replace(config, replay_dir='data/rl_unplugged/Pong/2')
  assert here(default) == {'run_2-00000-of-00003': b'2' * 9, 'run_2-00002-of-00003': b'2' * 9}


def test_where_the_dqn_replay_dataset_goes_tells_that_its_rewards_are_clipped(
  bucket, config, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  config = dataclasses.replace(config, replay_dir=None)
  download.main(config)
  directory = 'data/dqn_replay/Pong/1/replay_logs'
  assert here(dataclasses.replace(config, replay_dir=directory)) == there(bucket, 0, 1)
  assert runs._dqn_replay_run({'replay_dir': directory}, 'pong') == 1


def test_a_listing_in_pages(bucket, config):
  bucket.page_size = 3
  bucket.faults[''].extend([status(503), silence, login_page])
  download.main(config)
  assert here(config) == there(bucket, 0, 1)
  assert len(bucket.starts('')) == 3 + 5  # 14 files in 5 pages


def test_an_empty_file(bucket, config):
  bucket.files[dqn_name(0, 'reward')] = b''
  download.main(config)
  assert here(config) == there(bucket, 0, 1)


# A bad network.


def test_cut_connections_are_taken_up_where_they_ended(bucket, config, one_file):
  bucket.faults[OBSERVATION].extend([cut(1000), cut(0), cut(500), status(503)])
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [0, 1000, 1000, 1500, 1500]


def test_what_brings_something_may_take_many_attempts(bucket, config, one_file, monkeypatch):
  monkeypatch.setattr(download, 'WORTHWHILE', 100)
  bucket.faults[OBSERVATION].extend([cut(100)] * 20)
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [100 * i for i in range(21)]


def test_a_server_that_stays_silent(bucket, config, one_file):
  bucket.faults[OBSERVATION].extend([stall(0), stall(700)])
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [0, 0, 700]


def test_a_server_that_ignores_ranges(bucket, config, one_file):
  bucket.faults[OBSERVATION].extend([cut(1000), ignore_range])
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [0, 1000]


def test_a_wrong_checksum_is_given_a_second_chance(bucket, config, one_file):
  bucket.faults[OBSERVATION].extend([cut(1000), damage])
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [0, 1000, 0]


def test_a_checksum_that_stays_wrong(bucket, config, one_file):
  bucket.faults[OBSERVATION].extend([damage, damage])
  with pytest.raises(ValueError, match=r'observation_ckpt\.0\.gz: came twice with another'):
    one_file()
  assert here(config) == {}
  assert bucket.starts(OBSERVATION) == [0, 0]


def test_more_than_was_listed(bucket, config, one_file):
  bucket.files[OBSERVATION] *= 2
  with pytest.raises(ValueError, match='another checksum'):
    one_file()
  assert here(config) == {}


def test_a_partial_file_that_is_too_long(bucket, config, one_file):
  """As a kill may leave it while more comes than was listed."""
  pathlib.Path(config.replay_dir).mkdir()
  partial = pathlib.Path(config.replay_dir, f'.{OBSERVATION.rpartition("/")[2]}.7.partial')
  partial.write_bytes(bucket.files[OBSERVATION] + b'more')
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [0]


def test_a_server_that_fails_for_good(bucket, config, one_file):
  bucket.faults[OBSERVATION].extend([cut(100), *[status(500)] * 9])
  with pytest.raises(OSError, match=r'gz: HTTP status 500, after 5 attempts; .*goes on from here'):
    one_file()
  assert len(bucket.requests) == 5
  bucket.faults.clear()
  one_file()
  assert list(here(config).values()) == [bucket.files[OBSERVATION]]
  assert bucket.starts(OBSERVATION) == [0, 100, 100, 100, 100, 100]


def test_a_failure_ends_the_others_soon(bucket, config, monkeypatch):
  monkeypatch.setattr(download, 'FIRST_WAIT', 10)
  for column in COLUMNS[1:]:
    bucket.faults[dqn_name(0, column)].append(status(503))
    bucket.faults[dqn_name(1, column)].append(cut(10))
  bucket.faults[OBSERVATION].append(lambda handler: time.sleep(0.2) or status(403)(handler))
  start = time.monotonic()
  with pytest.raises(PermissionError, match='denies access'):
    download.main(config)
  assert time.monotonic() - start < 5


def test_no_network(bucket, config):
  closed = dataclasses.replace(config, base_url='http://127.0.0.1:1')
  with pytest.raises(OSError, match=r'127\.0\.0\.1:1: .*refused, after 5 attempts; see that'):
    download.main(closed)
  assert not pathlib.Path(config.replay_dir).exists()


def test_a_certificate_that_is_not_trusted(config, monkeypatch):
  calls = []

  def urlopen(url, timeout):
    calls.append(url)
    raise urllib.error.URLError(ssl.SSLCertVerificationError('self-signed'))

  monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
  with pytest.raises(OSError, match='self-signed'):
    download.main(config)
  assert len(calls) == 1  # it will not change


def test_an_unusual_answer(bucket, config, one_file):
  bucket.faults[''].append(status(400))
  with pytest.raises(OSError, match=r'127\.0\.0\.1:\d+: HTTP status 400'):
    download.main(config)
  bucket.faults[OBSERVATION].append(status(410))
  with pytest.raises(OSError, match=r'observation_ckpt\.0\.gz: HTTP status 410'):
    one_file()


def test_something_else_than_a_listing(bucket, config):
  bucket.faults[''].extend([login_page] * 9)
  with pytest.raises(OSError, match='expected a listing in JSON, got something else, after 5'):
    download.main(config)
  assert len(bucket.requests) == 5
  bucket.faults[''].clear()
  for listing in ([], {'items': [{'name': OBSERVATION}]}):
    bucket.listing = lambda query, listing=listing: listing
    with pytest.raises(ValueError, match=r'expected (a listing, got list|name, size, crc32c and)'):
      download.main(config)


def test_a_listing_without_end(bucket, config, monkeypatch):
  monkeypatch.setattr(download, 'MAX_PAGES', 4)
  bucket.listing = lambda query: {'nextPageToken': 'again'}
  with pytest.raises(ValueError, match='does not end'):
    download.main(config)
  assert len(bucket.requests) == 4


def test_names_that_lead_elsewhere_are_not_ours(bucket, config):
  for name in ('../../../action_ckpt.0.gz', '$store$_action_ckpt.7.gz/x', 'add_count_ckpt.-1.gz'):
    bucket.files[f'dqn/Pong/1/replay_logs/{name}'] = b'x'
  download.main(config)
  assert here(config) == there(bucket, 0, 1)


# What the bucket refuses, or lacks.


@pytest.mark.parametrize('code', [401, 403, 404])
def test_denied_access(bucket, config, code: int):
  bucket.faults[''].append(status(code))
  with pytest.raises(PermissionError) as error:
    download.main(config)
  assert str(error.value) == (
    f'the bucket atari-replay-datasets denies access (HTTP status {code}), as public threads have '
    'reported since 2025; RL Unplugged has the same play of 46 games: --source=rl_unplugged'
  )
  bucket.bucket = 'rl_unplugged'
  bucket.faults[''].append(status(code))
  with pytest.raises(PermissionError, match=f'rl_unplugged denies access .*{code}.*--base_url'):
    download.main(dataclasses.replace(config, source='rl_unplugged'))
  assert len(bucket.requests) == 2
  assert not pathlib.Path(config.replay_dir).exists()


@pytest.mark.parametrize(
  'flags, message',
  [
    (
      {'environment_name': 'alien'},
      '--environment_name=alien: the bucket atari-replay-datasets has 4 games, but not this one; '
      'nearest are boxing, asterix, asteroids; the other --source may have it',
    ),
    ({'run': 2}, '--run=2: the bucket atari-replay-datasets has no such run of pong'),
    ({'shards': (1, 2, 5)}, '--shards: the bucket has no [2, 5] of this run; it has [0, 1]'),
  ],
)
def test_what_the_bucket_lacks(bucket, config, flags, message: str):
  with pytest.raises(FileNotFoundError) as error:
    download.main(dataclasses.replace(config, **flags))
  assert str(error.value) == message
  assert not pathlib.Path(config.replay_dir).exists()


def test_a_file_that_changes(bucket, config, one_file):
  """Half of it has come when there is another in its place."""

  def change(handler):
    bucket.files[OBSERVATION] = bytes(5000)
    bucket.generations[OBSERVATION] = 8
    return False

  bucket.faults[OBSERVATION].extend([cut(1500), change])
  with pytest.raises(OSError, match=r'observation_ckpt\.0\.gz: was changed or removed'):
    one_file()
  assert list(here(config).values()) != [bucket.files[OBSERVATION]]
  bucket.requests.clear()
  download.main(config)
  assert here(config) == there(bucket, 0, 1)
  assert bucket.starts(OBSERVATION) == [0]


def test_a_file_that_is_removed(bucket, one_file):
  del bucket.files[OBSERVATION]
  with pytest.raises(OSError, match=r'observation_ckpt\.0\.gz: was changed or removed'):
    one_file()


@pytest.mark.parametrize(
  'flags, message',
  [
    ({'source': 'gs'}, '--source=gs: expected dqn_replay or rl_unplugged'),
    ({'run': 0}, '--run=0: expected 1 to 5'),
    ({'shards': (1, 2, 1)}, r'--shards=\(1, 2, 1\): expected each number once'),
    ({'num_threads': 0}, '--num_threads=0: expected more than 0'),
    ({'base_url': 'file:///etc'}, '--base_url=file:///etc: expected an address that begins with'),
    ({'environment_name': 'Pong'}, "unknown game 'Pong'; did you mean 'pong'"),
  ],
)
def test_bad_flags(flags, message: str):
  with pytest.raises(ValueError, match=message):
    download.main(download.Config(**flags))


# The disk.


def test_a_disk_that_is_too_small(bucket, config, monkeypatch):
  usage = shutil._ntuple_diskusage(10**6, 10**6, 10**4)
  monkeypatch.setattr(shutil, 'disk_usage', lambda directory: usage)
  with pytest.raises(OSError, match=r'logs: 3\.66e-05 GB are still to come and 1e-05 GB are free'):
    download.main(config)
  assert here(config) == {}


def test_a_disk_that_fills_up(bucket, config):
  pathlib.Path(config.replay_dir).mkdir()
  partial = pathlib.Path(config.replay_dir, f'.{OBSERVATION.rpartition("/")[2]}.7.partial')
  partial.symlink_to('/dev/full')
  with pytest.raises(OSError, match='logs: the disk is full; make room: the same command goes on'):
    download.main(config)
  partial.unlink()
  download.main(config)
  assert here(config) == there(bucket, 0, 1)


def test_two_downloads_do_not_share_a_directory(bucket, config):
  download.main(config)
  with open(pathlib.Path(config.replay_dir) / '.lock') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match='logs: another download is under way there'):
      download.main(config)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_download_goes_on(bucket, config, number):
  for i in range(2):
    bucket.files[dqn_name(i, 'observation')] = np.random.default_rng(i).bytes(400_000)
    bucket.faults[dqn_name(i, 'observation')].append(stall(300_000))
  process = subprocess.Popen(
    [sys.executable, '-m', 'offline_zoo.download', '--source=dqn_replay', '--shards=0-1',
     f'--replay_dir={config.replay_dir}', f'--base_url={bucket.url}'],
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  partial = pathlib.Path(config.replay_dir, f'.{OBSERVATION.rpartition("/")[2]}.7.partial')
  while process.poll() is None and (not partial.exists() or partial.stat().st_size < 290_000):
    time.sleep(0.01)
  process.send_signal(number)
  bucket.released.set()
  output = process.communicate(timeout=20)[1]
  assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
  assert 'Traceback' not in output
  size = partial.stat().st_size
  assert 290_000 <= size <= 300_000
  assert not dqn_replay.ShardFiles(config.replay_dir, 0).path('observation').exists()

  bucket.requests.clear()
  download.main(config)
  assert here(config) == there(bucket, 0, 1)
  assert bucket.starts(OBSERVATION) == [size]
