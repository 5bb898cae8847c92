"""Tests for frame_encoder.py that are not about frames; those are in frame_store_test.py."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import os, pwd

def nobody(uid):
  raise KeyError(uid)

pwd.getpwuid = nobody
from offline_zoo.encoding import frame_encoder
print(frame_encoder.__file__)
print(frame_encoder.Encoder().num_items, os.listdir())
"""


@pytest.mark.parametrize('home', ['/dev/null/home', None])
def test_nowhere_to_keep_what_is_compiled(tmp_path, home: str | None):
  """A home that cannot be written or none at all, and no room beside the code either."""
  package = tmp_path / 'code' / 'offline_zoo'
  ignored = shutil.ignore_patterns('__pycache__', '*_test.py')
  shutil.copytree(pathlib.Path(__file__).parents[1], package, ignore=ignored)
  (package / 'encoding' / '__pycache__').touch()  # root, too, cannot make a directory of it
  (tmp_path / 'here').mkdir()
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ('HOME', 'XDG_CACHE_HOME', 'NUMBA_CACHE_DIR')
  }
  environment |= {'PYTHONPATH': str(package.parent), 'PYTHONDONTWRITEBYTECODE': '1'}
  if home:
    environment['HOME'] = home
  process = subprocess.run(
    [sys.executable, '-c', SCRIPT], cwd=tmp_path / 'here', env=environment, timeout=120,
    capture_output=True, text=True,
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  file, result = process.stdout.splitlines()
  assert file == str(package / 'encoding' / 'frame_encoder.py')
  # A black piece of each level, and no directory called "~" where the program was started.
  assert result == '(1, 1, 1) []'
  (line,) = process.stderr.splitlines()
  assert 'No place to keep the compiled frame encoder' in line
