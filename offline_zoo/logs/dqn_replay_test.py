"""Tests for dqn_replay.py: against the recorded files, and with damaged ones."""

import dataclasses
import gzip
import io
import itertools
import os
import pathlib
import pickle
import re
import shutil
import signal
import time
import tracemalloc

import jax
import numpy as np
import pytest

from benchmarks import soak_logs
from offline_zoo import atari_env, processors, replay, testing
from offline_zoo.logs import dqn_replay

CAPACITY = 1000


# Writing.


def test_probabilities_are_written_where_they_are_asked_for_and_replaced(tmp_path):
  path = tmp_path / '$store$_prob_ckpt.0.gz'
  for with_prob in (True, False):
    writer = dqn_replay.ShardWriter(tmp_path, 10, with_prob=with_prob)
    writer.start_episode()
    for i in range(3):
      writer.add(np.full((84, 84), i, np.uint8), i, 0.0, i == 2, 0.25 * i)
    writer.close()
    files = dqn_replay.ShardFiles(tmp_path, 0)
    assert path.exists() == with_prob
    probability = files.read_small_files(num_actions=3).probability
    assert probability.tolist() == ([0, 0, 0, 0, 0.25, 0.5] if with_prob else [])
    assert probability.dtype == np.float32


def test_the_writer_makes_the_recorded_files(golden, logs, tmp_path):
  """The recorded stream, written by us, gives the recorded arrays but for the stale rows."""
  stream = np.load(golden / 'replay' / 'Breakout' / '1' / 'expected' / 'stream.npz')
  shards = [dqn_replay.ShardFiles(logs, i).read() for i in range(4)]
  writer = dqn_replay.ShardWriter(tmp_path, CAPACITY)
  num_kept = 0
  for i, padding in enumerate(stream['padding']):
    if padding and (i == 0 or not stream['padding'][i - 1]):
      writer.start_episode()
    if not padding:
      shard, row = divmod(i, CAPACITY)
      num_kept += row < CAPACITY - 1
      frame = shards[shard].observation[row]
      writer.add(frame, stream['action'][i], stream['reward'][i], bool(stream['terminal'][i]))
  writer.close()
  assert writer.num_transitions == num_kept
  assert [files.number for files in dqn_replay.open_shards(tmp_path)] == [0, 1, 2, 3]
  for i, theirs in enumerate(shards):
    ours = dqn_replay.ShardFiles(tmp_path, i).read()
    assert ours.add_count == theirs.add_count
    for name, column in ours.columns.items():
      rows = theirs.num_rows
      np.testing.assert_array_equal(column[:rows], theirs.columns[name][:rows])
      assert not column[rows:].any()
    for name in ('add_count', 'invalid_range'):
      arrays = []
      for directory in (tmp_path, logs):
        with gzip.open(directory / f'{name}_ckpt.{i}.gz') as file:
          arrays.append(np.load(file, allow_pickle=False))
      np.testing.assert_array_equal(*arrays)
      assert arrays[0].dtype == arrays[1].dtype


def test_writing_is_reproducible_and_reads_back(tmp_path):
  shard = testing.make_shard(20, 25, action=np.arange(20), reward=np.linspace(-3, 3, 20))
  for name in ('a', 'b'):
    dqn_replay.ShardFiles(tmp_path / name, 7).write(shard)
  files = sorted(path.name for path in (tmp_path / 'a').iterdir())
  assert len(files) == 6
  for name in files:
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
  back = dqn_replay.ShardFiles(tmp_path / 'a', 7).read()
  assert back.add_count == 20
  for name, column in shard.columns.items():
    np.testing.assert_array_equal(back.columns[name], column)
    assert back.columns[name].dtype == column.dtype


def test_write_refuses_other_types(tmp_path):
  shard = dataclasses.replace(testing.make_shard(20), action=np.zeros(21, np.int64))
  with pytest.raises(ValueError, match=r'action_ckpt\.0\.gz: expected int32 \[21\], got int64'):
    dqn_replay.ShardFiles(tmp_path, 0).write(shard)
  assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_shard(tmp_path, monkeypatch):
  dqn_replay.ShardFiles(tmp_path, 0).write(testing.make_shard(20, action=np.arange(20)))
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  save, calls = np.save, []

  def full_disk(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
      raise OSError(28, 'No space left on device')
    save(*args, **kwargs)

  monkeypatch.setattr(np, 'save', full_disk)
  path = re.escape(str(tmp_path / '$store$_terminal_ckpt.0.gz'))
  with pytest.raises(OSError, match=f'{path}: cannot be written: .*No space left'):
    dqn_replay.ShardFiles(tmp_path, 0).write(testing.make_shard(30))
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_writer_loses_only_the_row_that_would_be_stale(tmp_path):
  writer = dqn_replay.ShardWriter(tmp_path, 10)
  rows = []
  for episode in range(5):
    writer.start_episode()
    rows += [0, 0, 0]
    for step in range(6):
      rows.append(40 * episode + step + 1)
      writer.add(np.ones((84, 84), np.uint8), rows[-1], 0.0, step == 5)
  writer.close()
  shards = [files.read() for files in dqn_replay.open_shards(tmp_path)]
  assert [shard.add_count for shard in shards] == [9, 19, 29, 39, 5]
  kept = np.concatenate([shard.action[: shard.num_rows] for shard in shards])
  np.testing.assert_array_equal(kept, np.delete(rows, [9, 19, 29, 39]))
  assert writer.num_transitions == np.count_nonzero(kept)


def test_the_readmes_example_logs_what_agents_see(tmp_path, monkeypatch):
  """The logged actions, played again, give the logged frames, rewards and ends."""
  readme = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  (example,) = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
  assert example.count('\n') <= 25
  seeded = {
    'env.reset()': 'env.reset(seed=writer.num_transitions)',
    'env.action_space.sample()': 'rng.integers(4)',
  }
  for old, new in {'50_000': '300', '100_000': '5_000', **seeded}.items():
    assert example.count(old) == 1
    example = example.replace(old, new)
  monkeypatch.chdir(tmp_path)
  exec(compile(example, 'README.md', 'exec'), {'rng': np.random.default_rng(1)})

  (files,) = dqn_replay.open_shards('breakout_logs')
  shard = files.read()
  environment, processor = atari_env.AtariEnv('breakout', seed=0), processors.AtariProcessor()
  ends = np.flatnonzero(shard.terminal[: shard.num_rows]) + 1
  assert len(ends) >= 2 and ends[-1] == shard.num_rows >= 300
  num_played = 0
  for start, end in itertools.pairwise([0, *ends]):
    assert not shard.observation[start : start + 3].any()
    environment.seed(int(num_played))
    answer = processor(environment.reset())
    for row in range(start + 3, end):
      np.testing.assert_array_equal(shard.observation[row], answer.observation[..., -1])
      answer = None
      while answer is None:
        answer = processor(environment.step(shard.action[row]))
      assert (shard.reward[row], shard.terminal[row]) == (answer.reward, answer.last())
    num_played += end - start - 3
  data = replay.load('breakout_logs', num_actions=4)
  assert data.run_ends[-1] == num_played - 1  # all but the last, whose next frame is in no row
  assert set(shard.action[: shard.num_rows]) == {0, 1, 2, 3}


# Bad input.


@pytest.fixture
def copy(logs, tmp_path):
  """A directory with the recorded shard 1, to be damaged."""
  directory = tmp_path / 'logs'
  directory.mkdir()
  for path in logs.glob('*_ckpt.1.gz'):
    shutil.copy(path, directory)
  return directory


def write_array(path, array) -> None:
  with gzip.open(path, 'wb') as file:
    np.save(file, array)


COLUMNS = tuple(f'$store$_{name}' for name in ('observation', 'action', 'reward', 'terminal'))
FILES = (*COLUMNS, 'add_count')


@pytest.mark.parametrize('file', COLUMNS)
def test_a_missing_file_is_named(copy, file: str):
  (copy / f'{file}_ckpt.1.gz').unlink()
  with pytest.raises(FileNotFoundError) as error:
    replay.load(copy)
  assert f'{file}_ckpt.1.gz: a file of this shard is missing' in str(error.value)


DAMAGES = {
  'truncated': lambda data: data[: len(data) // 2],
  'without its trailer': lambda data: data[:-8],
  'cut in its trailer': lambda data: data[:-1],
  'with a wrong checksum': lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:],
  'with a wrong length': lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:],
  'empty': lambda data: b'',
  'text': lambda data: b'not an array\n',
  'compressed text': lambda data: gzip.compress(b'not an array\n'),
  'compressed nothing': lambda data: gzip.compress(b''),
  'followed by more': lambda data: data + gzip.compress(b'x'),
  'not compressed': lambda data: gzip.decompress(data),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('file', FILES)
def test_a_damaged_file_is_named(copy, file: str, damage: str):
  path = copy / f'{file}_ckpt.1.gz'
  path.write_bytes(DAMAGES[damage](path.read_bytes()))
  with pytest.raises(ValueError) as error:
    replay.load(copy)
  assert str(error.value).startswith(f'{path}: expected a gzip-compressed .npy array')
  assert '\n' not in str(error.value) and 'allow_pickle' not in str(error.value)


def test_every_flipped_bit_is_harmless_or_found(copy):
  """Some bits of a gzip header mean nothing; all others are checked."""
  path = copy / '$store$_action_ckpt.1.gz'
  good, want = path.read_bytes(), dqn_replay.ShardFiles(copy, 1).read().action
  rng = np.random.default_rng(0)
  found = 0
  for position in rng.integers(len(good), size=150):
    bad = bytearray(good)
    bad[position] ^= 1 << rng.integers(8)
    path.write_bytes(bad)
    try:
      np.testing.assert_array_equal(dqn_replay.ShardFiles(copy, 1).read().action, want)
    except ValueError:
      found += 1
  assert found > 120


@pytest.mark.parametrize('file', FILES)
def test_a_pickled_object_is_refused_and_never_run(copy, file: str, tmp_path):
  class Bomb:
    def __reduce__(self):
      return open, (str(tmp_path / 'bomb'), 'w')

  path = copy / f'{file}_ckpt.1.gz'
  npy = io.BytesIO()
  np.save(npy, np.array([Bomb()], dtype=object), allow_pickle=True)
  huge_header = b'\x93NUMPY\x01\x00' + (60_000).to_bytes(2, 'little') + b' ' * 60_000
  for content in (npy.getvalue(), pickle.dumps(Bomb()), huge_header):
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f'{re.escape(str(path))}: expected') as error:
      replay.load(copy)
    assert '\n' not in str(error.value) and 'allow_pickle' not in str(error.value)
  assert not (tmp_path / 'bomb').exists()


@pytest.mark.parametrize(
  'file, array, message',
  [
    ('$store$_observation', np.zeros((CAPACITY, 84, 84), np.float32), 'expected uint8.*float32'),
    ('$store$_observation', np.zeros((CAPACITY, 84, 85), np.uint8), r'84\], got .* 84, 85'),
    ('$store$_observation', np.zeros((CAPACITY, 84, 84, 1), np.uint8), 'expected uint8'),
    ('$store$_observation', np.zeros((CAPACITY - 1, 84, 84), np.uint8), '1000 rows.*got 999'),
    ('$store$_action', np.zeros(CAPACITY, np.int64), 'expected int32.*got int64'),
    ('$store$_action', np.zeros(CAPACITY - 1, np.int32), '1000 rows.*got 999'),
    ('$store$_action', np.full(CAPACITY, 4, np.int32), 'actions 0 to 3.*another game.*got 4 in'),
    ('$store$_action', np.full(CAPACITY, -1, np.int32), 'actions 0 to 3.*another game.*got -1'),
    ('$store$_reward', np.zeros(CAPACITY, np.float64), 'expected float32.*got float64'),
    ('$store$_reward', np.full(CAPACITY, np.nan, np.float32), 'finite rewards, got nan in row 0'),
    ('$store$_reward', np.full(CAPACITY, np.inf, np.float32), 'finite rewards, got inf in row 0'),
    ('$store$_terminal', np.zeros((), np.uint8), 'expected uint8'),
    ('$store$_terminal', np.zeros(0, np.uint8), '1 to 16777216 rows, got 0'),
    ('$store$_terminal', np.full(CAPACITY, 2, np.uint8), 'flags 0 or 1, got 2 in row 0'),
    ('add_count', np.float64(5), 'expected one count of rows, got float64'),
    ('add_count', np.array([5]), 'expected one count of rows'),
    ('add_count', np.int64(-1), 'expected one count of rows.*-1'),
  ],
)
def test_a_wrong_array_is_named(copy, file: str, array, message: str):
  write_array(copy / f'{file}_ckpt.1.gz', array)
  with pytest.raises(ValueError, match=message) as error:
    replay.load(copy, num_actions=4)
  assert str(error.value).startswith(str(copy / f'{file}_ckpt.1.gz'))
  assert '\n' not in str(error.value)


def test_stale_rows_may_hold_anything(tmp_path):
  dqn_replay.ShardFiles(tmp_path, 0).write(testing.make_shard(20))  # its stale row holds traps
  assert len(replay.load(tmp_path, num_actions=1).actions) == 20


def test_directories(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such replay directory'):
    replay.load(tmp_path / 'none')
  with pytest.raises(FileNotFoundError, match='no log shards here'):
    replay.load(tmp_path)
  (tmp_path / 'file').touch()
  with pytest.raises(NotADirectoryError):
    replay.load(tmp_path / 'file')


def test_other_files_are_ignored(copy):
  (copy / 'episode_end_indices_ckpt.1.gz').write_bytes(gzip.compress(pickle.dumps([1])))
  (copy / '$store$_observation_ckpt.1.gz.tmp').touch()
  assert [files.number for files in dqn_replay.open_shards(copy)] == [1]
  assert len(replay.load(copy).actions) == CAPACITY - 1


def assert_same(data: replay.ReplayData, other: replay.ReplayData) -> None:
  for ours, theirs in zip(jax.tree.leaves(data), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('number', [1, 3])
def test_four_files_a_shard_suffice(logs, tmp_path, caplog, number: int):
  """Without add_count a shard is taken for a full one: number 1 is, the last one is partial."""
  for path in logs.glob(f'$store$_*_ckpt.{number}.gz'):
    shutil.copy(path, tmp_path)
  assert len(list(tmp_path.iterdir())) == 4
  got, want = replay.load(tmp_path, n_step=3), replay.load(logs, [number], n_step=3)
  (warning,) = (record for record in caplog.records if record.levelname == 'WARNING')
  assert f'shards {number} have no add_count_ckpt files: taken for full ones' in warning.message
  assert '\n' not in warning.message
  assert len(got.actions) == CAPACITY - 1
  if number == 1:
    assert_same(got, want)
  else:  # its own rows come out as they are; what it costs are the stale ones after them
    for name in ('actions', 'rewards', 'terminals'):
      ours, theirs = getattr(got, name), getattr(want, name)
      assert len(theirs) < CAPACITY - 1
      np.testing.assert_array_equal(ours[: len(theirs)], theirs)


def test_a_link_to_nothing_is_not_taken_for_an_absent_add_count(copy):
  (copy / 'add_count_ckpt.1.gz').unlink()
  (copy / 'add_count_ckpt.1.gz').symlink_to('nowhere')
  with pytest.raises(
    FileNotFoundError, match=r'add_count_ckpt\.1\.gz: a file of this shard is miss'
  ):
    replay.load(copy)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int16, np.uint64, '>i4'])
def test_add_count_may_be_of_any_integer_type(copy, dtype):
  write_array(copy / 'add_count_ckpt.1.gz', np.array(100, dtype))
  assert len(replay.load(copy).actions) == 100


@pytest.fixture
def soon():
  """Fails a test that waits."""

  def too_late(*_):
    raise AssertionError('it waits')

  handler = signal.signal(signal.SIGALRM, too_late)
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda path: path.symlink_to('/dev/zero')])
@pytest.mark.parametrize('file', FILES)
def test_what_is_no_regular_file_is_refused_at_once(copy, soon, file: str, make):
  path = copy / f'{file}_ckpt.1.gz'
  path.unlink()
  make(path)
  with pytest.raises(OSError, match=f'^{re.escape(str(path))}: expected a regular file$'):
    replay.load(copy)


def test_an_invalid_range_is_never_opened(copy, soon):
  (copy / 'invalid_range_ckpt.1.gz').unlink()
  os.mkfifo(copy / 'invalid_range_ckpt.1.gz')
  assert len(replay.load(copy).actions) == CAPACITY - 1


def endless(begin: bytes) -> bytes:
  """A small file that decompresses to these bytes and 400 MB of zeros."""
  return gzip.compress(begin) + gzip.compress(bytes(10**8), 1) * 4


def header(shape: tuple[int, ...], descr: str, version: int = 1) -> bytes:
  text = repr({'descr': descr, 'fortran_order': False, 'shape': shape}).encode()
  length = len(text).to_bytes(2 if version == 1 else 4, 'little')
  return b'\x93NUMPY' + bytes([version, 0]) + length + text


@pytest.mark.parametrize(
  'begin, message',
  [
    (header((4 * 10**8,), '|u1'), 'expected 1 to 16777216 rows, got 400000000'),
    (header((CAPACITY,), '|u1'), 'it holds something else'),
    (header((CAPACITY,), '|u1')[:8] + b'\xff\xff', 'it holds something else'),
    (header((CAPACITY,), '|u1', 2)[:8] + b'\xff\xff\xff\xff', 'it holds something else'),
    (b'PK\3\4', 'it holds something else'),
  ],
  ids=['rows', 'surplus', 'header', 'long header', 'zip'],
)
def test_what_headers_claim_is_bounded(copy, begin: bytes, message: str):
  (copy / '$store$_terminal_ckpt.1.gz').write_bytes(endless(begin))
  tracemalloc.start()
  start = time.process_time()
  try:
    with pytest.raises(ValueError, match=message):
      replay.load(copy)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    assert time.process_time() - start < 5
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('version', [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_orders_and_versions_are_read_as_numpy_reads_them(logs, copy, monkeypatch, version, order):
  # In three pieces, the last of them shorter.
  monkeypatch.setattr(dqn_replay, '_FRAMES_PER_READ', 400)
  want = replay.load(logs, [1])
  for file in COLUMNS:
    path = copy / f'{file}_ckpt.1.gz'
    with gzip.open(path) as f:
      array = np.load(f)
    with gzip.open(path, 'wb', compresslevel=1) as f:
      np.lib.format.write_array(f, np.array(array, order=order), version=version)
  assert_same(replay.load(copy), want)
  whole = dqn_replay.ShardFiles(copy, 1).read().observation
  np.testing.assert_array_equal(whole, dqn_replay.ShardFiles(logs, 1).read().observation)


def test_damaged_in_a_hundred_ways(tmp_path, capsys, soon):
  """A short run of the soak test: what is not refused is what other readers read."""
  assert soak_logs.mutate_shards(100, tmp_path) == []
  (total,) = re.findall(r'\| all \| (\d+) \| (\d+) \|', capsys.readouterr().out)
  read, refused = map(int, total)
  assert read + refused == 100
  assert read >= 5 and refused >= 60


# New directories.


def test_a_new_directory_may_be_a_links_target(tmp_path):
  (tmp_path / 'disk' / 'empty').mkdir(parents=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'empty')
  with dqn_replay.new_directory(tmp_path / 'link') as partial:
    (partial / 'x').touch()
  assert (tmp_path / 'link').is_symlink()
  assert [path.name for path in (tmp_path / 'disk').rglob('*')] == ['empty', 'x']


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with (
    pytest.raises(OSError, match=r'--replay_dir=\.: is a mount point or the current directory'),
    dqn_replay.new_directory(pathlib.Path('.')),
  ):
    pass


def test_of_unfinished_directories_only_those_of_dead_processes_go(tmp_path):
  (tmp_path / '.logs.partial-12345678').mkdir()
  with dqn_replay.new_directory(tmp_path / 'logs') as one:
    (one / 'mine').touch()
    with pytest.raises(OSError), dqn_replay.new_directory(tmp_path / 'logs') as two:
      assert sorted(tmp_path.iterdir()) == sorted([one, two])
      raise OSError
    assert [*tmp_path.iterdir()] == [one]
  assert [path.name for path in tmp_path.rglob('*')] == ['logs', 'mine']
