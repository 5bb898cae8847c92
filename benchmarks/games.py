"""The games that the replay is measured on, and logs of them."""

import pathlib

from offline_zoo.logs import demo

NAMES = (
  'pong', 'breakout', 'qbert', 'montezuma_revenge', 'hero', 'asterix', 'riverraid', 'skiing',
  'space_invaders', 'beam_rider', 'ms_pacman', 'seaquest', 'zaxxon', 'yars_revenge', 'enduro',
)  # fmt: skip


def random_logs(logs_dir: pathlib.Path, game: str, num_transitions: int = 50_000) -> pathlib.Path:
  """The directory of a game's logs of uniformly random play, seed 0; made if it is missing."""
  replay_dir = logs_dir / f'{game}_{num_transitions}'
  if not replay_dir.exists():
    config = demo.Config(
      environment_name=game, num_transitions=num_transitions, policy='random', seed=0
    )
    demo.write_logs(config, replay_dir)
  return replay_dir
