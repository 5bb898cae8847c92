"""Reads the Atari episodes of RL Unplugged (Gulcehre et al. 2020), without TensorFlow.

They are the play of the DQN Replay Dataset in another form. A replay directory holds TFRecord files
of one run of a game, a file or a few for each checkpoint of about a million steps:

  run_<run>-<checkpoint>-of-<n>                       as published in `atari_episodes_ordered`,
                                                      each file compressed whole by gzip
  rlu_atari_checkpoints_ordered-checkpoint_<checkpoint>.tfrecord-<i>-of-<n>
                                                      as TensorFlow Datasets (TFDS) prepares them

A record is a serialised `tf.train.Example` with a whole episode of T steps: a PNG of each newest
frame, actions, unclipped rewards, and whether the last step is a terminal state: its discount is 0,
or TFDS's `is_terminal` is set.

A checkpoint is a shard, with the rows that DQN Replay shards have: three blank ones, then one for
each transition. Which steps are transitions is decided from code that reads the files. TFDS says
that the last step of an episode that ended is the terminal state, of which only the observation
means anything; Dopamine's offline_rl lab takes of all episodes the T - 1 steps that another one
follows, with a terminal where the one that follows is terminal. So an episode that ended gives
T - 1 rows, the last of them terminal. One that did not end was cut: it gives T rows, and the last
one is there for its frame only. Its action and reward are zeros, and it is marked as `CUT`, so that
no transition begins there or leads beyond it. Nothing in the files tells whether an episode goes on
in the next one; as in TFDS, it does not.

Files are untrusted input. What is held at a time is bounded by the size of a record, of which there
is a limit.
"""

import collections
import concurrent.futures
import dataclasses
import gzip
import itertools
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import cv2
import google_crc32c
import numpy as np
from absl import logging
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from isal import igzip, igzip_lib

from offline_zoo.atari_data import FRAME_SHAPE
from offline_zoo.logs import shard
from offline_zoo.logs.dqn_replay import MAX_ROWS
from offline_zoo.logs.shard import CUT, NUM_PADDING_ROWS, TERMINAL

# The longest episode has 27,000 steps, whose PNGs may have 4,970 bytes each.
_MAX_RECORD_BYTES = 2**27
# What no PNG of a frame is smaller than.
_MIN_PNG_BYTES = 60
# Frames are decoded, while those before them are encoded, in pieces of at most 1.8 MB.
_FRAMES_PER_PIECE = 250
# Up to the interlacing: what a file begins with that holds greys of 8 bits in the frames' shape.
_PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
_PNG_HEADER = struct.Struct('>I4sIIBBBBB')
_PNG_START = _PNG_SIGNATURE + _PNG_HEADER.pack(13, b'IHDR', *FRAME_SHAPE[::-1], 8, 0, 0, 0, 0)


class _Layout(NamedTuple):
  """The features that an episode is read from: their names, and the kinds of their values."""

  observations: tuple[str, str]
  actions: tuple[str, str]
  rewards: tuple[str, str]
  ends: tuple[str, str]
  end: int  # what the last of `ends` is where the last step is a terminal state


_PUBLISHED = _Layout(
  ('observations', 'bytes_list'),
  ('actions', 'int64_list'),
  ('unclipped_rewards', 'float_list'),
  ('discounts', 'float_list'),
  end=0,
)
_PREPARED = _Layout(
  ('steps/observation', 'bytes_list'),
  ('steps/action', 'int64_list'),
  ('steps/reward', 'float_list'),
  ('steps/is_terminal', 'int64_list'),
  end=1,
)


def _make_example_class() -> type[message.Message]:
  """`tf.train.Example`, as TensorFlow defines it, but that a feature is not held to one kind."""
  field = descriptor_pb2.FieldDescriptorProto

  def repeated(name: str, kind: int) -> dict[str, Any]:
    value = {'name': 'value', 'number': 1, 'label': field.LABEL_REPEATED, 'type': kind}
    return {'name': name, 'field': [value]}

  def one(name: str, number: int, type_name: str) -> dict[str, Any]:
    return {
      'name': name, 'number': number, 'label': field.LABEL_OPTIONAL, 'type': field.TYPE_MESSAGE,
      'type_name': type_name,
    }  # fmt: skip

  key = {'name': 'key', 'number': 1, 'label': field.LABEL_OPTIONAL, 'type': field.TYPE_STRING}
  entry = {
    'name': 'FeatureEntry', 'field': [key, one('value', 2, 'Feature')],
    'options': {'map_entry': True},
  }  # fmt: skip
  features = {**one('feature', 1, 'Features.FeatureEntry'), 'label': field.LABEL_REPEATED}
  feature = [
    one('bytes_list', 1, 'BytesList'),
    one('float_list', 2, 'FloatList'),
    one('int64_list', 3, 'Int64List'),
  ]
  messages = [
    repeated('BytesList', field.TYPE_BYTES),
    repeated('FloatList', field.TYPE_FLOAT),
    repeated('Int64List', field.TYPE_INT64),
    {'name': 'Feature', 'field': feature},
    {'name': 'Features', 'nested_type': [entry], 'field': [features]},
    {'name': 'Example', 'field': [one('features', 1, 'Features')]},
  ]
  file = descriptor_pb2.FileDescriptorProto(
    name='example.proto', syntax='proto3', message_type=messages
  )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('Example'))


_Example: Any = _make_example_class()


def _masked_crc(content: bytes) -> int:
  """The checksum of a TFRecord file."""
  crc = google_crc32c.value(content)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read_record(file: BinaryIO, where: str) -> bytes | None:
  """Reads the next record of a TFRecord file; returns None at the end of the file."""
  header = file.read(12)
  if not header:
    return None
  shard.expect(len(header) == 12, where, 'a length and its checksum', f'{len(header)} bytes')
  length, crc = struct.unpack('<QI', header)
  shard.expect(crc == _masked_crc(header[:8]), where, 'the checksum of the length', 'another')
  shard.expect(length <= _MAX_RECORD_BYTES, where, f'at most {_MAX_RECORD_BYTES} bytes', length)
  record = file.read(length + 4)
  shard.expect(
    len(record) == length + 4, where, f'{length + 4} bytes', f'{len(record)}, then the end'
  )
  content = record[:length]
  crc = int.from_bytes(record[length:], 'little')
  shard.expect(crc == _masked_crc(content), where, 'the checksum of the content', 'another')
  return content


def _read_records(path: pathlib.Path, is_compressed: bool) -> Iterator[tuple[str, bytes]]:
  """Yields the records of a TFRecord file, each with what messages call it."""
  with (
    shard.open_regular(path) as opened,
    igzip.open(opened) if is_compressed else opened as file,
  ):
    for number in itertools.count():
      where = f'{path}: record {number}'
      try:
        content = _read_record(file, where)
      # isal's stub takes the class for an instance
      except (EOFError, gzip.BadGzipFile, igzip_lib.IsalError) as error:  # type: ignore[misc]
        raise shard.FormatError(f'{where}: expected a gzip-compressed file: {error}') from error
      if content is None:
        return
      yield where, content


class _Episode(NamedTuple):
  """The n rows that an episode gives, blank ones excepted.

  Attributes:
    where: for messages: the file, and which of its records.
    pngs: of the frames; their headers have been checked.
    actions: [n] int64.
    rewards: [n] float32.
    terminals: [n] uint8: TERMINAL or CUT in the last row, 0 in the others.
    last_reward: what the last step says of the reward that followed it.
  """

  where: str
  pngs: list[bytes]
  actions: np.ndarray
  rewards: np.ndarray
  terminals: np.ndarray
  last_reward: float


def _values(features: Mapping[str, Any], where: str, name: str, kind: str) -> Sequence:
  """The values of a feature."""
  if name not in features and 'o_t' in features:
    raise shard.FormatError(
      f'{where}: expected whole episodes, those of atari_episodes_ordered, got shuffled transitions'
    )
  shard.expect(
    name in features, where, f'a feature {name}', ', '.join(sorted(features)[:10]) or 'none'
  )
  got = [field.name for field, _ in features[name].ListFields()]
  shard.expect(kind in got, where, f'{name} as {kind}', ', '.join(got) or 'nothing')
  return getattr(features[name], kind).value


def _describe_png(png: bytes) -> str:
  size = len(_PNG_SIGNATURE) + _PNG_HEADER.size
  if len(png) < size or not png.startswith(_PNG_SIGNATURE):
    return 'something else'
  _, _, width, height, depth, colour, *_ = _PNG_HEADER.unpack(png[len(_PNG_SIGNATURE) : size])
  return f'one of {width}x{height}, {depth} bits, colour type {colour}'


def _parse_episode(where: str, content: bytes, layout: _Layout) -> _Episode | None:
  """Parses and checks a record; returns None if it holds a terminal state and nothing else."""
  try:
    features = _Example.FromString(content).features.feature
  except message.DecodeError as error:
    raise shard.FormatError(f'{where}: expected a serialised tf.train.Example: {error}') from None
  columns = {name: _values(features, where, name, kind) for name, kind in layout[:4]}
  length = len(columns[layout.observations[0]])
  most = len(content) // _MIN_PNG_BYTES
  shard.expect(0 < length <= most, where, f'1 to {most} PNGs in so many bytes', length)
  for name, values in columns.items():
    shard.expect(len(values) == length, where, f'{length} {name}, as there are PNGs', len(values))
  pngs = list(columns[layout.observations[0]])
  actions = np.array(columns[layout.actions[0]], np.int64)
  rewards = np.array(columns[layout.rewards[0]], np.float32)
  ends = np.array(columns[layout.ends[0]])

  shard.expect(((ends >= 0) & (ends <= 1)).all(), where, f'{layout.ends[0]} from 0 to 1', 'others')
  # The first step's discount means nothing, and the last transition may have the end's.
  inside = np.flatnonzero(ends[1:-2] == layout.end)
  shard.expect(
    not len(inside), where, 'an end only at the end', f'one in step {[*inside, 0][0] + 1}'
  )
  has_ended = ends[-1] == layout.end
  if has_ended:
    pngs.pop()
  last_reward, num_rows = float(rewards[-1]), len(pngs)
  actions, rewards = actions[:num_rows], rewards[:num_rows]
  terminals = np.zeros(num_rows, np.uint8)
  if has_ended:
    if not num_rows:
      return None
    terminals[-1] = TERMINAL
  else:
    actions[-1] = rewards[-1] = 0
    terminals[-1] = CUT
  for step, png in enumerate(pngs):
    if not png.startswith(_PNG_START):
      height, width = FRAME_SHAPE
      expected = f'a PNG of {width}x{height}, 8 bits, colour type 0'
      shard.expect(False, f'{where}, step {step}', expected, _describe_png(png))
  if not (finite := np.isfinite(rewards)).all():
    step = int(np.argmin(finite))
    shard.expect(False, f'{where}, step {step}', 'a finite reward', rewards[step])
  return _Episode(where, pngs, actions, rewards, terminals, last_reward)


def _is_whole(png: bytes) -> bool:
  """Whether the lengths of its chunks add up; OpenCV would make room for whatever they say."""
  position = len(_PNG_SIGNATURE)
  while position < len(png):
    position += 12 + int.from_bytes(png[position : position + 4])
  return position == len(png)


def _decode(where: str, first_step: int, pngs: list[bytes]) -> np.ndarray:
  """Decodes frames [K, 84, 84] uint8, the first of which is of this step; b'' gives a blank one."""
  frames = np.zeros((len(pngs), *FRAME_SHAPE), np.uint8)
  for i, png in enumerate(pngs):
    if png:
      frame: np.ndarray | None = None
      if _is_whole(png):
        frame = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
      if frame is None or frame.shape != FRAME_SHAPE or frame.dtype != np.uint8:
        raise shard.FormatError(
          f'{where}, step {first_step + i}: expected a PNG, got a damaged one'
        )
      frames[i] = frame
  return frames


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
  """The files of one checkpoint: a `shard.LogShard`.

  Attributes:
    number: of the checkpoint.
    paths: its files, in order.
    is_prepared: whether TFDS made them.
  """

  number: int
  paths: tuple[pathlib.Path, ...]
  is_prepared: bool

  @property
  def kind(self) -> str:
    """Which of the two forms it has, in words."""
    form = 'as TFDS prepares them' if self.is_prepared else 'as published'
    return f'checkpoints of RL Unplugged, {form}'

  def path(self, name: str) -> pathlib.Path:
    """Its first file."""
    del name
    return self.paths[0]

  def has_probabilities(self) -> bool:
    """Never: nothing of the kind is published."""
    return False

  def fingerprint(self) -> dict[str, list[int]]:
    """Size and modification time of its files, by name."""
    stats = {path.name: path.stat() for path in self.paths}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

  def _read_episodes(self) -> Iterator[_Episode]:
    layout = _PREPARED if self.is_prepared else _PUBLISHED
    for path in self.paths:
      for where, content in _read_records(path, is_compressed=not self.is_prepared):
        if episode := _parse_episode(where, content, layout):
          yield episode

  def read_small_files(self, num_actions: int | None, max_rows: int | None = None) -> shard.Rows:
    """Reads all but the frames, which are checked as far as it goes without decoding them.

    Rewards are as published, not clipped. Nothing is read behind the rows that are kept. See
    `shard.LogShard`; errors name the record, too.
    """
    limit = MAX_ROWS if max_rows is None else min(max_rows, MAX_ROWS)
    padding = np.zeros(NUM_PADDING_ROWS)
    actions, rewards, terminals = [], [], []
    num_rows = num_odd = 0
    for episode in self._read_episodes():
      actions += [padding.astype(np.int64), episode.actions]
      rewards += [padding, episode.rewards]
      terminals += [padding, episode.terminals]
      num_odd += episode.terminals[-1] == TERMINAL and episode.last_reward != 0
      num_rows += NUM_PADDING_ROWS + len(episode.pngs)
      if num_rows >= limit:
        shard.expect(limit < MAX_ROWS, episode.where, f'fewer than {limit} rows', num_rows)
        break
    shard.expect(num_rows, self.paths[0], 'at least one episode', 'none')
    if num_odd:
      logging.warning(
        '%s: %d episodes have a reward in their terminal state; it is left out, as TFDS does',
        self.paths[0], num_odd,
      )  # fmt: skip
    action = np.concatenate(actions)[:limit]
    shard.check_actions(self, action, num_actions)
    return shard.Rows(
      action.astype(np.int32),
      np.concatenate(rewards)[:limit].astype(np.float32),
      np.concatenate(terminals)[:limit].astype(np.uint8),
      num_frames=len(action),
    )

  def _read_pieces(self, num_frames: int) -> Iterator[tuple[str, int, list[bytes]]]:
    """Yields the first frames as `_decode` takes them."""
    left = num_frames
    for episode in self._read_episodes():
      pngs = ([b''] * NUM_PADDING_ROWS + episode.pngs)[:left]
      for start in range(0, len(pngs), _FRAMES_PER_PIECE):
        piece = pngs[start : start + _FRAMES_PER_PIECE]
        yield episode.where, start - NUM_PADDING_ROWS, piece
      left -= len(pngs)
      if not left:
        return
    shard.expect(False, self.paths[0], f'{num_frames} rows, as before', num_frames - left)

  def read_frames(self, num_frames: int) -> Iterator[np.ndarray]:
    """Yields the frames; see `shard.LogShard`.

    Those that come next are read and decoded in the background, on all cores.
    """
    num_threads = len(os.sched_getaffinity(0))
    pieces = self._read_pieces(num_frames)
    with (
      concurrent.futures.ThreadPoolExecutor(1) as reader,
      concurrent.futures.ThreadPoolExecutor(num_threads) as decoders,  # OpenCV frees the lock
    ):
      pending: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
      reading = reader.submit(next, pieces, None)
      while piece := reading.result():
        reading = reader.submit(next, pieces, None)
        pending.append(decoders.submit(_decode, *piece))
        if len(pending) > 2 * num_threads:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()


_PUBLISHED_FILE = re.compile(r'run_([0-9]+)-([0-9]{5})-of-([0-9]{5})')
_PREPARED_FILE = re.compile(
  r'rlu_atari_checkpoints_ordered-checkpoint_([0-9]+)\.tfrecord-([0-9]{5})-of-([0-9]{5})'
)


def _matching(directory: pathlib.Path, pattern: re.Pattern) -> dict[pathlib.Path, list[int]]:
  """The files with such names, in order, each with the numbers in its name."""
  if not directory.is_dir():
    return {}
  matches = {path: pattern.fullmatch(path.name) for path in sorted(directory.iterdir())}
  return {path: list(map(int, match.groups())) for path, match in matches.items() if match}


def open_published(replay_dir: str | os.PathLike) -> list[CheckpointFiles]:
  """Lists the published checkpoints of a run, in ascending order; none if there are none.

  Args:
    replay_dir: a directory with the files of one run, or of several and then /run_<run>.

  Raises:
    ValueError: there are several runs to choose from, or files of different sets.
  """
  directory = pathlib.Path(replay_dir)
  chosen = None
  if not directory.exists() and (match := re.fullmatch(r'run_([0-9]+)', directory.name)):
    directory, chosen = directory.parent, int(match[1])
  files = _matching(directory, _PUBLISHED_FILE)
  if chosen is not None:
    files = {path: numbers for path, numbers in files.items() if numbers[0] == chosen}
  if len(runs := sorted({run for run, _, _ in files.values()})) > 1:
    raise ValueError(f'{directory}: expected one run, got {runs}; name {directory}/run_{runs[0]}')
  if len(totals := sorted({total for _, _, total in files.values()})) > 1:
    raise ValueError(f'{directory}: expected files of one set, got some of {totals}')
  return [CheckpointFiles(n, (path,), is_prepared=False) for path, (_, n, _) in files.items()]


def open_prepared(replay_dir: str | os.PathLike) -> list[CheckpointFiles]:
  """Lists the checkpoints that TFDS prepared, in ascending order; none if there are none.

  Raises:
    FileNotFoundError: a checkpoint lacks a file.
  """
  directory = pathlib.Path(replay_dir)
  files = _matching(directory, _PREPARED_FILE)
  shards = []
  for number in sorted({number for number, _, _ in files.values()}):
    paths = {path: (i, total) for path, (n, i, total) in files.items() if n == number}
    total = max(total for _, total in paths.values())
    if list(paths.values()) != [(i, total) for i in range(total)]:
      there = ', '.join(path.name[-14:] for path in paths)
      raise FileNotFoundError(
        f'{directory}: expected {total} files of checkpoint_{number:02d}, got {there}'
      )
    shards.append(CheckpointFiles(number, tuple(paths), is_prepared=True))
  return shards
