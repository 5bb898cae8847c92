"""Evaluates what a run has learnt: score, video, what it does, how often that is what was logged.

  python -m offline_zoo.studies.evaluate --checkpoint_dir=runs/cql/freeway/1/checkpoint

The agent and its flags are those that the checkpoint holds. Episodes are played in groups of four,
or of --episodes if these are fewer; each is a function of --seed, its number and the group's size.

Agreement is between the agent, which acts as in evaluation, random actions included, and the logs,
in states drawn uniformly from the logs' valid rows (from those of the first iteration's shards, if
not all are resident). A policy that always does the most frequent action agrees in all of that
action's states and in none else.
"""

import collections
import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from offline_zoo import atari_data, parts, playing, program, replay, results, trained_agent
from offline_zoo import logs as logged
from offline_zoo.logs import bundled
from offline_zoo.studies import statistics

_BATCH_SIZE = 100  # states
_MAX_PLAYERS = 4  # that play together, in half the time that they take one after the other
EPISODE_COLUMNS = (
  'agent', 'environment_name', 'seed', 'num_updates', 'eval_seed', 'episode', 'episode_return',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """What to evaluate and how; each field is a flag."""

  checkpoint_dir: str | None = None  # of a run; beside its CSV unless that said otherwise
  checkpoint: str = 'last'  # last; best, by the run's own evaluations; or 7 for step_7
  run_seed: int | None = None  # which seed's agent, if several learnt at once; default: the first
  episodes: int = 20  # whole ones to play
  eval_epsilon: float | None = None  # rate of random actions; default: the run's own
  csv_path: str | None = None  # where to write each episode's return
  video_path: str | None = None  # where to record the first episode, as MP4
  num_states: int = 10_000  # logged states to compare actions in; 0: none
  replay_dir: str | None = None  # the logs to compare with, as run_atari has it; default: the run's
  rom_dir: str | None = None  # of the ROM to play, see roms.py; default: the run's own
  seed: int = 0  # of episodes and states
  jax_platform_name: str | None = None  # cpu or cuda; default: JAX's choice
  compilation_cache_dir: str | None = None  # keeps compiled code; default: ~/.cache; none: does not
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    program.check(self, 'checkpoint_dir', self.checkpoint_dir is not None, 'the directory of a run')
    program.check_positive(self, 'episodes')
    program.check_not_negative(self, 'num_states', 'seed')
    if self.eval_epsilon is not None:
      program.check_in_unit_interval(self, 'eval_epsilon')


def play(
  trained: trained_agent.Trained, episodes: int, seed: int, video_path: pathlib.Path | None
) -> list[playing.Episode]:
  """Plays whole episodes as an agent that was restored; see `play_in_groups`."""

  def make_players(num_players: int) -> playing.Players:
    players = playing.Players(trained.agent, trained.make_environment, num_players)
    players.set_params(trained.agent.get_state().online_params)
    return players

  return play_in_groups(make_players, episodes, seed, video_path)


def play_in_groups(
  make_players: Callable[[int], playing.Players],
  episodes: int,
  seed: int,
  video_path: pathlib.Path | None = None,
) -> list[playing.Episode]:
  """Plays whole episodes.

  Args:
    make_players: gives so many players, who play together.
    episodes: how many.
    seed: each episode is a function of it, of its number and of how many are played together.
    video_path: where to record the first one, as MP4; None: nowhere.
  """
  num_players = min(_MAX_PLAYERS, episodes)
  players = make_players(num_players)
  done: list[playing.Episode] = []
  with program.progress_bar(episodes, 'playing', 'episode') as bar:
    for first in range(0, episodes, num_players):  # the last group is whole, too
      seeds = (seed, 0, first)  # no run's: its iterations count from 1
      played = players.play(seeds, video_path=None if first else video_path)
      done += [played[number] for number in sorted(played)]
      bar.update(min(num_players, episodes - first))
  return done[:episodes]


def returns_of(played: Sequence[playing.Episode]) -> np.ndarray:
  """Gives the returns [N] of episodes."""
  return np.array([episode.episode_return for episode in played])


def returns_csv(trained: trained_agent.Trained, returns: np.ndarray, seed: int) -> str:
  """Writes returns [episodes] down as CSV, a row an episode; `eval_seed` is that of `play`."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(EPISODE_COLUMNS)
  of_all = (trained.name, trained.config.environment_name, trained.seed, trained.num_updates)
  for number, episode_return in enumerate(returns.tolist(), start=1):
    writer.writerow([*of_all, seed, number, episode_return])
  return text.getvalue()


def actions_line(played: Sequence[playing.Episode], meanings: list[str]) -> str:
  """Says what was done in episodes, and how much of the time, the most frequent first."""
  counts = sum((episode.actions for episode in played), collections.Counter())
  shares = [f'{meanings[a]} {n / counts.total():.1%}' for a, n in counts.most_common()]
  return f'actions: {", ".join(shares)}'


def compare_actions(
  agent: parts.Learner, data: replay.ReplayData, num_states: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Lets an agent act in logged states; returns what it does and what was logged, [N] each.

  Args:
    agent: acts as in evaluation.
    data: the logs.
    num_states: N, if the logs have so many.
    seed: of the choice of states and of the agent's randomness.
  """
  params = agent.get_state().online_params
  valid = np.asarray(replay.valid_rows(data))
  rows = np.random.default_rng(seed).choice(valid, min(num_states, len(valid)), replace=False)

  @jax.jit
  def act(data, rows, rng_key):
    s_tm1 = replay.gather(data, rows).s_tm1
    rng_keys = jax.random.split(rng_key, len(rows))
    _, chosen, _ = jax.vmap(agent.act, (None, 0, 0))(params, rng_keys, s_tm1)
    return chosen

  batches = np.split(rows, range(_BATCH_SIZE, len(rows), _BATCH_SIZE))
  keys = jax.random.split(jax.random.PRNGKey(seed), len(batches))
  chosen = []
  with program.progress_bar(len(rows), 'comparing', 'state') as bar:
    for batch, rng_key in zip(batches, keys, strict=True):
      chosen.append(np.asarray(act(data, batch, rng_key)))
      bar.update(len(batch))
  return np.concatenate(chosen), np.asarray(replay.gather(data, jax.numpy.asarray(rows)).a_tm1)


def agreement_table(chosen: np.ndarray, logged: np.ndarray, meanings: list[str]) -> str:
  """Makes a Markdown table: for each logged action how often it is logged, and done there.

  Args:
    chosen: what the agent does [N].
    logged: what was logged [N].
    meanings: names of the actions.
  """
  lines = ['| logged action | of the states | done by the agent |', '|---|---|---|']
  for action, meaning in [*enumerate(meanings), (None, 'any')]:
    here = np.ones(len(logged), bool) if action is None else logged == action
    if here.any():
      agreement = (chosen == logged)[here].mean()
      lines.append(f'| {meaning} | {here.mean():.1%} | {agreement:.0%} |')
  return '\n'.join(lines)


def load_logs(config: Config, trained: trained_agent.Trained) -> replay.ReplayData | None:
  """Loads the logs of --replay_dir, or else the run's own; None if they are not those any more."""
  flags = trained.config
  if config.replay_dir is not None:
    replay_dir = bundled.find_or_make(config.replay_dir, flags.environment_name)
    chosen = {}
  else:
    if not hasattr(flags, 'replay_dir'):
      logging.warning('No agreement: this run learnt from its own play; see --replay_dir')
      return None
    replay_dir = bundled.find(flags.replay_dir, flags.environment_name)
    names = (
      'shards', 'max_rows_per_shard', 'first_fraction', 'max_random_transitions',
      'min_episode_return', 'top_fraction', 'seed',
    )  # fmt: skip
    chosen = {name: getattr(flags, name) for name in names}
    if not logged.exist(replay_dir):
      logging.warning('No agreement: there are no logs at %s; see --replay_dir', replay_dir)
      return None
  logs = replay.Logs(
    replay_dir,
    num_actions=trained.environment.action_spec().num_values,
    cache_dir=replay.cache_dir(getattr(flags, 'replay_cache_dir', None)),
    memory_gb=getattr(flags, 'replay_memory_gb', None),
    **chosen,
  )
  if config.replay_dir is None and logs.checksum != trained.replay_checksum:
    logging.warning(
      'No agreement: the logs at %s are not those that it learnt from; see --replay_dir', replay_dir
    )
    return None
  return logs.resident(1, 1)


def main(config: Config) -> None:
  if config.csv_path is not None:
    results.check_path('csv_path', pathlib.Path(config.csv_path), is_directory=False)
  trained = trained_agent.restore(
    config.checkpoint_dir or '', config.checkpoint, config.rom_dir,
    eval_epsilon=config.eval_epsilon, seed=config.run_seed,
  )  # fmt: skip
  data = load_logs(config, trained) if config.num_states else None
  video_path = pathlib.Path(config.video_path) if config.video_path else None
  played = play(trained, config.episodes, config.seed, video_path)
  returns = returns_of(played)
  if config.csv_path is not None:
    text = returns_csv(trained, returns, config.seed)
    results.write_atomically(pathlib.Path(config.csv_path), text)
  low, high = statistics.mean_interval(returns)
  interval = f' [{low:.1f}, {high:.1f}]' if len(returns) > 1 else ''
  game = trained.config.environment_name
  normalized = atari_data.human_normalized_score(game, returns.mean())
  print(
    f'{trained.name} on {game}, {trained.num_updates:,} updates: return '
    f'{returns.mean():.1f}{interval} over {len(returns)} episodes, {returns.min():.1f} to '
    f'{returns.max():.1f}' + ('' if normalized is None else f'; {normalized:.3f} of a human')
  )
  print(actions_line(played, trained.environment.action_meanings))
  if data is not None:
    chosen, logged = compare_actions(trained.agent, data, config.num_states, config.seed)
    print(f'\n{agreement_table(chosen, logged, trained.environment.action_meanings)}')


if __name__ == '__main__':
  program.run(main, Config)
