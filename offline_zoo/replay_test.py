"""Tests for replay.py: against Dopamine's buffer and against slow loops."""

import dataclasses
import gzip
import itertools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_zoo import replay, testing
from offline_zoo.logs import dqn_replay

CAPACITY = 1000


def expected(golden, shard: int, n_step: int) -> dict[str, np.ndarray]:
  path = golden / 'replay' / 'Breakout' / '1' / 'expected' / f'shard{shard}_h{n_step}.npz'
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


# Against Dopamine.


@pytest.mark.parametrize('n_step', [1, 3])
@pytest.mark.parametrize('shard', [0, 1, 2, 3])
def test_valid_rows_and_batches_equal_dopamines(golden, logs, shard: int, n_step: int):
  want = expected(golden, shard, n_step)
  data = replay.load(logs, [shard], n_step=n_step, discount=float(want['gamma']), num_actions=4)
  np.testing.assert_array_equal(replay.valid_rows(data), want['valid_indices'])
  batch = replay.gather(data, want['indices'])
  np.testing.assert_array_equal(batch.s_tm1, want['state'])
  np.testing.assert_array_equal(batch.a_tm1, want['action'])
  np.testing.assert_array_equal(batch.r_t, want['reward'])
  np.testing.assert_array_equal(batch.s_t, want['next_state'])
  gamma_n = np.float32(float(want['gamma']) ** n_step)
  np.testing.assert_array_equal(batch.discount_t, gamma_n * (1 - want['terminal']))
  assert batch.s_tm1.dtype == jnp.uint8 and batch.a_tm1.dtype == jnp.int32
  assert batch.r_t.dtype == batch.discount_t.dtype == jnp.float32


# Against a slow loop.


def slow_transition(shards: list[dqn_replay.Shard], row: int, n_step: int, discount: float):
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
  shards = [dqn_replay.ShardFiles(logs, i).read() for i in range(4)]
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


@pytest.mark.parametrize('n_step', [1, 2, 4])
def test_nothing_begins_at_a_cut_or_leads_beyond_it(tmp_path, n_step: int):
  """Episodes of 5, 1, 2 and 6 transitions; the first and the third one are cut."""
  episodes = [(5, False), (1, True), (2, False), (6, True)]
  frame, steps, contents = 1, [], []
  for length, ended in episodes:
    pngs = []
    for step in range(length + 1):
      pngs.append(cv2.imencode('.png', np.full((84, 84), frame, np.uint8))[1].tobytes())
      if length - step >= n_step or (ended and step < length):
        steps.append((frame, min(n_step, length - step), ended and length - step <= n_step))
      frame += 1
    features = {
      'observations': pngs,
      'actions': list(range(length + 1)),
      'unclipped_rewards': [0.25] * length + [0.0],
      'discounts': [1.0] * length + [1.0 - ended],
    }
    contents.append(testing.tfrecord(testing.serialise_example(features)))
  (tmp_path / 'run_1-00000-of-00050').write_bytes(gzip.compress(b''.join(contents)))
  data = replay.load(tmp_path, n_step=n_step, discount=0.5)
  # As everywhere, the last rows of a shard are without a transition if n more are not there.
  steps = [(first, num, end) for first, num, end in steps if first + n_step < frame - 1]
  batch = replay.gather(data, replay.valid_rows(data))
  firsts, nums, ends = np.array(steps).T
  np.testing.assert_array_equal(batch.s_tm1[:, 0, 0, -1], firsts)
  np.testing.assert_allclose(batch.r_t, [sum(0.25 * 0.5**k for k in range(num)) for num in nums])
  np.testing.assert_allclose(batch.discount_t, (1 - ends) * 0.5**n_step)
  going_on = ends == 0
  np.testing.assert_array_equal(batch.s_t[going_on, 0, 0, -1], (firsts + n_step)[going_on])
  logs = replay.Logs(tmp_path)
  assert logs.mean_episode_return == (0.25 * 1 + 0.25 * 6) / 2


def test_shards_load_in_the_order_given(logs):
  data = replay.load(logs, [3, 1])
  shards = [dqn_replay.ShardFiles(logs, i).read() for i in (3, 1)]
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
  shard = testing.make_shard(12, reward=[0, 0, 0, 5, 5, 5, -5, 0.25, 5, 5, 5, 5])
  dqn_replay.ShardFiles(tmp_path, 0).write(shard)
  data = replay.load(tmp_path, n_step=3, discount=0.5)
  rewards = replay.gather(data, jnp.array([3, 4, 5, 6])).r_t
  np.testing.assert_array_equal(
    rewards,
    [1 + 0.5 + 0.25, 1 + 0.5 - 0.25, 1 - 0.5 + 0.25 * 0.25, -1 + 0.5 * 0.25 + 0.25],
  )


def test_rewards_end_with_the_episode(tmp_path):
  terminal = np.zeros(20, np.uint8)
  terminal[[6, 13]] = 1
  shard = testing.make_shard(20, reward=np.full(20, 0.5), terminal=terminal)
  dqn_replay.ShardFiles(tmp_path, 0).write(shard)
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
    shards.append(testing.make_shard(30, action=np.arange(first, first + 30), terminal=terminal))
    dqn_replay.ShardFiles(tmp_path, len(shards) - 1).write(shards[-1])
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
  rows = [replay.sample(data, jax.random.PRNGKey(seed), 32).s_tm1 for seed in (1, 1, 2)]
  np.testing.assert_array_equal(rows[0], rows[1])
  assert not np.array_equal(rows[0], rows[2])


# Returns of the logged episodes.


def test_mean_episode_return_is_of_whole_episodes_only(tmp_path):
  terminal = np.zeros(40, np.uint8)
  terminal[[9, 19, 29]] = 1
  reward = np.arange(40, dtype=np.float32)
  first = testing.make_shard(40, terminal=terminal, reward=reward)
  dqn_replay.ShardFiles(tmp_path, 0).write(first)
  # The shard does not begin with padding, so its first episode may have begun before.
  whole = [sum(range(10, 20)), sum(range(20, 30))]
  assert replay.Logs(tmp_path).mean_episode_return == np.mean(whole)
  # With padding it begins here; padding has reward 0.
  observation, reward = first.observation.copy(), first.reward.copy()
  observation[:3] = 0
  reward[:3] = 0
  second = dataclasses.replace(first, observation=observation, reward=reward)
  dqn_replay.ShardFiles(tmp_path, 1).write(second)
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
    shard = testing.make_shard(num_rows, action=np.full(num_rows, index))
    shard.observation[:] = rng.integers(256, size=shard.observation.shape)
    shard.terminal[:num_rows] = rng.random(num_rows) < 0.1
    dqn_replay.ShardFiles(directory, index).write(shard)
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
  sample = jax.jit(lambda data, key: replay.sample(data, key, 64))
  sets = []
  for iteration in range(1, 12):
    data = logs.resident(iteration)
    assert logs.resident(iteration) is data
    shards = logs.resident_shards(iteration)
    sets.append(shards)
    assert sum(x.nbytes for x in jax.tree.leaves(data)) == logs._plan.num_bytes
    sample(data, jax.random.PRNGKey(0))
    if iteration > 4:
      continue
    alone = replay.load(distinct, shards, n_step=2)
    rows = replay.valid_rows(alone)
    np.testing.assert_array_equal(replay.valid_rows(data), rows)
    both = replay.gather(data, rows), replay.gather(alone, rows)
    for ours, theirs in zip(*both, strict=True):
      np.testing.assert_array_equal(ours, theirs)
    keys = jax.random.split(jax.random.PRNGKey(iteration), 5)
    for key in keys:
      for ours, theirs in zip(sample(data, key), replay.sample(alone, key, 64), strict=True):
        np.testing.assert_array_equal(ours, theirs)
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
  message = r'--replay_memory_gb=0\.001: too little; expected at least 0\.00\d+ for 1 of 5 shards'
  with pytest.raises(ValueError, match=message):
    replay.Logs(distinct, memory_gb=0.001)
  # Not rounded to nothing.
  with pytest.raises(ValueError, match=r'--replay_memory_gb=1e-09: too little; expected at least'):
    replay.Logs(distinct, memory_gb=1e-9)
  with pytest.raises(ValueError, match=r'too little; expected at least 0\.00\d+ for 3 of 5 shards'):
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
  assert num_bytes == replay.Logs(logs)._plan.num_bytes
  assert num_bytes / len(data.actions) < 7056 / 150
  columns = (data.actions, data.rewards, data.terminals)
  assert sum(column.nbytes for column in columns) == 3 * len(data.actions)


def test_rewards_are_held_raw_and_small_and_clipped_when_sampled(tmp_path):
  kinds = {
    jnp.int8: [2, -128, 127, 0, 1, -1, 0, 0],
    jnp.int16: [2, -129, 32767, 0, 1, -1, 0, 0],
    jnp.float32: [0.25, -0.5, 40000.0, 1.0, -7.5, 0.5, 0, 0],
  }
  cache = tmp_path / 'cache'
  for number, (dtype, rewards) in enumerate(kinds.items()):
    shard = testing.make_shard(8, reward=np.array(rewards, np.float32))
    dqn_replay.ShardFiles(tmp_path / 'logs', number).write(shard)
    data = replay.load(tmp_path / 'logs', [number])
    assert data.rewards.dtype == dtype
    np.testing.assert_array_equal(data.rewards, np.array(rewards, np.float32))
    # The bound is the sampling's, not the cache's.
    for bound in (1.0, 0.3, None, 1000.0):
      data = replay.load(tmp_path / 'logs', [number], max_abs_reward=bound, cache_dir=cache)
      rows = replay.valid_rows(data)
      want = np.array(rewards, np.float32)[rows]
      got = replay.gather(data, rows).r_t
      np.testing.assert_array_equal(got, want if bound is None else np.clip(want, -bound, bound))
  data = replay.load(tmp_path / 'logs', n_step=2, discount=0.5)
  np.testing.assert_array_equal(data.rewards, np.concatenate([*kinds.values()]).astype(np.float32))
  # Each reward is clipped before the sum: 0 + 0.5 and 1 - 0.5.
  assert replay.gather(data, jnp.array([3, 4])).r_t.tolist() == [0.5, 0.5]


# Bad input, but for bad files, which logs/dqn_replay_test.py has.


@pytest.mark.parametrize('num_rows', [0, 4])
def test_no_valid_transition(tmp_path, num_rows: int):
  dqn_replay.ShardFiles(tmp_path, 0).write(testing.make_shard(num_rows, 10))
  with pytest.raises(ValueError, match=r'no valid transition in shards \[0\]'):
    replay.load(tmp_path)


def test_arguments(logs):
  with pytest.raises(FileNotFoundError, match=r'no shards \[7\]; there are \[0, 1, 2, 3\]'):
    replay.load(logs, [0, 7])
  for arguments in (
    {'n_step': 0}, {'discount': 1.5}, {'max_rows_per_shard': 0}, {'shards': [1, 1]}, {'shards': []}
  ):  # fmt: skip
    with pytest.raises(ValueError):
      replay.load(logs, **arguments)


@pytest.mark.parametrize('column', ['observation', 'action', 'reward', 'terminal'])
def test_the_checksum_is_of_every_column(tmp_path, column: str):
  shard = testing.make_shard(20)
  dqn_replay.ShardFiles(tmp_path / 'before', 0).write(shard)
  values = getattr(shard, column)
  changed = (12, 80, 3) if column == 'observation' else 12  # one pixel
  values[changed] = 1
  dqn_replay.ShardFiles(tmp_path / 'after', 0).write(shard)
  checksums = [replay.Logs(tmp_path / name).checksum for name in ('before', 'before', 'after')]
  assert checksums[0] == checksums[1] != checksums[2]


# Only some episodes.


@pytest.fixture
def episodes(tmp_path):
  """Two shards of four episodes, of which the first and the last are cut off.

  Episodes have 7 rows, 4 of which a transition can begin at but for the last. Rows have their
  shard times 100 as actions, plus their number.
  """
  returns = {0: [90, 5, 5, 99], 1: [80, 7, -3, 99]}
  for index, of_shard in returns.items():
    terminal = np.tile(np.arange(7) == 6, 4)
    terminal[-1] = False
    reward = np.where(np.arange(28) % 7 == 6, np.repeat(of_shard, 7), 0)
    actions = 100 * index + np.arange(28)
    shard = testing.make_shard(28, action=actions, terminal=terminal, reward=reward)
    dqn_replay.ShardFiles(tmp_path, index).write(shard)
  return tmp_path


def logged_rows(directory, **settings) -> tuple[list[int], float, str]:
  logs = replay.Logs(directory, memory_gb=1, **settings)
  data = logs.resident(1)
  actions = np.asarray(data.actions)[replay.valid_rows(data)]
  return actions.tolist(), logs.mean_episode_return, logs.describe()


def of_episodes(*first_rows: int) -> list[int]:
  return [first + i for first in first_rows for i in range(3, 7)]


@pytest.mark.parametrize(
  'settings, first_rows, mean',
  [
    ({'min_episode_return': -3}, [7, 14, 107, 114], 3.5),
    ({'min_episode_return': 5}, [7, 14, 107], 17 / 3),
    ({'min_episode_return': 5.5}, [107], 7),
    ({'top_fraction': 1.0}, [7, 14, 107, 114], 3.5),
    ({'top_fraction': 0.25}, [107], 7),
    ({'top_fraction': 0.01}, [107], 7),  # one at least
    ({'top_fraction': 0.5}, [7, 14, 107], 17 / 3),  # of those that return 5, both or none
    ({'top_fraction': 0.75}, [7, 14, 107], 17 / 3),
    ({'top_fraction': 1.0, 'min_episode_return': 6}, [107], 7),
    ({'top_fraction': 0.25, 'min_episode_return': -9}, [107], 7),
    ({'first_fraction': 0.5}, [0, 7, 100, 107], 6),
    ({'first_fraction': 0.49}, [0, 100], np.nan),  # rounded down; none of them is whole
    ({'first_fraction': 0.5, 'top_fraction': 0.6}, [107], 7),
    ({'first_fraction': 0.5, 'max_random_transitions': 99}, [7, 107], 6),
  ],
)
def test_only_the_chosen_episodes_are_kept(episodes, settings, first_rows, mean: float):
  for n_step in (1, 3):
    rows, mean_episode_return, line = logged_rows(episodes, n_step=n_step, **settings)
    assert rows == of_episodes(*first_rows)
    assert mean_episode_return == pytest.approx(mean, nan_ok=True)
    assert f'mean logged return {mean:.1f}; only {len(first_rows)} of 8 episodes, ' in line
    assert f': {len(rows)} of 32 transitions' in line


def test_shards_without_a_kept_episode_are_left_out(episodes):
  assert replay.Logs(episodes, min_episode_return=6).shards == [1]


def test_without_a_bound_no_row_is_left_out(episodes):
  rows, mean, line = logged_rows(episodes)
  assert rows == [*of_episodes(0, 7, 14), 24, 25, 26, *of_episodes(100, 107, 114), 124, 125, 126]
  assert mean == 3.5 and 'only' not in line


def test_no_episode_to_keep(episodes):
  with pytest.raises(ValueError, match=r'--min_episode_return=8: expected at most 7, the best'):
    replay.Logs(episodes, min_episode_return=8)
  for settings in ({'min_episode_return': 1}, {'top_fraction': 0.5}):
    with pytest.raises(ValueError, match=rf'--{next(iter(settings))}: expected logs with whole'):
      replay.Logs(episodes, max_rows_per_shard=12, **settings)
  for flag, fraction in itertools.product(('first_fraction', 'top_fraction'), (0.0, 1.1)):
    with pytest.raises(ValueError, match=f'{flag} must be in'):
      replay.Logs(episodes, **{flag: fraction})


# Windows of logged steps, with the probabilities of their actions.


@pytest.mark.parametrize('shard, n_step', [(0, 5), (2, 5), (2, 1)])
def test_windows_equal_those_of_another_codes_buffer(golden, shard: int, n_step: int):
  """n17s/batch_rl's, on its own made-up logs, whose frames hold their number."""
  path = golden / 'off_policy' / 'expected' / f'shard{shard}_h{n_step}.npz'
  want = np.load(path, allow_pickle=False)
  logs = golden / 'off_policy' / 'replay_logs'
  data = replay.load(
    logs, [shard], n_step=n_step, discount=float(want['gamma']), with_probabilities=True
  )
  np.testing.assert_array_equal(replay.valid_rows(data), want['valid_indices'])
  got = replay.gather_windows(data, want['indices'])
  np.testing.assert_array_equal(got.a, want['traj_action'])
  np.testing.assert_array_equal(got.r, want['traj_reward'])
  np.testing.assert_array_equal(got.probability, want['traj_prob'])
  np.testing.assert_allclose(got.discount, want['traj_discount'], rtol=1e-6)
  numbers = got.s[:, :, 0, 0].astype(int) + 256 * got.s[:, :, 0, 1].astype(int)
  belong = want['traj_discount'] > 0
  ours, theirs = numbers[:, :-1][belong], want['traj_frame'][belong]
  # Frames with a first pixel of 0 were taken for blank ones when numbers were recorded.
  np.testing.assert_array_equal(np.where(ours % 256 == 0, 0, ours), theirs)
  # What a window and a transition have in common is the same.
  batch = replay.gather(data, want['indices'])
  np.testing.assert_array_equal(got.s[:, 0], batch.s_tm1)
  np.testing.assert_array_equal(got.discount_t, batch.discount_t)
  np.testing.assert_array_equal(got.discount_t == 0, want['terminal'])
  on = want['terminal'] == 0
  np.testing.assert_array_equal(got.s[on, -1], batch.s_t[on])
  np.testing.assert_allclose((got.r * got.discount).sum(axis=1), batch.r_t, rtol=1e-6)


def test_windows_are_sampled_as_transitions_are(golden):
  logs = golden / 'off_policy' / 'replay_logs'
  data = replay.load(logs, n_step=3, with_probabilities=True)
  key = jax.random.PRNGKey(3)
  windows, batch = replay.sample_windows(data, key, 32), replay.sample(data, key, 32)
  np.testing.assert_array_equal(windows.s[:, 0], batch.s_tm1)
  np.testing.assert_array_equal(windows.a[:, 0], batch.a_tm1)


def test_probabilities_take_room_only_where_they_are_asked_for(golden, tmp_path):
  logs = golden / 'off_policy' / 'replay_logs'
  without, with_them = (
    replay.load(logs, with_probabilities=asked, cache_dir=tmp_path / str(asked))
    for asked in (False, True)
  )
  assert without.probabilities is None
  sizes = [sum(x.nbytes for x in jax.tree.leaves(data)) for data in (without, with_them)]
  assert sizes[1] - sizes[0] == 4 * len(without.actions)
  # They come out of the cache as they were, also of one that was made for another agent.
  again = replay.load(logs, with_probabilities=True, cache_dir=tmp_path / 'False')
  np.testing.assert_array_equal(again.probabilities, with_them.probabilities)
  shards = [dqn_replay.ShardFiles(logs, number).read() for number in (0, 2)]
  want = np.concatenate([shard.prob[: shard.num_rows] for shard in shards])
  np.testing.assert_array_equal(with_them.probabilities, want)


def test_logs_without_probabilities(golden, logs, tmp_path):
  message = r'/\$store\$_prob_ckpt\.1\.gz: expected the probabilities of the logged actions, which'
  with pytest.raises(FileNotFoundError, match=message):
    replay.load(logs, [1], with_probabilities=True)


def test_probabilities_out_of_range(golden, tmp_path):
  shard = dqn_replay.ShardFiles(golden / 'off_policy' / 'replay_logs', 0).read()
  for value in (1.5, -0.1, np.nan):
    prob = shard.prob.copy()
    prob[7] = value
    dqn_replay.ShardFiles(tmp_path, 0).write(dataclasses.replace(shard, prob=prob))
    with pytest.raises(ValueError, match=r'prob_ckpt\.0\.gz: expected probabilities, got .* row 7'):
      replay.load(tmp_path)
