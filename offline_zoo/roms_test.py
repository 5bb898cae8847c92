"""Tests for roms.py, with a source distribution of made-up ROMs."""

import hashlib
import os
import subprocess
import sys
import tarfile

import pytest

from offline_zoo import atari_data, roms

ROMS = {f'{g.name}.bin': g.name.encode() for g in atari_data.GAMES if g.name != 'surround'}
# Says what pip asks a package before it calls it downloaded; needs nothing installed.
BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(directory, config_settings=None):
  name = 'atari_py-0.2.5.dist-info'
  metadata = pathlib.Path(directory, name)
  metadata.mkdir()
  (metadata / 'METADATA').write_text('Metadata-Version: 2.1\\nName: atari-py\\nVersion: 0.2.5\\n')
  return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def sdist(tmp_path, monkeypatch):
  """The archive, and checksums as it has them."""
  source = tmp_path / 'source'
  (source / 'atari_py' / 'atari_roms').mkdir(parents=True)
  (source / 'backend.py').write_text(BACKEND)
  (source / 'pyproject.toml').write_text(PYPROJECT)
  for name, rom in {**ROMS, 'kaboom.bin': b'no game of ours'}.items():
    (source / 'atari_py' / 'atari_roms' / name).write_bytes(rom)
  path = tmp_path / 'index' / f'{roms.SDIST}.tar.gz'
  path.parent.mkdir()
  with tarfile.open(path, 'w:gz') as archive:
    archive.add(source, roms.SDIST)
  monkeypatch.setattr(roms, 'SDIST_SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
  md5s = {g.name: hashlib.md5(g.name.encode()).hexdigest() for g in atari_data.GAMES}
  table = {**{name: ('', md5) for name, md5 in md5s.items()}, 'surround': ('', None)}
  monkeypatch.setattr(atari_data, '_ROM_MD5', table)
  # As a user names a mirror: pip looks nowhere else.
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(path.parent))
  return path


def contents(directory) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_roms_of_a_file_that_is_here(sdist, tmp_path):
  rom_dir = tmp_path / 'new' / 'roms'
  for _ in range(2):  # the second time finds them there
    roms.fetch(rom_dir, sdist)
    assert contents(rom_dir) == ROMS
  assert [path.name for path in rom_dir.parent.iterdir()] == ['roms']


def test_pip_downloads_them(sdist, tmp_path):
  roms.fetch(tmp_path / 'roms')
  assert contents(tmp_path / 'roms') == ROMS


def test_pip_does_not_run_another_package(sdist, tmp_path, monkeypatch):
  monkeypatch.setattr(roms, 'SDIST_SHA256', '0' * 64)
  with pytest.raises(OSError, match=r'pip could not download .*HASHES.*name it with --sdist'):
    roms.fetch(tmp_path / 'roms')
  assert not list(tmp_path.glob('*roms*'))


def test_what_pip_cannot_find(sdist, tmp_path):
  sdist.unlink()
  with pytest.raises(OSError, match=r'could not download .*\(No matching distribution.*--sdist'):
    roms.fetch(tmp_path / 'roms')


def test_another_archive_is_refused(sdist, tmp_path):
  sdist.write_bytes(sdist.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'atari-py-0\.2\.5\.tar\.gz: expected .*, got [0-9a-f]{64}'):
    roms.fetch(tmp_path / 'roms', sdist)
  assert not list(tmp_path.glob('*roms*'))


def test_another_rom_is_refused(sdist, tmp_path, monkeypatch):
  monkeypatch.setitem(atari_data._ROM_MD5, 'pong', ('', '0' * 32))
  with pytest.raises(ValueError, match=r'expected a pong\.bin of MD5 0{32}'):
    roms.fetch(tmp_path / 'roms', sdist)
  assert not list(tmp_path.glob('*roms*'))


def test_nothing_is_overwritten(sdist, tmp_path):
  (tmp_path / 'roms').mkdir()
  (tmp_path / 'roms' / 'pong.bin').write_bytes(b'mine')
  with pytest.raises(FileExistsError, match=r'--rom_dir=.*roms: exists'):
    roms.fetch(tmp_path / 'roms', sdist)
  assert contents(tmp_path / 'roms') == {'pong.bin': b'mine'}


def test_the_command(sdist, tmp_path):
  run = subprocess.run(
    [sys.executable, '-m', 'offline_zoo.roms', 'fetch', f'--sdist={sdist}'],
    env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}, capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  assert run.returncode == 1  # it is the real one's checksum that it expects
  assert run.stderr == (
    f'error: {sdist}: expected atari-py-0.2.5.tar.gz, SHA-256 681b4812d5d83edaee00f2e61a042bc72'
    f'33adaea99902f8bdea55b64008fc1e2, got {roms.SDIST_SHA256}\n'
  )
