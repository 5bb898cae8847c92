"""Tests for recorded.py: what is recorded comes out again, and what does not is found."""

import dataclasses
import itertools
import json
import lzma
import multiprocessing
import os
import resource
import struct
import zlib

import google_crc32c
import numpy as np
import pytest

from offline_zoo import atari_env, replay
from offline_zoo.logs import demo, dqn_replay, play, recorded

CONFIG = demo.Config(environment_name='breakout', num_transitions=500, num_processes=1, epsilon=0.9)


def here(function, items, num_processes):
  del num_processes
  yield from map(function, items)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
  monkeypatch.setattr(play, 'in_processes', here)
  monkeypatch.setattr(recorded, 'STEPS_PER_CHECKSUM', 50)


@pytest.fixture
def path(tmp_path):
  """A recording of two episodes or more, with their choices."""
  demo.record(CONFIG, tmp_path / 'breakout.play')
  return tmp_path / 'breakout.play'


def rewrite(path, change) -> None:
  """Replaces the recording by one of other episodes."""
  header, episodes = recorded.read(path)
  header, episodes = change(header, [*episodes])
  recording = recorded.Recording(header)
  for episode in episodes:
    recording.add(episode)
  path.write_bytes(recording.content())


def directory_bytes(directory) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_recording_expands_to_what_would_have_been_logged(path, tmp_path):
  header, episodes = recorded.read(path)
  lengths = [len(episode.actions) for episode in episodes]
  assert header.environment_name == 'breakout' and header.has_choices
  assert len(lengths) >= 2 and sum(lengths) >= 500 > sum(lengths[:-1])
  number = recorded.expand(path, tmp_path / 'expanded', 300, num_processes=1)
  # A row in 300 is lost, as in the public data.
  num_rows = sum(lengths) + 3 * len(lengths)
  assert sum(lengths) - num_rows // 300 <= number <= sum(lengths)
  config = dataclasses.replace(CONFIG, num_transitions=number, shard_capacity=300)
  demo.write_logs(config, tmp_path / 'logged')
  assert directory_bytes(tmp_path / 'expanded') == directory_bytes(tmp_path / 'logged')


def test_episodes_are_played_again_in_any_order(path):
  header, episodes = recorded.read(path)
  episodes = [*episodes]
  forward = [*recorded.play_again(path, header, episodes, 1)]
  backward = [*recorded.play_again(path, header, episodes[::-1], 1)]
  for one, other in zip(forward, backward[::-1], strict=True):
    for column, again in zip(one, other, strict=True):
      np.testing.assert_array_equal(column, again)


def test_batch_rls_own_loader_reads_what_is_expanded(golden, tmp_path, monkeypatch):
  """All that it can sample of an online run's play is what ours can, and is equal."""
  monkeypatch.setattr(recorded, 'STEPS_PER_CHECKSUM', 1000)
  recorded.expand(golden / 'recorded' / 'breakout.play', tmp_path / 'logs', 600, 1)
  with np.load(golden / 'recorded' / 'batch_rl.npz', allow_pickle=False) as file:
    columns = dict(file)
  for shard, n_step in itertools.product((0, 1), (1, 5)):
    indices, actions, rewards, terminals, *crcs = (
      columns[f'{name}_{shard}_{n_step}']
      for name in ('indices', 'action', 'reward', 'terminal', 'state', 'next_state')
    )
    data = replay.load(tmp_path / 'logs', [shard], n_step=n_step, discount=0.99, num_actions=4)
    np.testing.assert_array_equal(replay.valid_rows(data), indices)
    batch = replay.gather(data, indices)
    np.testing.assert_array_equal(batch.a_tm1, actions)
    np.testing.assert_array_equal(batch.r_t, rewards)
    np.testing.assert_array_equal(np.asarray(batch.discount_t) == 0, terminals == 1)
    assert terminals.any() and rewards.any()
    ours = [
      np.array([zlib.crc32(state.tobytes()) for state in np.asarray(states)])
      for states in (batch.s_tm1, batch.s_t)
    ]
    np.testing.assert_array_equal(ours[0], crcs[0])
    goes_on = terminals == 0  # blank rows follow an end
    np.testing.assert_array_equal(ours[1][goes_on], crcs[1][goes_on])


def test_processes_and_a_kill_change_nothing(tmp_path, monkeypatch):
  monkeypatch.undo()
  demo.record(dataclasses.replace(CONFIG, num_processes=2), tmp_path / 'a.play')
  recorded.expand(tmp_path / 'a.play', tmp_path / 'one', 300, num_processes=1)

  process = multiprocessing.get_context('spawn').Process(
    target=recorded.expand, args=(tmp_path / 'a.play', tmp_path / 'two', 300, 1)
  )
  process.start()
  while not list(tmp_path.glob('.two.partial-*')):
    assert process.is_alive()
  process.kill()
  process.join()
  assert len(os.listdir(tmp_path)) == 3
  recorded.expand(tmp_path / 'a.play', tmp_path / 'two', 300, num_processes=2)
  assert sorted(os.listdir(tmp_path)) == ['a.play', 'one', 'two']
  assert directory_bytes(tmp_path / 'one') == directory_bytes(tmp_path / 'two')
  with pytest.raises(FileExistsError, match='--replay_dir='):
    recorded.expand(tmp_path / 'a.play', tmp_path / 'two', 300, num_processes=1)


def test_an_episode_that_has_not_ended(path, tmp_path):
  header, (first, second, *_) = recorded.read(path)
  recording = recorded.Recording(header)
  recording.add(first)
  part = second._replace(
    ended=False, actions=second.actions[:100], choices=second.choices[:100],
    checksums=second.checksums[:2],
  )  # fmt: skip
  path.write_bytes(recording.content(part))
  num_steps = len(first.actions) + 100
  assert recorded.verify(path, 1) == (2, num_steps)
  assert recorded.expand(path, tmp_path / 'logs', 10_000, 1) == num_steps
  shard = dqn_replay.ShardFiles(tmp_path / 'logs', 0).read()
  assert np.flatnonzero(shard.terminal).tolist() == [len(first.actions) + 2]
  recording.add(second)  # goes on
  path.write_bytes(recording.content())
  assert recorded.verify(path, 1) == (2, len(first.actions) + len(second.actions))


def test_the_file_is_the_same_whenever_it_was_written(path, monkeypatch):
  monkeypatch.setattr(recorded, '_STEPS_PER_BLOCK', 300)
  header, episodes = recorded.read(path)
  once, often = recorded.Recording(header), recorded.Recording(header)
  lengths = []
  for episode in itertools.islice(itertools.cycle([*episodes]), 5):
    lengths.append(len(episode.actions))
    once.add(episode)
    often.add(episode)
    often.content()
  assert often.content() == once.content()
  path.write_bytes(often.content())
  assert [len(e.actions) for e in recorded.read(path)[1]] == lengths


# What does not come out as it was recorded.


def changed_action(step: int):
  def change(header, episodes):
    actions = episodes[1].actions.copy()
    actions[step] = (actions[step] + 1) % 4
    return header, [episodes[0], episodes[1]._replace(actions=actions), *episodes[2:]]

  return change


@pytest.mark.parametrize('step', [0, 49, 50, 130])
def test_one_changed_action_is_found_at_the_first_checksum(path, step: int):
  rewrite(path, changed_action(step))
  first = step // 50 * 50
  with pytest.raises(ValueError) as error:
    recorded.verify(path, 1)
  assert str(error.value).startswith(
    f'{path}: episode 1: steps {first} to {first + 49} are not what was recorded with ale-py '
  )
  assert atari_env.rom_md5('breakout') in str(error.value) and '\n' not in str(error.value)


def test_nothing_is_written_of_what_does_not_come_out(path, tmp_path):
  rewrite(path, changed_action(60))
  with pytest.raises(ValueError, match='episode 1: steps 50 to 99'):
    recorded.expand(path, tmp_path / 'logs', 300, 1)
  assert os.listdir(tmp_path) == ['breakout.play']


@pytest.mark.parametrize('field, value', [('seed', 7), ('ended', True)])
def test_another_seed_or_end_is_found(path, field: str, value):
  def change(header, episodes):
    part = {'actions': episodes[0].actions[:100], 'choices': episodes[0].choices[:100]}
    cut = part | {'checksums': episodes[0].checksums[:2]} if field == 'ended' else {}
    return header, [episodes[0]._replace(**cut, **{field: value})]

  rewrite(path, change)
  steps = '0 to 49' if field == 'seed' else '50 to 99'
  with pytest.raises(ValueError, match=f'episode 0: steps {steps} are not'):
    recorded.verify(path, 1)


def test_steps_after_the_games_end_are_found(path):
  def longer(header, episodes):
    more = {name: np.append(getattr(episodes[0], name), 0) for name in ('actions', 'choices')}
    checksums = np.append(episodes[0].checksums, np.uint32(0))[: -(-len(more['actions']) // 50)]
    return header, [episodes[0]._replace(**more, checksums=checksums)]

  rewrite(path, longer)
  with pytest.raises(ValueError, match=r'episode 0: steps .* are not'):
    recorded.verify(path, 1)


def test_another_rom_and_another_version(path, tmp_path, caplog, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(atari_env, 'rom_md5', lambda *_: '0' * 32)
    with pytest.raises(
      ValueError, match=r'breakout\.play: expected to be played with the ROM .*00'
    ):
      recorded.verify(path, 1)
  rewrite(path, lambda header, episodes: (
    dataclasses.replace(header, emulator='ale-py 0.1'), episodes))  # fmt: skip
  recorded.verify(path, 1)
  assert 'recorded with ale-py 0.1; here is ale-py ' in caplog.text
  rewrite(path, changed_action(3))
  with pytest.raises(ValueError, match=r'recorded with ale-py 0\.1 and ROM .*; here is ale-py '):
    recorded.verify(path, 1)


def test_another_number_of_actions(path):
  rewrite(path, lambda header, episodes: (dataclasses.replace(header, num_actions=18), episodes))
  with pytest.raises(ValueError, match='expected the 4 actions of breakout, got 18'):
    recorded.verify(path, 1)


# Hostile files.


def block(content: bytes) -> bytes:
  return checked(lzma.compress(content))


def checked(xz: bytes) -> bytes:
  return struct.pack('<II', len(xz), google_crc32c.value(xz)) + xz


def episodes_block(seeds=(1,), lengths=(2,), epsilons=(0.5,), ended=(1,), codes=b'\0\1', more=b''):
  count = len(seeds)
  return block(
    struct.pack(f'<I{count}I{count}I{count}f{count}B', count, *seeds, *lengths, *epsilons, *ended)
    + bytes(4 * sum(-(-length // 50) for length in lengths)) + codes + more
  )  # fmt: skip


def header_line(**changes) -> bytes:
  fields = {
    'format': 'offline_zoo recorded play', 'version': 1, 'environment_name': 'breakout',
    'rom_md5': 'x', 'emulator': 'y', 'sticky_action_probability': 0.25, 'num_actions': 4,
    'has_choices': False, 'steps_per_checksum': 50,
  }  # fmt: skip
  return json.dumps(fields | changes).encode() + b'\n'


def test_a_file_made_by_hand(path):
  path.write_bytes(header_line() + episodes_block() + episodes_block(ended=(0,), codes=b'\3\2'))
  header, episodes = recorded.read(path)
  assert header.sticky_action_probability == 0.25
  episodes = [*episodes]
  assert [episode.actions.tolist() for episode in episodes] == [[0, 1], [3, 2]]
  assert [episode.ended for episode in episodes] == [True, False]
  for codes, choices, rates in (
    (b'\4\6', [1, 0], [0.625, 0.125]),
    (b'\3\x08', [0, recorded.LASTING], [0.125, 1.0]),
  ):
    path.write_bytes(header_line(has_choices=True) + episodes_block(codes=codes))
    (episode,) = recorded.read(path)[1]
    assert (episode.actions.tolist(), episode.choices.tolist()) == ([1, 2], choices)
    assert recorded.probabilities(episode, num_actions=4).tolist() == rates


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'expected recorded play'),
    (b'[' * 5000, 'expected recorded play'),
    (b'{"format": "other"}\n', 'expected recorded play'),
    (header_line(version=2), 'expected version 1 of the format, got 2'),
    (header_line(steps_per_checksum=7), 'expected 50 steps a checksum, got 7'),
    (header_line(num_actions='4'), 'expected a header with'),
    (header_line(more=1), 'expected a header with'),
    (header_line(num_actions=19), '1 to 18 actions'),
    (header_line(environment_name='brekout'), r"breakout\.play: unknown game 'brekout'"),
    (header_line(), 'expected at least one block'),
    (header_line() + b'abc', 'block 0: expected a length'),
    (header_line() + struct.pack('<II', 2**31, 0), 'block 0: expected 4194304 bytes or less'),
    (header_line() + episodes_block()[:-1], 'is it cut short'),
    (header_line() + episodes_block()[:-1] + b'x', 'block 0: expected its checksum'),
    (header_line() + block(b''), 'expected 4 bytes of <u4'),
    (header_line() + struct.pack('<II', 20, google_crc32c.value(b'x' * 20)) + b'x' * 20, 'an .xz'),
    (header_line() + block(bytes(2**25)), 'of 4194304 bytes or less, got more'),
    (header_line() + checked(lzma.compress(b'x')[:-9]), 'expected a whole .xz.*got its beginning'),
    (header_line() + block(struct.pack('<I', 2**32 - 1)), 'bytes of <u4'),
    (header_line() + episodes_block((), (), (), (), b''), 'episodes of 1 to 27000 steps'),
    (header_line() + episodes_block(lengths=(0,), codes=b''), 'episodes of 1 to 27000 steps'),
    (header_line() + episodes_block(lengths=(27001,)), 'episodes of 1 to 27000 steps'),
    (header_line() + episodes_block(lengths=(3,)), 'expected 3 bytes of u1'),
    (header_line() + episodes_block(seeds=(2**31,)), 'seeds below'),
    (header_line() + episodes_block(epsilons=(float('nan'),)), r'rates in \[0, 1\]'),
    (header_line() + episodes_block((1, 1), (1, 1), (0, 0), (0, 1)), 'episodes that ended'),
    (header_line() + episodes_block(codes=b'\0\4'), 'expected actions 0 to 3, got 4'),
    (header_line() + episodes_block(more=b'\0'), 'nothing after its last step'),
    (header_line() + episodes_block(ended=(0,)) + episodes_block(), 'expected nothing after an ep'),
  ],
)  # fmt: skip
def test_damage_is_named(path, content: bytes, message: str):
  path.write_bytes(content)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(ValueError, match=message):
    for _ in recorded.read(path)[1]:
      pass
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # kB


def test_other_than_regular_files(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(OSError, match='expected a regular file'):
    recorded.read(tmp_path / 'pipe')
  with pytest.raises(FileNotFoundError, match=r'none\.play: no such recording'):
    recorded.read(tmp_path / 'none.play')


# The command.


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'command': ()}, 'expected one command, expand or verify'),
    ({'command': ('verify',)}, '--path=None: expected the path of a recording'),
    ({'command': ('expand',), 'path': 'x'}, '--replay_dir=None: expected where to write shards'),
    ({'command': ('verify',), 'path': 'x', 'num_processes': 0}, '--num_processes=0'),
  ],
)
def test_bad_flags(settings, message):
  with pytest.raises(ValueError, match=message):
    recorded.Config(**settings)


def test_the_commands(path, tmp_path, caplog):
  caplog.set_level('INFO', logger='absl')
  recorded.main(recorded.Config(('verify',), str(path), num_processes=1))
  recorded.main(recorded.Config(('expand',), str(path), str(tmp_path / 'logs'), num_processes=1))
  assert 'come out as recorded' in caplog.text and 'expanded to' in caplog.text
  assert dqn_replay.open_shards(tmp_path / 'logs')
