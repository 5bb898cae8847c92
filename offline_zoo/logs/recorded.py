"""Recorded play: a log kept as its actions, of which the emulator makes everything else again.

  python -m offline_zoo.logs.recorded expand --path=pong.play --replay_dir=/tmp/pong_logs
  python -m offline_zoo.logs.recorded verify --path=pong.play

It takes a fraction of a byte a transition instead of 7,065. `logs/demo.py` and `online/` record.

Each episode has a seed of its own, so that episodes are played again in any order: whether an
action sticks at the episode's i-th emulator frame is whether the i-th number of NumPy's
RandomState(seed).random_sample, four of them for each agent step, is less than
sticky_action_probability; before the first frame the action was to do nothing. The emulator has
drawn nothing. Version 1 of the format, little-endian:

  a line of JSON   format, version, environment_name, rom_md5, emulator (the package that ran it),
                   sticky_action_probability, num_actions, has_choices, steps_per_checksum (K)
  blocks           each: its length and the CRC-32C of the rest (uint32 both), then, as one .xz,
    uint32           how many episodes E; of each episode:
    uint32 [E]         seed, less than 2^31
    uint32 [E]         agent steps T, 1 to 27,000
    float32 [E]        epsilon, the rate at which uniformly random actions begin
    uint8 [E]          whether it ended; all but the file's last one did
    uint32 [...]       ceil(T / K) checksums, one episode's after the other's
    uint8 [...]        T codes: the action, or where has_choices 3 * action + choice

A choice is 1 where the action is what the policy would have done, so that with A actions its
probability was (1 - epsilon) * choice + epsilon / A; it is 2 where a random action lasts (see
online/learner.py), so that the probability was 1. A checksum is the CRC-32C of the K steps since
the one before (the episode's last: of what is left), of each step its frame [84, 84], action
(uint8), reward (float32, raw) and terminal flag (uint8). Terminal is 1 on an episode's last step if
it ended, with the game or at the limit of 27,000 steps.

Files are untrusted input: they are read block by block, and a block, 4 MB unpacked, takes 100 MB
at most.
"""

import dataclasses
import functools
import importlib.metadata
import json
import lzma
import os
import pathlib
import struct
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import google_crc32c
import numpy as np
from absl import logging

from offline_zoo import atari_data, atari_env, program
from offline_zoo.logs import dqn_replay, play, shard

VERSION = 1
STEPS_PER_CHECKSUM = 1000
LASTING = 2  # the choice of a random action that lasts
_FORMAT = 'offline_zoo recorded play'
_MAX_HEADER_BYTES = 4096
# A block is closed by the episode that brings it to so many steps.
_STEPS_PER_BLOCK = 2**17
# Of what is read, compressed or not: more than any that is written has.
_MAX_BLOCK_BYTES = 2**22
_XZ_MEMORY = 2**25
# Steps are single bytes, aligned to nothing.
_XZ_FILTERS = [
  {'id': lzma.FILTER_LZMA2, 'preset': 9 | lzma.PRESET_EXTREME, 'pb': 0, 'dict_size': 2**20}
]


@dataclasses.dataclass(frozen=True)
class Header:
  """What was played, and on what.

  Attributes:
    environment_name: of the game.
    rom_md5: of its ROM, in hexadecimal digits.
    emulator: name and version of the package.
    sticky_action_probability: per emulator frame.
    num_actions: the size of the minimal action set.
    has_choices: whether it is known which actions were the policy's own.
  """

  environment_name: str
  rom_md5: str
  emulator: str
  sticky_action_probability: float
  num_actions: int
  has_choices: bool


class Episode(NamedTuple):
  """An episode of T agent steps, as it is recorded.

  Attributes:
    seed: less than 2^31.
    epsilon: rate at which uniformly random actions begin.
    ended: whether its last step ended it; of a recording only the last episode may not have ended.
    actions: [T] uint8.
    choices: [T] uint8, 1 where the action is what the policy would have done, 2 (LASTING) where a
      random one lasts; zeros if not known.
    checksums: [ceil(T / STEPS_PER_CHECKSUM)] uint32.
  """

  seed: int
  epsilon: float
  ended: bool
  actions: np.ndarray
  choices: np.ndarray
  checksums: np.ndarray


def this_emulator() -> str:
  """Names the package that plays here."""
  return f'ale-py {importlib.metadata.version("ale-py")}'


def make_header(
  environment_name: str,
  sticky_action_probability: float,
  has_choices: bool,
  rom_dir: str | None = None,
) -> Header:
  """Describes what is played here; arguments and errors are those of `atari_env.AtariEnv`."""
  return Header(
    environment_name,
    atari_env.rom_md5(environment_name, rom_dir),
    this_emulator(),
    float(sticky_action_probability),
    play.game(environment_name, sticky_action_probability, rom_dir).num_actions,
    has_choices,
  )


class Checksums:
  """The checksums of an episode, step by step.

  Attributes:
    values: those of the steps so far, the last of which may yet change.
  """

  def __init__(self):
    self.values: list[int] = []
    self._num_steps = 0

  def add(self, frame: np.ndarray, action: int, reward: float, terminal: bool) -> None:
    """Adds a step: its frame [84, 84], what was done there, and what followed."""
    if self._num_steps % STEPS_PER_CHECKSUM == 0:
      self.values.append(0)
    content = frame.tobytes() + struct.pack('<BfB', action, reward, terminal)
    self.values[-1] = google_crc32c.extend(self.values[-1], content)
    self._num_steps += 1


# The file.


def _block(episodes: list[Episode], has_choices: bool) -> bytes:
  codes = [e.actions * 3 + e.choices if has_choices else e.actions for e in episodes]
  content = b''.join(
    [
      struct.pack('<I', len(episodes)),
      np.array([e.seed for e in episodes], '<u4').tobytes(),
      np.array([len(e.actions) for e in episodes], '<u4').tobytes(),
      np.array([e.epsilon for e in episodes], '<f4').tobytes(),
      np.array([e.ended for e in episodes], np.uint8).tobytes(),
      np.concatenate([e.checksums for e in episodes]).astype('<u4').tobytes(),
      np.concatenate(codes).astype(np.uint8).tobytes(),
    ]
  )
  # The CRC before it guards it already.
  xz = lzma.compress(content, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=_XZ_FILTERS)
  return struct.pack('<II', len(xz), google_crc32c.value(xz)) + xz


class Recording:
  """Episodes to be written. Equal ones make equal files, however often they are written between.

  Attributes:
    header: what is played.
    num_episodes, num_steps: how many were added.
  """

  def __init__(self, header: Header):
    self.header = header
    self.num_episodes = 0
    self.num_steps = 0
    self._blocks: list[bytes] = []  # that are closed
    self._open: list[Episode] = []

  def add(self, episode: Episode) -> None:
    """Adds an episode that ended."""
    assert episode.ended
    self.num_episodes += 1
    self.num_steps += len(episode.actions)
    self._open.append(episode)
    if sum(len(e.actions) for e in self._open) >= _STEPS_PER_BLOCK:
      self._blocks.append(_block(self._open, self.header.has_choices))
      self._open = []

  def content(self, unfinished: Episode | None = None) -> bytes:
    """Gives what a file of these episodes holds, and of one that has not ended at their end."""
    fields = {'format': _FORMAT, 'version': VERSION, **dataclasses.asdict(self.header)}
    header = json.dumps(fields | {'steps_per_checksum': STEPS_PER_CHECKSUM})
    last = self._open + ([unfinished] if unfinished else [])
    blocks = self._blocks + ([_block(last, self.header.has_choices)] if last else [])
    return header.encode() + b'\n' + b''.join(blocks)


def read(path: str | os.PathLike) -> tuple[Header, Iterator[Episode]]:
  """Reads a recording; its episodes, block by block, as they are asked for.

  Raises:
    OSError: there is no such file, or it is not a regular one.
    ValueError: it is not as the format says; while episodes are asked for, too.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such recording')
  with shard.open_regular(path) as file:
    line = file.readline(_MAX_HEADER_BYTES)
  header = _parse_header(path, line)
  return header, _read_episodes(path, header, len(line))


def _parse_header(path: pathlib.Path, line: bytes) -> Header:
  try:
    fields = json.loads(line)
    good = isinstance(fields, dict) and fields.pop('format') == _FORMAT
  except (KeyError, ValueError, RecursionError):
    good = False
  shard.expect(good and line.endswith(b'\n'), path, 'recorded play', 'something else')
  version, steps = fields.pop('version', None), fields.pop('steps_per_checksum', None)
  shard.expect(version == VERSION, path, f'version {VERSION} of the format', version)
  shard.expect(steps == STEPS_PER_CHECKSUM, path, f'{STEPS_PER_CHECKSUM} steps a checksum', steps)
  kinds = {field.name: field.type for field in dataclasses.fields(Header)}
  shard.expect(
    {name: type(value) for name, value in fields.items()} == kinds,
    path, f'a header with {", ".join(kinds)}', 'another',
  )  # fmt: skip
  header = Header(**fields)
  try:
    atari_data.game(header.environment_name)
  except ValueError as error:
    raise shard.FormatError(f'{path}: {error}') from error
  expected = 'a probability and 1 to 18 actions'
  good = 0 <= header.sticky_action_probability <= 1 and 1 <= header.num_actions <= 18
  shard.expect(good, path, expected, f'{header.sticky_action_probability}, {header.num_actions}')
  return header


def _read_episodes(path: pathlib.Path, header: Header, start: int) -> Iterator[Episode]:
  all_ended = True
  with shard.open_regular(path) as file:
    file.seek(start)
    number = 0
    while prefix := file.read(8):
      where = f'{path}: block {number}'
      shard.expect(all_ended, where, 'nothing after an episode that did not end', 'this')
      shard.expect(len(prefix) == 8, where, 'a length and a checksum', 'the end of the file')
      length, checksum = struct.unpack('<II', prefix)
      shard.expect(length <= _MAX_BLOCK_BYTES, where, f'{_MAX_BLOCK_BYTES} bytes or less', length)
      xz = file.read(length)
      shard.expect(len(xz) == length, where, f'{length} bytes', f'only {len(xz)}: is it cut short?')
      shard.expect(google_crc32c.value(xz) == checksum, where, 'its checksum', 'another')
      for episode in _parse_block(where, _unpacked(where, xz), header):
        yield episode
        all_ended = episode.ended
      number += 1
  shard.expect(number, path, 'at least one block', 'none')


def _unpacked(where: str, xz: bytes) -> bytes:
  try:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    content = decompressor.decompress(xz, _MAX_BLOCK_BYTES)
  except lzma.LZMAError as error:
    raise shard.FormatError(f'{where}: expected an .xz: {error}') from error
  got = 'its beginning' if decompressor.needs_input else f'more than {_MAX_BLOCK_BYTES} bytes'
  shard.expect(decompressor.eof, where, f'a whole .xz of {_MAX_BLOCK_BYTES} bytes or less', got)
  return content


def _parse_block(where: str, content: bytes, header: Header) -> Iterator[Episode]:
  rest = memoryview(content)

  def take(dtype: str, count: int) -> np.ndarray:
    nonlocal rest
    size = count * np.dtype(dtype).itemsize
    shard.expect(size <= len(rest), where, f'{size} bytes of {dtype}', len(rest))
    taken, rest = np.frombuffer(rest[:size], dtype), rest[size:]
    return taken

  (count,) = take('<u4', 1).tolist()
  seeds, lengths, epsilons, ended = (take(t, count) for t in ('<u4', '<u4', '<f4', 'u1'))
  good = count and (lengths >= 1).all() and (lengths <= play.MAX_STEPS_PER_EPISODE).all()
  shard.expect(good, where, f'episodes of 1 to {play.MAX_STEPS_PER_EPISODE} steps', 'others')
  good = (seeds < 2**31).all() and ((epsilons >= 0) & (epsilons <= 1)).all() and ended[:-1].all()
  shard.expect(good, where, 'seeds below 2^31, rates in [0, 1], episodes that ended', 'others')
  lengths = lengths.astype(np.int64)
  ends = np.cumsum(lengths)
  last_checksums = np.cumsum(-(-lengths // STEPS_PER_CHECKSUM))
  checksums, codes = take('<u4', int(last_checksums[-1])), take('u1', int(ends[-1]))
  shard.expect(not len(rest), where, 'nothing after its last step', f'{len(rest)} bytes')
  actions, choices = np.divmod(codes, 3) if header.has_choices else (codes, np.zeros_like(codes))
  expected = f'actions 0 to {header.num_actions - 1}'
  shard.expect((actions < header.num_actions).all(), where, expected, actions.max())
  columns = (np.split(actions, ends[:-1]), np.split(choices, ends[:-1]))
  yield from (
    Episode(int(seed), float(epsilon), bool(ended), *arrays)
    for seed, epsilon, ended, *arrays in zip(
      seeds, epsilons, ended, *columns, np.split(checksums, last_checksums[:-1]), strict=True
    )
  )


# Playing it again.


class _Mismatch(NamedTuple):
  """The first steps of an episode, counted from 0, that did not come out as recorded."""

  first: int
  last: int


def probabilities(episode: Episode, num_actions: int) -> np.ndarray:
  """Gives those of an episode's actions, out of so many, under its policy: [T] float32."""
  rate, is_choice = np.float32(episode.epsilon), (episode.choices == 1).astype(np.float32)
  drawn = (1 - rate) * is_choice + rate / np.float32(num_actions)
  return np.where(episode.choices == LASTING, np.float32(1), drawn)


def _play_again(
  header: Header, rom_dir: str | None, keeps_rows: bool, episode: Episode
) -> dqn_replay.EpisodeRows | _Mismatch | None:
  """Plays an episode; returns its rows, if they are wanted, or where it is another one."""
  game = play.game(header.environment_name, header.sticky_action_probability, rom_dir)
  checksums, length = Checksums(), len(episode.actions)
  frames = np.empty((length if keeps_rows else 1, *atari_data.FRAME_SHAPE), np.uint8)
  rewards, terminals = np.zeros(length, np.float32), np.zeros(length, np.uint8)
  game.start(episode.seed)
  for i, action in enumerate(episode.actions.tolist()):
    frame = game.frame
    frames[i if keeps_rows else 0] = frame
    rewards[i], terminals[i] = game.step(action)
    checksums.add(frame, action, rewards[i], terminals[i])
    last, number = i == length - 1, i // STEPS_PER_CHECKSUM
    if last or terminals[i] or (i + 1) % STEPS_PER_CHECKSUM == 0:
      expected = int(episode.checksums[number])
      if checksums.values[-1] != expected or terminals[i] != (last and episode.ended):
        return _Mismatch(number * STEPS_PER_CHECKSUM, i)
  if not keeps_rows:
    return None
  probs = probabilities(episode, header.num_actions)
  return dqn_replay.EpisodeRows(frames, episode.actions.astype(np.int32), rewards, terminals, probs)


def play_again(
  path: str | os.PathLike,
  header: Header,
  episodes: Iterable[Episode],
  num_processes: int,
  rom_dir: str | None = None,
  keeps_rows: bool = True,
  first_number: int = 0,
) -> Iterator[dqn_replay.EpisodeRows | None]:
  """Plays recorded episodes in several processes; yields the rows of each, in order.

  Args:
    path: of the recording, for messages.
    header: its header.
    episodes: some of its episodes.
    num_processes: that play; no influence on what is yielded.
    rom_dir: see `atari_env.rom_path`.
    keeps_rows: False: checks only, and yields None.
    first_number: of the first of the episodes, for messages.

  Raises:
    ValueError: the ROM is another one than the recording's, or has another number of actions; or an
      episode did not come out as it was recorded: at the first checksum that differs.
    FileNotFoundError: `rom_dir` has no such ROM.
    OSError: a process was killed.
  """
  md5, emulator = atari_env.rom_md5(header.environment_name, rom_dir), this_emulator()
  shard.expect(
    md5 == header.rom_md5, pathlib.Path(path),
    f'to be played with the ROM of {header.environment_name} with MD5 {header.rom_md5}', md5,
  )  # fmt: skip
  num_actions = play.game(
    header.environment_name, header.sticky_action_probability, rom_dir
  ).num_actions
  expected = f'the {num_actions} actions of {header.environment_name}'
  shard.expect(header.num_actions == num_actions, pathlib.Path(path), expected, header.num_actions)
  if emulator != header.emulator:
    logging.warning('%s: recorded with %s; here is %s', path, header.emulator, emulator)
  function = functools.partial(_play_again, header, rom_dir, keeps_rows)
  for number, rows in enumerate(play.in_processes(function, episodes, num_processes), first_number):
    if isinstance(rows, _Mismatch):
      is_same = emulator == header.emulator
      why = 'here is the same: was the file changed, or how OpenCV resizes?'
      raise shard.FormatError(
        f'{path}: episode {number}: steps {rows.first} to {rows.last} are not what was recorded '
        f'with {header.emulator} and ROM {header.rom_md5}; '
        + (why if is_same else f'here is {emulator}, with this ROM')
      )
    yield rows


def expand(
  path: str | os.PathLike,
  replay_dir: pathlib.Path,
  shard_capacity: int,
  num_processes: int,
  rom_dir: str | None = None,
) -> int:
  """Writes a recording's transitions as shards; returns how many there are.

  The directory appears when it is complete.

  Args:
    path: of the recording.
    replay_dir: where to; may be an empty directory.
    shard_capacity: rows of a shard.
    num_processes: that play; no influence on what is written.
    rom_dir: see `atari_env.rom_path`.

  Raises:
    ValueError, OSError: see `read` and `play_again`.
    FileExistsError: there is something at `replay_dir` already.
  """
  header, episodes = read(path)
  with (
    dqn_replay.new_directory(replay_dir) as partial,
    program.progress_bar(None, 'expanding', 'transition') as bar,
  ):
    writer = dqn_replay.ShardWriter(partial, shard_capacity, with_prob=header.has_choices)
    for rows in play_again(path, header, episodes, num_processes, rom_dir):
      assert rows is not None
      writer.add_episode(rows)
      bar.update(writer.num_transitions - bar.n)
    writer.close()
  return writer.num_transitions


def verify(
  path: str | os.PathLike, num_processes: int, rom_dir: str | None = None
) -> tuple[int, int]:
  """Checks that a recording's transitions come out as recorded; counts episodes and transitions.

  Args:
    path: of the recording.
    num_processes: that play.
    rom_dir: see `atari_env.rom_path`.

  Raises:
    ValueError, OSError: see `read` and `play_again`.
  """
  header, episodes = read(path)
  num_episodes = num_steps = 0

  def counted() -> Iterator[Episode]:
    nonlocal num_steps
    for episode in episodes:
      num_steps += len(episode.actions)
      yield episode

  with program.progress_bar(None, 'verifying', 'episode') as bar:
    for _ in play_again(path, header, counted(), num_processes, rom_dir, keeps_rows=False):
      num_episodes += 1
      bar.update()
  return num_episodes, num_steps


@dataclasses.dataclass(frozen=True)
class Config:
  """What to do with which recording; each field but the first is a flag."""

  command: tuple[str, ...] = ()
  path: str | None = None  # of the recording
  replay_dir: str | None = None  # where expand writes shards
  shard_capacity: int = 25_000  # rows of a shard, blank ones included
  rom_dir: str | None = None  # of the ROM, see roms.py; default: the emulator's own
  num_processes: int = play.NUM_PROCESSES  # that play; no influence on what is written
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    if self.command not in (('expand',), ('verify',)):
      raise ValueError(f'expected one command, expand or verify, got {" ".join(self.command)}')
    program.check(self, 'path', self.path is not None, 'the path of a recording')
    program.check_positive(self, 'num_processes')
    has_place = self.command == ('verify',) or self.replay_dir is not None
    program.check(self, 'replay_dir', has_place, 'where to write shards')


def main(config: Config) -> None:
  assert config.path is not None
  start = time.monotonic()
  if config.command == ('verify',):
    num_episodes, number = verify(config.path, config.num_processes, config.rom_dir)
    done = f'all {num_episodes:,} episodes come out as recorded'
  else:
    assert config.replay_dir is not None
    replay_dir = pathlib.Path(config.replay_dir)
    number = expand(
      config.path, replay_dir, config.shard_capacity, config.num_processes, config.rom_dir
    )
    done = f'expanded to {replay_dir}'
  seconds = time.monotonic() - start
  logging.info(
    '%s: %s: %d transitions in %.1f s, %.0f a second; %.3f bytes each',
    config.path, done, number, seconds, number / seconds, os.path.getsize(config.path) / number,
  )  # fmt: skip


if __name__ == '__main__':
  program.run(main, Config, arguments='command')
