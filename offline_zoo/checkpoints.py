"""Checkpoints on disk: the last two of a run or more, each either whole or noticed not to be.

A checkpoint is a directory `step_<number>`, which appears by a rename when all of it is written:

  state/       the state's arrays, written by Orbax
  record.json  a line with the SHA-256 of the rest; then, as JSON, the caller's record and score,
               the SHA-256 of each file in state/, and each array's name, shape, dtype and SHA-256

The files' checksums keep damaged bytes from Orbax, which they could make hang, take any amount of
memory or give other numbers. The arrays' hold Orbax to giving back what it was given.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from offline_zoo import program

# More than any record, CSV or config.json of a run has.
_MAX_TEXT_BYTES = 2**26
_PARTIAL = '.partial'
_STEP = re.compile('step_([1-9][0-9]*)')


def read_text_file(path: pathlib.Path) -> bytes:
  """Reads a small regular file.

  Raises:
    OSError: there is none, or it is a symbolic link.
    ValueError: it is something else than a regular file, or large.
  """
  # Without waiting for the other end of a pipe.
  with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), 'rb') as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_TEXT_BYTES:
      raise ValueError(f'{path}: expected a regular file of at most {_MAX_TEXT_BYTES} bytes')
    return file.read(_MAX_TEXT_BYTES)


def is_reserved(name: str) -> bool:
  """Whether `Checkpoints` may replace or remove what has this name in its directory."""
  return name == _PARTIAL or _STEP.fullmatch(name) is not None


def _file_checksums(directory: pathlib.Path) -> dict[str, str]:
  """The SHA-256 of each regular file below a directory, by its path from there."""
  checksums = {}
  for path in directory.rglob('*'):
    if path.is_file():
      with open(path, 'rb') as file:
        checksum = hashlib.file_digest(file, 'sha256').hexdigest()
      checksums[str(path.relative_to(directory))] = checksum
  return checksums


def _describe(name: str, array: np.ndarray) -> dict[str, Any]:
  """What a record says of an array."""
  return {
    'name': name,
    'shape': list(array.shape),
    'dtype': str(array.dtype),
    'sha256': hashlib.sha256(array.tobytes()).hexdigest(),
  }


def _names_and_leaves(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _checkpointer() -> ocp.Checkpointer:
  # A file an array, which takes half the time that OCDBT takes.
  return ocp.PyTreeCheckpointer(use_ocdbt=False)


class Checkpoint(NamedTuple):
  """What was saved.

  Attributes:
    path: the checkpoint's directory.
    record: the caller's.
    arrays: the leaves of the state, by their names in it (`jax.tree_util.keystr`).
  """

  path: pathlib.Path
  record: Any
  arrays: dict[str, np.ndarray]

  def part(self, prefix: str) -> 'Checkpoint':
    """Keeps only what has names that begin so, such as `.learner` or `[0]`, as if it were all."""
    arrays = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
    return self._replace(arrays=arrays)

  def state(self, like: Any) -> Any:
    """Gives the state as a pytree of NumPy arrays.

    Args:
      like: a pytree of the structure, shapes and dtypes that are expected.

    Raises:
      ValueError: the state has others.
    """
    expected = _names_and_leaves(like)
    for name in {name: None for name, _ in expected} | self.arrays:
      ours, theirs = (
        f'{tree[name].dtype} {list(tree[name].shape)}' if name in tree else 'nothing'
        for tree in (dict(expected), self.arrays)
      )
      if ours != theirs:
        raise ValueError(
          f'{self.path}: checkpoint of another network: {name} is {theirs}, expected {ours}'
        )
    return jax.tree.unflatten(jax.tree.structure(like), [self.arrays[name] for name, _ in expected])


def _write(directory: pathlib.Path, state: Any, record: Any, score: float | None) -> None:
  leaves = _names_and_leaves(state)
  with _checkpointer() as checkpointer:
    checkpointer.save(directory / 'state', {f'{i:04}': leaf for i, (_, leaf) in enumerate(leaves)})
  contents = {
    'record': record,
    'score': score,
    'files': _file_checksums(directory / 'state'),
    'arrays': [_describe(*leaf) for leaf in leaves],
  }
  text = json.dumps(contents).encode()
  with open(directory / 'record.json', 'wb') as file:
    file.write(hashlib.sha256(text).hexdigest().encode() + b'\n' + text)
    file.flush()
    os.fsync(file.fileno())


def _read_contents(directory: pathlib.Path) -> Any:
  """What record.json holds."""
  checksum, _, text = read_text_file(directory / 'record.json').partition(b'\n')
  if hashlib.sha256(text).hexdigest().encode() != checksum:
    raise ValueError('record.json has another checksum')
  return json.loads(text)


def _read(directory: pathlib.Path) -> Checkpoint:
  contents = _read_contents(directory)
  files, expected = _file_checksums(directory / 'state'), contents['files']
  if files != expected:
    name, _ = min(files.items() ^ expected.items())
    raise ValueError(f'{name} has another checksum')
  with _checkpointer() as checkpointer:
    leaves = checkpointer.restore(directory / 'state')
  arrays = {}
  for i, description in enumerate(contents['arrays']):
    name = description['name']
    arrays[name] = np.asarray(leaves[f'{i:04}'])
    if _describe(name, arrays[name]) != description:
      raise ValueError(f'{name} has another checksum')
  return Checkpoint(directory, contents['record'], arrays)


class Checkpoints:
  """The last two checkpoints in a directory, and more if asked for.

  A save is atomic: killed, or out of disk space, it leaves the checkpoints before it as they were.
  One process at a time may save; who does holds a lock.
  """

  def __init__(self, directory: str | os.PathLike, keep: str = 'last'):
    """Touches nothing yet.

    Args:
      directory: made by the first save, if need be.
      keep: 'last' keeps two; 'best' that with the highest score as well; 'all' every one.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._newest: pathlib.Path | None = None  # that is known to be whole

  def _paths(self) -> dict[int, pathlib.Path]:
    """The checkpoints that are there, whole or not, by number, from the oldest to the newest."""
    paths = self.directory.iterdir() if self.directory.exists() else ()
    steps = ((_STEP.fullmatch(path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in steps if match))

  def exist(self) -> bool:
    """Whether there are any, whole or not."""
    return bool(self._paths())

  def restore(self) -> Checkpoint | None:
    """Reads the newest checkpoint that is whole, and says so if it is not the newest.

    Returns:
      None if there are no checkpoints.

    Raises:
      ValueError: there are checkpoints, but none is whole.
    """
    damages = []
    for path in reversed(self._paths().values()):
      try:
        checkpoint = _read(path)
      except MemoryError:
        raise
      except Exception as error:  # TensorStore has its own kinds
        damages.append(f'{path.name} is damaged: {program.first_line(error)}')
        continue
      if damages:
        logging.warning(
          '%s: %s; using %s, the one before', self.directory, '; '.join(damages), path.name
        )
      self._newest = path
      return checkpoint
    if damages:
      raise ValueError(f'{self.directory}: no checkpoint is whole: {"; ".join(damages)}')
    return None

  def restore_one(self, which: str) -> Checkpoint:
    """Reads one checkpoint.

    Args:
      which: a number, or 'best' for that with the highest score.

    Raises:
      ValueError: it is not there, or damaged.
    """
    paths = self._paths()
    path = self._best() if which == 'best' else paths.get(int(which) if which.isdecimal() else 0)
    if path is None:
      there = ', '.join(map(str, paths)) or 'none'
      raise ValueError(f'{self.directory}: no checkpoint {which}; there are: {there}')
    try:
      return _read(path)
    except MemoryError:
      raise
    except Exception as error:
      raise ValueError(f'{path}: damaged: {program.first_line(error)}') from error

  def _best(self) -> pathlib.Path | None:
    """The checkpoint with the highest score, the newest of such; None if there are no scores."""
    scores: dict[float, pathlib.Path] = {}
    for path in self._paths().values():
      try:
        scores[float(_read_contents(path)['score'])] = path
      except MemoryError:
        raise
      except Exception:  # damaged, or not evaluated
        continue
    return scores[max(scores)] if scores else None

  def save(self, state: Any, record: Any, score: float | None = None) -> None:
    """Saves a pytree of NumPy arrays, and a JSON-able record with it.

    Of those before, the last that this object restored or saved is kept; others are removed, but
    for what `keep` says.

    Args:
      state: the pytree.
      record: what else is to be known.
      score: of the state's evaluation; None if it has not been evaluated.

    Raises:
      OSError: it could not be written; the ones before, if any, are still there.
    """
    # A damaged newest one is never written over.
    number = 1 + max(self._paths(), default=0)
    path, partial = self.directory / f'step_{number}', self.directory / _PARTIAL
    try:
      shutil.rmtree(partial, ignore_errors=True)  # a killed process left it
      partial.mkdir(parents=True)
      # Claims the space first: when a disk fills up under Orbax, its threads print tracebacks and
      # go on writing for a while.
      with tempfile.TemporaryFile(dir=partial) as file:
        for array in jax.tree.leaves(state):
          file.write(bytes(array.nbytes))
      _write(partial, state, record, score)
      partial.rename(path)
    except Exception as error:  # TensorStore has its own kinds
      shutil.rmtree(partial, ignore_errors=True)
      raise OSError(
        f'{self.directory}: could not write a checkpoint, an earlier one is untouched: '
        f'{program.first_line(error)}'
      ) from error
    kept = {path, self._newest} | ({self._best()} if self._keep == 'best' else set())
    for other in self._paths().values():
      if self._keep != 'all' and other not in kept:
        shutil.rmtree(other, ignore_errors=True)
    self._newest = path
