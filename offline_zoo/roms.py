"""Fetches the ROMs that the public datasets were logged with, for `--rom_dir`.

  python -m offline_zoo.roms fetch

They are those of atari-py 0.2.5. Of the DQN Replay Dataset's 60 games, 29 have another ROM in
today's ale-py. pip downloads the source distribution from where it downloads all packages, and
nothing of it is installed. Whose the games are, and who may use them, is for the user to settle.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

from absl import logging

from offline_zoo import atari_data, program

SDIST = 'atari-py-0.2.5'
SDIST_SHA256 = '681b4812d5d83edaee00f2e61a042bc7233adaea99902f8bdea55b64008fc1e2'


@dataclasses.dataclass(frozen=True)
class Config:
  """Where from and where to; each field is a flag."""

  rom_dir: str | None = None  # where to; default: ~/.cache/offline_zoo/atari_py_roms
  sdist: str | None = None  # atari-py-0.2.5.tar.gz, if it is here already; default: pip fetches it
  debug: bool = False  # tracebacks for errors


def _download(directory: pathlib.Path) -> pathlib.Path:
  """Has pip download the source distribution, and check it before its set-up script is run."""
  elsewhere = f'download {SDIST}.tar.gz elsewhere and name it with --sdist'
  if not importlib.util.find_spec('pip'):
    raise OSError(f'this Python has no pip to download with: {elsewhere}')
  requirements = directory / 'requirements.txt'
  requirements.write_text(f'atari-py==0.2.5 --hash=sha256:{SDIST_SHA256}\n')
  run = subprocess.run(
    [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
     '--no-deps', '--no-binary=:all:', f'--requirement={requirements}',
     f'--dest={directory}'],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  if run.returncode:
    errors = [line for line in run.stderr.splitlines() if line.startswith('ERROR: ')]
    said = (errors or [run.stderr])[-1].removeprefix('ERROR: ')
    raise OSError(f'pip could not download {SDIST} ({said}): {elsewhere}')
  return directory / f'{SDIST}.tar.gz'


def fetch(rom_dir: pathlib.Path, sdist: pathlib.Path | None = None) -> None:
  """Puts atari-py 0.2.5's ROMs, `<game>.bin`, into a directory that appears when it is complete.

  Args:
    rom_dir: may exist if it is empty or already complete.
    sdist: atari-py-0.2.5.tar.gz; None: pip downloads it.

  Raises:
    FileExistsError: there is something else at `rom_dir`.
    ValueError: the archive is not the one expected.
    OSError: it could not be downloaded, read or written.
  """
  md5s = {f'{g.name}.bin': g.logged_rom_md5 for g in atari_data.GAMES if g.logged_rom_md5}
  if rom_dir.exists():
    there = {path.name: _digest(path, 'md5') for path in rom_dir.iterdir() if path.is_file()}
    if there == md5s:
      return
    if any(rom_dir.iterdir()):
      raise FileExistsError(f'--rom_dir={rom_dir}: exists and holds something else')
  rom_dir.parent.mkdir(parents=True, exist_ok=True)
  staging = pathlib.Path(tempfile.mkdtemp(prefix=f'.{rom_dir.name}-', dir=rom_dir.parent))
  try:
    sdist = sdist or _download(staging)
    sha256 = _digest(sdist, 'sha256')
    if sha256 != SDIST_SHA256:
      raise ValueError(f'{sdist}: expected {SDIST}.tar.gz, SHA-256 {SDIST_SHA256}, got {sha256}')
    (staging / 'roms').mkdir()
    with tarfile.open(sdist) as archive:
      for name, md5 in md5s.items():
        member = archive.extractfile(f'{SDIST}/atari_py/atari_roms/{name}')
        (staging / 'roms' / name).write_bytes(member.read() if member else b'')
        if _digest(staging / 'roms' / name, 'md5') != md5:
          raise ValueError(f'{sdist}: expected a {name} of MD5 {md5}')
    os.replace(staging / 'roms', rom_dir)
  finally:
    shutil.rmtree(staging)


def _digest(path: pathlib.Path, algorithm: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, algorithm).hexdigest()


def default_dir() -> pathlib.Path:
  """Names where the ROMs are kept: $XDG_CACHE_HOME/offline_zoo/atari_py_roms.

  Raises:
    FileNotFoundError: the user has no home directory.
  """
  home = program.user_cache_dir()
  if home is None:
    raise FileNotFoundError('--rom_dir: there is no home directory for ROMs; name one')
  return home / 'atari_py_roms'


def main(config: Config) -> None:
  rom_dir = pathlib.Path(config.rom_dir or default_dir())
  fetch(rom_dir, pathlib.Path(config.sdist) if config.sdist else None)
  logging.info('ROMs of %s: add --rom_dir=%s to evaluate with them', SDIST, rom_dir)


if __name__ == '__main__':
  if sys.argv[1:2] == ['fetch']:  # the one thing it does
    del sys.argv[1]
  program.run(main, Config)
