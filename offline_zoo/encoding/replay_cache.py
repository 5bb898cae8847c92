"""Encoded shards, and the files that they are kept in between runs.

All shards of a game share one set of dictionaries, which grows as shards are encoded one after the
other. So a cache directory holds a chain: file K has what the K-th shard added to the dictionaries,
its frames as ids that may point to pieces of any file so far, and the SHA-256 of file K - 1. A file
begins with the SHA-256 of the rest of it. What is damaged, of other logs, of another version or
does not continue the chain is not used, nor is anything after it.
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from absl import logging

from offline_zoo.encoding import frame_store

VERSION = 3
_DIGEST_SIZE = hashlib.sha256().digest_size
_PARTIAL = '.partial-'


@dataclasses.dataclass(frozen=True)
class EncodedShard:
  """The n usable rows of a shard. Ids are of the whole chain's pieces, packed by frame_store.pack.

  Attributes:
    tiles: [t, 4] uint32, the tiles that no shard before had.
    blocks: [b, 9, k] uint8, likewise.
    bands: [s, 7, k] uint8, likewise.
    frames: [n, 7, k] uint8.
    actions: [n] uint8.
    rewards: [n] as logged; int8, int16 or float32, the smallest that holds them exactly.
    terminals: [n] uint8, as in `logs.shard.Rows`.
    probabilities: [n] float32, of the actions under the policy that acted; [0] if not logged.
    episode_returns: [e] float64, sums of rewards as logged, of episodes that lie whole within it.
    checksum: [] uint32, a CRC-32 of frames, actions, rewards as logged, terminals, probabilities.
  """

  tiles: np.ndarray
  blocks: np.ndarray
  bands: np.ndarray
  frames: np.ndarray
  actions: np.ndarray
  rewards: np.ndarray
  terminals: np.ndarray
  probabilities: np.ndarray
  episode_returns: np.ndarray
  checksum: np.ndarray

  def pieces(self, level: int) -> np.ndarray:
    """Its new tiles (level 0), blocks (1) or bands (2), packed if they are ids."""
    return (self.tiles, self.blocks, self.bands)[level]

  @property
  def dictionaries(self) -> frame_store.Dictionaries:
    blocks, bands = (frame_store.unpack(ids).view(np.uint32) for ids in (self.blocks, self.bands))
    return frame_store.Dictionaries(np.asarray(self.tiles), blocks, bands)


class _HashingFile:
  """Passes on what is written, and hashes it."""

  def __init__(self, file):
    self._file = file
    self.sha256 = hashlib.sha256()

  def write(self, data) -> int:
    self.sha256.update(data)
    return self._file.write(data)


def _write(path: pathlib.Path, header: dict[str, Any], shard: EncodedShard) -> str:
  """Writes a file, whole or not at all; returns its hash."""
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PARTIAL, delete=False) as file:
    try:
      file.write(bytes(_DIGEST_SIZE))
      hashing = _HashingFile(file)
      np.save(hashing, np.frombuffer(json.dumps(header).encode(), np.uint8))
      for field in dataclasses.fields(shard):
        np.save(hashing, getattr(shard, field.name), allow_pickle=False)
      file.seek(0)
      file.write(hashing.sha256.digest())
      file.flush()
      os.fchmod(file.fileno(), 0o644)  # others may read what is only a copy of the logs
      os.replace(file.name, path)
    except BaseException:
      pathlib.Path(file.name).unlink(missing_ok=True)
      raise
  return hashing.sha256.hexdigest()


def _read(path: pathlib.Path) -> tuple[dict[str, Any], EncodedShard, str]:
  """A file's header, its shard, in the file's own pages, and its hash.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not as `_write` left it.
  """
  content = np.memmap(path, np.uint8, 'r')
  sha256 = hashlib.sha256(content[_DIGEST_SIZE:].data)
  if sha256.digest() != content[:_DIGEST_SIZE].tobytes():
    raise ValueError('it is damaged')

  with open(path, 'rb') as file:

    def next_array() -> np.ndarray:
      np.lib.format.read_magic(file)
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
      if dtype.hasobject:
        raise ValueError('it holds Python objects')
      start = file.tell()
      end = file.seek(start + math.prod(shape) * dtype.itemsize)
      return content[start:end].view(dtype).reshape(shape)

    file.seek(_DIGEST_SIZE)
    header = json.loads(next_array().tobytes())
    if header['version'] != VERSION:  # before its arrays are taken for ours
      raise ValueError(f'it is of version {header["version"]}, not {VERSION}')
    return (
      header,
      EncodedShard(*(next_array() for _ in dataclasses.fields(EncodedShard))),
      sha256.hexdigest(),
    )


class Cache:
  """The chain of one replay directory's shards: a context, in which no other process has it.

  Attributes:
    shards: encoded shards by number, in the chain's order.
  """

  def __init__(self, directory: pathlib.Path | None):
    """Keeps files in a directory, which is made if need be; with None, nothing is kept.

    Where nothing can be written, what is there is read all the same.
    """
    self._directory = directory
    self._writes = directory is not None
    self._previous = ''
    self.shards: dict[int, EncodedShard] = {}

  def __enter__(self) -> 'Cache':
    self._lock = None
    if self._directory is not None:
      try:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._directory / '.lock', 'w')
        try:
          fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          logging.info('Waiting for another process that encodes these logs: %s', self._directory)
          fcntl.flock(self._lock, fcntl.LOCK_EX)
        for left in self._directory.glob(f'{_PARTIAL}*'):  # by a process that was killed
          left.unlink()
      except OSError as error:
        self._stop_writing(self._directory, error)
    return self

  def __exit__(self, *unused) -> None:
    if self._lock is not None:
      self._lock.close()

  def _stop_writing(self, path: pathlib.Path, error: Exception) -> None:
    said = getattr(error, 'strerror', None) or error  # a full disk's does not say which file it was
    logging.warning('Encoded logs will not be kept for the next run: %s: %s', path, said)
    self._writes = False

  def _path(self, position: int) -> pathlib.Path:
    assert self._directory is not None
    return self._directory / f'{position:04d}.shard'

  def read(self, fingerprints: dict[int, Any]) -> None:
    """Reads the chain as far as it is good.

    Args:
      fingerprints: for each shard that there is, what tells whether it has changed; JSON-able.
    """
    while self._directory is not None:
      path = self._path(len(self.shards))
      try:
        header, shard, digest = _read(path)
        if header['previous'] != self._previous:
          raise ValueError('it does not continue the file before it')
        if header['fingerprint'] != fingerprints.get(header['shard']):
          raise ValueError(f'shard {header["shard"]} has changed since')
      except FileNotFoundError:
        break
      except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning('%s: not used, nor are files after it: %s', path, error)
        break
      self.shards[header['shard']] = shard
      self._previous = digest

  def append(self, number: int, fingerprint: Any, shard: EncodedShard) -> None:
    """Adds a shard to the chain and, if it can, to the directory.

    Files from its position on, which cannot be part of the chain, are removed.
    """
    position = len(self.shards)
    self.shards[number] = shard
    if not self._writes:
      return
    header = {
      'version': VERSION, 'previous': self._previous, 'shard': number, 'fingerprint': fingerprint
    }  # fmt: skip
    path = self._path(position)
    try:
      for stale in itertools.takewhile(
        pathlib.Path.exists, map(self._path, itertools.count(position))
      ):
        stale.unlink()
      self._previous = _write(path, header, shard)
      _, self.shards[number], _ = _read(path)  # no longer in our own memory
    except (OSError, ValueError) as error:
      self._stop_writing(path, error)


def directory_for(
  cache_dir: str | os.PathLike, replay_dir: str | os.PathLike, max_rows_per_shard: int | None
) -> pathlib.Path:
  """Where in `cache_dir` the chain of a replay directory is kept."""
  resolved = pathlib.Path(replay_dir).resolve()
  key = hashlib.sha256(f'{resolved}\0{max_rows_per_shard}'.encode()).hexdigest()[:16]
  return pathlib.Path(cache_dir, f'{resolved.name}-{key}')
