"""Tests for atari_env.py against recorded runs and by hand."""

import hashlib
import pathlib
import shutil

import ale_py
import numpy as np
import pytest

from offline_zoo import atari_data, atari_env


def packaged_rom(game: str) -> pathlib.Path:
  return ale_py.roms.get_rom_path(game)


def md5(path: pathlib.Path) -> str:
  return hashlib.md5(path.read_bytes()).hexdigest()


def frames(environment: atari_env.AtariEnv, num_frames: int = 60) -> list[np.ndarray]:
  first = environment.reset().observation
  return [first, *(environment.step(i // 8 % 4).observation for i in range(num_frames))]


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


# ROMs.


def test_a_rom_of_the_users_is_played(tmp_path, monkeypatch):
  """Boxing's passes for the one that Breakout was logged with."""
  shutil.copy(packaged_rom('boxing'), tmp_path / 'breakout.bin')
  md5s = (md5(packaged_rom('breakout')), md5(packaged_rom('boxing')))
  monkeypatch.setitem(atari_data._ROM_MD5, 'breakout', md5s)
  environment = atari_env.AtariEnv('breakout', rom_dir=tmp_path, seed=1)
  played = frames(environment)
  environment.seed(1)  # which loads the ROM again
  np.testing.assert_array_equal(frames(environment), played)
  np.testing.assert_array_equal(frames(atari_env.AtariEnv('boxing', seed=1)), played)
  assert not np.array_equal(frames(atari_env.AtariEnv('breakout', seed=1)), played)

  assert atari_env.rom_note('breakout', tmp_path) is None
  assert 'another ROM of breakout' in atari_env.rom_note('breakout')
  shutil.copy(packaged_rom('breakout'), tmp_path)
  assert 'another ROM of breakout' in atari_env.rom_note('breakout', tmp_path)
  np.testing.assert_array_equal(
    frames(atari_env.AtariEnv('breakout', rom_dir=tmp_path, seed=1)),
    frames(atari_env.AtariEnv('breakout', seed=1)),
  )


def test_games_that_were_logged_with_another_rom():
  noted = [game for game in atari_data.DQN_REPLAY_GAMES if atari_env.rom_note(game)]
  assert len(noted) == 29 and {'ms_pacman', 'space_invaders'} < {*noted}
  assert not {'pong', 'breakout', 'qbert', 'seaquest', 'asterix'} & {*noted}
  assert atari_env.rom_note('surround') is None  # no public data


def test_roms_that_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'--rom_dir=.*: no pong\.bin there'):
    atari_env.AtariEnv('pong', rom_dir=tmp_path, seed=0)
  shutil.copy(packaged_rom('boxing'), tmp_path / 'pong.bin')
  expected = f'{md5(packaged_rom("pong"))}.*, got {md5(packaged_rom("boxing"))}'
  with pytest.raises(ValueError, match=f'a known ROM of pong, with the MD5 {expected}'):
    atari_env.AtariEnv('pong', rom_dir=tmp_path, seed=0)


def test_the_rom_that_hangs_is_refused(tmp_path, monkeypatch):
  rom = tmp_path / 'defender.bin'
  rom.write_bytes(bytes(4096))
  monkeypatch.setitem(atari_data._ROM_MD5, 'defender', ('', md5(rom)))
  with pytest.raises(ValueError, match=r'defender.* hangs'):
    atari_env.AtariEnv('defender', rom_dir=tmp_path, seed=0)
