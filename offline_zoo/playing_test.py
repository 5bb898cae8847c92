"""Tests for playing.py: what is counted of an episode, videos, and episodes played together."""

import contextlib
import dataclasses
import os
import resource
import types

import cv2
import dm_env
import numpy as np
import pytest

from offline_zoo import playing
from offline_zoo.dqn import run_atari
from offline_zoo.parts_test import Counting, Echo


class Seeded(Counting):
  """Notes its seeds."""

  def __init__(self, length: int = 10):
    super().__init__(length)
    self.seeds = []

  def seed(self, seed):
    self.seeds.append(seed)


def play_one(agent, environment, seeds) -> playing.Episode:
  (episode,) = playing.play_episodes([agent], [environment], seeds).values()
  return episode


def test_an_episode_by_hand():
  """Of 11 frames: agent steps of 4, 4 and 3, whose rewards are clipped; the last frame is 11."""
  episode = play_one(Echo(), Seeded(11), (1, 2, 3))
  assert (episode.num_frames, episode.num_steps) == (11, 3)
  assert (episode.episode_return, episode.clipped_return) == (66.0, 3.0)
  assert episode.statistics == {'state_value': sum(range(100, 111)) / 2}
  assert episode.actions == dict.fromkeys(range(100, 111), 1)


def test_clipping_is_of_agent_steps_not_frames():
  episode = playing.Episode()
  agent = types.SimpleNamespace(statistics={})
  episode.add(dm_env.restart(0), agent, 2)
  for reward in (0.5, 0.25, 0, 0, -3, 1, 0, 0, 1, -1, 7, 0):
    episode.add(dm_env.transition(reward, 0), agent, 1)
  episode.add(dm_env.termination(-0.5, 0), agent, None)
  assert episode.clipped_return == 0.75 - 1 + 1 - 0.5
  assert episode.episode_return == 0.75 - 2 + 7 - 0.5
  assert episode.num_steps == 4
  assert episode.actions == {1: 12, 2: 1}


def test_an_episode_ends_after_half_an_hour_of_play():
  episode = play_one(Echo(), Seeded(10**9), (0, 0, 0))
  assert episode.num_frames == 108_000  # 60 frames a second
  assert episode.clipped_return == episode.num_steps == 27_000


def test_an_episode_begins_with_its_own_seed_and_key():
  agent, environment = Echo(), Seeded()
  numbers = [(seed, i, n) for seed in range(8) for i in range(8) for n in range(8)]
  for seeds in [*numbers, numbers[7]]:
    play_one(agent, environment, seeds)
  keys = [tuple(np.asarray(key)) for key in agent.keys]
  assert len(keys) == len(environment.seeds) == 513
  assert len({*keys}) == len({*environment.seeds}) == 512
  assert (keys[-1], environment.seeds[-1]) == (keys[7], environment.seeds[7])


class Painting(Seeded):
  """Shows frame n as a red wall, a green one, and grey that brightens with n."""

  def render(self) -> np.ndarray:
    picture = np.zeros((210, 160, 3), np.uint8)
    picture[:70, :, 0] = picture[70:140, :, 1] = 200
    picture[140:] = 20 * self._frame
    return picture


def test_the_first_episode_is_recorded_in_its_colours(tmp_path):
  path = tmp_path / 'new' / '1.mp4'
  playing.play_episodes([Echo(), Echo()], [Painting(10), Seeded(12)], (0, 1, 0), video_path=path)
  video = cv2.VideoCapture(str(path))
  assert video.get(cv2.CAP_PROP_FPS) == 60
  frames = [video.read()[1] for _ in range(11)]
  assert not video.read()[0]  # none of the second episode
  for number, frame in enumerate(frames):
    assert frame.shape == (420, 320, 3)
    picture = frame[1::2, 1::2, ::-1].astype(int)
    assert np.abs(picture[5:65] - [200, 0, 0]).mean() < 8
    assert np.abs(picture[75:135] - [0, 200, 0]).mean() < 8
    assert np.abs(picture[145:205] - 20 * number).mean() < 8
  assert os.listdir(path.parent) == ['1.mp4']


def test_a_signal_leaves_no_half_a_video(tmp_path):
  class Stops:
    calls = 0

    def check(self):
      self.calls += 1
      if self.calls == 5:
        assert os.listdir(tmp_path) == ['.1.partial.mp4']
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    playing.play_episodes(
      [Echo()], [Painting()], (0, 1, 0), video_path=tmp_path / '1.mp4', check=Stops().check
    )
  assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def full_disk():
  """Files of at most a hundred bytes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_a_video(tmp_path):
  with full_disk(), pytest.raises(OSError, match=r'1\.mp4: the video could not be written'):
    playing.play_episodes([Echo()], [Painting()], (0, 1, 0), video_path=tmp_path / '1.mp4')
  assert os.listdir(tmp_path) == []


# Together.


def test_an_episode_is_given_up_when_it_cannot_count():
  """Of 40, 4 and 100 agent steps; the two before it have 41 when the first has played 37."""
  for num_steps, want in ((1, [40]), (40, [40]), (41, [40, 4]), (44, [40, 4]), (45, [40, 4, 100])):
    agents, environments = [Echo(), Echo(), Echo()], [Seeded(4 * n) for n in (40, 4, 100)]
    episodes = playing.play_episodes(agents, environments, (0, 1, 7), num_steps=num_steps)
    assert [episode.num_steps for episode in episodes.values()] == want
    assert [*episodes] == [7, 8, 9][: len(want)]
    if num_steps == 41:
      assert len(agents[2].seen) == 1 + 4 * 36 + 1


class Noise(Seeded):
  """Shows noise, for as long as its seed says; an action is its reward."""

  def __init__(self, *, seed: int):
    super().__init__()
    self.seed(seed)

  def reset(self):
    self._rng = np.random.default_rng(self.seeds[-1])
    self._left = int(self._rng.integers(20, 60))
    return dm_env.restart(self._screen())

  def step(self, action):
    self._left -= 1
    make = dm_env.transition if self._left else dm_env.termination
    return make(float(action), self._screen())

  def _screen(self):
    return self._rng.integers(256, size=(210, 160), dtype=np.uint8)


def test_players_act_as_the_agent_whoever_the_others_are():
  """On its real network, whose sums another order of terms, or other rows, could round otherwise.

  That they do the same, exactly, where there is nothing to round: see agents_test.py.
  """
  agent = run_atari.make_agent(run_atari.Config(eval_epsilon=0.1), 6, None)
  players = playing.Players(agent, Noise, 3)
  players.set_params(agent.get_state().online_params)
  together = players.play((5, 1, 4))
  assert [*together] == [4, 5, 6]
  alone = play_one(agent, Noise(seed=0), (5, 1, 6))
  assert alone.statistics == pytest.approx(together[6].statistics, rel=1e-5)
  assert dataclasses.replace(alone, statistics={}) == dataclasses.replace(
    together[6], statistics={}
  )
  # In the first place, with others.
  assert players.play((5, 1, 6))[6] == together[6]
  # The others are given up, and show the network for ever what they saw last.
  assert players.play((5, 1, 4), num_steps=1) == {4: together[4]}
