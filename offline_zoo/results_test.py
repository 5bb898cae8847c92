"""Tests for results.py: what a run leaves, to whom it belongs and how a run goes on from it."""

import csv
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
import sys
import time
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from offline_zoo import checkpoints, results

# The CSV.


def read_csv(path) -> list[dict[str, str]]:
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def test_csv_rows_read_back_and_none_is_empty(tmp_path):
  path = tmp_path / 'new' / 'results.csv'
  writer = results.CsvWriter(path)
  assert not path.exists()
  rows = [{'iteration': 1, 'loss': 0.1 + 0.2, 'normalized_return': None}]
  writer.write(rows)
  rows.append({'iteration': 2, 'loss': 1e-9, 'normalized_return': 0.5})
  writer.write(rows)
  got = read_csv(path)
  assert [float(row['loss']) for row in got] == [0.1 + 0.2, 1e-9]
  assert [row['normalized_return'] for row in got] == ['', '0.5']
  assert os.listdir(path.parent) == ['results.csv']
  writer.write([])
  assert os.listdir(path.parent) == []


def test_a_failing_csv_write_names_the_file_and_leaves_the_old_rows(tmp_path, monkeypatch):
  writer = results.CsvWriter(tmp_path / 'results.csv')
  writer.write([{'iteration': 1}])

  def full_disk(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match=f"No space left on device: '{writer.path}'"):
    writer.write([{'iteration': 1}, {'iteration': 2}])
  assert len(read_csv(writer.path)) == 1
  assert os.listdir(tmp_path) == ['results.csv']


def test_a_long_name_can_be_written(tmp_path):
  writer = results.CsvWriter(tmp_path / ('x' * 250))
  writer.write([{'iteration': 1}])
  assert len(read_csv(writer.path)) == 1


# A run of two parameters.


@dataclasses.dataclass(frozen=True)
class Config:
  results_csv_path: str | None = None
  checkpoint_dir: str | None = None
  environment_name: str = 'pong'
  seed: int = 1
  num_seeds: int = 1
  num_iterations: int = 10
  num_updates_per_iteration: int = 4
  eval_steps: int = 1
  learning_rate: float = 0.1
  keep_checkpoints: str = 'last'
  tensorboard_dir: str | None = None
  video_dir: str | None = None
  num_eval_workers: int | None = None


class Learner:
  def __init__(self):
    self.state = {'w': np.zeros(3, np.float32)}

  def get_state(self):
    return {'w': self.state['w'].copy()}

  def set_state(self, state):
    self.state = state


LOGS = types.SimpleNamespace(
  checksum='abc', num_resident_shards=2, num_transitions=7, mean_episode_return=math.nan
)


@pytest.fixture
def config(tmp_path) -> Config:
  return Config(str(tmp_path / 'run' / 'results.csv'))


def go_on(config: Config, num_iterations: int = 1):
  """Begins or goes on, for so many iterations; iteration i leaves the parameters at i."""
  run = results.Results(config, 'dqn')
  learner = Learner()
  progress = run.resume(learner, LOGS)
  for _ in range(num_iterations):
    learner.state = {'w': np.full(3, progress.iteration, np.float32)}
    for index in range(config.num_seeds):
      row = {
        'environment_name': 'pong', 'seed': config.seed + index, 'iteration': progress.iteration,
        'num_updates': 4 * progress.iteration, 'frame': 64 * progress.iteration, 'loss': 0.5,
        'eval_episode_return': -progress.iteration * (-2) ** index,
      }  # fmt: skip
      progress.rows.append(row)
    progress.begin_next_iteration()
    run.save(learner.get_state(), progress)
  return run, learner, progress


def tree(directory: pathlib.Path) -> dict[str, tuple[int, bytes]]:
  """Every file and directory, with what would show that it was touched."""
  return {
    str(path.relative_to(directory)): (
      path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b'',
    )
    for path in directory.rglob('*')
  }  # fmt: skip


def test_a_run_goes_on_from_its_newest_checkpoint(config, tmp_path):
  go_on(config, 2)
  _, learner, progress = go_on(config, 0)
  assert progress.iteration == 3 and [row['iteration'] for row in progress.rows] == [1, 2]
  assert learner.state['w'].tolist() == [2, 2, 2]
  assert sorted(os.listdir(tmp_path / 'run')) == [
    '.lock',
    'checkpoint',
    'config.json',
    'results.csv',
  ]


# One run at a time.


def test_a_second_start_touches_nothing(config, tmp_path):
  running = go_on(config)
  (tmp_path / 'run' / 'checkpoint' / '.partial').mkdir()  # a save under way
  (tmp_path / 'run' / 'checkpoint' / '9.orbax-checkpoint-tmp').mkdir()
  before = tree(tmp_path)
  elsewhere = {'checkpoint_dir': str(tmp_path / 'run' / 'checkpoint')}
  for changes in ({}, {'results_csv_path': str(tmp_path / 'other' / 'x.csv'), **elsewhere}):
    with pytest.raises(BlockingIOError, match=f'^{tmp_path}.*: another run is writing'):
      results.Results(dataclasses.replace(config, **changes), 'dqn')
  assert tree(tmp_path) == before
  del running
  go_on(config)


def test_a_second_start_before_the_first_save(config):
  running = go_on(config, 0)
  with pytest.raises(BlockingIOError, match='another run is writing'):
    results.Results(config, 'dqn')
  del running


def test_two_starts_at_once(config, tmp_path):
  first, second, third = (results.Results(config, 'dqn') for _ in range(3))
  assert not (tmp_path / 'run').exists()
  learner = Learner()
  progress = first.resume(learner, LOGS)
  with pytest.raises(BlockingIOError, match='another run is writing'):
    second.resume(Learner(), LOGS)
  first.save(learner.get_state(), progress)
  del first
  with pytest.raises(BlockingIOError, match='another run has begun here meanwhile'):
    third.resume(Learner(), LOGS)


def test_record_and_state_are_of_one_checkpoint(config):
  go_on(config, 2)
  second = results.Results(config, 'dqn')
  assert second.progress.iteration == 3
  newer = checkpoints.Checkpoints(pathlib.Path(config.results_csv_path).parent / 'checkpoint')
  newer.save({'w': np.full(3, 99, np.float32)}, {})
  learner = Learner()
  assert second.resume(learner, LOGS).iteration == 3
  assert learner.state['w'].tolist() == [2, 2, 2]


def test_results_and_checkpoints_in_one_directory(config, tmp_path):
  config = dataclasses.replace(config, checkpoint_dir=str(tmp_path / 'run' / '..' / 'run'))
  running = go_on(config)
  with pytest.raises(BlockingIOError):
    results.Results(config, 'dqn')
  del running
  (tmp_path / 'run' / '.partial').mkdir()  # left by a save that was killed
  assert go_on(config)[2].iteration == 3


def test_a_lock_is_neither_followed_nor_emptied(config, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / '.lock').write_text('mine')
  go_on(config)
  assert (tmp_path / 'run' / '.lock').read_text() == 'mine'
  (tmp_path / 'run' / '.lock').unlink()
  (tmp_path / 'notes.txt').write_text('mine')
  (tmp_path / 'run' / '.lock').symlink_to(tmp_path / 'notes.txt')
  with pytest.raises(OSError, match=r'\.lock'):
    go_on(config)
  assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_a_place_that_cannot_be_locked_is_named(config, tmp_path, monkeypatch):
  def no_locks(*args):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with pytest.raises(OSError, match=r"No locks available: '.*/run/\.lock'"):
    go_on(config)


# Damaged checkpoints.


def damage(config: Config, name: str) -> None:
  """Flips a bit of a parameter."""
  checkpoint = pathlib.Path(config.results_csv_path).parent / 'checkpoint' / name
  path = checkpoint / 'state' / '0000' / '0'
  contents = bytearray(path.read_bytes())
  contents[len(contents) // 2] ^= 1
  path.write_bytes(contents)


def test_the_checkpoint_before_a_damaged_one_is_used_and_said(config, tmp_path, caplog):
  go_on(config, 2)
  damage(config, 'step_2')
  assert len(read_csv(config.results_csv_path)) == 2
  run, learner, progress = go_on(config, 0)
  assert 'step_2 is damaged' in caplog.text and 'using step_1' in caplog.text
  assert progress.iteration == 2 and learner.state['w'].tolist() == [1, 1, 1]
  assert len(read_csv(config.results_csv_path)) == 1
  del run
  _, _, progress = go_on(config, 2)
  assert progress.iteration == 4
  assert len(read_csv(config.results_csv_path)) == 3
  assert sorted(os.listdir(tmp_path / 'run' / 'checkpoint')) == ['.lock', 'step_3', 'step_4']
  caplog.clear()
  assert go_on(config, 0)[1].state['w'].tolist() == [3, 3, 3]
  assert not caplog.text


def test_a_fallback_to_before_the_first_row(config):
  run, learner, progress = go_on(config, 0)
  run.save(learner.get_state(), progress)  # as a signal in the first iteration does
  del run
  go_on(config)
  damage(config, 'step_2')
  _, _, progress = go_on(config, 0)
  assert progress.rows == [] and not os.path.exists(config.results_csv_path)


def test_no_whole_checkpoint_is_an_error(config, tmp_path):
  go_on(config, 2)
  for name in ('step_1', 'step_2'):
    damage(config, name)
  before = tree(tmp_path)
  with pytest.raises(ValueError, match=f'^{tmp_path}/run/checkpoint: no checkpoint is whole'):
    results.Results(config, 'dqn')
  assert tree(tmp_path) == before


def rewrite_record(config: Config, change) -> None:
  """Changes the newest record, as damage that its checksum does not show."""
  path = pathlib.Path(config.results_csv_path).parent / 'checkpoint' / 'step_2' / 'record.json'
  contents = json.loads(path.read_bytes().partition(b'\n')[2])
  contents['record'] = change(contents['record'])
  text = json.dumps(contents).encode()
  path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b'\n' + text)


def in_progress(name: str, value):
  def change(record):
    record['progress'][name] = value
    return record

  return change


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda record: {}, '"identity"'),
    (lambda record: None, '"identity"'),
    (lambda record: [record], '"identity"'),
    (lambda record: {**record, 'identity': 'x'}, '"agent"'),
    (lambda record: {**record, 'identity': {'agent': 'dqn', 'flags': []}}, r'flags are \[\]'),
    (lambda record: {**record, 'progress': {}}, '"num_updates"'),
    (in_progress('num_updates', -5), 'num_updates -5'),
    (in_progress('num_updates', 5), 'num_updates 5'),
    (in_progress('num_updates', True), 'num_updates True'),
    (in_progress('num_updates', '1'), 'num_updates 1'),
    (in_progress('metric_sums', []), r'metric_sums \[\]'),
    (in_progress('metric_sums', {'loss': None}), 'metric_sums'),
    (in_progress('metric_sums', {'loss': float('nan')}), 'metric_sums'),
    (in_progress('seconds', -1.0), r'seconds -1\.0'),
    (in_progress('seconds', {}), 'seconds'),
    (in_progress('num_resident_shards', 0), 'num_resident_shards 0'),
    (in_progress('rows', {}), 'rows'),
    (in_progress('rows', [1]), 'rows'),
    (in_progress('rows', [{}]), 'rows'),
    (in_progress('rows', [{'environment_name': 'pong'}]), 'rows'),
  ],
)
def test_records_that_no_run_has(config, tmp_path, change, message):
  go_on(config, 2)
  rewrite_record(config, change)
  before = tree(tmp_path)
  with pytest.raises(ValueError, match=f'step_2: .*{message}'):
    results.Results(config, 'dqn')
  assert tree(tmp_path) == before


def test_rows_of_several_seeds(config, tmp_path):
  config = dataclasses.replace(
    config, seed=5, num_seeds=2, keep_checkpoints='best', tensorboard_dir=str(tmp_path / 'board'),
    video_dir=str(tmp_path / 'video'),
  )  # fmt: skip
  go_on(config, 2)
  run, _, progress = go_on(config, 2)
  assert progress.iteration == 5
  table = [(row['seed'], row['iteration']) for row in read_csv(config.results_csv_path)]
  assert table == [(str(seed), str(i)) for i in (1, 2, 3, 4) for seed in (5, 6)]
  # Iteration i has -i and 2 i: the mean's best is the last.
  kept = sorted(path.name for path in (tmp_path / 'run' / 'checkpoint').glob('step_*'))
  assert kept == ['step_3', 'step_4']
  for index, seed in enumerate((5, 6)):
    *_, (name, step, value) = scalars(tmp_path / 'board' / 'dqn' / 'pong' / str(seed))
    assert (name, step, value) == ('eval_episode_return', 16, -4 * (-2) ** index)
    assert run.video_path(seed, 3) == tmp_path / 'video' / 'dqn' / 'pong' / str(seed) / '3.mp4'
  del run  # and its locks
  with pytest.raises(ValueError, match='its --num_seeds is 2, not 3'):
    results.Results(dataclasses.replace(config, num_seeds=3), 'dqn')
  path = pathlib.Path(config.results_csv_path)
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([lines[0], lines[2], lines[1], *lines[3:]]))
  with pytest.raises(FileExistsError, match="is not this run's"):
    results.Results(config, 'dqn')


def test_records_that_no_run_of_several_seeds_has(config):
  config = dataclasses.replace(config, num_seeds=2)
  _, _, progress = go_on(config, 2)
  rewrite_record(config, in_progress('metric_sums', {'loss': [0.5, 1.5]}))
  assert results.Results(config, 'dqn').progress.metric_sums == {'loss': [0.5, 1.5]}
  for name, value in (
    ('rows', progress.rows[:3]),
    ('rows', [progress.rows[i] for i in (1, 0, 2, 3)]),
    ('metric_sums', {'loss': 0.5}),
    ('metric_sums', {'loss': [0.5]}),
    ('metric_sums', {'loss': [0.5, None]}),
  ):
    rewrite_record(config, in_progress(name, value))
    with pytest.raises(ValueError, match=f'no run has {name}'):
      results.Results(config, 'dqn')


# Files that are not ours.


@pytest.mark.parametrize(
  'name, text',
  [
    ('notes.txt', 'buy milk\n'),
    ('thesis.tex', '\\documentclass{book}\n'),
    ('empty.csv', ''),
    ('bytes', '\0\udcff'),
    ('other.csv', 'a,b\n1,2\n'),
    ('seed.csv', 'environment_name,seed,iteration,num_updates,frame\npong,2,1,4,64\n'),
    ('game.csv', 'environment_name,seed,iteration,num_updates,frame\nqbert,1,1,4,64\n'),
    ('row.csv', 'environment_name,seed,iteration,num_updates,frame\npong,1,2,8,128\n'),
    ('short.csv', 'environment_name,seed,iteration,num_updates,frame\npong,1,1\n'),
  ],
)
def test_a_file_that_is_not_our_csv_is_kept(config, tmp_path, name, text):
  """Though there is a checkpoint of the same run."""
  go_on(config)
  path = tmp_path / name
  path.write_text(text, errors='surrogateescape')
  before = tree(tmp_path)
  checkpoint_dir = str(tmp_path / 'run' / 'checkpoint')
  with pytest.raises(FileExistsError, match=f"{name}: exists, and is not this run's"):
    go_on(dataclasses.replace(config, results_csv_path=str(path), checkpoint_dir=checkpoint_dir))
  assert tree(tmp_path) == before


def test_the_csv_of_another_run_of_this_game_and_seed_is_kept(config, tmp_path):
  go_on(config)
  other = Config(str(tmp_path / 'other' / 'results.csv'), learning_rate=0.2)
  go_on(other)
  before = tree(tmp_path)
  checkpoint_dir = str(tmp_path / 'other' / 'checkpoint')
  with pytest.raises(ValueError, match=r'config\.json: of another run: its --learning_rate'):
    go_on(dataclasses.replace(config, checkpoint_dir=checkpoint_dir, learning_rate=0.2))
  assert tree(tmp_path) == before


@pytest.mark.parametrize('with_checkpoint', [False, True])
@pytest.mark.parametrize(
  'text', ['', '{}', '[]', '3', '{"agent": "dqn"', '{"name": "app"}', '[' * 10**5, '\0',
           '{"agent": "dqn", "flags": {}, "sessions": [1]}',
           '{"agent": "dqn", "flags": [], "sessions": []}'],
)  # fmt: skip
def test_a_config_json_that_is_not_ours_is_kept(config, tmp_path, text, with_checkpoint):
  if with_checkpoint:
    go_on(config)
  (tmp_path / 'run').mkdir(exist_ok=True)
  (tmp_path / 'run' / 'config.json').write_text(text)
  before = tree(tmp_path)
  with pytest.raises(FileExistsError, match=r'config\.json: exists, and is not the config\.json'):
    results.Results(config, 'dqn')
  assert tree(tmp_path) == before


def test_links_and_special_files_are_neither_replaced_nor_waited_for(config, tmp_path):
  go_on(config)
  path = pathlib.Path(config.results_csv_path)
  path.rename(tmp_path / 'mine.csv')
  for make in (lambda: path.symlink_to(tmp_path / 'mine.csv'), lambda: os.mkfifo(path)):
    make()
    with pytest.raises(OSError, match=f'^--results_csv_path={path}: .* link or special file'):
      results.Results(config, 'dqn')
    path.unlink()
  config_path = path.with_name('config.json')
  config_path.rename(tmp_path / 'mine.json')
  for make in (
    lambda: config_path.symlink_to(tmp_path / 'mine.json'),
    lambda: os.mkfifo(config_path),
    config_path.mkdir,
  ):
    make()
    with pytest.raises(FileExistsError, match=f'^{config_path}: exists'):
      results.Results(config, 'dqn')
    config_path.rmdir() if config_path.is_dir() else config_path.unlink()
  go_on(config)


# Paths that cannot work.


@pytest.mark.parametrize(
  'csv_path, checkpoint_dir, message',
  [
    ('.', None, '--results_csv_path=.*is a directory, expected a file'),
    ('file/results.csv', None, '--results_csv_path=.*Not a directory'),
    ('/proc/none/results.csv', None, '--results_csv_path=/proc/none/results.csv: cannot be'),
    ('gs://bucket/results.csv', None, '--results_csv_path=gs://.*only local directories work'),
    ('x' * 256, None, '--results_csv_path=.*File name too long'),
    ('new/' + 'x' * 256, None, '--results_csv_path=.*File name too long'),
    ('x/' * 2000 + 'results.csv', None, '--results_csv_path=.*File name too long'),
    ('caf\udce9.csv', None, '--results_csv_path=.*UTF-8'),
    ('run/checkpoint', None, '--checkpoint_dir=.*is to be a file'),
    ('run/config.json', None, '--results_csv_path=.*another file has that name'),
    ('run/.lock', None, '--results_csv_path=.*another file has that name'),
    ('run/x.csv', 'file', '--checkpoint_dir=.*Not a directory'),
    ('run/x.csv', 'file/below', '--checkpoint_dir=.*Not a directory'),
    ('run/x.csv', '/proc/none', '--checkpoint_dir=/proc/none: cannot be written'),
    ('run/x.csv', 's3://bucket/x', '--checkpoint_dir=s3://.*only local directories work'),
    ('run/x.csv', 'x' * 256, '--checkpoint_dir=.*File name too long'),
    ('run/x.csv', 'caf\udce9', '--checkpoint_dir=.*UTF-8'),
    ('run/x.csv', 'run/x.csv', '--checkpoint_dir=.*x.csv is to be a file'),
    ('run/x.csv', 'run/config.json/y', '--checkpoint_dir=.*config.json is to be a file'),
    ('run/step_1', 'run', '--results_csv_path=.*step_1 is to be a checkpoint'),
    ('run/.partial/x.csv', 'run', '--results_csv_path=.*partial is to be a checkpoint'),
  ],
)
def test_paths_that_cannot_work_are_named(tmp_path, csv_path, checkpoint_dir, message):
  (tmp_path / 'file').touch()

  def below(path: str | None) -> str | None:
    return path if path is None or '://' in path else os.path.join(tmp_path, path)

  with pytest.raises((ValueError, OSError), match=f'^{message}'):
    results.Results(Config(below(csv_path), below(checkpoint_dir)), 'dqn')
  assert os.listdir(tmp_path) == ['file']


def test_a_disk_without_space_for_a_checkpoint_is_named(config, monkeypatch):
  run, learner, progress = go_on(config)

  def full_disk(dir):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(checkpoints.tempfile, 'TemporaryFile', full_disk)
  with pytest.raises(OSError, match=r'^/.*/run/checkpoint: .*No space left on device'):
    run.save(learner.get_state(), progress)


# What else a run may leave.


def scalars(directory: pathlib.Path) -> list[tuple[str, float, float | None]]:
  """Reads TensorBoard's files: (tag, step, value); no tag where what is after step is forgotten."""
  found = []
  for path in sorted(directory.iterdir()):
    content = path.read_bytes()
    while content:  # length [8], its checksum [4], an event, its checksum [4]
      length = int.from_bytes(content[:8], 'little')
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      if event.HasField('session_log'):
        found.append(('', event.step, None))
      found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
  return found


def test_tensorboard_has_the_rows(tmp_path):
  rows = [
    {'environment_name': 'pong', 'seed': 1, 'iteration': i, 'num_updates': 10 * i, 'loss': i / 4,
     'normalized_return': None}
    for i in (1, 2, 3)
  ]  # fmt: skip
  writer = results.TensorBoard(tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
  writer.write(rows[:1])
  writer.write(rows[:2])
  first = [('', 0, None), ('loss', 10, 0.25), ('loss', 20, 0.5)]
  assert scalars(tmp_path / 'new') == first
  # Another process, after a kill: what there was is forgotten and written again.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(time, 'time', lambda: 2e9)  # and later, which its file's name says
    results.TensorBoard(tmp_path / 'new').write(rows)
  assert scalars(tmp_path / 'new') == [*first, *first, ('loss', 30, 0.75)]


def test_tensorboard_without_its_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(ValueError, match='--tensorboard_dir: needs tensorboardX, which the extra'):
    results.TensorBoard(tmp_path)


def test_a_kept_score_is_of_the_state_that_was_evaluated(config, tmp_path):
  """Iteration i evaluates at -i: the first is the best."""
  go_on(dataclasses.replace(config, keep_checkpoints='best'), 4)
  kept = sorted(path.name for path in (tmp_path / 'run' / 'checkpoint').glob('step_*'))
  assert kept == ['step_1', 'step_3', 'step_4']
  best = checkpoints.Checkpoints(tmp_path / 'run' / 'checkpoint').restore_one('best')
  assert best.arrays["['w']"].tolist() == [1, 1, 1]
