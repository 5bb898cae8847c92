"""Tests for replay.py: against Dopamine's buffer, against slow loops, and with damaged files."""

import dataclasses
import gzip
import io
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_zoo import log_shards, replay

CAPACITY = 1000


@pytest.fixture(scope='session')
def logs(golden):
  return golden / 'replay' / 'Breakout' / '1' / 'replay_logs'


def expected(golden, shard: int, n_step: int) -> dict[str, np.ndarray]:
  path = golden / 'replay' / 'Breakout' / '1' / 'expected' / f'shard{shard}_h{n_step}.npz'
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def make_shard(num_rows: int, capacity: int | None = None, **columns) -> log_shards.Shard:
  """A shard whose frame in row i is filled with i + 1; rows past `num_rows` hold traps."""
  capacity = capacity or num_rows + 1
  rows = {
    'observation': np.zeros((capacity, 84, 84), np.uint8)
    + np.arange(1, capacity + 1, dtype=np.uint8)[:, None, None],
    'action': np.zeros(capacity, np.int32),
    'reward': np.zeros(capacity, np.float32),
    'terminal': np.zeros(capacity, np.uint8),
  }
  rows['action'][num_rows:] = -7
  rows['reward'][num_rows:] = np.nan
  rows['terminal'][num_rows:] = 205
  for name, values in columns.items():
    rows[name][: len(values)] = values
  return log_shards.Shard(**rows, add_count=num_rows)


# Against Dopamine.


@pytest.mark.parametrize('n_step', [1, 3])
@pytest.mark.parametrize('shard', [0, 1, 2, 3])
def test_valid_rows_and_batches_equal_dopamines(golden, logs, shard: int, n_step: int):
  want = expected(golden, shard, n_step)
  data = replay.load(logs, [shard], n_step=n_step, discount=float(want['gamma']), num_actions=4)
  np.testing.assert_array_equal(replay.valid_rows(data), want['valid_indices'])
  batch = jax.jit(replay.gather)(data, want['indices'])
  np.testing.assert_array_equal(batch.s_tm1, want['state'])
  np.testing.assert_array_equal(batch.a_tm1, want['action'])
  np.testing.assert_array_equal(batch.r_t, want['reward'])
  np.testing.assert_array_equal(batch.s_t, want['next_state'])
  gamma_n = np.float32(float(want['gamma']) ** n_step)
  np.testing.assert_array_equal(batch.discount_t, gamma_n * (1 - want['terminal']))
  assert batch.s_tm1.dtype == jnp.uint8 and batch.a_tm1.dtype == jnp.int32
  assert batch.r_t.dtype == batch.discount_t.dtype == jnp.float32


def test_the_writer_makes_the_recorded_files(golden, logs, tmp_path):
  """The recorded stream, written by us, gives the recorded arrays but for the stale rows."""
  stream = np.load(golden / 'replay' / 'Breakout' / '1' / 'expected' / 'stream.npz')
  shards = [log_shards.read_shard(logs, i) for i in range(4)]
  writer = log_shards.ShardWriter(tmp_path, CAPACITY)
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
  assert log_shards.list_shards(tmp_path) == [0, 1, 2, 3]
  for i, theirs in enumerate(shards):
    ours = log_shards.read_shard(tmp_path, i)
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


# Against a slow loop.


def slow_transition(shards: list[log_shards.Shard], row: int, n_step: int, discount: float):
  """The rule of the format, one row at a time; None where a transition cannot begin."""
  for shard in shards:
    if row < shard.num_rows:
      break
    row -= shard.num_rows
  if row < 3 or row + n_step >= shard.num_rows or shard.terminal[row - 3 : row].any():
    return None
  reward, steps, ended = 0.0, 0, False
  for k in range(n_step):
    reward += discount**k * min(max(float(shard.reward[row + k]), -1.0), 1.0)
    steps = k + 1
    ended = bool(shard.terminal[row + k])
    if ended:
      break
  stack = [np.moveaxis(shard.observation[i - 3 : i + 1], 0, -1) for i in (row, row + steps)]
  return stack[0], shard.action[row], reward, 0.0 if ended else discount**n_step, stack[1]


@pytest.mark.parametrize('n_step', [1, 2, 5])
def test_every_row_of_several_shards_equals_a_slow_loop(logs, n_step: int):
  data = replay.load(logs, n_step=n_step, discount=0.9)
  shards = [log_shards.read_shard(logs, i) for i in range(4)]
  want = {}
  for row in range(sum(shard.num_rows for shard in shards)):
    if (transition := slow_transition(shards, row, n_step, 0.9)) is not None:
      want[row] = transition
  np.testing.assert_array_equal(replay.valid_rows(data), list(want))
  batch = replay.gather(data, replay.valid_rows(data))
  columns = [np.stack(column) for column in zip(*want.values(), strict=True)]
  going_on = columns[3] > 0  # after an end, s_t means nothing
  np.testing.assert_array_equal(batch.s_tm1, columns[0])
  np.testing.assert_array_equal(batch.a_tm1, columns[1])
  np.testing.assert_allclose(batch.r_t, columns[2], rtol=1e-6)
  np.testing.assert_allclose(batch.discount_t, columns[3], rtol=1e-6)
  np.testing.assert_array_equal(np.asarray(batch.s_t)[going_on], columns[4][going_on])


def test_shards_load_in_the_order_given(logs):
  data = replay.load(logs, [3, 1])
  shards = [log_shards.read_shard(logs, i) for i in (3, 1)]
  np.testing.assert_array_equal(
    data.actions, np.concatenate([shard.action[: shard.num_rows] for shard in shards])
  )


def test_max_rows_per_shard_keeps_the_first_rows(logs):
  data = replay.load(logs, max_rows_per_shard=100)
  assert len(data.actions) == 400
  for i in range(4):
    alone = replay.valid_rows(replay.load(logs, [i]))
    rows = np.asarray(replay.valid_rows(data))
    np.testing.assert_array_equal(
      rows[(rows >= 100 * i) & (rows < 100 * i + 100)] - 100 * i, alone[alone + 1 < 100]
    )


def test_each_reward_is_clipped_before_the_sum(tmp_path):
  shard = make_shard(12, reward=[0, 0, 0, 5, 5, 5, -5, 0.25, 5, 5, 5, 5])
  log_shards.write_shard(tmp_path, 0, shard)
  data = replay.load(tmp_path, n_step=3, discount=0.5)
  rewards = replay.gather(data, jnp.array([3, 4, 5, 6])).r_t
  np.testing.assert_array_equal(
    rewards,
    [1 + 0.5 + 0.25, 1 + 0.5 - 0.25, 1 - 0.5 + 0.25 * 0.25, -1 + 0.5 * 0.25 + 0.25],
  )


def test_rewards_end_with_the_episode(tmp_path):
  terminal = np.zeros(20, np.uint8)
  terminal[[6, 13]] = 1
  log_shards.write_shard(tmp_path, 0, make_shard(20, reward=np.full(20, 0.5), terminal=terminal))
  data = replay.load(tmp_path, n_step=3, discount=0.5)
  # Rows 7 to 9 have the end in row 6 among the three before them; 17 to 19 lack a row n later.
  assert replay.valid_rows(data).tolist() == [3, 4, 5, 6, 10, 11, 12, 13]
  batch = replay.gather(data, replay.valid_rows(data))
  full, two, one = 0.5 + 0.25 + 0.125, 0.75, 0.5
  np.testing.assert_array_equal(batch.r_t, [full, full, two, one] * 2)
  np.testing.assert_array_equal(batch.discount_t, [0.125, 0, 0, 0] * 2)


# Sampling.


def test_sampling_is_uniform_over_valid_rows_and_touches_no_other(tmp_path):
  """Rows are recognised by their action; stale and padding rows hold actions of their own."""
  shards = []
  for first in (0, 100):
    terminal = np.zeros(30, np.uint8)
    terminal[[9, 20]] = 1
    shards.append(make_shard(30, action=np.arange(first, first + 30), terminal=terminal))
    log_shards.write_shard(tmp_path, len(shards) - 1, shards[-1])
  data = replay.load(tmp_path)
  valid = np.asarray(data.actions)[np.asarray(replay.valid_rows(data))]
  assert len(valid) == 2 * (3 + 3 + 4 + 8 + 2)

  batches = jax.jit(lambda keys: jax.vmap(lambda key: replay.sample(data, key, 32).a_tm1)(keys))
  actions = np.asarray(batches(jax.random.split(jax.random.PRNGKey(0), 1000))).ravel()
  values, counts = np.unique(actions, return_counts=True)
  np.testing.assert_array_equal(values, valid)
  mean = len(actions) / len(valid)
  chi_squared = ((counts - mean) ** 2 / mean).sum()
  # 39 degrees of freedom: below 72.1 with probability 0.999, and a biased sampler is far above.
  assert chi_squared < 72.1


def test_samples_are_a_function_of_the_key(logs):
  data = replay.load(logs)
  sample = jax.jit(replay.sample, static_argnums=2)
  rows = [sample(data, jax.random.PRNGKey(seed), 32).s_tm1 for seed in (1, 1, 2)]
  np.testing.assert_array_equal(rows[0], rows[1])
  assert not np.array_equal(rows[0], rows[2])


# Returns of the logged episodes.


def test_mean_episode_return_is_of_whole_episodes_only(tmp_path):
  terminal = np.zeros(40, np.uint8)
  terminal[[9, 19, 29]] = 1
  reward = np.arange(40, dtype=np.float32)
  first = make_shard(40, terminal=terminal, reward=reward)
  log_shards.write_shard(tmp_path, 0, first)
  # The shard does not begin with padding, so its first episode may have begun before.
  whole = [sum(range(10, 20)), sum(range(20, 30))]
  assert replay.Logs(tmp_path).mean_episode_return == np.mean(whole)
  # With padding it begins here; padding has reward 0.
  observation, reward = first.observation.copy(), first.reward.copy()
  observation[:3] = 0
  reward[:3] = 0
  second = dataclasses.replace(first, observation=observation, reward=reward)
  log_shards.write_shard(tmp_path, 1, second)
  assert replay.Logs(tmp_path, [1]).mean_episode_return == np.mean([sum(range(3, 10)), *whole])
  assert replay.Logs(tmp_path).mean_episode_return == np.mean([*whole, sum(range(3, 10)), *whole])
  assert np.isnan(replay.Logs(tmp_path, [0], max_rows_per_shard=9).mean_episode_return)


def test_mean_episode_return_of_the_recorded_logs(golden, logs):
  stream = np.load(golden / 'replay' / 'Breakout' / '1' / 'expected' / 'stream.npz')
  lap = np.arange(len(stream['reward'])) // CAPACITY
  lost = np.arange(len(stream['reward'])) % CAPACITY == CAPACITY - 1
  returns = []
  for episode in range(18):
    rows = (stream['episode'] == episode) & ~stream['padding']
    if stream['terminal'][rows].any() and len(set(lap[rows])) == 1 and not lost[rows].any():
      returns.append(stream['reward'][rows].sum())
  assert replay.Logs(logs).mean_episode_return == np.mean(returns)


# Which shards are resident.


@pytest.fixture(scope='session')
def distinct(tmp_path_factory):
  """Five shards of 30 to 70 rows of noise, and one too short to sample from."""
  directory = tmp_path_factory.mktemp('distinct')
  rng = np.random.default_rng(0)
  for index, num_rows in enumerate((30, 70, 4, 50, 40, 60)):
    shard = make_shard(num_rows, action=np.full(num_rows, index))
    shard.observation[:] = rng.integers(256, size=shard.observation.shape)
    shard.terminal[:num_rows] = rng.random(num_rows) < 0.1
    log_shards.write_shard(directory, index, shard)
  return directory


def test_a_budget_makes_sets_of_shards_that_change_every_iteration(distinct):
  whole = replay.Logs(distinct, memory_gb=1)
  assert whole.num_resident_shards == 5 and whole.shards == [0, 1, 3, 4, 5]
  assert whole.resident(1) is whole.resident(2)
  # About 8 kB a row: 250 rows are 2 MB; two sets of two shards are at most 4 MB, of one 1.1 MB.
  logs = replay.Logs(distinct, memory_gb=0.0012, seed=7)
  assert logs.num_resident_shards == 1
  assert '1 of 5 shards at a time' in logs.describe()

  logs = replay.Logs(distinct, memory_gb=10, num_resident_shards=2, seed=7, n_step=2)
  gather = jax.jit(replay.gather)
  sample = jax.jit(lambda data, key: replay.sample(data, key, 64))
  sets = []
  for iteration in range(1, 12):
    data = logs.resident(iteration)
    assert logs.resident(iteration) is data
    shards = logs.resident_shards(iteration)
    alone = replay.load(distinct, shards, n_step=2)
    rows = replay.valid_rows(alone)
    np.testing.assert_array_equal(replay.valid_rows(data), rows)
    for ours, theirs in zip(gather(data, rows), gather(alone, rows), strict=True):
      np.testing.assert_array_equal(ours, theirs)
    keys = jax.random.split(jax.random.PRNGKey(iteration), 5)
    for key in keys:
      for ours, theirs in zip(sample(data, key), replay.sample(alone, key, 64), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    sets.append(shards)
    assert sum(x.nbytes for x in jax.tree.leaves(data)) == logs._num_bytes(2)
  assert sample._cache_size() == 1  # nothing is compiled anew
  assert len({tuple(shards) for shards in sets}) > 5
  assert {index for shards in sets for index in shards} == {0, 1, 3, 4, 5}
  assert all(len(set(shards)) == 2 for shards in sets)


def test_resident_shards_are_a_function_of_seed_and_iteration(distinct):
  def sets(seed: int, iterations) -> list[list[int]]:
    logs = replay.Logs(distinct, num_resident_shards=2, seed=seed)
    drawn = []
    for i in iterations:
      data = logs.resident(i)  # each row's action is its shard's number
      drawn.append(sorted(set(np.asarray(data.actions[replay.valid_rows(data)]).tolist())))
      assert drawn[-1] == logs.resident_shards(i)
    return drawn

  assert sets(1, [1, 2, 3, 9]) == [sets(1, [i])[0] for i in (1, 2, 3, 9)]
  assert sets(1, range(8)) != sets(2, range(8))


def test_what_comes_next_is_loaded_in_the_background(distinct, monkeypatch):
  logs = replay.Logs(distinct, num_resident_shards=2)
  loaded = []
  load = logs._load
  monkeypatch.setattr(logs, '_load', lambda shards: (loaded.append(shards), load(shards))[1])
  logs.resident(4)
  logs._sets[5].result(timeout=60)
  assert loaded == [logs.resident_shards(4), logs.resident_shards(5)]
  assert set(logs._sets) == {4, 5}
  logs.resident(5)
  logs._sets[6].result(timeout=60)
  assert loaded[2:] == [logs.resident_shards(6)]
  assert set(logs._sets) == {5, 6}  # the set before is let go


def test_too_little_memory(distinct):
  with pytest.raises(
    ValueError, match=r'--replay_memory_gb: 0\.0010 are too little; 1 of 5 shards at a'
  ):
    replay.Logs(distinct, memory_gb=0.001)
  with pytest.raises(ValueError, match=r'too little; 3 of 5 shards at a time take 0\.00'):
    replay.Logs(distinct, memory_gb=0.0015, num_resident_shards=3)


def test_a_run_that_goes_on_with_fewer_shards_than_it_had(distinct):
  with pytest.raises(ValueError, match='6 shards were resident in this run'):
    replay.Logs(distinct, num_resident_shards=6)


def test_the_last_iteration_loads_nothing_more(distinct):
  logs = replay.Logs(distinct, num_resident_shards=2)
  logs.resident(8, 9)
  logs.resident(9, 9)
  assert set(logs._sets) == {9}


def test_bytes_are_counted_and_few(golden, logs):
  """Recorded Breakout frames shrink, and the other columns take 3 bytes a row."""
  data = replay.load(logs)
  num_bytes = sum(array.nbytes for array in jax.tree.leaves(data))
  assert num_bytes == replay.Logs(logs)._num_bytes(4)
  assert num_bytes / len(data.actions) < 7056 / 150
  columns = (data.actions, data.rewards, data.terminals)
  assert sum(column.nbytes for column in columns) == 3 * len(data.actions)


def test_rewards_that_are_not_whole_numbers(tmp_path):
  rewards = [0.25, -0.5, 0.0, 1.0, -7.5, 0.5, 0.0, 0.0]
  log_shards.write_shard(tmp_path, 0, make_shard(8, reward=np.array(rewards)))
  log_shards.write_shard(tmp_path, 1, make_shard(8, reward=np.array([2.0] * 8)))
  data = replay.load(tmp_path)
  assert data.rewards.dtype == jnp.float32
  np.testing.assert_array_equal(data.rewards, np.clip([*rewards, *[2.0] * 8], -1, 1))
  assert replay.load(tmp_path, [1]).rewards.dtype == jnp.int8


# Writing.


def test_writing_is_reproducible_and_reads_back(tmp_path):
  shard = make_shard(20, 25, action=np.arange(20), reward=np.linspace(-3, 3, 20))
  for name in ('a', 'b'):
    log_shards.write_shard(tmp_path / name, 7, shard)
  files = sorted(path.name for path in (tmp_path / 'a').iterdir())
  assert len(files) == 6
  for name in files:
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
  back = log_shards.read_shard(tmp_path / 'a', 7)
  assert back.add_count == 20
  for name, column in shard.columns.items():
    np.testing.assert_array_equal(back.columns[name], column)
    assert back.columns[name].dtype == column.dtype


def test_write_refuses_other_types(tmp_path):
  shard = dataclasses.replace(make_shard(20), action=np.zeros(21, np.int64))
  with pytest.raises(ValueError, match=r'action_ckpt\.0\.gz: expected int32 \[21\], got int64'):
    log_shards.write_shard(tmp_path, 0, shard)
  assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_shard(tmp_path, monkeypatch):
  log_shards.write_shard(tmp_path, 0, make_shard(20, action=np.arange(20)))
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  save, calls = np.save, []

  def full_disk(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
      raise OSError(28, 'No space left on device')
    save(*args, **kwargs)

  monkeypatch.setattr(np, 'save', full_disk)
  with pytest.raises(OSError, match='No space left'):
    log_shards.write_shard(tmp_path, 0, make_shard(30))
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_writer_loses_only_the_row_that_would_be_stale(tmp_path):
  writer = log_shards.ShardWriter(tmp_path, 10)
  rows = []
  for episode in range(5):
    writer.start_episode()
    rows += [0, 0, 0]
    for step in range(6):
      rows.append(40 * episode + step + 1)
      writer.add(np.ones((84, 84), np.uint8), rows[-1], 0.0, step == 5)
  writer.close()
  shards = [log_shards.read_shard(tmp_path, i) for i in log_shards.list_shards(tmp_path)]
  assert [shard.add_count for shard in shards] == [9, 19, 29, 39, 5]
  kept = np.concatenate([shard.action[: shard.num_rows] for shard in shards])
  np.testing.assert_array_equal(kept, np.delete(rows, [9, 19, 29, 39]))
  assert writer.num_transitions == np.count_nonzero(kept)


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


FILES = (
  *(f'$store$_{name}' for name in ('observation', 'action', 'reward', 'terminal')),
  'add_count',
  'invalid_range',
)


@pytest.mark.parametrize('file', FILES)
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
  good, want = path.read_bytes(), log_shards.read_shard(copy, 1).action
  rng = np.random.default_rng(0)
  found = 0
  for position in rng.integers(len(good), size=150):
    bad = bytearray(good)
    bad[position] ^= 1 << rng.integers(8)
    path.write_bytes(bad)
    try:
      np.testing.assert_array_equal(log_shards.read_shard(copy, 1).action, want)
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
    with pytest.raises(ValueError, match='expected a gzip-compressed') as error:
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
    ('$store$_terminal', np.zeros(0, np.uint8), 'at least one row, got none'),
    ('$store$_terminal', np.full(CAPACITY, 2, np.uint8), 'flags 0 or 1, got 2 in row 0'),
    ('add_count', np.float64(5), 'expected one count of rows, got float64'),
    ('add_count', np.array([5]), 'expected one count of rows'),
    ('add_count', np.int64(-1), 'expected one count of rows.*-1'),
    ('invalid_range', np.zeros((2, 2), np.int64), r'expected integers \[K\]'),
    ('invalid_range', np.zeros(5), r'expected integers \[K\]'),
  ],
)
def test_a_wrong_array_is_named(copy, file: str, array, message: str):
  write_array(copy / f'{file}_ckpt.1.gz', array)
  with pytest.raises(ValueError, match=message) as error:
    replay.load(copy, num_actions=4)
  assert str(error.value).startswith(str(copy / f'{file}_ckpt.1.gz'))
  assert '\n' not in str(error.value)


def test_stale_rows_may_hold_anything(tmp_path):
  log_shards.write_shard(tmp_path, 0, make_shard(20))  # its stale row holds traps
  assert len(replay.load(tmp_path, num_actions=1).actions) == 20


@pytest.mark.parametrize('num_rows', [0, 4])
def test_no_valid_transition(tmp_path, num_rows: int):
  log_shards.write_shard(tmp_path, 0, make_shard(num_rows, 10))
  with pytest.raises(ValueError, match=r'no valid transition in shards \[0\]'):
    replay.load(tmp_path)


def test_directories(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such replay directory'):
    replay.load(tmp_path / 'none')
  with pytest.raises(FileNotFoundError, match='no log shards here'):
    replay.load(tmp_path)
  (tmp_path / 'file').touch()
  with pytest.raises(NotADirectoryError):
    replay.load(tmp_path / 'file')


def test_arguments(logs):
  with pytest.raises(FileNotFoundError, match=r'no shards \[7\]; there are \[0, 1, 2, 3\]'):
    replay.load(logs, [0, 7])
  for arguments in (
    {'n_step': 0}, {'discount': 1.5}, {'max_rows_per_shard': 0}, {'shards': [1, 1]}, {'shards': []}
  ):  # fmt: skip
    with pytest.raises(ValueError):
      replay.load(logs, **arguments)


def test_other_files_are_ignored(copy):
  (copy / 'episode_end_indices_ckpt.1.gz').write_bytes(gzip.compress(pickle.dumps([1])))
  (copy / '$store$_observation_ckpt.1.gz.tmp').touch()
  assert log_shards.list_shards(copy) == [1]
  assert len(replay.load(copy).actions) == CAPACITY - 1
