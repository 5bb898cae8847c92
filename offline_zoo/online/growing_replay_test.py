"""Tests for growing_replay.py: against a slow loop, in all states of a replay that forgets."""

import jax
import numpy as np
import optax
import pytest

from offline_zoo import networks, replay, testing
from offline_zoo.dqn import agent
from offline_zoo.online import growing_replay

DISCOUNT = 0.9


def make_replay(capacity: int, n_step: int) -> growing_replay.GrowingReplay:
  return growing_replay.GrowingReplay(
    capacity, n_step=n_step, discount=DISCOUNT, max_abs_reward=1.0
  )


def write_episode(target, rng, length: int, shade: int) -> list[tuple]:
  """Adds an episode; returns its rows, blank ones too."""
  target.start_episode()
  rows = [(0, 0, 0.0, False)] * 3
  for i in range(length):
    row = (1 + (shade + i) % 255, int(rng.integers(6)), float(rng.normal()), i == length - 1)
    target.add(np.full((84, 84), row[0], np.uint8), *row[1:])
    rows.append(row)
  return rows


def slow_transitions(rows: list[tuple], capacity: int, n_step: int) -> list[tuple]:
  """All transitions that the last rows hold, oldest first: stack, action, reward, ..."""
  transitions = []
  for t in range(max(len(rows) - capacity, 0) + 3, len(rows) - n_step):
    if rows[t][0] == 0:  # blank
      continue
    reward, k, ended = 0.0, 0, False
    while k < n_step and not ended:
      reward += DISCOUNT**k * min(max(rows[t + k][2], -1.0), 1.0)
      ended = rows[t + k][3]
      k += 1
    stack = [row[0] for row in rows[t - 3 : t + 1]]
    after = None if ended else [row[0] for row in rows[t + n_step - 3 : t + n_step + 1]]
    transitions.append((stack, rows[t][1], reward, after))
  return transitions


def check(data: replay.ReplayData, want: list[tuple], n_step: int, gather) -> None:
  rows = np.asarray(replay.valid_rows(data))
  assert len(rows) == len(want)
  if not want:
    return
  for start in range(0, len(rows), 64):
    some = np.resize(rows[start : start + 64], 64)
    batch = jax.tree.map(np.asarray, gather(data, some))
    for i, (stack, action, reward, after) in enumerate(want[start : start + 64]):
      assert batch.s_tm1[i, 5, 7].tolist() == stack
      assert batch.a_tm1[i] == action
      assert batch.r_t[i] == pytest.approx(reward, abs=1e-5)
      assert batch.discount_t[i] == pytest.approx(0.0 if after is None else DISCOUNT**n_step)
      if after is not None:
        assert batch.s_t[i, 0, 83].tolist() == after


@pytest.mark.parametrize('n_step, capacity', [(1, 130), (3, 131), (5, 257)])
def test_all_transitions_are_those_of_a_slow_loop(n_step: int, capacity: int):
  """From an empty replay to one that has forgotten much; nothing is compiled anew."""
  rng = np.random.default_rng(n_step)
  target = make_replay(capacity, n_step)
  gather = jax.jit(lambda *args: replay.gather(*args))  # with a cache of its own
  rows: list[tuple] = []
  check(target.data(), [], n_step, gather)
  # The replay has room for capacity // 64 episodes: these are long enough, but for a very long one.
  for length in [2, 70, 90, 80, 64, capacity + 50, 75, 66, 130, 61, 99]:
    rows += write_episode(target, rng, length, shade=len(rows))
    check(target.data(), slow_transitions(rows, capacity, n_step), n_step, gather)
  assert len(rows) > 4 * capacity
  assert gather._cache_size() == 1


def test_within_an_episode_too():
  rng = np.random.default_rng(0)
  target, gather = make_replay(128, 1), jax.jit(replay.gather)
  rows = write_episode(target, rng, 100, 0)
  target.start_episode()
  rows += [(0, 0, 0.0, False)] * 3
  for i in range(60):
    target.add(np.full((84, 84), i + 1, np.uint8), 2, 0.5, False)
    rows.append((i + 1, 2, 0.5, False))
    if i % 7 == 0:
      check(target.data(), slow_transitions(rows, 128, 1), 1, gather)


def test_no_more_episodes_than_there_is_room_for():
  """The oldest are forgotten then, earlier than their rows would be."""
  rng = np.random.default_rng(0)
  target, rows = make_replay(256, 1), []
  for _ in range(9):
    rows.append(write_episode(target, rng, 5, 0))
  last = [row for episode in rows[-4:] for row in episode]
  check(target.data(), slow_transitions([(0, 0, 0.0, False), *last], 256, 1), 1, replay.gather)


def test_a_replay_that_begins_later_gives_the_same_batches():
  """A resumed run, which plays again only what is not forgotten, draws what it would have drawn."""
  rng = np.random.default_rng(0)
  whole, episodes = make_replay(200, 2), []
  for length in (100, 80, 90, 120):
    episodes.append((length, rng.bit_generator.state))
    write_episode(whole, rng, length, 0)
  late = make_replay(200, 2)
  for length, state in episodes[2:]:
    rng.bit_generator.state = state
    write_episode(late, rng, length, 0)
  one, other = whole.data(), late.data()
  assert len(replay.valid_rows(one)) == len(replay.valid_rows(other)) > 150
  key, size = jax.random.PRNGKey(0), 2000  # so that every row is among them
  for a, b in zip(replay.sample(one, key, size), replay.sample(other, key, size), strict=True):
    np.testing.assert_array_equal(a, b)


def test_too_little_memory_is_said():
  with pytest.raises(ValueError, match=r'--replay_capacity=2000000000: needs 14112.0 GB of memory'):
    make_replay(2_000_000_000, 1)


def test_an_agent_learns_the_optimal_values_of_an_mdp_while_it_grows():
  """In a replay that is full at half of the time; its update is compiled once."""

  def table(frames: jax.Array) -> networks.QNetworkOutputs:
    return networks.QNetworkOutputs(q_values=testing.table('q', frames, 2))

  target = make_replay(250, 1)
  dqn = testing.make_agent(agent.Dqn, table, None, double_q=False, optimizer=optax.sgd(1.0))
  state = dqn.initial_state(jax.random.PRNGKey(0))
  update = jax.jit(dqn.update)
  rng = np.random.default_rng(0)

  def play_until(num_rows: int) -> None:
    while target._num_rows < num_rows:
      target.start_episode()
      at, ended = 0, False
      while not ended:
        action = int(rng.random() < 0.2)
        ended = at == 1 and action == 1
        frame = np.full((84, 84), 10 * (at + 1), np.uint8)
        target.add(frame, action, testing.REWARDS[at, action], ended)
        at = action

  for i in range(600):
    play_until(100 + i)
    state, _ = update(state, target.data())
  np.testing.assert_allclose(state.online_params['~']['q'], testing.optimal_values(), atol=1e-3)
  assert update._cache_size() == 1
