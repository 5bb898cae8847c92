"""Tests for rl_unplugged.py: against what TFDS gives of the same files, and with damaged ones."""

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
import numpy as np
import pytest

from offline_zoo import testing
from offline_zoo.logs import rl_unplugged


@pytest.fixture(scope='module')
def recorded(golden):
  """Two checkpoints as published and as TFDS prepared them, and what TFDS reads of these."""
  return golden / 'rl_unplugged'


def read(shard: rl_unplugged.Shard, num_actions: int | None = 4) -> dict[str, np.ndarray]:
  frames = list(shard.read_frames())
  return {**shard.read_small_files(num_actions), 'frame': np.concatenate(frames)}


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
  shards = rl_unplugged.list_shards(recorded / kind)
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
  raw, prepared = (rl_unplugged.list_shards(recorded / kind)[1] for kind in ('raw', 'tfds'))
  assert raw.fingerprint() == {path.name: [stat.st_size, stat.st_mtime_ns]}
  name = 'rlu_atari_checkpoints_ordered-checkpoint_01.tfrecord-0000{}-of-00002'
  assert list(prepared.fingerprint()) == [name.format(0), name.format(1)]


# Which files.


def test_directories(recorded, tmp_path):
  assert rl_unplugged.list_shards(tmp_path) == []
  assert rl_unplugged.list_shards(tmp_path / 'none') == []
  assert rl_unplugged.list_shards(recorded / 'expected.npz') == []
  (tmp_path / 'run_1-00000-of-00002.tmp').touch()
  assert rl_unplugged.list_shards(tmp_path) == []


def test_one_of_several_runs_is_chosen_by_name(recorded, tmp_path):
  for path in (recorded / 'raw').iterdir():
    shutil.copy(path, tmp_path)
  shutil.copy(recorded / 'raw' / 'run_1-00001-of-00002', tmp_path / 'run_3-00000-of-00001')
  with pytest.raises(ValueError, match=r'holds the runs \[1, 3\]; name one, as .*/run_1$'):
    rl_unplugged.list_shards(tmp_path)
  assert [shard.number for shard in rl_unplugged.list_shards(tmp_path / 'run_1')] == [0, 1]
  (shard,) = rl_unplugged.list_shards(tmp_path / 'run_3')
  assert shard.paths == (tmp_path / 'run_3-00000-of-00001',)
  assert rl_unplugged.list_shards(tmp_path / 'run_2') == []


def test_files_of_different_sets_are_refused(recorded, tmp_path):
  for total in (49, 50):
    shutil.copy(recorded / 'raw' / 'run_1-00001-of-00002', tmp_path / f'run_1-00001-of-000{total}')
  with pytest.raises(ValueError, match=r"different sets: \['00049', '00050'\]"):
    rl_unplugged.list_shards(tmp_path)


def test_a_missing_file_of_a_prepared_checkpoint_is_named(recorded, tmp_path):
  shutil.copytree(recorded / 'tfds', tmp_path / 'tfds')
  (
    tmp_path / 'tfds' / 'rlu_atari_checkpoints_ordered-checkpoint_01.tfrecord-00000-of-00002'
  ).unlink()
  with pytest.raises(FileNotFoundError, match=r'checkpoint_01 should have 2 files.* has 1 of 2$'):
    rl_unplugged.list_shards(tmp_path / 'tfds')


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


def shard_of(tmp_path, *contents: bytes | dict[str, list]) -> rl_unplugged.Shard:
  """A published file of these records."""
  records = (
    testing.tfrecord(c if isinstance(c, bytes) else testing.serialise_example(c)) for c in contents
  )
  path = tmp_path / 'run_1-00000-of-00050'
  path.write_bytes(gzip.compress(b''.join(records)))
  (shard,) = rl_unplugged.list_shards(tmp_path)
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
  pieces = list(shard_of(tmp_path, *episodes).read_frames())
  assert max(map(len, pieces)) == 250
  want = [np.concatenate([np.zeros(3), np.arange(1, n) % 256]).astype(np.uint8) for n in lengths]
  np.testing.assert_array_equal(np.concatenate(pieces)[:, 7, 7], np.concatenate(want))


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
  np.testing.assert_array_equal(columns['terminal'], [0, 0, 0, 0, 0, rl_unplugged.CUT])
  np.testing.assert_array_equal(columns['frame'][:, 0, 0], [0, 0, 0, 1, 2, 3])


def test_an_empty_file_is_an_empty_shard(tmp_path):
  columns = shard_of(tmp_path).read_small_files(4)
  assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(columns, 0)


# Bad input.


def damaged(tmp_path, data: bytes) -> rl_unplugged.Shard:
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
  for reading in (lambda: shard.read_small_files(None), lambda: list(shard.read_frames())):
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
  'another action set': (episode(), 'actions 0 to 2 .* another game.*, got 3 in step 3'),
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
  assert str(error.value).startswith(f'{shard.paths[0]}: record 1')
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
    list(shard.read_frames())


def test_a_bomb_behind_the_pixels_is_not_unpacked(tmp_path):
  bombs = [
    png_of(
      chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(10**8))), chunk(b'IDAT', zlib.compress(PIXELS))
    ),
    png_of(chunk(b'IDAT', zlib.compress(PIXELS + bytes(10**8)))),
  ]
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  shard = shard_of(tmp_path, episode(3, observations=[png(NOISE), *bombs], discounts=[1.0] * 3))
  for frame in np.concatenate(list(shard.read_frames()))[3:]:
    np.testing.assert_array_equal(frame, NOISE)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_memory_is_bounded(tmp_path):
  """A file that gzip makes 260 times larger than it is holds a record of the largest size."""
  path = tmp_path / 'run_1-00000-of-00050'
  length = struct.pack('<Q', 2**27 - 4)
  zeros = zlib.compressobj(level=1, wbits=31)
  with open(path, 'wb') as file:
    file.write(zeros.compress(length + testing.tfrecord(length)[-4:]))
    for _ in range(2**8):
      file.write(zeros.compress(bytes(2**20)))
    file.write(zeros.flush())
  code = f"""
import resource
from offline_zoo import testing
from offline_zoo.logs import rl_unplugged
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
  rl_unplugged.list_shards({str(tmp_path)!r})[0].read_small_files(None)
except ValueError as error:
  print(error, peak() - before, sep=chr(10))
"""
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  message, kilobytes = result.stdout.splitlines()
  assert message == f'{path}: record 0: expected the checksum of the content, got another'
  assert int(kilobytes) < 3 * 2**17


def test_a_pipe_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'run_1-00000-of-00050')
  (shard,) = rl_unplugged.list_shards(tmp_path)
  with pytest.raises(ValueError, match='expected a regular file'):
    shard.read_small_files(None)
