"""Tests for atari_env.py against recorded runs and by hand."""

import numpy as np
import pytest

from offline_zoo import atari_env


@pytest.mark.parametrize('game', ['breakout', 'pong'])
def test_the_emulator_gives_the_recorded_raw_frames(golden, game: str):
  run = dict(np.load(golden / 'preproc' / f'preproc_{game}.npz', allow_pickle=False))
  environment = atari_env.AtariEnv(game, sticky_action_probability=0.25, seed=int(run['gym_seed']))
  assert environment.action_meanings == list(run['action_meanings'])
  for i, action in enumerate(run['raw_action_requested']):
    timestep = environment.reset() if run['raw_is_reset'][i] else environment.step(int(action))
    np.testing.assert_array_equal(timestep.observation, run['raw_gray'][i])
    np.testing.assert_array_equal(environment.ram(), run['raw_ram'][i])
    assert environment.lives == run['raw_lives'][i]
    if not timestep.first():
      assert timestep.reward == run['raw_reward'][i]
      assert timestep.last() == run['raw_terminated'][i]
  for picture, i in zip(run['raw_rgb'], run['raw_rgb_index'], strict=True):
    if i == len(run['raw_gray']) - 1:
      np.testing.assert_array_equal(environment.render(), picture)


def test_the_same_seed_and_actions_give_the_same_game():
  def play(seed: int) -> list:
    environment = atari_env.AtariEnv('pong', seed=seed)
    environment.reset()
    return [environment.step(i // 40 % 6).observation for i in range(400)]

  np.testing.assert_array_equal(play(3), play(3))
  assert not np.array_equal(play(3), play(4))  # sticky actions differ


def test_without_sticky_actions_the_seed_has_no_say():
  def play(seed: int) -> list:
    environment = atari_env.AtariEnv('pong', sticky_action_probability=0.0, seed=seed)
    environment.reset()
    return [environment.step(i // 40 % 6).observation for i in range(400)]

  np.testing.assert_array_equal(play(3), play(4))


def test_episodes_after_the_first_differ():
  environment = atari_env.AtariEnv('breakout', seed=0)
  episodes = []
  for _ in range(2):
    environment.reset()
    episodes.append([environment.step(1 + i % 3).observation for i in range(300)])
  assert not np.array_equal(episodes[0], episodes[1])


def test_specs_and_bad_input():
  environment = atari_env.AtariEnv('ms_pacman', seed=0)
  assert environment.action_spec().num_values == 9
  environment.observation_spec().validate(environment.reset().observation)
  assert environment.render().shape == (210, 160, 3)
  with pytest.raises(ValueError, match='pong'):
    atari_env.AtariEnv('pnog', seed=0)
  with pytest.raises(ValueError, match=r'sticky_action_probability.*1\.5'):
    atari_env.AtariEnv('pong', sticky_action_probability=1.5, seed=0)
