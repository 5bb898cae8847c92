"""Tests for checkpoints.py."""

import io
import json
import os
import pathlib
import resource
import shutil

import numpy as np
import pytest

from offline_zoo import checkpoints


def state(value: float, width: int = 3):
  return {'w': np.full(width, value, np.float32), 'n': np.array(value, np.int32)}


def names(directory: pathlib.Path) -> list[str]:
  return sorted(os.listdir(directory))


@pytest.fixture
def two(tmp_path):
  """The checkpoints 1 and 2 in a directory."""
  saved = checkpoints.Checkpoints(tmp_path)
  for number in (1, 2):
    saved.save(state(number / 10, width=1000), {'number': number, 'third': number / 3})
  return tmp_path


def test_the_newest_is_restored_bit_for_bit_and_two_are_kept(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path / 'new')
  assert saved.restore() is None and not saved.exist()
  for value in (0.1, 0.2, 0.3):
    saved.save(state(value), {'rows': [value, None, 'x'], 'nested': {'sum': value / 3}})
  assert names(tmp_path / 'new') == ['step_2', 'step_3']
  restored = checkpoints.Checkpoints(tmp_path / 'new').restore()
  assert restored.record == {'rows': [0.3, None, 'x'], 'nested': {'sum': 0.3 / 3}}
  got = restored.state(state(0))
  np.testing.assert_array_equal(got['w'], state(0.3)['w'], strict=True)
  np.testing.assert_array_equal(got['n'], np.int32(0), strict=True)


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
  for name in ('2023', 'step_x', 'step_01', 'notes'):
    (tmp_path / name).mkdir()
  saved = checkpoints.Checkpoints(tmp_path)
  for value in range(3):
    saved.save(state(value), {})
  assert names(tmp_path) == ['2023', 'notes', 'step_01', 'step_2', 'step_3', 'step_x']


@pytest.mark.parametrize(
  'other, message',
  [
    (state(0, 4), r"\['w'\] is float32 \[3\], expected float32 \[4\]"),
    ({**state(0), 'n': np.zeros((), np.int64)}, r"\['n'\] is int32 \[\], expected int64 \[\]"),
    ({'w': state(0)['w']}, r"\['n'\] is int32 \[\], expected nothing"),
    ({**state(0), 'v': np.zeros(1)}, r"\['v'\] is nothing, expected float64 \[1\]"),
  ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, other, message):
  checkpoints.Checkpoints(tmp_path).save(state(1), {})
  with pytest.raises(ValueError, match=f'step_1: checkpoint of another network: {message}'):
    checkpoints.Checkpoints(tmp_path).restore().state(other)


def test_every_flipped_bit_is_noticed(two, caplog):
  """Two bits of each file of the newest checkpoint, one after the other."""
  rng = np.random.default_rng(0)
  files = sorted(path for path in (two / 'step_2').rglob('*') if path.is_file())
  num_flips = 0
  for path in files * 2:
    original = path.read_bytes()
    if not original:
      continue
    changed = bytearray(original)
    changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    path.write_bytes(changed)
    caplog.clear()
    restored = checkpoints.Checkpoints(two).restore()
    path.write_bytes(original)
    assert restored.record == {'number': 1, 'third': 1 / 3}
    np.testing.assert_array_equal(restored.arrays["['w']"], state(0.1, 1000)['w'])
    assert 'step_2 is damaged' in caplog.text and 'using step_1' in caplog.text
    num_flips += 1
  assert num_flips >= 12
  caplog.clear()
  assert checkpoints.Checkpoints(two).restore().record['number'] == 2
  assert not caplog.text


def test_missing_and_additional_files_are_noticed(two):
  (two / 'step_2' / 'state' / '0000' / 'other').touch()
  assert checkpoints.Checkpoints(two).restore().record['number'] == 1
  shutil.rmtree(two / 'step_1' / 'state' / '0001')
  with pytest.raises(ValueError, match=r'no checkpoint is whole: step_2 .*other.*; step_1 .*0001'):
    checkpoints.Checkpoints(two).restore()
  os.mkfifo(two / 'step_3')
  (two / 'step_4').mkdir()
  os.mkfifo(two / 'step_4' / 'record.json')  # not waited for
  with pytest.raises(ValueError, match=r'no checkpoint is whole: step_4 .*; step_3 '):
    checkpoints.Checkpoints(two).restore()


def test_orbax_is_held_to_the_arrays_that_it_was_given(two, monkeypatch):
  restore = checkpoints.ocp.PyTreeCheckpointer.restore

  def other(*args):
    leaves = restore(*args)
    leaves['0001'] = leaves['0001'] + np.float32(1e-6)
    return leaves

  monkeypatch.setattr(checkpoints.ocp.PyTreeCheckpointer, 'restore', other)
  with pytest.raises(ValueError, match=r"\['w'\] has another checksum"):
    checkpoints.Checkpoints(two).restore()


def test_a_save_after_a_fallback(two):
  """It takes a number of its own, and the whole one before is what is kept with it."""
  (two / 'step_2' / 'record.json').write_text('')
  saved = checkpoints.Checkpoints(two)
  assert saved.restore().record['number'] == 1
  saved.save(state(3), {'number': 3})
  assert names(two) == ['step_1', 'step_3']
  assert checkpoints.Checkpoints(two).restore().record == {'number': 3}
  (two / 'step_3' / 'record.json').unlink()
  assert checkpoints.Checkpoints(two).restore().record['number'] == 1


def test_what_a_killed_save_left_is_no_checkpoint(two):
  shutil.copytree(two / 'step_2', two / '.partial')
  assert checkpoints.Checkpoints(two).restore().path == two / 'step_2'
  assert '.partial' in names(two)  # reading removes nothing
  saved = checkpoints.Checkpoints(two)
  saved.save(state(3), {})
  assert '.partial' not in names(two)


def test_a_record_with_its_own_checksum_that_is_no_record(two):
  path = two / 'step_2' / 'record.json'
  for contents in ([], {}, {'record': {}}, {'record': {}, 'files': [], 'arrays': 3}):
    text = json.dumps(contents).encode()
    path.write_bytes(checkpoints.hashlib.sha256(text).hexdigest().encode() + b'\n' + text)
    assert checkpoints.Checkpoints(two).restore().record['number'] == 1


def test_a_disk_that_fills_up_under_orbax_leaves_the_last_checkpoint(tmp_path, monkeypatch):
  """Files of at most 100 kB; without the claim of space that `save` begins with."""
  saved = checkpoints.Checkpoints(tmp_path)
  saved.save(state(0.1), {'number': 1})
  noise = {'w': np.random.default_rng(0).random(10**6), 'n': np.zeros((), np.int32)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.tempfile, 'TemporaryFile', lambda dir: io.BytesIO())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
      with pytest.raises(OSError, match=f'^{tmp_path}: could not write a checkpoint'):
        saved.save(noise, {'number': 2})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert names(tmp_path) == ['step_1']
  again = checkpoints.Checkpoints(tmp_path)
  restored = again.restore()
  assert restored.record == {'number': 1}
  np.testing.assert_array_equal(restored.state(state(0))['w'], state(0.1)['w'])
  again.save(state(0.2), {'number': 3})
  assert again.restore().record == {'number': 3}


@pytest.mark.parametrize(
  'keep, kept',
  [
    ('last', ['1', '12', '23', '34', '45']),
    ('all', ['1', '12', '123', '1234', '12345']),
    # The fourth is of an iteration under way, and the fifth as good as the second.
    ('best', ['1', '12', '23', '234', '45']),
  ],
)
def test_which_checkpoints_are_kept(tmp_path, keep: str, kept: list[str]):
  for number, score in enumerate([3.0, 7.0, 5.0, None, 7.0], start=1):
    saved = checkpoints.Checkpoints(tmp_path, keep)
    saved.restore()  # as another process does that goes on
    saved.save(state(number), {'number': number}, score)
    assert names(tmp_path) == [f'step_{i}' for i in kept[number - 1]]


def test_a_checkpoint_is_found_by_its_number_or_score(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path, 'all')
  for number, score in enumerate([3.0, 7.0, 5.0, None], start=1):
    saved.save(state(number), {'number': number}, score)
  for which, number in (('best', 2), ('3', 3), ('4', 4)):
    found = checkpoints.Checkpoints(tmp_path).restore_one(which)
    assert found.record == {'number': number}
    np.testing.assert_array_equal(found.state(state(0))['w'], state(number)['w'])
  for which in ('5', 'worst'):
    with pytest.raises(ValueError, match=f'no checkpoint {which}; there are: 1, 2, 3, 4'):
      saved.restore_one(which)
  (tmp_path / 'step_2' / 'record.json').write_text('{')
  assert saved.restore_one('best').record == {'number': 3}
  with pytest.raises(ValueError, match=r'step_2: damaged: record\.json has another checksum'):
    saved.restore_one('2')
