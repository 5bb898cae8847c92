"""Tests for demo.py and demo_policies.py: real play, logged as the format asks."""

import dataclasses
import functools
import os
import pickle
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax import flatten_util

from offline_zoo import (
  atari_env,
  networks,
  parts,
  processors,
  replay,
  testing,
  trained_agent,
)
from offline_zoo.dqn import run_atari
from offline_zoo.logs import demo, dqn_replay, play, recorded

pytestmark = pytest.mark.usefixtures('compiled_quickly')


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
    _, episode = demo.play_episode(config, index)
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
  config = demo.Config(
    environment_name='breakout', policy='random', seed=5, sticky_action_probability=0.0
  )
  _, episode = demo.play_episode(config, 3)
  environment = atari_env.AtariEnv('breakout', sticky_action_probability=0.0, seed=9)
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
def test_rates_of_random_actions_spread_over_the_episodes(game, max_epsilon):
  """So that play is from poor to good."""
  config = demo.Config(environment_name=game)
  policies = [demo._make_policy(config, np.random.default_rng((1, i))) for i in range(100)]
  assert None not in [policy for policy, _ in policies]
  epsilons = [epsilon for _, epsilon in policies]
  # The least and the largest of 100 uniform draws.
  assert 0 <= min(epsilons) < 0.1 * max_epsilon and 0.9 * max_epsilon < max(epsilons) <= max_epsilon
  assert np.mean(epsilons) == pytest.approx(max_epsilon / 2, rel=0.2)
  fixed = demo.Config(environment_name=game, epsilon=0.3)
  assert demo._make_policy(fixed, np.random.default_rng(0))[1] == 0.3


def test_the_emulators_chance_is_as_the_flag_says_and_its_rom_the_agents(monkeypatch):
  made = []

  def game(*arguments):
    made.append(arguments)
    raise ZeroDivisionError

  monkeypatch.setattr(play, 'game', game)
  with pytest.raises(ZeroDivisionError):
    demo.play_episode(demo.Config(sticky_action_probability=0.125), 0)
  trained = demo._Trained('dqn', types.SimpleNamespace(rom_dir='roms'), {})
  with pytest.raises(ZeroDivisionError):
    demo.play_episode(demo.Config(), 0, trained)
  assert made == [('pong', 0.125, None), ('pong', 0.25, 'roms')]


def always_one(monkeypatch, epsilon: float) -> None:
  monkeypatch.setattr(demo, '_make_policy', lambda *_: (lambda game: 1, epsilon))


def test_random_actions_are_as_often_as_they_should_be(monkeypatch):
  """Of a policy that always presses FIRE, at a rate of 0.4 over six actions: a third others."""
  always_one(monkeypatch, 0.4)
  monkeypatch.setattr(play, 'MAX_STEPS_PER_EPISODE', 700)
  actions = np.concatenate([demo.play_episode(demo.Config(), i)[1].actions for i in range(3)])
  rates = np.bincount(actions, minlength=6) / len(actions)
  np.testing.assert_allclose(rates, [1 / 15, 2 / 3, *[1 / 15] * 4], atol=0.03)


def test_probabilities_are_of_the_policy_mixed_with_random_actions(monkeypatch):
  """With a policy that always takes action 1, in an episode cut short."""
  always_one(monkeypatch, 0.5)
  monkeypatch.setattr(play, 'MAX_STEPS_PER_EPISODE', 500)
  episode, rows = demo.play_episode(demo.Config(), 7)
  chosen = rows.actions == 1
  want = np.where(chosen, 0.5 + 0.5 / 6, 0.5 / 6)
  np.testing.assert_allclose(rows.probs, want, rtol=1e-6)
  # Random draws of the policy's action count as it.
  assert np.mean(chosen) == pytest.approx(0.5 + 0.5 / 6, abs=0.06)
  np.testing.assert_array_equal(episode.choices, chosen)
  np.testing.assert_array_equal(episode.actions, rows.actions)


def test_an_episode_cut_at_the_limit_is_logged_as_ended(monkeypatch):
  monkeypatch.setattr(play, 'MAX_STEPS_PER_EPISODE', 100)
  _, rows = demo.play_episode(demo.Config(), 0)
  assert rows.terminals.tolist() == [0] * 99 + [1]


# What a trained agent plays.


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """The checkpoints of a run on Breakout: after one update and after two, of seeds 1 and 2."""
  directory = tmp_path_factory.mktemp('trained')
  testing.write_noise(directory / 'logs', 1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, 'nature_torso', testing.small_torso)
    config = run_atari.Config(
      environment_name='breakout', replay_dir=str(directory / 'logs'), replay_cache_dir='none',
      results_csv_path=str(directory / 'results.csv'), num_iterations=2, num_seeds=2,
      num_updates_per_iteration=1, eval_steps=1, eval_epsilon=1.0, num_eval_workers=0,
      keep_checkpoints='all',
    )  # fmt: skip
    run_atari.main(config)
  return str(directory / 'checkpoint')


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(networks, 'nature_torso', testing.small_torso)
  monkeypatch.setattr(play, 'in_processes', lambda f, items, n: (f(item) for item in items))
  monkeypatch.setattr(play, 'MAX_STEPS_PER_EPISODE', 300)
  demo._act.cache_clear()


def test_a_trained_agents_play_is_what_it_does_frame_by_frame(small, checkpoint, monkeypatch):
  config = demo.Config(
    environment_name='breakout', policy_checkpoint=checkpoint, sticky_action_probability=0.0
  )
  recording, rows = demo.play_episode(config, 2, demo._restore(config))
  assert recording.epsilon == 0 and recording.choices.all() and (rows.probs == 1).all()
  agent = trained_agent.restore(checkpoint, eval_epsilon=0.0).agent
  monkeypatch.setattr(parts, 'MAX_FRAMES_PER_EPISODE', 4 * len(rows.actions))
  actions = []
  environment = atari_env.AtariEnv('breakout', sticky_action_probability=0.0, seed=9)
  for frame, (_, timestep, _, action) in enumerate(parts.run_loop(agent, environment)):
    if timestep.last():
      break
    if frame % 4 == 0:
      actions.append(action)
  np.testing.assert_array_equal(rows.actions, actions)
  assert len(actions) > 100


def test_the_agent_that_plays_is_the_one_that_is_named(small, checkpoint):
  def params(**which):
    config = demo.Config(environment_name='breakout', policy_checkpoint=checkpoint, **which)
    return flatten_util.ravel_pytree(demo._restore(config).params)[0]

  agent = trained_agent.restore(checkpoint, '1', seed=2).agent
  want, _ = flatten_util.ravel_pytree(agent.get_state().online_params)
  np.testing.assert_array_equal(params(checkpoint='1', run_seed=2), want)
  for other in ({}, {'checkpoint': '1'}, {'run_seed': 2}):
    assert (params(**other) != want).any()
  for which in ({'checkpoint': 'best'}, {'run_seed': 2}):
    with pytest.raises(ValueError, match='expected --policy_checkpoint beside it'):
      demo.Config(environment_name='breakout', **which)


def test_every_process_plays_the_agent_that_was_read(small, checkpoint, tmp_path):
  """Though its run goes on meanwhile, and keeps other checkpoints."""
  directory = tmp_path / 'checkpoint'
  shutil.copytree(checkpoint, directory)
  config = demo.Config(environment_name='breakout', policy_checkpoint=str(directory))
  in_a_process = pickle.dumps(
    functools.partial(demo.play_episode, config, trained=demo._restore(config))
  )
  shutil.rmtree(directory)
  same = demo.Config(environment_name='breakout', policy_checkpoint=checkpoint)
  want = demo.play_episode(same, 1, demo._restore(same))
  got = pickle.loads(in_a_process)(1)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_was_not_logged_as_it_says_is_not_played(small, checkpoint, tmp_path, monkeypatch):
  """An agent that samples has other probabilities than its best action's."""
  trained = trained_agent.restore(checkpoint)
  sampling = types.SimpleNamespace(**vars(trained.config), sample_actions=True)
  monkeypatch.setattr(
    trained_agent, 'restore', lambda *_, **__: dataclasses.replace(trained, config=sampling)
  )
  config = demo.Config(environment_name='breakout', policy_checkpoint=checkpoint)
  with pytest.raises(ValueError, match=r'--policy_checkpoint=.*expected no agent with --sample'):
    demo.write_logs(config, tmp_path / 'logs')


def test_a_trained_agents_logs(small, checkpoint, tmp_path):
  """At half of its actions random, with their probabilities; as shards and as recorded play."""
  config = demo.Config(
    environment_name='breakout', policy_checkpoint=checkpoint, epsilon=0.5, num_transitions=400,
    recorded_path=str(tmp_path / 'a.play'), num_processes=1,
  )  # fmt: skip
  demo.main(config)
  assert recorded.verify(tmp_path / 'a.play', 1)[1] >= 400
  config = dataclasses.replace(config, recorded_path=None, replay_dir=str(tmp_path / 'logs'))
  demo.main(config)
  shard = dqn_replay.ShardFiles(tmp_path / 'logs', 0).read()
  assert set(np.unique(shard.prob)) == {0, 0.125, 0.625}
  with pytest.raises(FileExistsError, match='--recorded_path='):
    demo.main(dataclasses.replace(config, replay_dir=None, recorded_path=str(tmp_path / 'a.play')))
  for changes, message in (
    ({'environment_name': 'pong'}, '--policy_checkpoint=.*expected an agent of pong, not breakout'),
    ({'policy': 'random'}, '--policy=random: expected none beside'),
    ({'epsilon': 1.5}, '--epsilon=1.5'),
    ({'policy_checkpoint': None, 'policy': 'random'}, '--epsilon=0.5: expected nothing'),
  ):
    with pytest.raises(ValueError, match=message):
      demo.write_logs(dataclasses.replace(config, **changes), tmp_path / 'other')
  with pytest.raises(ValueError, match='--replay_dir=None: expected a directory'):
    demo.main(dataclasses.replace(config, replay_dir=None))
  with pytest.raises(FileNotFoundError, match='--policy_checkpoint=/none: there is no checkpoint'):
    demo.write_logs(dataclasses.replace(config, policy_checkpoint='/none'), tmp_path / 'other')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a.play', 'logs']


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'environment_name': 'pnog'}, "'pong'"),
    ({'num_transitions': 0}, '--num_transitions=0'),
    ({'policy': 'best'}, '--policy=best'),
    ({'policy': 'scripted', 'environment_name': 'seaquest'}, 'only for freeway, pong, breakout'),
    ({'shard_capacity': 3}, '--shard_capacity=3: expected 6 to'),
    ({'sticky_action_probability': 2.0}, '--sticky_action_probability=2.0: expected'),
    ({'seed': -1}, '--seed=-1: expected 0 or more'),
    ({'num_processes': 0}, '--num_processes=0'),
  ],
)
def test_bad_settings_leave_nothing(tmp_path, settings, message: str):
  with pytest.raises(ValueError, match=message):
    demo.write_logs(demo.Config(**settings), tmp_path / 'logs')
  assert not list(tmp_path.iterdir())


def test_no_recording_is_played_that_cannot_be_kept(tmp_path):
  (tmp_path / 'file').touch()
  config = demo.Config(num_transitions=10**9, recorded_path=str(tmp_path / 'file' / 'a.play'))
  with pytest.raises(OSError, match=r'--recorded_path=.*cannot be written'):
    demo.main(config)
  with pytest.raises(ValueError, match='--replay_dir=x: expected none beside --recorded_path'):
    demo.main(dataclasses.replace(config, recorded_path=str(tmp_path / 'a.play'), replay_dir='x'))


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
  demo.main(demo.Config(environment_name='pong', num_processes=1))
  assert len(made) == 2 and (tmp_path / 'offline_zoo' / 'demo_logs' / 'pong').is_dir()
  with pytest.raises(ValueError, match='--replay_dir=None: expected a directory'):
    demo.main(demo.Config(environment_name='breakout', num_transitions=10))
  assert len(made) == 2


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
