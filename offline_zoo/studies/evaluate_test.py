"""Tests for evaluate.py: the agent of a checkpoint, its score, video, and agreement with logs."""

import collections
import shutil
import types

import ale_py
import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers_study
from offline_zoo import (
  checkpoints,
  parts,
  playing,
  processors,
  replay,
  testing,
  trained_agent,
)
from offline_zoo.dqn import run_atari
from offline_zoo.studies import evaluate, runs


@pytest.fixture(scope='module', autouse=True)
def small_torso():
  """Networks that take next to no time."""
  with testing.small_torsos():
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of two iterations on the two-state problem's logs; acts at random, so that games end."""
  directory = tmp_path_factory.mktemp('run')
  testing.write_logs(directory / 'logs')
  config = run_atari.Config(
    environment_name='breakout', replay_dir=str(directory / 'logs'), num_iterations=2,
    results_csv_path=str(directory / 'results.csv'), keep_checkpoints='all', batch_size=4,
    num_updates_per_iteration=3, eval_steps=1, eval_epsilon=1.0, num_eval_workers=0,
    replay_cache_dir='none',
  )  # fmt: skip
  run_atari.main(config)
  return directory


@pytest.fixture(scope='module')
def trained(run):
  return trained_agent.restore(run / 'checkpoint')


def test_the_agent_is_as_the_checkpoint_has_it(run, trained):
  assert (trained.name, trained.num_updates) == ('dqn', 6)
  assert trained.config.eval_epsilon == 1.0 and trained.config.keep_checkpoints == 'all'
  assert trained.environment.action_spec().num_values == 4
  state = trained.agent.get_state()
  saved = checkpoints.Checkpoints(run / 'checkpoint').restore().state(state)
  chex.assert_trees_all_equal(state, saved)
  first = trained_agent.restore(run / 'checkpoint', '1')
  assert first.num_updates == 3
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(first.agent.get_state().online_params, saved.online_params)


def test_a_rom_of_the_users_is_played(run, tmp_path):
  shutil.copy(ale_py.roms.get_rom_path('breakout'), tmp_path)
  trained_agent.restore(run / 'checkpoint', rom_dir=str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r'--rom_dir=.*none: no breakout\.bin there'):
    trained_agent.restore(run / 'checkpoint', rom_dir=str(tmp_path / 'none'))


def test_episodes_are_a_function_of_seed_and_number(trained, tmp_path):
  """Played four together, and recorded or not; the one beyond the last group is played as well."""
  path = tmp_path / 'e.mp4'
  returns = evaluate.returns_of(played := evaluate.play(trained, 5, seed=5, video_path=path))
  loop = parts.run_loop(trained.agent, environment := trained.make_environment(seed=0))
  alone = []
  for number in range(5):  # by what every agent does in `step`, which here is to act at random
    seed, key = playing.episode_seed(5, 0, number)
    environment.seed(seed)
    trained.agent.reset(key)
    episode, actions = [], collections.Counter()
    for _, timestep, _, action in until_last(loop):
      episode.append(timestep)
      actions[action] += 1
    assert played[number].actions == actions - collections.Counter([None])
    alone.append(sum(timestep.reward for timestep in episode[1:]))
    if not number:
      assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) == len(episode)
  assert returns.tolist() == alone and len({*alone}) > 1
  assert evaluate.returns_of(evaluate.play(trained, 4, 5, None)).tolist() == alone[:4]
  assert evaluate.returns_of(evaluate.play(trained, 4, 6, None)).tolist() != alone[:4]


def test_other_libraries_play_the_same_episodes(run):
  """What one of ours holds best, said as another library says it: the same returns."""
  ours = trained_agent.restore(run / 'checkpoint', eval_epsilon=0.5)
  greedy = trained_agent.restore(run / 'checkpoint', eval_epsilon=0.0).agent
  params, key = greedy.get_state().online_params, jax.random.PRNGKey(0)
  greedy_act = jax.jit(jax.vmap(lambda stack: greedy.act(params, key, stack)[1]))

  def best_actions(stacks: bytes) -> list[int]:
    frames = np.frombuffer(stacks, np.uint8).reshape(-1, 4, 84, 84)
    return greedy_act(np.moveaxis(frames, 1, -1)).tolist()

  def players(num_players: int) -> peers_study.Players:
    processor = processors.AtariProcessor()
    return peers_study.Players(best_actions, processor, ours.make_environment, num_players, 0.5)

  played = evaluate.play_in_groups(players, 5, seed=3)
  of_ours = evaluate.play(ours, 5, 3, None)
  assert [e.actions for e in played] == [e.actions for e in of_ours]
  returns = evaluate.returns_of(played).tolist()
  assert returns == evaluate.returns_of(of_ours).tolist() and len({*returns}) > 1


def until_last(loop):
  """Yields the rest of an episode."""
  for seen in loop:
    yield seen
    if seen[1].last():
      return


def test_agreement_by_hand(run):
  """An agent that does 1 in state 0 and 0 in state 1, in logs that do either in both."""

  def act(online_params, rng_key, s_t):
    return rng_key, online_params['one'] - testing.states(s_t[None])[0], jnp.zeros(())

  agent = types.SimpleNamespace(
    act=act, get_state=lambda: types.SimpleNamespace(online_params={'one': 1})
  )
  data = replay.load(run / 'logs')
  everything = replay.gather(data, replay.valid_rows(data))
  # More states than there are: all of them, in batches of which the last is short.
  chosen, logged = evaluate.compare_actions(agent, data, 10_000, seed=1)
  assert len(chosen) == len(everything.a_tm1) > 100 and len(chosen) % 100
  done = 1 - np.asarray(testing.states(everything.s_tm1))
  for action in (0, 1):
    want = np.mean(done[everything.a_tm1 == action] == action)
    assert 0.2 < want < 0.8
    assert np.mean(chosen[logged == action] == action) == want


def test_the_table():
  chosen, logged = np.array([0, 0, 1, 2, 2, 2, 2, 2]), np.array([0, 0, 0, 0, 2, 2, 2, 1])
  assert evaluate.agreement_table(chosen, logged, ['NOOP', 'FIRE', 'UP', 'DOWN']).splitlines() == [
    '| logged action | of the states | done by the agent |',
    '|---|---|---|',
    '| NOOP | 50.0% | 50% |',
    '| FIRE | 12.5% | 0% |',
    '| UP | 37.5% | 100% |',
    '| any | 100.0% | 62% |',
  ]


def test_the_line_of_actions():
  played = [playing.Episode(actions=collections.Counter(a)) for a in ({3: 6, 1: 2}, {1: 4})]
  line = evaluate.actions_line(played, ['NOOP', 'FIRE', 'UP', 'DOWN'])
  assert line == 'actions: DOWN 50.0%, FIRE 50.0%'


def test_the_program(run, capsys, caplog, tmp_path):
  before = sorted(run.rglob('*'))
  settings = {'checkpoint_dir': str(run / 'checkpoint'), 'episodes': 2, 'num_states': 30}
  evaluate.main(evaluate.Config(**settings))
  score, actions, _, *table = capsys.readouterr().out.splitlines()
  trained = trained_agent.restore(run / 'checkpoint')
  returns = evaluate.returns_of(played := evaluate.play(trained, 2, 0, None))
  low, high = returns.mean() + np.array([-1, 1]) * 12.7062047 * np.abs(np.diff(returns)) / 2
  assert score == (
    f'dqn on breakout, 6 updates: return {returns.mean():.1f} [{low:.1f}, {high:.1f}] over 2 '
    f'episodes, {returns.min():.1f} to {returns.max():.1f}; '
    f'{(returns.mean() - 1.7) / 28.8:.3f} of a human'
  )
  assert actions == evaluate.actions_line(played, ['NOOP', 'FIRE', 'RIGHT', 'LEFT'])
  assert table[0].startswith('| logged action') and table[-1].startswith('| any | 100.0% | ')
  assert sorted(run.rglob('*')) == before
  csv_path = tmp_path / 'evaluation.csv'
  evaluate.main(evaluate.Config(**settings | {'num_states': 0, 'csv_path': str(csv_path)}))
  assert csv_path.read_text().splitlines() == [
    'agent,environment_name,seed,num_updates,eval_seed,episode,episode_return',
    f'dqn,breakout,1,6,0,1,{returns[0]}',
    f'dqn,breakout,1,6,0,2,{returns[1]}',
  ]
  capsys.readouterr()
  evaluate.main(evaluate.Config(**settings | {'num_states': 0, 'eval_epsilon': 0.5}))
  other = evaluate.play(trained_agent.restore(run / 'checkpoint', eval_epsilon=0.5), 2, 0, None)
  others_actions = evaluate.actions_line(other, ['NOOP', 'FIRE', 'RIGHT', 'LEFT'])
  assert capsys.readouterr().out.splitlines()[1] == others_actions != actions
  # Beside the run's own CSV it is what a report takes.
  for name in ('results.csv', 'config.json'):
    shutil.copy(run / name, tmp_path)
  last = runs.last_evaluation(runs.read([tmp_path / 'results.csv']))
  assert (last.num_episodes, last.returns.tolist()) == ((2,), [returns.mean()])
  capsys.readouterr()
  # Where the run's logs are gone, those that are named serve as well; else there is no table.
  (run / 'logs').rename(run / 'elsewhere')
  try:
    evaluate.main(evaluate.Config(**settings | {'episodes': 1}))
    score, _ = capsys.readouterr().out.splitlines()
    assert '[' not in score and '1 episodes' in score
    data = evaluate.load_logs(
      evaluate.Config(**settings | {'replay_dir': str(run / 'elsewhere')}), trained
    )
    assert evaluate.compare_actions(trained.agent, data, 30, 0)[0].shape == (30,)
    # Nor if there are others in their place.
    testing.write_logs(run / 'logs', num_transitions=60)
    assert evaluate.load_logs(evaluate.Config(**settings), trained) is None
    assert 'are not those that it learnt from' in caplog.text
    shutil.rmtree(run / 'logs')
  finally:
    (run / 'elsewhere').rename(run / 'logs')


def test_bad_input_is_named(run, tmp_path):
  with pytest.raises(ValueError, match='--checkpoint_dir=None: expected the directory of a run'):
    evaluate.Config()
  with pytest.raises(ValueError, match=r'--eval_epsilon=1\.5'):
    evaluate.Config(checkpoint_dir=str(run / 'checkpoint'), eval_epsilon=1.5)
  with pytest.raises(FileNotFoundError, match='--checkpoint_dir=nowhere: there is no checkpoint'):
    trained_agent.restore('nowhere')
  with pytest.raises(ValueError, match='no checkpoint 3; there are: 1, 2'):
    trained_agent.restore(run / 'checkpoint', '3')
  with pytest.raises(ValueError, match=r'step_2: no seed 2; there are: 1$'):
    trained_agent.restore(run / 'checkpoint', seed=2)
  config = {'checkpoint_dir': str(run / 'checkpoint'), 'replay_dir': str(tmp_path / 'none')}
  with pytest.raises(FileNotFoundError, match='none: no such replay directory'):
    evaluate.main(evaluate.Config(**config))
  state = {'w': np.zeros(3)}
  for record, message in (
    ({}, "KeyError.*'identity'"),
    ({'identity': {'agent': 'dqm', 'flags': {}}}, 'ModuleNotFoundError.*dqm'),
    ({'identity': {'agent': 'dqn', 'flags': {'n_steps': 2}}}, 'TypeError.*n_steps'),
  ):
    checkpoints.Checkpoints(tmp_path / 'other').save(state, record)
    with pytest.raises(ValueError, match=f'not a checkpoint of this version.*{message}'):
      trained_agent.restore(tmp_path / 'other')
