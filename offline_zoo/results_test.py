"""Tests for results.py: the CSV and checkpoints."""

import csv
import io
import os
import resource

import numpy as np
import pytest

from offline_zoo import results


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


def test_a_failing_csv_write_leaves_the_old_rows(tmp_path, monkeypatch):
  writer = results.CsvWriter(tmp_path / 'results.csv')
  writer.write([{'iteration': 1}])

  def full_disk(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space'):
    writer.write([{'iteration': 1}, {'iteration': 2}])
  assert len(read_csv(writer.path)) == 1
  assert os.listdir(tmp_path) == ['results.csv']


def test_csv_paths_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').touch()
  for path in (tmp_path, tmp_path / 'file' / 'results.csv', '/proc/none/results.csv'):
    with pytest.raises(OSError, match='--results_csv_path='):
      results.CsvWriter(path)


def state(value: float, width: int = 3):
  return {'w': np.full(width, value, np.float32), 'n': np.array(value, np.int32)}


def test_checkpoints_restore_the_newest_bit_for_bit(tmp_path):
  checkpoint = results.Checkpoint(tmp_path / 'checkpoint')
  assert checkpoint.restore_record() is None
  for value in (0.1, 0.2, 0.3):
    checkpoint.save(state(value), {'rows': [value, None, 'x'], 'nested': {'sum': value / 3}})
  record = results.Checkpoint(tmp_path / 'checkpoint').restore_record()
  assert record == {'rows': [0.3, None, 'x'], 'nested': {'sum': 0.3 / 3}}
  restored = checkpoint.restore_state(state(0))
  np.testing.assert_array_equal(restored['w'], state(0.3)['w'])
  assert restored['n'].dtype == np.int32
  assert len(os.listdir(tmp_path / 'checkpoint')) == 1  # the older ones are gone


@pytest.mark.parametrize('other', [state(0, 4), {'v': np.zeros(3, np.float32)}])
def test_a_checkpoint_of_another_network_is_refused(tmp_path, other):
  checkpoint = results.Checkpoint(tmp_path)
  checkpoint.save(state(1), {})
  with pytest.raises(ValueError, match='another network') as error:
    checkpoint.restore_state(other)
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_a_damaged_checkpoint_is_named(tmp_path):
  checkpoint = results.Checkpoint(tmp_path)
  checkpoint.save(state(1), {'a': 1})
  for path in tmp_path.rglob('*'):
    if path.is_file() and 'record' in str(path):
      path.write_text('{')
  with pytest.raises(ValueError, match='damaged'):
    checkpoint.restore_record()


def test_a_checkpoint_directory_that_is_a_file(tmp_path):
  (tmp_path / 'file').touch()
  for path in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/none/checkpoint'):
    with pytest.raises(OSError, match='--checkpoint_dir='):
      results.Checkpoint(path)


def test_a_disk_that_fills_up_under_orbax_leaves_the_last_checkpoint(tmp_path, monkeypatch):
  """Files of at most 100 kB; without the claim of space that `save` begins with."""
  checkpoint = results.Checkpoint(tmp_path)
  checkpoint.save(state(0.1), {'number': 1})
  noise = {'w': np.random.default_rng(0).random(10**6), 'n': np.zeros((), np.int32)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with monkeypatch.context() as patch:
    patch.setattr(results.tempfile, 'TemporaryFile', lambda dir: io.BytesIO())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
      with pytest.raises(OSError, match='could not write a checkpoint'):
        checkpoint.save(noise, {'number': 2})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  again = results.Checkpoint(tmp_path)
  assert again.restore_record() == {'number': 1}
  np.testing.assert_array_equal(again.restore_state(state(0))['w'], state(0.1)['w'])
  again.save(state(0.2), {'number': 3})
  assert again.restore_record() == {'number': 3}
