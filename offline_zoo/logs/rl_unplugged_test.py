"""Tests for rl_unplugged.py: against what TFDS gives of the same files, and with damaged ones."""

import csv
import gzip
import itertools
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib

import cv2
import jax
import numpy as np
import pytest

from offline_zoo import logs as logs_package
from offline_zoo import replay, testing
from offline_zoo.dqn import run_atari
from offline_zoo.logs import dqn_replay, rl_unplugged
from offline_zoo.logs.shard import CUT


@pytest.fixture(scope='module')
def recorded(golden):
  """Two checkpoints as published and as TFDS prepared them, and what TFDS reads of these."""
  return golden / 'rl_unplugged'


def read(shard: rl_unplugged.CheckpointFiles) -> dict[str, np.ndarray]:
  columns = shard.read_small_files(4)
  frames = list(shard.read_frames(columns.num_frames))
  return {
    'action': columns.action,
    'reward': columns.reward,
    'terminal': columns.terminal,
    'frame': np.concatenate(frames),
  }


# Against TFDS.


def expected_rows(expected, checkpoint: int) -> dict[str, np.ndarray]:
  """The rows of TFDS's steps: T - 1 of an episode that ended, whose last step is a state only."""
  rows: dict[str, list] = {'action': [], 'reward': [], 'terminal': [], 'frame': []}
  for i in itertools.count():
    name = f'checkpoint_{checkpoint:02d}/{i}'
    if f'{name}/action' not in expected:
      return {name: np.array(column) for name, column in rows.items()}
    step = {
      key: expected[f'{name}/{key}'] for key in ('action', 'reward', 'is_terminal', 'is_last')
    }
    frames = expected[f'{name}/observation'][..., 0]
    length = len(frames)
    assert step['is_last'].tolist() == [False] * (length - 1) + [True]
    if step['is_terminal'].all():  # nothing but a terminal state
      continue
    for column in rows.values():
      column += [np.zeros((84, 84), np.uint8) if column is rows['frame'] else 0] * 3
    for t in range(length - 1):
      rows['action'].append(step['action'][t])
      rows['reward'].append(step['reward'][t])
      rows['terminal'].append(int(step['is_terminal'][t + 1]))
      rows['frame'].append(frames[t])
      # Where TFDS's discount is 0, no value is bootstrapped from.
      assert (expected[f'{name}/discount'][t] == 0) == step['is_terminal'][t + 1]
    if not step['is_terminal'][-1]:
      for name_, value in {'action': 0, 'reward': 0, 'terminal': 2, 'frame': frames[-1]}.items():
        rows[name_].append(value)


@pytest.mark.parametrize('kind', ['raw', 'tfds'])
def test_rows_are_those_of_tfds(recorded, kind: str):
  expected = np.load(recorded / 'expected.npz')
  shards = logs_package.open_shards(recorded / kind)
  assert [shard.number for shard in shards] == [0, 1]
  for shard, num_rows in zip(shards, (42, 23), strict=True):
    got, want = read(shard), expected_rows(expected, shard.number)
    assert {name: len(column) for name, column in got.items()} == dict.fromkeys(got, num_rows)
    for name, column in want.items():
      np.testing.assert_array_equal(got[name], column, err_msg=name)
    dtypes = {'action': np.int32, 'reward': np.float32, 'terminal': np.uint8, 'frame': np.uint8}
    assert {name: column.dtype for name, column in got.items()} == dtypes
  # The recording has what matters: rewards beyond the clipped ones, and both ways to end.
  assert want['reward'].max() == 7 and set(want['terminal']) == {0, 1, 2}


def test_fingerprints_name_every_file(recorded):
  path = recorded / 'raw' / 'run_1-00001-of-00002'
  stat = path.stat()
  raw, prepared = (logs_package.open_shards(recorded / kind)[1] for kind in ('raw', 'tfds'))
  assert raw.fingerprint() == {path.name: [stat.st_size, stat.st_mtime_ns]}
  name = 'rlu_atari_checkpoints_ordered-checkpoint_01.tfrecord-0000{}-of-00002'
  assert list(prepared.fingerprint()) == [name.format(0), name.format(1)]


# Against log shards of the same play.


@pytest.fixture(scope='module')
def both(logs, tmp_path_factory):
  """Whole episodes of the recorded logs, in two shards of either format."""
  directories = tmp_path_factory.mktemp('shards'), tmp_path_factory.mktemp('episodes')
  for number, source in enumerate((1, 2)):
    content = dqn_replay.ShardFiles(logs, source).read()
    ends = np.flatnonzero(content.terminal[: content.num_rows])
    used = slice(ends[0] + 1, ends[-1] + 2)  # and a row that becomes stale
    columns = {name: column[used].copy() for name, column in content.columns.items()}
    columns['reward'][50:60] = [3, -2, 0.5, 7, 1, -1, 2, 0, 0, 0]
    shard = dqn_replay.Shard(**columns, add_count=int(ends[-1] - ends[0]))
    dqn_replay.ShardFiles(directories[0], number).write(shard)
    testing.write_rl_unplugged(directories[1] / f'run_4-{number:05d}-of-00050', shard)
  return directories


@pytest.mark.parametrize('n_step', [1, 3])
@pytest.mark.parametrize('max_rows', [None, 200])
def test_the_replay_is_that_of_log_shards(both, n_step: int, max_rows: int | None):
  want, got = (
    replay.Logs(directory, n_step=n_step, max_rows_per_shard=max_rows, num_actions=4)
    for directory in both
  )
  assert got.checksum == want.checksum
  np.testing.assert_equal(got.mean_episode_return, want.mean_episode_return)
  leaves = [jax.tree.leaves(logs.resident(0)) for logs in (want, got)]
  assert len(leaves[0]) > 8
  for array, other in zip(*leaves, strict=True):
    assert array.dtype == other.dtype
    np.testing.assert_array_equal(array, other)


def test_a_run_gives_the_csv_of_log_shards(both, tmp_path):
  csvs = []
  for number, directory in enumerate((both[0], both[1] / 'run_4')):
    path = tmp_path / str(number) / 'results.csv'
    config = run_atari.Config(
      environment_name='breakout', replay_dir=str(directory), shards=(1, 0), num_iterations=1,
      num_updates_per_iteration=4, eval_steps=1, eval_epsilon=1.0, num_eval_workers=0, batch_size=4,
      results_csv_path=str(path),
    )  # fmt: skip
    with testing.small_torsos():
      run_atari.main(config)
    with open(path, newline='') as file:
      csvs.append(list(csv.DictReader(file)))
  timings = {'updates_per_second', 'eval_frame_rate', 'seconds'}
  for row, other in zip(*csvs, strict=True):
    assert {name: row[name] for name in row.keys() - timings} == {
      name: other[name] for name in row.keys() - timings
    }
  assert len(csvs[0]) == 1 and float(csvs[0][0]['loss']) > 0


# Which files.


def test_the_kind_is_recognised_and_said(logs, recorded, caplog):
  caplog.set_level('INFO', logger='absl')
  for directory, kind in (
    (logs, '4 shards of the DQN Replay Dataset'),
    (recorded / 'raw', '2 checkpoints of RL Unplugged, as published'),
    (recorded / 'tfds', '2 checkpoints of RL Unplugged, as TFDS prepares them'),
  ):
    caplog.clear()
    assert replay.Logs(directory, memory_gb=1).shards == list(range(int(kind[0])))
    assert caplog.messages[0] == f'{directory}: {kind}'


def test_logs_of_two_kinds_are_refused(logs, recorded, tmp_path):
  for directory in (logs, recorded / 'raw'):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
  with pytest.raises(ValueError, match=r'of one kind, got shards of the DQN .* and checkpoints of'):
    replay.load(tmp_path)


def test_directories(recorded, tmp_path):
  (tmp_path / 'run_1-00000-of-00002.tmp').touch()
  for path in (tmp_path, tmp_path / 'none', recorded / 'expected.npz'):
    assert rl_unplugged.open_published(path) == rl_unplugged.open_prepared(path) == []
  with pytest.raises(FileNotFoundError, match=r'no log shards here; .*run_1-00000-of-00050'):
    replay.load(tmp_path)


def test_one_of_several_runs_is_chosen_by_name(recorded, tmp_path):
  for path in (recorded / 'raw').iterdir():
    shutil.copy(path, tmp_path)
  shutil.copy(recorded / 'raw' / 'run_1-00001-of-00002', tmp_path / 'run_3-00000-of-00001')
  with pytest.raises(ValueError, match=r'expected one run, got \[1, 3\]; name .*/run_1$'):
    logs_package.open_shards(tmp_path)
  assert [shard.number for shard in logs_package.open_shards(tmp_path / 'run_1')] == [0, 1]
  (shard,) = logs_package.open_shards(tmp_path / 'run_3')
  assert shard.path('action') == tmp_path / 'run_3-00000-of-00001'
  with pytest.raises(FileNotFoundError, match='run_2: no such replay directory'):
    logs_package.open_shards(tmp_path / 'run_2')
  exist = [logs_package.exist(tmp_path / name) for name in ('', 'run_1', 'run_2', 'run_3', 'none')]
  assert exist == [True, True, False, True, False]


def test_files_of_different_sets_are_refused(recorded, tmp_path):
  for total in (49, 50):
    shutil.copy(recorded / 'raw' / 'run_1-00001-of-00002', tmp_path / f'run_1-00001-of-000{total}')
  with pytest.raises(ValueError, match=r'expected files of one set, got some of \[49, 50\]'):
    logs_package.open_shards(tmp_path)


def test_a_missing_file_of_a_prepared_checkpoint_is_named(recorded, tmp_path):
  shutil.copytree(recorded / 'tfds', tmp_path / 'tfds')
  next((tmp_path / 'tfds').glob('*checkpoint_01.tfrecord-00000-*')).unlink()
  with pytest.raises(
    FileNotFoundError, match=r'expected 2 files of checkpoint_01, got 00001-of-00002$'
  ):
    logs_package.open_shards(tmp_path / 'tfds')


# Episodes made here.


def png(frame: np.ndarray) -> bytes:
  return cv2.imencode('.png', frame)[1].tobytes()


def episode(length: int = 5, **features) -> dict[str, list]:
  """The features of an episode that ended; a keyword replaces one, or removes it if None."""
  frames = np.zeros((length, 84, 84), np.uint8) + np.arange(1, length + 1)[:, None, None]
  made = {
    'observations': [png(frame.astype(np.uint8)) for frame in frames],
    'actions': list(range(length)),
    'unclipped_rewards': [1.0] * (length - 1) + [0.0],
    'discounts': [1.0] * (length - 1) + [0.0],
    **features,
  }
  return {name: values for name, values in made.items() if values is not None}


def shard_of(tmp_path, *contents: bytes | dict[str, list]) -> rl_unplugged.CheckpointFiles:
  """A published file of these records."""
  records = (
    testing.tfrecord(c if isinstance(c, bytes) else testing.serialise_example(c)) for c in contents
  )
  path = tmp_path / 'run_1-00000-of-00050'
  path.write_bytes(gzip.compress(b''.join(records)))
  (shard,) = rl_unplugged.open_published(tmp_path)
  return shard


def test_our_records_are_as_tensorflow_writes_them(recorded):
  """What the other tests write is what TensorFlow would."""
  written = gzip.decompress((recorded / 'raw' / 'run_1-00001-of-00002').read_bytes())
  length = int.from_bytes(written[:8], 'little')
  content = written[12 : 12 + length]
  assert testing.tfrecord(content) == written[: 16 + length]
  example = rl_unplugged._Example.FromString(content)
  assert example.SerializeToString(deterministic=True) == content


def test_long_episodes_come_in_pieces_and_in_order(tmp_path):
  lengths = (700, 3, 1200)
  episodes = [episode(n, actions=[0] * n) for n in lengths]
  pieces = list(shard_of(tmp_path, *episodes).read_frames(sum(lengths) + 6))
  assert max(map(len, pieces)) == 250
  want = [np.concatenate([np.zeros(3), np.arange(1, n) % 256]).astype(np.uint8) for n in lengths]
  np.testing.assert_array_equal(np.concatenate(pieces)[:, 7, 7], np.concatenate(want))


def test_nothing_is_read_behind_the_rows_that_are_kept(tmp_path):
  """So that a small part of a game takes as small a part of the time."""
  shard = shard_of(tmp_path, episode(5), episode(5), b'damaged')
  rows = shard.read_small_files(5, max_rows=12)
  np.testing.assert_array_equal(rows.action, [0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 1])
  assert len(rows.reward) == len(rows.terminal) == rows.num_frames == 12
  frames = np.concatenate(list(shard.read_frames(rows.num_frames)))
  np.testing.assert_array_equal(frames[:, 0, 0], [0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 1, 2])
  with pytest.raises(ValueError, match='record 2: expected a serialised'):
    shard.read_small_files(5, max_rows=15)


def test_a_file_that_has_lost_episodes_since_is_refused(tmp_path):
  shard = shard_of(tmp_path, episode(5))
  with pytest.raises(ValueError, match='expected 8 rows, as before, got 7'):
    list(shard.read_frames(8))


def test_a_shard_of_too_many_rows_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(rl_unplugged, 'MAX_ROWS', 14)
  with pytest.raises(ValueError, match='record 1: expected fewer than 14 rows, got 14'):
    shard_of(tmp_path, episode(5), episode(5)).read_small_files(5)


def test_what_a_terminal_state_says_of_action_and_reward_means_nothing(tmp_path, caplog):
  shard = shard_of(
    tmp_path, episode(4, actions=[1, 2, 3, -99], unclipped_rewards=[1.0, 2.0, 3.0, 50.0])
  )
  columns = read(shard)
  np.testing.assert_array_equal(columns['action'], [0, 0, 0, 1, 2, 3])
  np.testing.assert_array_equal(columns['reward'], [0, 0, 0, 1, 2, 3])
  np.testing.assert_array_equal(columns['terminal'], [0, 0, 0, 0, 0, 1])
  assert '1 episodes have a reward in their terminal state' in caplog.text


def test_a_cut_episode_keeps_its_last_frame_only(tmp_path):
  shard = shard_of(
    tmp_path,
    episode(
      3, actions=[1, 2, -99], unclipped_rewards=[1.0, 2.0, float('nan')], discounts=[1.0] * 3
    ),
  )
  columns = read(shard)
  np.testing.assert_array_equal(columns['action'], [0, 0, 0, 1, 2, 0])
  np.testing.assert_array_equal(columns['reward'], [0, 0, 0, 1, 2, 0])
  np.testing.assert_array_equal(columns['terminal'], [0, 0, 0, 0, 0, CUT])
  np.testing.assert_array_equal(columns['frame'][:, 0, 0], [0, 0, 0, 1, 2, 3])


# Bad input.


def damaged(tmp_path, data: bytes) -> rl_unplugged.CheckpointFiles:
  shard = shard_of(tmp_path, episode(), episode())
  shard.paths[0].write_bytes(data)
  return shard


def good_file() -> bytes:
  return b''.join(testing.tfrecord(testing.serialise_example(episode())) for _ in range(2))


SIZE = len(testing.serialise_example(episode()))
DAMAGES = {
  'cut gzip': (lambda: gzip.compress(good_file())[:-100], 'record [01]: expected a gzip'),
  'no trailer': (lambda: gzip.compress(good_file())[:-8], 'record [0-2]: expected a gzip'),
  'wrong gzip checksum': (lambda: gzip.compress(good_file())[:-8] + bytes(8), 'expected a gzip'),
  'more behind': (lambda: gzip.compress(good_file()) + b'more', 'record [0-2]: expected a gzip'),
  'not compressed': (good_file, 'record 0: expected a gzip'),
  'text': (lambda: b'hello\n', 'record 0: expected a gzip'),
  'cut in a length': (
    lambda: gzip.compress(good_file()[: 16 + SIZE + 5]), 'record 1: .*its checksum, got 5 bytes'
  ),
  'cut in an episode': (
    lambda: gzip.compress(good_file()[: 16 + SIZE + 50]),
    f'record 1: expected {SIZE + 4} bytes, got 38, then the end',
  ),
  'cut in its checksum': (
    lambda: gzip.compress(good_file()[:-2]), f'record 1: expected {SIZE + 4} .* {SIZE + 2}, then'
  ),
  'wrong checksum of a length': (
    lambda: gzip.compress(struct.pack('<QI', SIZE, 5) + good_file()[12:]),
    'record 0: expected the checksum of the length, got another',
  ),
  'wrong checksum of an episode': (
    lambda: gzip.compress(good_file()[:-1] + bytes([good_file()[-1] ^ 1])),
    'record 1: expected the checksum of the content, got another',
  ),
  'wrong byte in an episode': (
    lambda: gzip.compress(good_file()[:100] + bytes([good_file()[100] ^ 1]) + good_file()[101:]),
    'record 0: expected the checksum of the content, got another',
  ),
  'a length of 2^60': (
    lambda: gzip.compress(
      struct.pack('<Q', 2**60)
      + testing.tfrecord(struct.pack('<Q', 2**60))[-4:]
      + good_file()
    ),
    'record 0: expected at most 134217728 bytes, got 1152921504606846976',
  ),
}  # fmt: skip


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_file_is_named(tmp_path, damage: str):
  make, message = DAMAGES[damage]
  shard = damaged(tmp_path, make())
  for reading in (lambda: shard.read_small_files(None), lambda: list(shard.read_frames(100))):
    with pytest.raises(ValueError, match=message) as error:
      reading()
    assert str(error.value).startswith(f'{shard.paths[0]}: record')
    assert '\n' not in str(error.value)


def grey(*shape: int) -> bytes:
  return png(np.zeros(shape, np.uint8))


EPISODES = {
  'transitions': (
    {'o_t': [b''] * 4, 'a_t': [1], 'r_t': [1.0]},
    'expected whole episodes, those of atari_episodes_ordered, got shuffled transitions',
  ),
  'no such feature': (
    episode(discounts=None), 'a feature discounts, got actions, observations, unclipped_rewards'
  ),
  'nothing': ({}, 'a feature observations, got none'),
  'not an example': (b'\xff' * 20, 'expected a serialised tf.train.Example'),
  'empty feature': (episode(actions=[]), 'actions as int64_list, got nothing'),
  'float actions': (episode(actions=[0.0] * 5), 'actions as int64_list, got float_list'),
  'integer rewards': (episode(unclipped_rewards=[0] * 5), 'as float_list, got int64_list'),
  'greys as numbers': (episode(observations=[0] * 5), 'as bytes_list, got int64_list'),
  'too few actions': (episode(actions=[0] * 4), 'expected 5 actions, as there are PNGs, got 4'),
  'too many rewards': (episode(unclipped_rewards=[0.0] * 6), 'expected 5 unclipped_re.* got 6'),
  'too few discounts': (episode(discounts=[1.0] * 4), 'expected 5 discounts'),
  'an end inside': (episode(discounts=[1.0, 1.0, 0.0, 1.0, 0.0]), 'only at the end, got .* step 2'),
  'a negative discount': (episode(discounts=[-1.0] * 5), 'discounts from 0 to 1'),
  'a discount of nan': (episode(discounts=[float('nan')] * 5), 'discounts from 0 to 1'),
  'infinite reward': (
    episode(unclipped_rewards=[0.0, float('inf'), 0.0, 0.0, 0.0]), 'step 1: .* finite.* got inf'
  ),
  'another action set': (episode(), 'actions 0 to 2 .* another game.*, got 3 in row 11'),
  'no PNGs': (episode(observations=[b''] * 5), r'expected 1 to \d+ PNGs in so many bytes, got 5'),
  'other size': (
    episode(observations=[grey(84, 84)] * 3 + [grey(84, 85)] * 2),
    'step 3: expected a PNG of 84x84, 8 bits, colour type 0, got one of 85x84, 8 bits, colour',
  ),
  'colour': (episode(observations=[grey(84, 84, 3)] * 5), 'of 84x84, 8 bits, colour type 2'),
  'sixteen bits': (
    episode(observations=[png(np.zeros((84, 84), np.uint16))] * 5), 'got one of 84x84, 16 bits'
  ),
  'a bomb': (
    episode(observations=[grey(1, 1)[:16] + struct.pack('>II', 2**30, 2**30) + bytes(50)] * 5),
    'got one of 1073741824x1073741824',
  ),
  'JPEG': (
    episode(observations=[cv2.imencode('.jpg', np.zeros((84, 84), np.uint8))[1].tobytes()] * 5),
    'got something else',
  ),
}  # fmt: skip


@pytest.mark.parametrize('kind', EPISODES)
def test_a_wrong_episode_is_named(tmp_path, kind: str):
  content, message = EPISODES[kind]
  shard = shard_of(tmp_path, episode(3), content)
  with pytest.raises(ValueError, match=message) as error:
    shard.read_small_files(3)
  where = ': ' if kind == 'another action set' else ': record 1'
  assert str(error.value).startswith(f'{shard.paths[0]}{where}')
  assert '\n' not in str(error.value)


def chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
  size = len(content) if length is None else length
  return struct.pack('>I', size) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


NOISE = np.random.default_rng(0).integers(256, size=(84, 84), dtype=np.uint8)
PIXELS = b''.join(b'\0' + row.tobytes() for row in NOISE)


def png_of(*chunks: bytes) -> bytes:
  return b''.join([grey(84, 84)[:33], *chunks, chunk(b'IEND', b'')])


DAMAGED_PNGS = {
  'cut': png(NOISE)[:5000],
  'cut in its end': png(NOISE)[:-1],
  'a wrong byte': png(NOISE)[:3000] + bytes([png(NOISE)[3000] ^ 1]) + png(NOISE)[3001:],
  'too few pixels': png_of(chunk(b'IDAT', zlib.compress(PIXELS[:3000]))),
  'a chunk of 2 GB': png_of(chunk(b'IDAT', zlib.compress(PIXELS), 2**31 - 1)),
  'a chunk too short': png_of(chunk(b'IDAT', zlib.compress(PIXELS), 100)),
  'a second header': png_of(chunk(b'IHDR', struct.pack('>IIBBBBB', 2**15, 2**15, 8, 0, 0, 0, 0))),
  'no pixels': png_of(),
}  # fmt: skip


@pytest.mark.parametrize('damage', DAMAGED_PNGS)
def test_a_damaged_png_is_named(tmp_path, damage: str):
  pngs = [png(NOISE)] * 3 + [DAMAGED_PNGS[damage]] + [png(NOISE)]
  shard = shard_of(tmp_path, episode(3), episode(observations=pngs))
  with pytest.raises(ValueError, match=r'record 1, step 3: expected a PNG, got a damaged one$'):
    list(shard.read_frames(12))


def test_a_bomb_behind_the_pixels_is_not_unpacked(tmp_path):
  bombs = [
    png_of(
      chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(10**8))), chunk(b'IDAT', zlib.compress(PIXELS))
    ),
    png_of(chunk(b'IDAT', zlib.compress(PIXELS + bytes(10**8)))),
  ]
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  shard = shard_of(tmp_path, episode(3, observations=[png(NOISE), *bombs], discounts=[1.0] * 3))
  for frame in np.concatenate(list(shard.read_frames(6)))[3:]:
    np.testing.assert_array_equal(frame, NOISE)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_memory_is_bounded(tmp_path):
  """A file of 0.3 MB holds a record of the largest size."""
  path = tmp_path / 'run_1-00000-of-00050'
  length = struct.pack('<Q', 2**27 - 4)
  zeros = gzip.compress(bytes(2**20)) * 2**8
  path.write_bytes(gzip.compress(length + testing.tfrecord(length)[-4:]) + zeros)
  code = f"""
import resource
from offline_zoo import logs as logs_package
from offline_zoo import replay, testing
from offline_zoo.dqn import run_atari
from offline_zoo.logs import dqn_replay, rl_unplugged
from offline_zoo.logs.shard import CUT
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
  rl_unplugged.open_published({str(tmp_path)!r})[0].read_small_files(None)
except ValueError as error:
  print(error, peak() - before, sep=chr(10))
"""
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  message, kilobytes = result.stdout.splitlines()
  assert message == f'{path}: record 0: expected the checksum of the content, got another'
  assert int(kilobytes) < 3 * 2**17


def test_a_pipe_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'run_1-00000-of-00050')
  (shard,) = rl_unplugged.open_published(tmp_path)
  with pytest.raises(OSError, match='expected a regular file'):
    shard.read_small_files(None)
