"""Tests for demo.py and demo_policies.py: real play, logged as the format asks."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest

from offline_zoo import atari_env, parts, processors, replay
from offline_zoo.logs import demo, dqn_replay


def directory_bytes(directory) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_logs_are_the_episodes_row_by_row_and_reproducible(tmp_path):
  config = demo.Config(
    environment_name='breakout', num_transitions=900, shard_capacity=300, num_processes=2
  )
  demo.write_logs(config, tmp_path / 'a')
  want: dict[str, list] = {
    name: [] for name in ('observation', 'action', 'reward', 'terminal', 'prob')
  }
  index = 0
  while len(want['action']) < 1000:
    episode = demo.play_episode(config, index)
    blank = np.zeros((3, 84, 84), np.uint8)
    want['observation'] += [*blank, *episode.frames]
    want['action'] += [0, 0, 0, *episode.actions]
    want['reward'] += [0, 0, 0, *episode.rewards]
    want['terminal'] += [0, 0, 0, *episode.terminals]
    want['prob'] += [0, 0, 0, *episode.probs]
    index += 1
  num_transitions = 0
  for files in dqn_replay.open_shards(tmp_path / 'a'):
    assert files.read_small_files(num_actions=4).num_frames == 300
    shard = files.read()
    rows = slice(300 * files.number, 300 * files.number + shard.num_rows)
    for name, column in shard.columns.items():
      np.testing.assert_array_equal(column[: shard.num_rows], want[name][rows])
      assert not column[shard.num_rows :].any()
    padding = ~shard.observation[: shard.num_rows].any(axis=(1, 2))
    num_transitions += shard.num_rows - padding.sum()
  assert num_transitions == 900
  assert max(want['reward']) > 1  # raw: bricks score up to 7

  # Again, and by one process instead of two: the same bytes.
  one = demo.Config(**{**vars(config), 'num_processes': 1})
  demo.write_logs(one, tmp_path / 'b')
  assert directory_bytes(tmp_path / 'a') == directory_bytes(tmp_path / 'b')
  other = demo.Config(**{**vars(one), 'seed': 2})
  demo.write_logs(other, tmp_path / 'c')
  assert directory_bytes(tmp_path / 'a') != directory_bytes(tmp_path / 'c')


def test_a_logged_episode_is_what_the_emulator_plays_again():
  """The logged actions, played again, give the logged frames, rewards and end."""
  config = demo.Config(environment_name='breakout', policy='random', seed=5)
  episode = demo.play_episode(config, 3)
  rng = np.random.default_rng((5, 3))
  environment = atari_env.AtariEnv('breakout', seed=int(rng.integers(2**31)))
  processor = processors.AtariProcessor()
  answer = processor(environment.reset())
  for frame, action, reward, terminal, prob in zip(*episode, strict=True):
    assert prob == 0.25
    np.testing.assert_array_equal(answer.observation[..., -1], frame)
    answer = None
    while answer is None:
      answer = processor(environment.step(action))
    assert answer.reward == reward
    assert answer.last() == terminal
  assert set(episode.actions) == {0, 1, 2, 3}


@pytest.mark.parametrize('game, max_epsilon', [('pong', 0.03), ('breakout', 0.2)])
def test_rates_of_random_actions_spread_over_the_episodes(game, max_epsilon, monkeypatch):
  """So that play is from poor to good; and the emulator's own chance is as the flag says."""
  epsilons, probabilities = [], []

  def record(emulator, policy, epsilon, rng):
    assert policy is not None
    epsilons.append(epsilon)
    return types.SimpleNamespace(episode=lambda: None)

  def make_environment(name, *, sticky_action_probability, seed):
    probabilities.append(sticky_action_probability)
    return types.SimpleNamespace(seed=lambda seed: None)

  monkeypatch.setattr(demo, '_Recorder', record)
  monkeypatch.setattr(demo, '_make_environment', make_environment)
  monkeypatch.setattr(parts, 'run_loop', lambda *_: iter([]))
  for index in range(100):
    demo.play_episode(demo.Config(environment_name=game), index)
  # The least and the largest of 100 uniform draws.
  assert 0 <= min(epsilons) < 0.1 * max_epsilon and 0.9 * max_epsilon < max(epsilons) <= max_epsilon
  assert np.mean(epsilons) == pytest.approx(max_epsilon / 2, rel=0.2)
  assert probabilities == [0.25] * 100


def test_random_actions_are_as_often_as_they_should_be():
  """Of a policy that always serves, at a rate of 0.4 over four actions: 0.3 others."""
  environment = atari_env.AtariEnv('breakout', seed=0)
  recorder = demo._Recorder(environment, lambda ram: 1, 0.4, np.random.default_rng(0))
  loop = parts.run_loop(recorder, environment)
  for _ in zip(range(4000), loop, strict=False):
    pass
  rates = np.bincount(recorder._actions, minlength=4) / len(recorder._actions)
  np.testing.assert_allclose(rates, [0.1, 0.7, 0.1, 0.1], atol=0.05)


def test_probabilities_are_of_the_policy_mixed_with_random_actions(monkeypatch):
  """With a policy that always takes action 1, in an episode cut short."""
  loop = parts.run_loop
  monkeypatch.setattr(parts, 'run_loop', lambda *args: loop(*args, max_frames_per_episode=4000))
  policies = {'pong': (lambda: lambda ram: 1, 0.8)}
  monkeypatch.setattr(demo.demo_policies, 'POLICIES', policies)
  episode = demo.play_episode(demo.Config(), 7)
  rng = np.random.default_rng((1, 7))
  rng.integers(2**31)
  epsilon = rng.uniform(0.0, 0.8)
  assert epsilon > 0.1
  chosen = episode.actions == 1
  want = np.where(chosen, 1 - epsilon + epsilon / 6, epsilon / 6)
  np.testing.assert_allclose(episode.probs, want, rtol=1e-6)
  # Random draws of the policy's action count as it.
  assert np.mean(chosen) == pytest.approx(1 - epsilon + epsilon / 6, abs=0.05)


def test_an_episode_cut_at_the_limit_is_logged_as_ended(monkeypatch):
  loop = parts.run_loop
  monkeypatch.setattr(parts, 'run_loop', lambda *args: loop(*args, max_frames_per_episode=400))
  episode = demo.play_episode(demo.Config(), 0)
  assert episode.terminals.tolist() == [0] * 99 + [1]


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'environment_name': 'pnog'}, "'pong'"),
    ({'num_transitions': 0}, '--num_transitions=0'),
    ({'policy': 'best'}, '--policy=best'),
    ({'policy': 'scripted', 'environment_name': 'seaquest'}, 'only for freeway, pong, breakout'),
    ({'shard_capacity': 3}, 'capacity'),
    ({'sticky_action_probability': 2.0}, 'sticky_action_probability'),
    ({'num_processes': 0}, '--num_processes=0'),
  ],
)
def test_bad_settings_leave_nothing(tmp_path, settings, message: str):
  with pytest.raises(ValueError, match=message):
    demo.write_logs(demo.Config(**settings), tmp_path / 'logs')
  assert not list(tmp_path.iterdir())


def test_existing_logs_are_not_overwritten(tmp_path):
  (tmp_path / 'logs').mkdir()
  (tmp_path / 'logs' / 'mine').touch()
  with pytest.raises(FileExistsError, match='--replay_dir='):
    demo.write_logs(demo.Config(), tmp_path / 'logs')
  assert [path.name for path in tmp_path.rglob('*')] == ['logs', 'mine']


def test_demo_logs_are_made_once_where_the_cache_is(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  made = []

  def write_logs(config, replay_dir):
    made.append(config)
    replay_dir.mkdir(parents=True)

  monkeypatch.setattr(demo, 'write_logs', write_logs)
  for _ in range(2):
    directory = demo.find_or_make('seaquest')
    assert directory == tmp_path / 'offline_zoo' / 'demo_logs' / 'seaquest'
  assert made == [demo.Config(environment_name='seaquest')]


def test_the_command(tmp_path):
  run = subprocess.run(
    [sys.executable, '-m', 'offline_zoo.logs.demo', '--environment_name=seaquest',
     '--num_transitions=150', f'--replay_dir={tmp_path / "logs"}', '--num_processes=1'],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert 'Logged 150 transitions of seaquest' in run.stderr
  assert 'leaked' not in run.stderr
  data = replay.load(tmp_path / 'logs', num_actions=18)
  assert len(data.actions) == 153 or len(data.actions) == 156
