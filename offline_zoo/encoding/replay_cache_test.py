"""Tests for what Logs keeps in a cache, and for what it does with a bad one."""

import gzip
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import soak_logs
from offline_zoo import replay
from offline_zoo.encoding import replay_cache
from offline_zoo.logs import dqn_replay

SCRIPT = """
import sys
from offline_zoo import replay
from offline_zoo.logs import dqn_replay
read = dqn_replay.ShardFiles.read_frames
dqn_replay.ShardFiles.read_frames = lambda *args: (print('encodes', args[0]), read(*args))[1]
logs = replay.Logs(sys.argv[1], cache_dir=sys.argv[2])
print(logs.checksum, logs.resident(0).frames.frames.shape)
"""


@pytest.fixture
def logs(golden, tmp_path):
  """A copy of the recorded logs, four shards, to be changed."""
  source = golden / 'replay' / 'Breakout' / '1' / 'replay_logs'
  return pathlib.Path(shutil.copytree(source, tmp_path / 'logs'))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
  """The numbers of the shards whose frames were read since it was last cleared."""
  numbers = []
  read_frames = dqn_replay.ShardFiles.read_frames

  def reading(self, num_frames):
    numbers.append(self.number)
    return read_frames(self, num_frames)

  monkeypatch.setattr(dqn_replay.ShardFiles, 'read_frames', reading)
  return numbers


def files_of(cache: pathlib.Path) -> list[pathlib.Path]:
  return sorted(cache.glob('*/*.shard'))


def check(logs, shards, cache, **kwargs) -> None:
  """What comes with the cache is, row by row, what comes without."""
  want = replay.Logs(logs, shards, **kwargs)
  got = replay.Logs(logs, shards, cache_dir=cache, **kwargs)
  assert got.checksum == want.checksum
  np.testing.assert_equal(got.mean_episode_return, want.mean_episode_return)
  rows = replay.valid_rows(want.resident(0))
  np.testing.assert_array_equal(replay.valid_rows(got.resident(0)), rows)
  both = (replay.gather(logs.resident(0), rows) for logs in (got, want))
  for ours, theirs in zip(*both, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_second_time_nothing_is_encoded(logs, tmp_path, encoded):
  replay.Logs(logs, cache_dir=tmp_path / 'cache')
  assert encoded == [0, 1, 2, 3]
  assert len(files_of(tmp_path / 'cache')) == 4
  encoded.clear()
  replay.Logs(logs, cache_dir=tmp_path / 'cache')
  assert encoded == []
  check(logs, None, tmp_path / 'cache', n_step=3)
  # Logs in another directory are other logs, and so are fewer rows of each shard.
  encoded.clear()
  moved = shutil.copytree(logs, tmp_path / 'moved')
  replay.Logs(moved, [2], cache_dir=tmp_path / 'cache')
  replay.Logs(logs, [2], cache_dir=tmp_path / 'cache', max_rows_per_shard=100)
  assert encoded == [2, 2]
  check(logs, [2], tmp_path / 'cache', max_rows_per_shard=100)
  check(logs, [2], tmp_path / 'cache')


def test_shards_are_added_and_subsets_taken(logs, tmp_path, encoded):
  cache = tmp_path / 'cache'
  replay.Logs(logs, [3, 1], cache_dir=cache)
  before = [path.read_bytes() for path in files_of(cache)]
  replay.Logs(logs, [0, 1], cache_dir=cache)
  replay.Logs(logs, cache_dir=cache)
  assert encoded == [3, 1, 0, 2]
  assert [path.read_bytes() for path in files_of(cache)][:2] == before
  for shards in ([3, 1], [1, 3], [2], [0, 2], None):
    check(logs, shards, cache)
  # Pieces of shards that are not chosen are left out.
  alone = replay.load(logs, [2])
  from_chain = replay.load(logs, [2], cache_dir=cache)
  for one, other in zip(alone.frames, from_chain.frames, strict=True):
    assert one.shape == other.shape


def flip(position: int):
  def damage(data: bytes) -> bytes:
    at = position % len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

  return damage


DAMAGES = {
  'in its hash': flip(3),
  'in its header': flip(170),
  'in the middle': lambda data: flip(len(data) // 2)(data),
  'at its end': flip(-1),
  'truncated': lambda data: data[: len(data) // 2],
  'longer': lambda data: data + b'\0',
  'empty': lambda data: b'',
  'text': lambda data: b'hello\n' * 100,
}


@pytest.mark.parametrize(
  'damage, position', [('in the middle', 2), *((damage, 0) for damage in DAMAGES)]
)
def test_a_damaged_file_is_found_and_made_anew(logs, tmp_path, encoded, damage, position):
  cache = tmp_path / 'cache'
  replay.Logs(logs, cache_dir=cache)
  good = [path.read_bytes() for path in files_of(cache)]
  path = files_of(cache)[position]
  path.write_bytes(DAMAGES[damage](good[position]))
  encoded.clear()
  check(logs, None, cache)
  assert encoded[4:] == [0, 1, 2, 3][position:]  # first without, then with the cache
  assert [path.read_bytes() for path in files_of(cache)] == good


def test_every_flipped_bit_is_found(logs, tmp_path):
  replay.Logs(logs, [3], cache_dir=tmp_path / 'cache')
  (path,) = files_of(tmp_path / 'cache')
  good = path.read_bytes()
  for position in np.random.default_rng(0).integers(len(good), size=200):
    path.write_bytes(flip(position)(good))
    with pytest.raises(ValueError, match='damaged'):
      replay_cache._read(path)


def test_a_flipped_bit_changes_no_row(tmp_path):
  """A short run of the soak test, through all that a run does with the cache."""
  assert soak_logs.flip_cache(20, tmp_path) == []


def rewrite(path: pathlib.Path, **header) -> None:
  """Makes a file with another header and, for that, a right hash."""
  stored, shard, _ = replay_cache._read(path)
  shard = replay_cache.EncodedShard(*(np.array(getattr(shard, f)) for f in vars(shard)))
  replay_cache._write(path, {**stored, **header}, shard)


@pytest.mark.parametrize(
  'header, message',
  [
    ({'version': replay_cache.VERSION + 1}, 'of version'),
    ({'previous': '0' * 64}, 'does not continue'),
    ({'shard': 2}, 'has changed since'),
    ({'shard': 77}, 'has changed since'),
    ({'fingerprint': {}}, 'has changed since'),
  ],
)
def test_a_foreign_file_is_not_used(logs, tmp_path, encoded, caplog, header, message):
  cache = tmp_path / 'cache'
  replay.Logs(logs, cache_dir=cache)
  rewrite(files_of(cache)[1], **header)
  encoded.clear()
  check(logs, None, cache)
  assert encoded[4:] == [1, 2, 3]
  assert message in caplog.text


def test_another_directorys_files_are_not_used(logs, tmp_path, encoded):
  cache = tmp_path / 'cache'
  other = pathlib.Path(shutil.copytree(logs, tmp_path / 'other'))
  shard = dqn_replay.ShardFiles(other, 0).read()
  shard.observation[10] += 1
  dqn_replay.ShardFiles(other, 0).write(shard)
  for replay_dir in (logs, other):
    replay.Logs(replay_dir, cache_dir=cache)
  first, second = (replay_cache.directory_for(cache, x, None) for x in (logs, other))
  for path in files_of(cache):
    if path.parent == second:
      shutil.copy(path, first)
  encoded.clear()
  check(logs, None, cache)
  assert encoded[4:] == [0, 1, 2, 3]


def test_a_changed_shard_is_encoded_anew(logs, tmp_path, encoded):
  cache = tmp_path / 'cache'
  replay.Logs(logs, cache_dir=cache)
  shard = dqn_replay.ShardFiles(logs, 2).read()
  shard.observation[10] += 1
  dqn_replay.ShardFiles(logs, 2).write(shard)
  encoded.clear()
  check(logs, None, cache)
  assert encoded[4:] == [2, 3]
  # As is one that only seems to have changed.
  os.utime(dqn_replay.ShardFiles(logs, 3).path('reward'), ns=(1, 1))
  encoded.clear()
  check(logs, None, cache)
  assert encoded[4:] == [3]


@pytest.mark.parametrize('replaces', [True, False])
def test_a_changed_shard_of_the_same_size_and_time_is_encoded_anew(
  logs, tmp_path, encoded, replaces: bool
):
  cache = tmp_path / 'cache'
  path = dqn_replay.ShardFiles(logs, 2).path('action')
  actions = dqn_replay.ShardFiles(logs, 2).read().action
  versions = []
  for column in (actions, (actions + 1) % 4):
    npy = io.BytesIO()
    np.save(npy, column)
    versions.append(gzip.compress(npy.getvalue(), 0))  # not compressed, so of the same size
  assert len(versions[0]) == len(versions[1])
  path.write_bytes(versions[0])
  os.utime(path, ns=(10**18, 10**18))
  replay.Logs(logs, cache_dir=cache)
  if replaces:
    (tmp_path / 'new').write_bytes(versions[1])
    os.replace(tmp_path / 'new', path)
  else:
    path.write_bytes(versions[1])
  os.utime(path, ns=(10**18, 10**18))
  encoded.clear()
  got = replay.load(logs, [2], cache_dir=cache)
  assert encoded == [2]
  np.testing.assert_array_equal(got.actions, (actions[: len(got.actions)] + 1) % 4)


def test_actions_are_checked_against_the_game_at_hand(logs, tmp_path):
  replay.Logs(logs, cache_dir=tmp_path / 'cache', num_actions=4)
  with pytest.raises(ValueError, match=r'action_ckpt\.0\.gz: expected actions 0 to 2 .*got 3 in'):
    replay.Logs(logs, cache_dir=tmp_path / 'cache', num_actions=3)


def test_nothing_is_ever_unpickled(logs, tmp_path, encoded):
  class Bomb:
    def __reduce__(self):
      return open, (str(tmp_path / 'bomb'), 'w')

  replay.Logs(logs, [0], cache_dir=tmp_path / 'cache')
  (path,) = files_of(tmp_path / 'cache')
  header, _, _ = replay_cache._read(path)
  hashing_to = tmp_path / 'bad'
  with open(hashing_to, 'wb') as file:
    file.write(bytes(32))
    hashing = replay_cache._HashingFile(file)
    np.save(hashing, np.frombuffer(json.dumps(header).encode(), np.uint8))
    np.save(hashing, np.array([Bomb()], dtype=object), allow_pickle=True)
    file.seek(0)
    file.write(hashing.sha256.digest())
  os.replace(hashing_to, path)
  encoded.clear()
  check(logs, [0], tmp_path / 'cache')
  assert encoded == [0, 0]
  assert not (tmp_path / 'bomb').exists()


def test_two_processes_on_a_cold_cache(logs, tmp_path):
  command = [sys.executable, '-c', SCRIPT, str(logs), str(tmp_path / 'cache')]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(pathlib.Path.cwd())}
  processes = [
    subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  want = replay.Logs(logs).checksum
  assert [output[-1].split()[0] for output in outputs] == [str(want)] * 2
  # One of them encoded, the other waited for it.
  assert sorted(len(output) for output in outputs) == [1, 5]
  assert len(files_of(tmp_path / 'cache')) == 4
  check(logs, None, tmp_path / 'cache')


def test_a_full_disk_only_costs_the_cache(logs, tmp_path, monkeypatch, caplog):
  save = np.save

  def full_disk(file, *args, **kwargs):
    if len(files_of(tmp_path / 'cache')) == 2:
      raise OSError(28, 'No space left on device')
    save(file, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(np, 'save', full_disk)
    check(logs, None, tmp_path / 'cache')
  (directory,) = (tmp_path / 'cache').iterdir()
  full = f'will not be kept for the next run: {directory / "0002.shard"}: No space left on device'
  assert full in caplog.text
  left = [path.name for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
  assert sorted(left) == ['.lock', '0000.shard', '0001.shard']
  check(logs, None, tmp_path / 'cache')
  assert len(files_of(tmp_path / 'cache')) == 4


def test_other_shards_in_the_cache_take_no_memory(logs, tmp_path):
  """What is resident does not depend on what else was ever encoded."""
  cache = tmp_path / 'cache'
  noise = dqn_replay.ShardFiles(logs, 0).read()
  noise.observation[:] = np.random.default_rng(0).integers(256, size=noise.observation.shape)
  dqn_replay.ShardFiles(logs, 9).write(noise)
  replay.Logs(logs, [9], cache_dir=cache)
  for shards in ([0, 1, 2, 3], [2]):
    alone, among = replay.Logs(logs, shards), replay.Logs(logs, shards, cache_dir=cache)
    assert among._plan == alone._plan
    for number in range(1, len(shards)):
      among, alone = (
        replay.Logs(logs, shards, cache_dir=directory, num_resident_shards=number)
        for directory in (cache, None)
      )
      assert among._plan == alone._plan


def test_files_are_mapped_once_and_leftovers_removed(logs, tmp_path):
  """One open file a shard: a game has more than fifty."""
  cache = tmp_path / 'cache'
  before = len(os.listdir('/proc/self/fd'))
  opened = replay.Logs(logs, cache_dir=cache)
  assert len(os.listdir('/proc/self/fd')) - before <= len(opened.shards)
  directory = files_of(cache)[0].parent
  (directory / '.partial-killed').touch()
  (directory / '0002.shard').write_bytes(b'damaged')
  replay.Logs(logs, [0, 1], cache_dir=cache)
  assert not (directory / '.partial-killed').exists()
  replay.Logs(logs, [0, 1, 3], cache_dir=cache)
  assert [path.name for path in files_of(cache)] == ['0000.shard', '0001.shard', '0002.shard']
  check(logs, None, cache)


def test_without_locks_or_leave_to_write_the_cache_is_still_read(
  logs, tmp_path, encoded, monkeypatch, caplog
):
  cache = tmp_path / 'cache'
  replay.Logs(logs, [0, 1], cache_dir=cache)
  encoded.clear()

  def no_locks(*args):
    raise OSError(37, 'No locks available')

  monkeypatch.setattr(replay_cache.fcntl, 'flock', no_locks)
  check(logs, [0, 1, 2], cache)
  assert encoded == [0, 1, 2, 2]  # all without the cache, one with it
  assert 'No locks available' in caplog.text
  assert len(files_of(cache)) == 2


def test_the_flag(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert replay.cache_dir(None) == tmp_path / 'offline_zoo' / 'replay'
  assert replay.cache_dir('none') is None
  assert replay.cache_dir(str(tmp_path / 'here')) == tmp_path / 'here'
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match=r'--replay_cache_dir=.*file/cache: cannot be made'):
    replay.cache_dir(str(tmp_path / 'file' / 'cache'))
