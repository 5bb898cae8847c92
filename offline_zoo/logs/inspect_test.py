"""Tests for inspect.py: what it says of logs that were made up to be counted."""

import dataclasses
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

from offline_zoo import testing
from offline_zoo.encoding import shards as encoded_shards
from offline_zoo.logs import demo, dqn_replay, inspect, play
from offline_zoo.logs.shard import CUT


def log_episode(writer, num_steps: int, last_reward: float, action: int = 0) -> None:
  """Frames of another grey each; action 1 in the last step."""
  writer.start_episode()
  for step in range(num_steps):
    last = step == num_steps - 1
    frame = np.full((84, 84), 10 + step, np.uint8)
    writer.add(frame, 1 if last else action, last_reward if last else 0.0, last, 0.5)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """Episodes of 10, 20, 30, 20 and 10 steps, of which shards of 60 rows cut some."""
  directory = tmp_path_factory.mktemp('logs')
  writer = dqn_replay.ShardWriter(directory, 60)
  for num_steps, last_reward in ((10, 1), (20, -2), (30, 7), (20, 1), (10, 5)):
    log_episode(writer, num_steps, last_reward)
  writer.close()
  return directory


def summaries(directory) -> list[inspect.Summary]:
  encoded = encoded_shards.load(directory, None, None, None, None)
  return [
    inspect.summarise(number, shard, 0)
    for number, shard in zip(encoded.numbers, encoded.shards, strict=True)
  ]


def test_all_is_said_in_text(directory, tmp_path, capsys):
  inspect.main(
    inspect.Config(replay_dir=str(directory), replay_cache_dir='none', environment_name='freeway')
  )
  text = capsys.readouterr().out
  assert text.startswith(f'{directory}: 2 shards of the DQN Replay Dataset, numbers 0, 1')
  for line in (
    # Rows: 13, 23 and 23, then one is lost; 9 of the third episode, 23 and 13.
    '| 0 | 59 | 1 | 50 | 2 | -0.5 | 21 |',
    '| 1 | 45 | 15 | 39 | 2 | 3.0 | 30 |',
    '| all | 104 | 16 | 89 | 4 | 1.2 | 30 |',
    'Returns of 4 whole episodes',
    f'-2 to 0.3333 1 25.0% {20 * "#"}',
    f'0.3333 to 2.667 2 50.0% {40 * "#"}',
    f'2.667 to 5 1 25.0% {20 * "#"}',
    f'0 NOOP 84 94.4% {40 * "#"}',
    '1 UP 5 5.6% ##',
    '2 DOWN 0 0.0%',
    '-2 1 1.1%',
    f'0 84 94.4% {40 * "#"}',
    '1 2 2.2% #',
    'Whole episodes have 10 to 20 steps, 15 on average; there only in part: 2.',
    'All frames are made of 30 distinct tiles of 4x4 pixels.',
    '* actions never taken: DOWN: are these the logs of another game?',
  ):
    assert line in [' '.join(said.split()) for said in text.split('\n')]
  assert text.count('\n* ') == 1


def test_what_a_run_plays_itself_has_the_same_name_here(directory, monkeypatch, capsys):
  monkeypatch.setattr(demo, 'find_or_make', lambda game: {'freeway': directory}[game])
  inspect.main(
    inspect.Config(replay_dir='demo', replay_cache_dir='none', environment_name='freeway')
  )
  assert capsys.readouterr().out.startswith(f'{directory}: 2 shards')
  with pytest.raises(ValueError, match='--replay_dir=demo: expected --environment_name beside it'):
    inspect.Config(replay_dir='demo')


def test_logs_without_a_step(tmp_path, capsys):
  writer = dqn_replay.ShardWriter(tmp_path, 100)
  writer.start_episode()
  writer.close()
  (files,) = dqn_replay.open_shards(tmp_path)
  assert len(files.read().action)
  inspect.main(
    inspect.Config(replay_dir=str(tmp_path), environment_name='pong', replay_cache_dir='none')
  )
  assert ' FIRE            0    0.0%\n' in capsys.readouterr().out


def test_rl_unplugged_of_the_same_play(tmp_path, capsys):
  writer = dqn_replay.ShardWriter(tmp_path / 'shards', 100)
  for num_steps, last_reward in ((10, 1), (20, -2), (30, 7)):
    log_episode(writer, num_steps, last_reward)
  writer.close()
  (files,) = dqn_replay.open_shards(tmp_path / 'shards')
  (tmp_path / 'episodes').mkdir()
  testing.write_rl_unplugged(tmp_path / 'episodes' / 'run_1-00000-of-00001', files.read())
  texts = []
  for name in ('shards', 'episodes'):
    inspect.main(inspect.Config(replay_dir=str(tmp_path / name), replay_cache_dir='none'))
    texts.append(capsys.readouterr().out.split('\n'))
  assert 'checkpoints of RL Unplugged, as published' in texts[1][0]
  # But for the rows that are left in a shard's files.
  assert '| 0 | 69 | 31 | 60 | 3 | 2.0 | 31 |' in texts[0]
  assert '| 0 | 69 | 0 | 60 | 3 | 2.0 | 31 |' in texts[1]
  assert [x for x in texts[0][1:] if x[:2] != '| '] == [x for x in texts[1][1:] if x[:2] != '| ']


def test_a_frame_without_an_action_is_no_step(tmp_path):
  write(tmp_path)
  (shard,) = encoded_shards.load(tmp_path, None, None, None, None).shards
  terminals = np.where(np.arange(30) == 29, CUT, shard.terminals).astype(np.uint8)
  cut = dataclasses.replace(shard, terminals=terminals, episode_returns=shard.episode_returns[:2])
  before, after = (inspect.summarise(0, x, 0) for x in (shard, cut))
  assert (before.num_steps, after.num_steps) == (21, 20)
  assert (before.actions.total(), after.actions.total()) == (21, 20)
  assert (len(before.returns), len(after.returns)) == (3, 2)


# What is suspicious.


def write(directory, **columns) -> list[inspect.Summary]:
  """A shard of three whole episodes of 7 steps each, with other columns."""
  padding = np.arange(30) % 10 < 3
  shard = testing.make_shard(30)
  shard.observation[:30][padding] = 0
  shard.terminal[9:30:10] = 1
  shard.reward[:30] = np.where(shard.terminal[:30], [0.0] * 9 + [1.0] + [0.0] * 20, 0.0)
  shard.action[:30] = np.where(padding, 0, np.arange(30) % 2)
  prob = np.where(np.arange(31) < 30, 0.5, 7.0).astype(np.float32)
  shard = dataclasses.replace(shard, prob=prob)
  for name, (rows, values) in columns.items():
    getattr(shard, name)[rows] = values
  dqn_replay.ShardFiles(directory, 0).write(shard)
  return summaries(directory)


@pytest.mark.parametrize(
  'columns, found',
  [
    ({}, []),
    ({'action': (5, 2)}, ['actions up to 2 are logged, and the game has 2, 0 to 1: are these']),
    ({'action': (slice(30), 0)}, ['actions never taken: FIRE: are these']),
    ({'reward': (slice(30), 0)}, ['every reward is 0']),
    ({'reward': ([19, 29], 1)}, ['each of 3 episodes returns 1']),
    (
      {'terminal': (slice(30), 0)},
      ['no episode lies whole within a shard', '22% of all steps have a blank'],
    ),
    ({'observation': (12, 7)}, ['1 episodes begin without three blank rows']),
    ({'prob': ([3, 15], 0)}, ['2 steps have actions of probability 0']),
    ({'observation': (5, 0)}, ['5% of all steps have a blank frame']),
    ({'observation': ([*range(3, 10), *range(13, 20)], 9)}, ['57% of all steps have the frame']),
  ],
)
def test_what_is_suspicious(tmp_path, columns, found):
  lines = inspect.suspicions(write(tmp_path, **columns), ['NOOP', 'FIRE'])
  assert len(lines) == len(found)
  for line, start in zip(lines, found, strict=True):
    assert line.startswith(start)


def test_an_episode_that_never_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(play, 'MAX_STEPS_PER_EPISODE', 7)
  assert inspect.suspicions(write(tmp_path), None) == []
  lines = inspect.suspicions(write(tmp_path, terminal=(9, 0)), None)
  assert lines[0] == 'shard 0 has an episode of 17 steps; the protocol ends one after 7'


def test_shards_that_hold_the_same(tmp_path):
  write(tmp_path)
  for path in list(tmp_path.iterdir()):
    path.with_name(path.name.replace('.0.', '.7.')).write_bytes(path.read_bytes())
  assert inspect.suspicions(summaries(tmp_path), None) == ['shards 0 and 7 hold the same']


def test_only_one_action_of_an_unknown_game(tmp_path):
  lines = inspect.suspicions(write(tmp_path, action=(slice(30), 3)), None)
  assert lines == ['no other action than 3 is ever taken']


# Pictures.


def test_the_picture_shows_steps_of_all_shards(directory, tmp_path):
  encoded = encoded_shards.load(directory, None, None, None, None)
  sheet = inspect.contact_sheet(encoded, summaries(directory))
  assert sheet.shape == (4, 8, 84, 84)
  # Steps of shard 0, then of shard 1; never a blank row.
  greys = [*range(10, 20), *range(10, 30), *range(10, 30), *range(31, 40), *range(10, 30)]
  greys += range(10, 20)
  steps = np.linspace(0, 88, 32).astype(int)
  np.testing.assert_array_equal(sheet.reshape(32, -1)[:, 0], np.array(greys)[steps])
  assert (sheet == sheet[..., :1, :1]).all()
  path = tmp_path / 'new' / 'logs.png'
  inspect.main(
    inspect.Config(
      replay_dir=str(directory),
      replay_cache_dir='none',
      picture_path=str(path),
      video_path=str(tmp_path / 'episode.mp4'),
    )
  )
  assert cv2.imread(str(path)).shape == (1700, 2000, 3)


def test_the_video_is_the_best_whole_episode(directory, tmp_path):
  encoded = encoded_shards.load(directory, None, None, None, None)
  said = inspect.write_video(encoded, summaries(directory), tmp_path / 'episode.mp4')
  # The one that returns 7 is cut.
  assert said == 'shard 1, rows 35 to 44, return 5'
  video = cv2.VideoCapture(str(tmp_path / 'episode.mp4'))
  assert video.get(cv2.CAP_PROP_FPS) == 15
  frames = [video.read()[1] for _ in range(10)]
  assert not video.read()[0] and frames[0].shape == (168, 168, 3)
  means = [frame.mean() for frame in frames]
  np.testing.assert_allclose(means, np.arange(10, 20), atol=5)


def test_there_may_be_no_whole_episode(tmp_path):
  write(tmp_path, terminal=(slice(30), 0))
  encoded = encoded_shards.load(tmp_path, None, None, None, None)
  with pytest.raises(ValueError, match='--video_path: expected logs with whole episodes'):
    inspect.write_video(encoded, summaries(tmp_path), tmp_path / 'episode.mp4')
  assert not (tmp_path / 'episode.mp4').exists()


def test_frames_are_decoded_as_they_are_in_the_files(logs):
  """Of shards whose pieces are in other ones, too."""
  encoded = encoded_shards.load(logs, None, None, None, None)
  rng = np.random.default_rng(0)
  for position, number in enumerate(encoded.numbers):
    frames = dqn_replay.ShardFiles(logs, number).read().observation
    rows = rng.integers(len(encoded.shards[position].actions), size=50)
    np.testing.assert_array_equal(encoded.decode(position, rows), frames[rows])


def test_bad_input_gets_one_line(tmp_path):
  program = [sys.executable, '-m', 'offline_zoo.logs.inspect']
  for flags, message in (
    ([], 'error: --replay_dir=None: expected a directory of logs'),
    ([f'--replay_dir={tmp_path}/none'], f'error: {tmp_path}/none: no such replay directory'),
  ):
    run = subprocess.run(
      [*program, *flags],
      capture_output=True,
      text=True,
      cwd=pathlib.Path(inspect.__file__).parents[2],
    )
    assert run.returncode == 1 and run.stderr.strip().split('\n')[-1] == message
