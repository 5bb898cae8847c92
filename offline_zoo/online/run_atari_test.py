"""Tests of online runs: what they leave, how they go on, and what their recordings hold."""

import csv
import itertools
import json
import os
import pathlib
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_zoo import networks, parts, processors, replay, results, testing, trained_agent
from offline_zoo.logs import dqn_replay, play, play_test, recorded
from offline_zoo.online import learner, run_atari

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TIMING_COLUMNS = ('updates_per_second', 'eval_frame_rate', 'seconds')
AGENTS = [agent for agent in run_atari.AGENTS if agent != 'random']


def here(function, items, num_processes):
  del num_processes
  yield from map(function, items)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(networks, 'nature_torso', testing.small_torso)
  monkeypatch.setattr(parts, 'max_updates_per_chunk', lambda: 5)
  monkeypatch.setattr(play, 'in_processes', here)


def make_settings(directory, **changes) -> dict:
  """A run of four episodes or so of random-looking play, in a replay that forgets."""
  return {
    'environment_name': 'breakout',
    'results_csv_path': str(directory / 'run' / 'results.csv'),
    'seed': 3,
    'num_iterations': 3,
    'num_updates_per_iteration': 50,
    'eval_steps': 1,
    'eval_epsilon': 1.0,
    'replay_capacity': 400,
    'warmup_steps': 100,
    'epsilon_decay_steps': 300,
    'final_epsilon': 0.5,
    'log_probabilities': True,
    'agent_flags': '--batch_size=4 --target_network_update_period=7',
    **changes,
  }


def run(settings: dict) -> None:
  run_atari.main(run_atari.Config(**settings))


def rows(settings: dict) -> list[dict[str, str]]:
  with open(settings['results_csv_path'], newline='') as file:
    return [
      {name: value for name, value in row.items() if name not in TIMING_COLUMNS}
      for row in csv.DictReader(file)
    ]


def recording(settings: dict) -> pathlib.Path:
  return pathlib.Path(settings['results_csv_path']).with_name('recorded.play')


def learnt(settings: dict) -> learner.OnlineState:
  saved = results.checkpoints.Checkpoints(
    pathlib.Path(settings['results_csv_path']).with_name('checkpoint')
  )
  return saved.restore().arrays


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, compiled_quickly):
  """A run's settings and what it played: each row, as the replay was given it."""
  settings = make_settings(tmp_path_factory.mktemp('undisturbed'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, 'nature_torso', testing.small_torso)
    patch.setattr(parts, 'max_updates_per_chunk', lambda: 5)
    patch.setattr(play, 'in_processes', here)
    played = []
    replay_class = learner.growing_replay.GrowingReplay
    add = replay_class.add
    patch.setattr(replay_class, 'add', lambda self, *row: (played.append(row), add(self, *row))[1])
    run(settings)
  return settings, played


def test_results(undisturbed):
  settings, played = undisturbed
  table = rows(settings)
  assert [int(row['num_updates']) for row in table] == [50, 100, 150]
  assert [int(row['frame']) for row in table] == [4 * (100 + 4 * n) for n in (50, 100, 150)]
  assert len(played) == 100 + 4 * 150
  returns = np.array([reward for _, _, reward, _ in played])
  ends = np.flatnonzero([ended for *_, ended in played]) + 1
  assert len(ends) >= 3
  of_iteration = [[], [], []]
  for start, end in itertools.pairwise([0, *ends]):
    of_iteration[max(0, end - 101) // 200].append(returns[start:end].sum())
  for row, expected in zip(table, of_iteration, strict=True):
    assert row['dataset_episode_return'] == (str(np.mean(expected)) if expected else '')
  epsilons = [float(row['epsilon']) for row in table]
  assert 1 >= epsilons[0] > epsilons[1] > epsilons[2] >= 0.5
  config = json.loads(recording(settings).with_name('config.json').read_text())
  assert config['agent'] == 'online_dqn'


def test_the_recording_is_what_was_played(undisturbed, tmp_path):
  """And a slow loop of raw frames, with the recorded seeds and actions, sees the same."""
  settings, played = undisturbed
  recorded.expand(recording(settings), tmp_path / 'logs', 10_000, 1)
  shard = dqn_replay.open_shards(tmp_path / 'logs')[0].read()
  shown = shard.observation[: shard.num_rows].any(axis=(1, 2))
  columns = (shard.observation, shard.action, shard.reward, shard.terminal)
  for column, want in zip(columns, zip(*played, strict=True), strict=True):
    np.testing.assert_array_equal(column[: shard.num_rows][shown], want)
  # The episode under way is there, without an end.
  _, episodes = recorded.read(recording(settings))
  episodes = [*episodes]
  assert [episode.ended for episode in episodes] == [True] * (len(episodes) - 1) + [False]
  row = 0
  for episode in episodes:
    environment = play_test.Sticky('breakout', 0.25, episode.seed)
    processor = processors.AtariProcessor()
    answer = processor(environment.reset())
    for action in episode.actions:
      np.testing.assert_array_equal(answer.observation[..., -1], played[row][0])
      answer = None
      while answer is None:
        answer = processor(environment.step(action))
      assert answer.reward == played[row][2] and answer.last() == played[row][3]
      row += 1
  assert row == len(played)
  # Our reader takes the shards, with probabilities.
  data = replay.load(tmp_path / 'logs', num_actions=4, with_probabilities=True)
  got = np.asarray(data.probabilities)[shown]
  want = np.concatenate([recorded.probabilities(episode, 4) for episode in episodes])
  np.testing.assert_array_equal(got, want)


def test_actions_are_the_schedules(tmp_path, monkeypatch):
  """Greedy ones but for epsilon of them: of an agent that always takes action 2."""
  settings = make_settings(
    tmp_path, warmup_steps=200, epsilon_decay_steps=1, final_epsilon=0.25, num_iterations=1,
    num_updates_per_iteration=250,
  )  # fmt: skip
  config = run_atari.Config(**settings)
  agent = run_atari.make_learner(config, 4)
  monkeypatch.setattr(agent, '_greedy_act', lambda *_: (None, jnp.asarray(2), None))
  agent.start(tmp_path / 'none', 1)
  agent.learn(250)
  (tmp_path / 'a.play').write_bytes(agent.recording())
  counts = {1.0: np.zeros(4), 0.25: np.zeros(4)}
  for episode in recorded.read(tmp_path / 'a.play')[1]:
    np.testing.assert_array_equal(episode.choices, episode.actions == 2)
    counts[episode.epsilon] += np.bincount(episode.actions, minlength=4)
  assert counts[1.0].sum() >= 200 and sum(map(np.sum, counts.values())) == 1200
  np.testing.assert_allclose(counts[1.0] / counts[1.0].sum(), [0.25] * 4, atol=0.12)
  rates = counts[0.25] / counts[0.25].sum()
  np.testing.assert_allclose(rates, [0.0625, 0.0625, 0.8125, 0.0625], atol=0.05)


def test_the_greedy_action_is_greedy(tmp_path):
  """Though evaluation acts at random."""
  learner = run_atari.make_learner(run_atari.Config(**make_settings(tmp_path)), 4)
  params = learner.get_state().learner.online_params
  frames = np.random.default_rng(0).integers(256, size=(84, 84, 4), dtype=np.uint8)
  keys = jax.random.split(jax.random.PRNGKey(0), 20)
  greedy, evaluated = (
    {int(act(params, key, frames)[1]) for key in keys}
    for act in (learner._greedy_act, learner._act)
  )
  assert len(greedy) == 1 and len(evaluated) == 4


def test_epsilon_falls_as_dopamines():
  schedule = learner.Schedule(20_000, 250_000, 0.01, 4)
  steps = [0, 20_000, 20_000 + 125_000, 270_000, 10**6]
  assert [schedule.epsilon(n) for n in steps] == pytest.approx([1, 1, 0.505, 0.01, 0.01])


def test_schedule_and_probabilities_equal_those_of_another_codes_logging_agent(golden):
  """n17s's fork of Dopamine's DQN."""
  with np.load(golden / 'off_policy' / 'action_probability.npz', allow_pickle=False) as want:
    steps, choices = want['training_steps'], want['action'] == want['greedy_action']
    epsilons, probabilities = want['epsilon'], want['prob']
    num_actions = int(want['num_actions'])
  schedule = learner.Schedule(20_000, 250_000, 0.01, 4)
  got = [schedule.epsilon(int(step)) for step in steps]
  np.testing.assert_allclose(got, epsilons, rtol=1e-12)
  for epsilon, choice, probability in zip(got, choices, probabilities, strict=True):
    choices = np.array([choice], np.uint8)
    episode = recorded.Episode(0, epsilon, True, np.zeros(1, np.uint8), choices, np.zeros(1))
    got = recorded.probabilities(episode, num_actions)
    np.testing.assert_allclose(got, probability, rtol=1e-6)
  assert len(set(probabilities.tolist())) == 10


def test_random_actions_last_as_in_epsilon_z_greedy():
  """Dabney et al. 2021, a step at a time: n steps in all; and how long they last."""
  schedule = learner.Schedule(20_000, 250_000, 0.01, 4, zeta_exponent=2.0)
  begins, lasts, actions = schedule.random_actions(np.random.default_rng(0), 18, epsilon=0.1)
  rng = np.random.default_rng(0)
  draws, drawn = rng.random(27_000), rng.integers(18, size=27_000)
  durations = rng.zipf(2.0, 27_000)
  left, lasting = 0, []
  for step in range(27_000):
    assert lasts[step] == (left > 0)
    if not left:
      assert begins[step] == (draws[step] < 0.1)
      if begins[step]:
        left, action = durations[step], drawn[step]
        lasting.append(left)
    if left:
      assert actions[step] == action
      left -= 1
  rates = [np.mean(np.equal(lasting, n)) for n in (1, 2, 3)]  # of 1 / (zeta(2) n^2)
  np.testing.assert_allclose(rates, [0.608, 0.152, 0.068], atol=0.03)
  # Without an exponent, one step each.
  schedule = schedule._replace(zeta_exponent=None)
  begins, lasts, actions = schedule.random_actions(np.random.default_rng(0), 18, epsilon=0.1)
  np.testing.assert_array_equal(begins, draws < 0.1)
  np.testing.assert_array_equal(actions, drawn)
  assert not lasts.any()


# Resumption, bit for bit.


def assert_as_undisturbed(settings: dict, undisturbed) -> None:
  assert rows(settings) == rows(undisturbed[0])
  assert recording(settings).read_bytes() == recording(undisturbed[0]).read_bytes()
  chex.assert_trees_all_equal(learnt(settings), learnt(undisturbed[0]))


class Killed(BaseException):
  """As after SIGKILL, nothing is done any more."""


def kill(monkeypatch, owner, name: str, call: int):
  """Ends the process, so to speak, where a function is called for the n-th time."""
  function, calls = getattr(owner, name), []

  def killed(*args, **kwargs):
    calls.append(args)
    if len(calls) == call:
      raise Killed
    return function(*args, **kwargs)

  monkeypatch.setattr(owner, name, killed)


def test_a_run_goes_on_where_it_was_stopped(undisturbed, tmp_path, monkeypatch):
  """After a signal in an episode; after an iteration's end; after the replay has forgotten some."""
  settings = make_settings(tmp_path)
  learn, calls = learner.OnlineLearner.learn, []

  def interrupted(self, n):
    calls.append(n)
    if len(calls) in (3, 26):
      os.kill(os.getpid(), signal.SIGTERM)
    return learn(self, n)

  monkeypatch.setattr(learner.OnlineLearner, 'learn', interrupted)
  run(settings)
  assert len(calls) == 3 and not os.path.exists(settings['results_csv_path'])
  assert recorded.verify(recording(settings), 1)[1] == 100 + 4 * 15
  run({**settings, 'num_iterations': 2})
  assert len(calls) == 20 and len(rows(settings)) == 2
  run(settings)
  assert len(calls) == 26 and len(rows(settings)) == 2
  # An episode has ended in the third iteration, and the first one's rows are forgotten.
  _, played = undisturbed
  ends = np.flatnonzero([ended for *_, ended in played]) + 1
  assert any(500 < end < 620 for end in ends) and ends[0] < 620 - settings['replay_capacity']
  run(settings)
  assert_as_undisturbed(settings, undisturbed)


@pytest.mark.parametrize(
  'owner, name, call',
  [
    (learner.OnlineLearner, '_play_step', 350),  # in the second iteration
    (run_atari.results, 'write_atomically', 4),  # before the second recording
    (results.Results, 'save', 2),  # between the second recording and checkpoint
    (results.Results, 'save', 1),  # the recording is there, and no checkpoint
  ],
)
def test_a_kill(undisturbed, tmp_path, owner, name: str, call: int):
  settings = make_settings(tmp_path)
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    kill(patch, owner, name, call)
    run(settings)
  run(settings)
  assert_as_undisturbed(settings, undisturbed)


def test_an_episode_that_does_not_come_out_again_is_refused(tmp_path, monkeypatch):
  settings = make_settings(tmp_path, num_updates_per_iteration=5, num_iterations=1)
  run(settings)
  resize = processors.resize
  monkeypatch.setattr(processors, 'resize', lambda screen: resize(screen) ^ 1)
  with pytest.raises(ValueError, match=r'recorded\.play: the episode under way does not come out'):
    run({**settings, 'num_iterations': 2})


@pytest.mark.parametrize('agent', AGENTS)
def test_every_agent_learns_and_goes_on(agent: str, tmp_path):
  settings = make_settings(tmp_path, agent=agent, num_updates_per_iteration=5, num_iterations=2)
  run({**settings, 'num_iterations': 1})
  run(settings)
  assert [row['frame'] for row in rows(settings)] == ['480', '560']
  assert float(rows(settings)[-1]['loss']) > 0
  # Its checkpoint is one that can be evaluated and played from.
  trained = trained_agent.restore(recording(settings).with_name('checkpoint'))
  assert (trained.name, trained.num_updates) == (f'online_{agent}', 10)
  _, greedy, _ = trained.agent.act(
    trained.agent.get_state().online_params, jax.random.PRNGKey(0), np.zeros((84, 84, 4), np.uint8)
  )
  assert 0 <= greedy < 4


def test_random_play(tmp_path):
  settings = make_settings(tmp_path, agent='random', num_updates_per_iteration=10, num_iterations=2)
  run({**settings, 'num_iterations': 1})
  run(settings)
  first, row = rows(settings)
  assert first['epsilon'] == row['epsilon'] == '1.0' and 'loss' not in row
  assert recorded.verify(recording(settings), 1)[1] == 180
  # It needs no replay.
  random = run_atari.make_learner(run_atari.Config(**settings | {'replay_capacity': 10**9}), 4)
  assert random._replay.capacity == 128
  with pytest.raises(ValueError, match='step_2: random play, which has learnt nothing'):
    trained_agent.restore(recording(settings).with_name('checkpoint'))


def test_other_values_arrive_and_a_run_of_them_goes_on(tmp_path, monkeypatch):
  """Of an agent that always takes action 2; without choices, and with random actions that last."""
  settings = make_settings(
    tmp_path, log_probabilities=False, zeta_exponent=2.0, steps_per_update=2, warmup_steps=60,
    epsilon_decay_steps=1, final_epsilon=0.1, num_updates_per_iteration=100, num_iterations=2,
    agent_flags='--batch_size=4 --n_step=3 --discount=0.9 --max_abs_reward=0.5',
  )  # fmt: skip
  started, start = [], learner.OnlineLearner.start

  def start_with_spies(self, *args):
    self._greedy_act = lambda *_: (None, jnp.asarray(2), None)
    started.append(self)
    start(self, *args)

  monkeypatch.setattr(learner.OnlineLearner, 'start', start_with_spies)
  whole = {**settings, 'results_csv_path': str(tmp_path / 'whole' / 'results.csv')}
  run(whole)
  run({**settings, 'num_iterations': 1})
  run(settings)
  assert_as_undisturbed(settings, (whole, None))
  data = started[0]._replay.data()
  assert (data.n_step, data.discount, data.max_abs_reward) == (3, 0.9, 0.5)
  header, episodes = recorded.read(recording(settings))
  episodes = [*episodes]
  assert not header.has_choices and sum(len(e.actions) for e in episodes) == 60 + 2 * 200
  schedule, actions = started[0]._schedule, []
  for number, episode in enumerate(episodes):
    rng = np.random.default_rng((3, number))
    assert episode.seed == rng.integers(2**31)
    begins, lasts, randoms = schedule.random_actions(rng, 4, episode.epsilon)
    wanted = np.where(begins | lasts, randoms, 2)[: len(episode.actions)]
    np.testing.assert_array_equal(episode.actions, wanted)
    actions += [*lasts[: len(wanted)]]
  assert schedule.zeta_exponent == 2 and any(actions) and {e.epsilon for e in episodes} > {1.0}


def test_a_recording_without_a_checkpoint_is_kept(tmp_path):
  settings = make_settings(tmp_path, num_iterations=1, num_updates_per_iteration=5)
  run(settings)
  before = recording(settings).read_bytes()
  for path in recording(settings).parent.iterdir():
    if path.name == 'checkpoint':
      shutil.rmtree(path)
    elif path.name != 'recorded.play':
      path.unlink()
  run(settings)
  (kept,) = recording(settings).parent.glob('recorded.play.*')
  assert kept.read_bytes() == before == recording(settings).read_bytes()


# Bad input.


def test_a_recording_that_is_not_the_runs(tmp_path):
  settings = make_settings(tmp_path, num_iterations=1)
  run(settings)
  path, content = recording(settings), recording(settings).read_bytes()
  more = {**settings, 'num_iterations': 2}
  path.write_bytes(content.replace(b'ale-py 0', b'ale-py 9'))
  with pytest.raises(
    ValueError, match=r'recorded\.play: its emulator is ale-py 9.*, here it is ale'
  ):
    run(more)
  (tmp_path / 'same.play').write_bytes(content)
  header, episodes = recorded.read(tmp_path / 'same.play')
  changed = recorded.Recording(header)
  for episode in episodes:
    if episode.ended:
      changed.add(episode._replace(actions=3 - episode.actions))
  path.write_bytes(changed.content())
  with pytest.raises(ValueError, match=r'recorded\.play: not what the run played'):
    run(more)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'recorded\.play: no such recording'):
    run(more)
  path.write_bytes(content[: content.index(b'\n') + 1])
  with pytest.raises(ValueError, match=r'recorded\.play: expected at least one block'):
    run(more)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'agent': 'ddpg'}, '--agent=ddpg: expected dqn, qrdqn, rem, c51, random'),
    ({'agent_flags': '--n_stp=3'}, '--agent_flags: Unknown command line flag'),
    ({'agent_flags': '--n_step=x'}, '--agent_flags: flag --n_step=x'),
    ({'agent_flags': '--n_step=0'}, '--agent_flags: --n_step=0: expected more than 0'),
    ({'agent_flags': 'n_step=2'}, '--agent_flags: expected flags only, got n_step=2'),
    ({'agent_flags': '--seed=2'}, "--agent_flags: --seed=2: expected only what is the agent's"),
    ({'agent_flags': '--shards=2'}, '--agent_flags: --shards='),
    ({'replay_capacity': 10**9}, '--replay_capacity=1000000000: needs .* GB of memory'),
    ({'replay_capacity': 127}, '--replay_capacity=127: expected 128 or more'),
    ({'warmup_steps': 3}, '--warmup_steps=3: expected'),
    ({'final_epsilon': 2.0}, '--final_epsilon'),
    ({'steps_per_update': 0}, '--steps_per_update=0'),
    ({'zeta_exponent': 1.0}, '--zeta_exponent=1.0: expected more than 1'),
    ({'seed': -1}, '--seed=-1'),
    ({'agent_flags': '--num_eval_workers=0'}, '--agent_flags: --num_eval_workers=0'),
    ({'results_csv_path': 'x/recorded.play'}, '--results_csv_path=.*the recording has this one'),
    ({'environment_name': 'brekout'}, "unknown game 'brekout'"),
  ],
)
def test_bad_flags_are_named(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run(make_settings(tmp_path, **changes))
  assert not list(tmp_path.iterdir())
