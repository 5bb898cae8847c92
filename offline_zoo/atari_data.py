"""The Atari games this library knows, by name, with their published reference scores.

`GAMES` has 62 entries, the union of two overlapping sets:

* `DQN_REPLAY_GAMES`, the 60 games of the DQN Replay Dataset (Agarwal et al., 2020), which are
  also the 60 games of Dopamine's baselines.
* `ATARI_57_GAMES`, the 57 games with a published human score, on which DQN Zoo and Agent57
  report.

The second set has `defender` and `surround`, for which the dataset holds no data. The first has
`air_raid`, `carnival`, `elevator_action`, `journey_escape` and `pooyan`, for which no human score
was published. The other 55 games are in both.

The scores are undiscounted episode returns of a uniformly random agent and of a professional
human games tester. Episodes start with up to 30 no-ops and last at most 30 minutes (108,000
frames). They are the no-op-start scores of Wang et al. (2016), which DQN Zoo uses. Two other sets
in circulation must not be mixed with these: Mnih et al. (2015) allowed the human 5 minutes (alien
is 6875.4 there), and the human-start scores of Nair et al. (2015) begin in the middle of human
games. For video_pinball, Agent57 and Dopamine take 0.0 as the random score; this table, like DQN
Zoo, keeps the published 16256.9.
"""

import dataclasses
import difflib
import re

# What a network sees: four preprocessed frames, one for each action repeat of four raw frames
# (Mnih et al. 2015), the newest last. The logged frames are single ones of these.
FRAME_SHAPE = (84, 84)
STACK_SIZE = 4
OBSERVATION_SHAPE = (*FRAME_SHAPE, STACK_SIZE)
NUM_ACTION_REPEATS = 4


@dataclasses.dataclass(frozen=True)
class Game:
  """One Atari game.

  Attributes:
    name: What users type, in snake_case. It is also the game's ROM id in `ale_py`.
    random_score: Mean return of a uniformly random agent, or None where none was published.
    human_score: Mean return of a human games tester, or None where none was published.
    in_dqn_replay: Whether the DQN Replay Dataset has the game.
  """

  name: str
  random_score: float | None
  human_score: float | None
  in_dqn_replay: bool = True

  @property
  def rom(self) -> str:
    """Names the ROM by which `ale_py.roms.get_rom_path` finds the game, such as `ms_pacman`."""
    return self.name

  @property
  def directory(self) -> str:
    """Names the directory in the bucket gs://atari-replay-datasets/dqn, such as `MsPacman`."""
    return ''.join(word.capitalize() for word in self.name.split('_'))

  @property
  def gym_id(self) -> str:
    """Names what `ale_py` registers with Gymnasium for the game, such as `ALE/MsPacman-v5`."""
    return f'ALE/{self.directory}-v5'


#                          random     human
GAMES: tuple[Game, ...] = (
  Game('air_raid',           None,     None),
  Game('alien',             227.8,   7127.7),
  Game('amidar',              5.8,   1719.5),
  Game('assault',           222.4,    742.0),
  Game('asterix',           210.0,   8503.3),
  Game('asteroids',         719.1,  47388.7),
  Game('atlantis',        12850.0,  29028.1),
  Game('bank_heist',         14.2,    753.1),
  Game('battle_zone',      2360.0,  37187.5),
  Game('beam_rider',        363.9,  16926.5),
  Game('berzerk',           123.7,   2630.4),
  Game('bowling',            23.1,    160.7),
  Game('boxing',              0.1,     12.1),
  Game('breakout',            1.7,     30.5),
  Game('carnival',           None,     None),
  Game('centipede',        2090.9,  12017.0),
  Game('chopper_command',   811.0,   7387.8),
  Game('crazy_climber',   10780.5,  35829.4),
  Game('defender',         2874.5,  18688.9, in_dqn_replay=False),
  Game('demon_attack',      152.1,   1971.0),
  Game('double_dunk',       -18.6,    -16.4),
  Game('elevator_action',    None,     None),
  Game('enduro',              0.0,    860.5),
  Game('fishing_derby',     -91.7,    -38.7),
  Game('freeway',             0.0,     29.6),
  Game('frostbite',          65.2,   4334.7),
  Game('gopher',            257.6,   2412.5),
  Game('gravitar',          173.0,   3351.4),
  Game('hero',             1027.0,  30826.4),
  Game('ice_hockey',        -11.2,      0.9),
  Game('jamesbond',          29.0,    302.8),
  Game('journey_escape',     None,     None),
  Game('kangaroo',           52.0,   3035.0),
  Game('krull',            1598.0,   2665.5),
  Game('kung_fu_master',    258.5,  22736.3),
  Game('montezuma_revenge',   0.0,   4753.3),
  Game('ms_pacman',         307.3,   6951.6),
  Game('name_this_game',   2292.3,   8049.0),
  Game('phoenix',           761.4,   7242.6),
  Game('pitfall',          -229.4,   6463.7),
  Game('pong',              -20.7,     14.6),
  Game('pooyan',             None,     None),
  Game('private_eye',        24.9,  69571.3),
  Game('qbert',             163.9,  13455.0),
  Game('riverraid',        1338.5,  17118.0),
  Game('road_runner',        11.5,   7845.0),
  Game('robotank',            2.2,     11.9),
  Game('seaquest',           68.4,  42054.7),
  Game('skiing',         -17098.1,  -4336.9),
  Game('solaris',          1236.3,  12326.7),
  Game('space_invaders',    148.0,   1668.7),
  Game('star_gunner',       664.0,  10250.0),
  Game('surround',          -10.0,      6.5, in_dqn_replay=False),
  Game('tennis',            -23.8,     -8.3),
  Game('time_pilot',       3568.0,   5229.2),
  Game('tutankham',          11.4,    167.6),
  Game('up_n_down',         533.4,  11693.2),
  Game('venture',             0.0,   1187.5),
  Game('video_pinball',   16256.9,  17667.9),
  Game('wizard_of_wor',     563.5,   4756.5),
  Game('yars_revenge',     3092.9,  54576.9),
  Game('zaxxon',             32.5,   9173.3),
)  # fmt: skip

DQN_REPLAY_GAMES: tuple[str, ...] = tuple(g.name for g in GAMES if g.in_dqn_replay)
ATARI_57_GAMES: tuple[str, ...] = tuple(g.name for g in GAMES if g.human_score is not None)

_BY_NAME = {g.name: g for g in GAMES}
_BY_LETTERS = {g.name.replace('_', ''): g.name for g in GAMES}


def game(name: str) -> Game:
  """Looks a game up by its snake_case name.

  Args:
    name: The game's name, such as `ms_pacman`.

  Returns:
    The game.

  Raises:
    ValueError: If no game has this name. The message suggests the nearest names.
  """
  try:
    return _BY_NAME[name]
  except KeyError:
    raise ValueError(f'unknown game {name!r}; {_hint(name)}') from None


def human_normalized_score(name: str, episode_return: float) -> float | None:
  """Rescales a return so that 0 is the random agent's score and 1 is the human's.

  Args:
    name: The game's name.
    episode_return: An undiscounted, unclipped return, or a mean of such returns.

  Returns:
    The score as a fraction, not a percentage; None for a game without a published human score.
  """
  g = game(name)
  if g.random_score is None or g.human_score is None:
    return None
  return (episode_return - g.random_score) / (g.human_score - g.random_score)


def capped_human_normalized_score(name: str, episode_return: float) -> float | None:
  """Caps `human_normalized_score` at 1: nothing is gained past human level."""
  score = human_normalized_score(name, episode_return)
  return None if score is None else min(score, 1.0)  # In this order, NaN stays NaN.


def _hint(name: str) -> str:
  """Says which known names are nearest to an unknown one, however that one is spelled."""
  letters = _letters(name)
  near = [letters] if letters in _BY_LETTERS else difflib.get_close_matches(letters, _BY_LETTERS)
  if not near:
    return f"names look like 'ms_pacman', and atari_data.GAMES lists all {len(GAMES)}"
  return 'did you mean ' + ' or '.join(repr(_BY_LETTERS[n]) for n in near) + '?'


def _letters(name: str) -> str:
  """Reduces any usual spelling, such as `ALE/MsPacman-v5`, to bare letters (`mspacman`)."""
  core = re.sub(r'^.*/|(NoFrameskip|Deterministic)?-v\d+$', '', name)
  return re.sub(r'[^a-z]', '', core.lower())
