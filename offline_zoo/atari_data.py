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
  def rom_md5(self) -> str:
    """Gives the MD5, in hexadecimal digits, of the game's ROM in ale-py 0.12.1."""
    return _ROM_MD5[self.name][0]

  @property
  def logged_rom_md5(self) -> str | None:
    """Gives that of atari-py 0.2.5, which logged the public datasets; None: it had no such game."""
    return _ROM_MD5[self.name][1]

  @property
  def directory(self) -> str:
    """Names the game's directory in the buckets of both public datasets, such as `MsPacman`."""
    return ''.join(word.capitalize() for word in self.name.split('_'))


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

#                         ale-py 0.12.1                       atari-py 0.2.5
_ROM_MD5: dict[str, tuple[str, str | None]] = {
  'air_raid': ('35be55426c1fec32dfb503b4f0651572', '35be55426c1fec32dfb503b4f0651572'),
  'alien': ('f1a0a23e6464d954e3a9579c4ccd01c8', 'f1a0a23e6464d954e3a9579c4ccd01c8'),
  'amidar': ('acb7750b4d0c4bd34969802a7deb2990', '056f5d886a4e7e6fdd83650554997d0d'),
  'assault': ('de78b3a064d374390ac0710f95edde92', 'c31a17942d162b80962cb1f7571cd1d5'),
  'asterix': ('89a68746eff7f266bbf08de2483abe55', '89a68746eff7f266bbf08de2483abe55'),
  'asteroids': ('ccbd36746ed4525821a8083b0d6d2c2c', 'ccbd36746ed4525821a8083b0d6d2c2c'),
  'atlantis': ('9ad36e699ef6f45d9eb6c4cf90475c9f', '0b33252b680b65001e91a411e56e72e9'),
  'bank_heist': ('00ce0bdd43aed84a983bef38fe7f5ee3', '83b8c01c72306d60dd9b753332ebd276'),
  'battle_zone': ('41f252a66c6301f1e8ab3612c19bc5d4', 'e434c0e161dd3c3fb435eb6bad2e182c'),
  'beam_rider': ('79ab4123a83dc11d468fb2108ea09e2e', '79ab4123a83dc11d468fb2108ea09e2e'),
  'berzerk': ('136f75c4dd02c29283752b7e5799f978', 'fac28963307b6e85082ccd77c88325e7'),
  'bowling': ('c9b7afad3bfd922e006a6bfc1d4f3fe7', 'c9b7afad3bfd922e006a6bfc1d4f3fe7'),
  'boxing': ('c3ef5c4653212088eda54dc91d787870', 'c3ef5c4653212088eda54dc91d787870'),
  'breakout': ('f34f08e5eb96e500e851a80be3277a56', 'f34f08e5eb96e500e851a80be3277a56'),
  'carnival': ('028024fb8e5e5f18ea586652f9799c96', 'de29e46dbea003c3c09c892d668b9413'),
  'centipede': ('91c2098e88a6b13f977af8c003e0bca5', '17d000a2882f9fdaa8b4a391ad367f00'),
  'chopper_command': ('c1cb228470a87beb5f36e90ac745da26', 'c1cb228470a87beb5f36e90ac745da26'),
  'crazy_climber': ('55ef7b65066428367844342ed59f956c', '55ef7b65066428367844342ed59f956c'),
  'defender': ('0f643c34e40e3f1daafd9c524d3ffe64', 'e1029676edb3d35b76ca943da7434da8'),
  'demon_attack': ('f0e0addc07971561ab80d9abe1b8d333', 'b24f6a5820a4b7763a3d547e3e07441d'),
  'double_dunk': ('368d88a6c071caba60b4f778615aae94', 'cfc226d04d7490b69e155abd7741e98c'),
  'elevator_action': ('71f8bacfbdca019113f3f0801849057e', '71f8bacfbdca019113f3f0801849057e'),
  'enduro': ('94b92a882f6dbaa6993a46e2dcc58402', '94b92a882f6dbaa6993a46e2dcc58402'),
  'fishing_derby': ('b8865f05676e64f3bec72b9defdacfa7', 'b8865f05676e64f3bec72b9defdacfa7'),
  'freeway': ('8e0ab801b1705a740b476b7f588c6d16', '8e0ab801b1705a740b476b7f588c6d16'),
  'frostbite': ('4ca73eb959299471788f0b685c3ba0b5', '4ca73eb959299471788f0b685c3ba0b5'),
  'gopher': ('c16c79aad6272baffb8aae9a7fff0864', '8f90590dba143d783df5a6cff2000e4d'),
  'gravitar': ('8ac18076d01a6b63acf6e2cab4968940', '4767356fa0ed3ebe21437b4473d4ee28'),
  'hero': ('fca4a5be1251927027f2c24774a02160', 'fca4a5be1251927027f2c24774a02160'),
  'ice_hockey': ('a4c08c4994eb9d24fb78be1793e82e26', '47711c44723da5d67047990157dcb5dd'),
  'jamesbond': ('e51030251e440cffaab1ac63438b44ae', 'e51030251e440cffaab1ac63438b44ae'),
  'journey_escape': ('718ae62c70af4e5fd8e932fee216948a', '718ae62c70af4e5fd8e932fee216948a'),
  'kangaroo': ('4326edb70ff20d0ee5ba58fa5cb09d60', '4326edb70ff20d0ee5ba58fa5cb09d60'),
  'krull': ('4baada22435320d185c95b7dd2bcdb24', 'cc724ebe74a109e39c0b2784ddc980ca'),
  'kung_fu_master': ('5b92a93b23523ff16e2789b820e2a4c5', '0b4e793c9425175498f5a65a3e960086'),
  'montezuma_revenge': ('3347a6dd59049b15a38394aa2dafa585', '3347a6dd59049b15a38394aa2dafa585'),
  'ms_pacman': ('87e79cd41ce136fd4f72cc6e2c161bee', '9469d18238345d87768e8965f9f4a6b2'),
  'name_this_game': ('36306070f0c90a72461551a7a4f3a209', 'f98d2276d4a25b286135566255aea9d0'),
  'phoenix': ('7e52a95074a66640fcfde124fffd491a', '7e52a95074a66640fcfde124fffd491a'),
  'pitfall': ('3e90cf23106f2e08b2781e41299de556', 'f73d2d0eff548e8fc66996f27acf2b4b'),
  'pong': ('60e0ea3cbe0913d39803477945e9e5ec', '60e0ea3cbe0913d39803477945e9e5ec'),
  'pooyan': ('4799a40b6e889370b7ee55c17ba65141', '668dc528b7ea9345140f4fcfbecf7066'),
  'private_eye': ('ef3a4f64b6494ba770862768caf04b86', 'ef3a4f64b6494ba770862768caf04b86'),
  'qbert': ('484b0076816a104875e00467d431c2d2', '484b0076816a104875e00467d431c2d2'),
  'riverraid': ('393948436d1f4cc3192410bb918f9724', 'da5096000db5fdaa8d02db57d9367998'),
  'road_runner': ('ce5cc62608be2cd3ed8abd844efb8919', '7d3cdde63b16fa637c4484e716839c94'),
  'robotank': ('4f618c2429138e0280969193ed6c107e', '4f618c2429138e0280969193ed6c107e'),
  'seaquest': ('240bfbac5163af4df5ae713985386f92', '240bfbac5163af4df5ae713985386f92'),
  'skiing': ('b76fbadc8ffb1f83e2ca08b6fb4d6c9f', '367411b78119299234772c08df10e134'),
  'solaris': ('e72eb8d4410152bdcb69e7fba327b420', 'e72eb8d4410152bdcb69e7fba327b420'),
  'space_invaders': ('72ffbef6504b75e69ee1045af9075f66', '61dbe94f110f30ca4ec524ae5ce2d026'),
  'star_gunner': ('a3c1c70024d7aabb41381adbfb6d3b25', 'a3c1c70024d7aabb41381adbfb6d3b25'),
  'surround': ('4d7517ae69f95cfbc053be01312b7dba', None),
  'tennis': ('42cdd6a9e42a3639e190722b8ea3fc51', 'a5c96b046d5f8b7c96daaa12f925bef8'),
  'time_pilot': ('fc2104dd2dadf9a6176c1c1c8f87ced9', 'fc2104dd2dadf9a6176c1c1c8f87ced9'),
  'tutankham': ('085322bae40d904f53bdcc56df0593fc', '66c2380c71709efa7b166621e5bb4558'),
  'up_n_down': ('a499d720e7ee35c62424de882a3351b6', 'a499d720e7ee35c62424de882a3351b6'),
  'venture': ('3e899eba0ca8cd2972da1ae5479b4f0d', 'c63a98ca404aa5ee9fcff1de488c3f43'),
  'video_pinball': ('107cc025334211e6d29da0b6be46aec7', 'a2424c1a0c783d7585d701b1c71b5fdc'),
  'wizard_of_wor': ('7e8aa18bc9502eb57daaf5e7c1e94da7', '663ef22eb399504d5204c543b8a86bcd'),
  'yars_revenge': ('c5930d0e8cdae3e037349bfa08e871be', 'ee8027d554d14c8d0b86f94737d2fdcc'),
  'zaxxon': ('eea0da9b987d661264cce69a7c13c3bd', 'eea0da9b987d661264cce69a7c13c3bd'),
}  # fmt: skip

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
