"""Tests for bundled.py: which logs a run gets without a download."""

import pathlib

import numpy as np
import pytest

from offline_zoo import replay
from offline_zoo.logs import bundled, demo, play, recorded

SHIPPED_RECORDINGS = bundled.RECORDINGS
SHIPPED = ('breakout', 'freeway', 'pong', 'qbert')
CONFIG = demo.Config(environment_name='breakout', num_transitions=300, policy='random')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> pathlib.Path:
  """A miniature replay of Breakout alone, and an empty cache."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(bundled, 'RECORDINGS', tmp_path)
  monkeypatch.setattr(play, 'in_processes', lambda f, items, n: (f(x) for x in items))
  demo.record(CONFIG, tmp_path / 'breakout.play')
  return tmp_path / 'cache' / 'offline_zoo'


def test_the_miniature_replay_is_expanded_once_and_holds_what_was_played(home, monkeypatch):
  directory = bundled.find_or_make(None, 'breakout')
  with monkeypatch.context() as patch:
    patch.setattr(recorded, 'expand', lambda *_: pytest.fail('again'))
    assert bundled.find_or_make('miniature', 'breakout') == directory
  assert directory.parent == home / 'miniature' and directory.name.startswith('breakout-')
  data = replay.load(directory, num_actions=4)
  learnt_from = replay.gather(data, replay.valid_rows(data))
  played = [demo.play_episode(CONFIG, index)[1] for index in range(3)]
  actions = np.concatenate([rows.actions for rows in played])
  assert len(learnt_from.a_tm1) >= CONFIG.num_transitions - 1
  np.testing.assert_array_equal(learnt_from.a_tm1, actions[: len(learnt_from.a_tm1)])


def test_another_version_of_a_recording_is_expanded_to_another_place(home):
  before = bundled.find('miniature', 'breakout')
  with open(bundled.RECORDINGS / 'breakout.play', 'ab') as file:
    file.write(b'more')
  assert bundled.find('miniature', 'breakout') != before


def test_what_another_process_has_just_expanded_is_taken(monkeypatch):
  def expand(path, directory, *_):
    directory.mkdir(parents=True)
    raise FileExistsError('just made')

  monkeypatch.setattr(recorded, 'expand', expand)
  assert bundled.find_or_make('miniature', 'breakout').is_dir()


def test_demo_logs_of_games_that_it_lacks_and_where_they_are_asked_for(home, monkeypatch):
  monkeypatch.setattr(demo, 'find_or_make', lambda game: f'demo logs of {game}')
  assert bundled.find_or_make(None, 'pong') == 'demo logs of pong'
  assert bundled.find_or_make('demo', 'breakout') == 'demo logs of breakout'
  assert bundled.find(None, 'pong') == home / 'demo_logs' / 'pong'


def test_a_recording_that_does_not_come_out_names_what_does(home):
  path = bundled.RECORDINGS / 'breakout.play'
  path.write_bytes(path.read_bytes().replace(b'"rom_md5": "', b'"rom_md5": "0'))
  with pytest.raises(ValueError, match=r'breakout\.play: .*; --replay_dir=demo needs no recording'):
    bundled.find_or_make(None, 'breakout')
  assert not home.exists() or not [*home.glob('miniature/breakout*')]


def test_a_directory_is_the_users_even_if_it_is_missing(tmp_path):
  assert bundled.find_or_make(f'{tmp_path}/none', 'breakout') == tmp_path / 'none'
  assert bundled.find_or_make('./miniature', 'pong') == pathlib.Path('miniature')


@pytest.mark.parametrize('game', SHIPPED)
def test_what_is_shipped(game: str):
  """Its size, its protocol, and that its first episode and a late one come out as recorded."""
  path = SHIPPED_RECORDINGS / f'{game}.play'
  header, episodes = recorded.read(path)
  episodes = [*episodes]
  assert header.environment_name == game and header.has_choices
  assert header.sticky_action_probability == 0.25
  assert path.stat().st_size < 1_000_000
  assert sum(len(episode.actions) for episode in episodes) >= 300_000
  assert episodes[0].epsilon == 1 and episodes[-2].epsilon == np.float32(0.01)
  chosen = [episodes[-2], episodes[0]]  # in another order than when they were recorded
  late, first = recorded.play_again(path, header, chosen, 1)
  assert late.rewards.sum() > first.rewards.sum()


def test_the_games_that_are_shipped(monkeypatch):
  monkeypatch.setattr(bundled, 'RECORDINGS', SHIPPED_RECORDINGS)
  assert bundled.miniature_games() == [*SHIPPED]


def test_games_that_it_lacks():
  with pytest.raises(ValueError, match='--replay_dir=miniature: there is no pong; expected break'):
    bundled.find_or_make('miniature', 'pong')
