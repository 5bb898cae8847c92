"""Tests for atari_data."""

import hashlib
import math

import ale_py
import gymnasium
import pytest

from offline_zoo import atari_data

gymnasium.register_envs(ale_py)

# The dataset's directories, typed out so that the derived names are checked against something.
_DATASET_DIRECTORIES = """
    AirRaid Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk
    Bowling Boxing Breakout Carnival Centipede ChopperCommand CrazyClimber DemonAttack DoubleDunk
    ElevatorAction Enduro FishingDerby Freeway Frostbite Gopher Gravitar Hero IceHockey Jamesbond
    JourneyEscape Kangaroo Krull KungFuMaster MontezumaRevenge MsPacman NameThisGame Phoenix
    Pitfall Pong Pooyan PrivateEye Qbert Riverraid RoadRunner Robotank Seaquest Skiing Solaris
    SpaceInvaders StarGunner Tennis TimePilot Tutankham UpNDown Venture VideoPinball WizardOfWor
    YarsRevenge Zaxxon
"""

_WITHOUT_HUMAN_SCORE = ('air_raid', 'carnival', 'elevator_action', 'journey_escape', 'pooyan')
_ALL_NAMES = [g.name for g in atari_data.GAMES]


def test_the_two_sets_have_the_published_sizes() -> None:
  assert len(atari_data.DQN_REPLAY_GAMES) == len(set(atari_data.DQN_REPLAY_GAMES)) == 60
  assert len(atari_data.ATARI_57_GAMES) == len(set(atari_data.ATARI_57_GAMES)) == 57
  assert len(atari_data.GAMES) == len(set(_ALL_NAMES)) == 62


def test_the_two_sets_differ_in_exactly_seven_games() -> None:
  replay, atari_57 = set(atari_data.DQN_REPLAY_GAMES), set(atari_data.ATARI_57_GAMES)
  assert replay - atari_57 == set(_WITHOUT_HUMAN_SCORE)
  assert atari_57 - replay == {'defender', 'surround'}
  assert replay | atari_57 == set(_ALL_NAMES)


def test_games_are_in_alphabetical_order() -> None:
  assert sorted(_ALL_NAMES) == _ALL_NAMES


def test_directories_are_those_of_the_dataset() -> None:
  directories = [atari_data.game(name).directory for name in atari_data.DQN_REPLAY_GAMES]
  assert directories == _DATASET_DIRECTORIES.split()


@pytest.mark.parametrize('name', _ALL_NAMES)
def test_ale_has_the_rom_and_the_environment(name: str) -> None:
  path = ale_py.roms.get_rom_path(name)
  assert path is not None and path.is_file()
  assert hashlib.md5(path.read_bytes()).hexdigest() == atari_data.game(name).rom_md5
  spec = gymnasium.spec(f'ALE/{atari_data.game(name).directory}-v5')
  assert spec.kwargs['game'] == name


def test_roms_that_the_data_was_logged_with() -> None:
  games = [atari_data.game(name) for name in atari_data.DQN_REPLAY_GAMES]
  assert sum(game.rom_md5 != game.logged_rom_md5 for game in games) == 29
  # As Stella's list of ROMs has them: Atari's Ms. Pac-Man, and CCE's.
  assert atari_data.game('ms_pacman').rom_md5 == '87e79cd41ce136fd4f72cc6e2c161bee'
  assert atari_data.game('ms_pacman').logged_rom_md5 == '9469d18238345d87768e8965f9f4a6b2'
  assert atari_data.game('surround').logged_rom_md5 is None


@pytest.mark.parametrize(
  ('name', 'random_score', 'human_score'),
  [
    ('alien', 227.8, 7127.7),
    ('asterix', 210.0, 8503.3),
    ('breakout', 1.7, 30.5),
    ('defender', 2874.5, 18688.9),
    ('double_dunk', -18.6, -16.4),
    ('montezuma_revenge', 0.0, 4753.3),
    ('ms_pacman', 307.3, 6951.6),
    ('pitfall', -229.4, 6463.7),
    ('pong', -20.7, 14.6),
    ('private_eye', 24.9, 69571.3),
    ('qbert', 163.9, 13455.0),
    ('seaquest', 68.4, 42054.7),
    ('skiing', -17098.1, -4336.9),
    ('space_invaders', 148.0, 1668.7),
    ('surround', -10.0, 6.5),
    ('video_pinball', 16256.9, 17667.9),
    ('zaxxon', 32.5, 9173.3),
  ],
)
def test_published_scores(name: str, random_score: float, human_score: float) -> None:
  assert atari_data.game(name).random_score == random_score
  assert atari_data.game(name).human_score == human_score


def test_score_columns_add_up() -> None:
  # The sums over the 57 games, taken from DQN Zoo's table, catch a slip in any row.
  assert round(math.fsum(g.random_score or 0.0 for g in atari_data.GAMES), 1) == 50864.9
  assert round(math.fsum(g.human_score or 0.0 for g in atari_data.GAMES), 1) == 606494.2


@pytest.mark.parametrize('name', atari_data.ATARI_57_GAMES)
def test_normalized_score_is_0_at_random_and_1_at_human(name: str) -> None:
  g = atari_data.game(name)
  assert g.random_score is not None and g.human_score is not None
  assert g.random_score < g.human_score
  assert atari_data.human_normalized_score(name, g.random_score) == 0.0
  assert atari_data.human_normalized_score(name, g.human_score) == 1.0


def test_normalized_score_is_an_uncapped_fraction() -> None:
  # (21 + 20.7) / (14.6 + 20.7) and (-21 + 20.7) / (14.6 + 20.7).
  assert atari_data.human_normalized_score('pong', 21.0) == pytest.approx(1.181303, abs=1e-6)
  assert atari_data.human_normalized_score('pong', -21.0) == pytest.approx(-0.008499, abs=1e-6)


def test_capped_score_is_capped_above_only() -> None:
  assert atari_data.capped_human_normalized_score('pong', 21.0) == 1.0
  assert atari_data.capped_human_normalized_score('breakout', 16.1) == pytest.approx(0.5)
  below_random = atari_data.capped_human_normalized_score('pong', -21.0)
  assert below_random == pytest.approx(-0.008499, abs=1e-6)
  not_a_number = atari_data.capped_human_normalized_score('pong', math.nan)
  assert not_a_number is not None and math.isnan(not_a_number)


@pytest.mark.parametrize('name', _WITHOUT_HUMAN_SCORE)
def test_no_normalized_score_without_a_human_score(name: str) -> None:
  assert atari_data.game(name).random_score is None
  assert atari_data.game(name).human_score is None
  assert atari_data.human_normalized_score(name, 100.0) is None
  assert atari_data.capped_human_normalized_score(name, 100.0) is None


@pytest.mark.parametrize(
  ('given', 'meant'),
  [
    ('MsPacman', 'ms_pacman'),
    ('Pong', 'pong'),
    ('PONG', 'pong'),
    ('ALE/Pong-v5', 'pong'),
    ('UpNDown', 'up_n_down'),
    ('ALE/YarsRevenge-v5', 'yars_revenge'),
    ('BreakoutNoFrameskip-v4', 'breakout'),
    ('space-invaders', 'space_invaders'),
    ('james_bond', 'jamesbond'),
    ('river raid', 'riverraid'),
    ('Q*bert', 'qbert'),
  ],
)
def test_other_spellings_are_refused_with_the_name_that_was_meant(given: str, meant: str) -> None:
  with pytest.raises(ValueError) as error:
    atari_data.game(given)
  assert str(error.value) == f'unknown game {given!r}; did you mean {meant!r}?'


@pytest.mark.parametrize(
  ('given', 'meant'),
  [
    ('seaquets', 'seaquest'),
    ('montezumas_revenge', 'montezuma_revenge'),
    ('up_and_down', 'up_n_down'),
    ('ALE/Asteriks-v5', 'asterix'),
  ],
)
def test_misspelled_names_bring_up_the_nearest_names(given: str, meant: str) -> None:
  with pytest.raises(ValueError) as error:
    atari_data.game(given)
  message = str(error.value)
  assert message.startswith(f'unknown game {given!r}; did you mean ')
  assert repr(meant) in message
  assert '\n' not in message


@pytest.mark.parametrize('given', ['', 'xyzzy', 'ALE/-v5'])
def test_a_name_like_no_other_is_refused_without_a_guess(given: str) -> None:
  with pytest.raises(ValueError) as error:
    atari_data.game(given)
  assert str(error.value) == (
    f"unknown game {given!r}; names look like 'ms_pacman', and atari_data.GAMES lists all 62"
  )


def test_every_spelling_of_every_game_is_recognized() -> None:
  for g in atari_data.GAMES:
    of_gym = (f'ALE/{g.directory}-v5', f'{g.directory}NoFrameskip-v4')
    for spelling in (g.directory, *of_gym, g.name.upper()):
      with pytest.raises(ValueError, match=f"did you mean '{g.name}'\\?$"):
        atari_data.game(spelling)


def test_normalizing_an_unknown_game_is_refused() -> None:
  with pytest.raises(ValueError, match="unknown game 'Pong'; did you mean 'pong'"):
    atari_data.human_normalized_score('Pong', 0.0)
