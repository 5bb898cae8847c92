"""Looks at logs before anything is learnt from them: what is in them, and what looks wrong.

  python -m offline_zoo.logs.inspect --replay_dir=... --environment_name=pong \
    --picture_path=logs.png --video_path=episode.mp4

Any kind of logs that a run takes. Shards are encoded as for a run, which then finds them in the
cache, and looking at one that is there takes a second or two. Rewards and returns are as logged.
The picture shows frames from all shards and the same statistics, the video the whole episode of the
highest return. The picture needs matplotlib, which the extra `plots` installs.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from offline_zoo import atari_env, episodes, logs, playing, program, replay, results
from offline_zoo.atari_data import FRAME_SHAPE, NUM_ACTION_REPEATS, STACK_SIZE
from offline_zoo.encoding import frame_store, replay_cache
from offline_zoo.encoding import shards as encoded_shards
from offline_zoo.logs import bundled, play
from offline_zoo.logs import shard as log_shard
from offline_zoo.studies import report

_BAR_WIDTH = 40  # characters
_MAX_BINS = 12
_MAX_REWARDS = 8
_SHEET_SHAPE = (4, 8)  # frames
_FRAMES_PER_SECOND = 60 // NUM_ACTION_REPEATS  # the game's own speed
_FRAMES_PER_PIECE = 1000
# A frame's ids times these add up to 64 bits by which it is told from others.
_FACTORS = np.random.default_rng(0).integers(2**64, size=frame_store.NUM_BANDS, dtype=np.uint64)


@dataclasses.dataclass(frozen=True)
class Config:
  """What to look at; each field is a flag."""

  replay_dir: str | None = None  # the directory of the logs; miniature or demo: the game's own
  environment_name: str | None = None  # their game, to check and name the actions
  shards: tuple[int, ...] | None = None  # numbers of the shards to look at; default: all
  replay_cache_dir: str | None = None  # keeps encoded shards; default: ~/.cache; none: does not
  picture_path: str | None = None  # where to draw frames and statistics, as PNG
  video_path: str | None = None  # where to show the whole episode of the highest return, as MP4
  debug: bool = False  # tracebacks for errors

  def __post_init__(self):
    program.check(self, 'replay_dir', self.replay_dir is not None, 'a directory of logs')
    good = self.replay_dir not in bundled.NAMES or self.environment_name is not None
    program.check(self, 'replay_dir', good, '--environment_name beside it')


class Summary(NamedTuple):
  """What there is to say of a shard.

  Attributes:
    number: the shard's.
    num_rows: usable ones.
    num_stale: how many rows the files hold after them.
    is_step: [num_rows] bool, which of the rows are agent steps: neither blank ones before an
      episode nor frames that were logged without an action.
    num_blank: how many steps have a blank frame.
    num_repeated: how many steps have the frame of the step before.
    num_unpadded: how many episodes begin without three blank rows.
    num_impossible: how many steps have actions that had no chance, if it is logged.
    of_episodes: all of them, whole or not.
    actions: how often each is taken.
    rewards: how often each follows.
    frame_hashes: [distinct frames] uint64.
    checksum: of all rows.
  """

  number: int
  num_rows: int
  num_stale: int
  is_step: np.ndarray
  num_blank: int
  num_repeated: int
  num_unpadded: int
  num_impossible: int
  of_episodes: episodes.Episodes
  actions: collections.Counter[int]
  rewards: collections.Counter[float]
  frame_hashes: np.ndarray
  checksum: int

  @property
  def num_steps(self) -> int:
    return int(self.is_step.sum())

  @property
  def returns(self) -> np.ndarray:
    """Those of whole episodes."""
    return self.of_episodes.returns[self.is_whole]

  @property
  def is_whole(self) -> np.ndarray:
    return ~np.isnan(self.of_episodes.returns)


def _counts(values: np.ndarray) -> collections.Counter:
  found, counts = np.unique(values, return_counts=True)
  return collections.Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def summarise(number: int, encoded: replay_cache.EncodedShard, num_stale: int) -> Summary:
  """Counts what is in a shard."""
  ids = frame_store.unpack(encoded.frames)
  is_blank = ~ids.any(axis=1)  # a black band has the id 0
  of_episodes = episodes.of_shard(encoded)
  starts, lengths, _ = of_episodes
  ends = np.append(starts[1:], len(ids))
  is_padding, is_padded = np.zeros(len(ids), bool), np.ones(len(starts), bool)
  for offset in range(STACK_SIZE - 1):
    is_padded &= starts + offset < ends
    rows = starts[is_padded] + offset
    is_padding[rows] = is_blank[rows] & (encoded.rewards[rows] == 0)
    is_padded[is_padded] = is_padding[rows]
  is_step = ~is_padding & (encoded.terminals != log_shard.CUT)
  is_repeated = np.zeros(len(ids), bool)
  is_repeated[1:] = (ids[1:] == ids[:-1]).all(axis=1) & is_step[:-1]
  impossible = encoded.probabilities == 0 if len(encoded.probabilities) else False
  return Summary(
    number=number,
    num_rows=len(ids),
    num_stale=num_stale,
    is_step=is_step,
    num_blank=int((is_blank & is_step).sum()),
    num_repeated=int((is_repeated & is_step).sum()),
    # A shard may begin within an episode, or within the blank rows before it.
    num_unpadded=int((~is_padded & (lengths > 0) & (starts > 0)).sum()),
    num_impossible=int((impossible & is_step).sum()),
    of_episodes=of_episodes,
    actions=_counts(encoded.actions[is_step]),
    rewards=_counts(encoded.rewards[is_step]),
    frame_hashes=np.unique(ids.astype(np.uint64) @ _FACTORS),
    checksum=int(encoded.checksum),
  )


def suspicions(summaries: Sequence[Summary], action_meanings: Sequence[str] | None) -> list[str]:
  """Lists what logs of Atari play should not be like, a line each.

  Args:
    summaries: of the shards.
    action_meanings: names of the game's actions, if it is known.
  """
  found = []
  num_steps = sum(summary.num_steps for summary in summaries)
  actions = _total(summary.actions for summary in summaries)
  if action_meanings is not None:
    num_actions = len(action_meanings)
    if max(actions, default=0) >= num_actions:
      found.append(
        f'actions up to {max(actions)} are logged, and the game has {num_actions}, 0 to '
        f'{num_actions - 1}: are these the logs of another game?'
      )
    if never := [name for i, name in enumerate(action_meanings) if not actions[i]]:
      found.append(f'actions never taken: {", ".join(never)}: are these the logs of another game?')
  elif len(actions) == 1:
    found.append(f'no other action than {next(iter(actions))} is ever taken')
  returns = np.concatenate([summary.returns for summary in summaries])
  if _total(summary.rewards for summary in summaries).keys() == {0}:
    found.append('every reward is 0')
  elif len(returns) > 1 and len(set(returns)) == 1:
    found.append(f'each of {len(returns):,} episodes returns {returns[0]:g}')
  if not len(returns):
    found.append('no episode lies whole within a shard')
  for summary in summaries:
    if (longest := summary.of_episodes.lengths.max()) > play.MAX_STEPS_PER_EPISODE:
      found.append(
        f'shard {summary.number} has an episode of {longest:,} steps; the protocol ends one after '
        f'{play.MAX_STEPS_PER_EPISODE:,}'
      )
  for count, what in (
    (sum(s.num_unpadded for s in summaries), 'episodes begin without three blank rows: nothing '
     'is learnt from their first three steps'),
    (sum(s.num_impossible for s in summaries), 'steps have actions of probability 0'),
  ):  # fmt: skip
    if count:
      found.append(f'{count:,} {what}')
  for count, limit, what in (
    (sum(s.num_blank for s in summaries), 0.01, 'have a blank frame'),
    (sum(s.num_repeated for s in summaries), 0.5, 'have the frame of the step before'),
  ):
    if count > limit * num_steps:
      found.append(f'{count / num_steps:.0%} of all steps {what}')
  by_content = collections.defaultdict(list)
  for summary in summaries:
    by_content[summary.num_rows, summary.checksum].append(str(summary.number))
  found += [
    f'shards {" and ".join(numbers)} hold the same'
    for numbers in by_content.values()
    if len(numbers) > 1
  ]
  return found


def _total(counters: Iterable[collections.Counter]) -> collections.Counter:
  return sum(counters, collections.Counter())


# As text.


def _table(summaries: Sequence[Summary]) -> Iterator[str]:
  """Makes a Markdown table: a row a shard, and one for all of them."""
  yield '| shard | rows | stale | steps | whole episodes | mean return | distinct frames |'
  yield '|---|---|---|---|---|---|---|'
  every = np.concatenate([summary.frame_hashes for summary in summaries])
  rows = [(str(s.number), [s], len(s.frame_hashes)) for s in summaries]
  for name, some, num_frames in [*rows, ('all', summaries, len(np.unique(every)))]:
    returns = np.concatenate([s.returns for s in some])
    cells = [sum(s.num_rows for s in some), sum(s.num_stale for s in some)]
    cells += [sum(s.num_steps for s in some), len(returns)]
    mean = f'{returns.mean():.1f}' if len(returns) else ''
    yield f'| {name} | {" | ".join(f"{cell:,}" for cell in cells)} | {mean} | {num_frames:,} |'


def _bars(counts: Sequence[tuple[str, int]]) -> Iterator[str]:
  """Draws counts, each with its share."""
  width = max((len(label) for label, _ in counts), default=0)
  highest = max((count for _, count in counts), default=0) or 1
  total = sum(count for _, count in counts) or 1
  for label, count in counts:
    bar = '#' * round(_BAR_WIDTH * count / highest)
    yield f'  {label:>{width}} {count:>12,} {count / total:>7.1%}  {bar}'.rstrip()


def _histograms(
  summaries: Sequence[Summary], action_meanings: Sequence[str] | None
) -> dict[str, list[tuple[str, int]]]:
  """For each title, labels and counts; for text and picture."""
  returns = np.concatenate([summary.returns for summary in summaries])
  of_returns: list[tuple[str, int]] = []
  if len(returns):
    counts, edges = np.histogram(returns, bins=min(len(np.unique(returns)), _MAX_BINS))
    of_returns = [
      (f'{low:.4g} to {high:.4g}', int(count))
      for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
  actions = _total(summary.actions for summary in summaries)
  names = dict(enumerate(action_meanings or ()))
  numbers = range(max([*actions, *names], default=-1) + 1)
  rewards = _total(summary.rewards for summary in summaries)
  common = dict(sorted(rewards.most_common(_MAX_REWARDS)))
  of_rewards = [(f'{reward:g}', count) for reward, count in common.items()]
  if num_others := len(rewards) - len(common):
    of_rewards.append((f'{num_others} others', rewards.total() - sum(common.values())))
  return {
    f'Returns of {len(returns):,} whole episodes': of_returns,
    'Actions': [(f'{i} {names.get(i, "")}'.strip(), actions[i]) for i in numbers],
    'Rewards': of_rewards,
  }


def describe(
  summaries: Sequence[Summary], num_tiles: int, action_meanings: Sequence[str] | None
) -> str:
  """Says all in lines of text.

  Args:
    summaries: of the shards.
    num_tiles: how many distinct tiles their frames are made of.
    action_meanings: names of the game's actions, if it is known.
  """
  lines = list(_table(summaries))
  for title, counts in _histograms(summaries, action_meanings).items():
    lines += ['', title, *_bars(counts)]
  lengths = np.concatenate([s.of_episodes.lengths[s.is_whole] for s in summaries])
  partial = sum(np.count_nonzero(~s.is_whole & (s.of_episodes.lengths > 0)) for s in summaries)
  if len(lengths):
    lines.append(
      f'\nWhole episodes have {lengths.min():,} to {lengths.max():,} steps, {lengths.mean():,.0f} '
      f'on average; there only in part: {partial:,}.'
    )
  lines.append(f'All frames are made of {num_tiles:,} distinct tiles of 4x4 pixels.')
  found = suspicions(summaries, action_meanings)
  lines += ['\nSuspicious:', *(f'* {line}' for line in found or ['nothing'])]
  return '\n'.join(lines)


# As pictures.


def contact_sheet(encoded: encoded_shards.EncodedLogs, summaries: Sequence[Summary]) -> np.ndarray:
  """Lays out frames of steps, evenly over those of all shards: [4, 8, 84, 84] uint8.

  Raises:
    ValueError: there is none.
  """
  first_steps = np.cumsum([0, *(summary.num_steps for summary in summaries)])
  if not first_steps[-1]:
    raise ValueError('--picture_path: expected logs with a step; there is none')
  frames = []
  for step in np.linspace(0, first_steps[-1] - 1, math.prod(_SHEET_SHAPE)).astype(int):
    position = int(np.searchsorted(first_steps, step, side='right')) - 1
    rows = np.flatnonzero(summaries[position].is_step)
    frames.append(encoded.decode(position, rows[[step - first_steps[position]]]))
  return np.concatenate(frames).reshape(*_SHEET_SHAPE, *FRAME_SHAPE)


def draw(sheet: np.ndarray, histograms: Mapping[str, Sequence[tuple[str, int]]]) -> bytes:
  """Draws a contact sheet above histograms, as PNG."""
  plots = report.import_plots()
  with plots.theme(dark=False):
    figure = plots.Figure((10, 8.5))
    above, below = figure.subfigures(2, 1, height_ratios=(5, 3))
    axes = above.subplots()
    framed = np.pad(sheet, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=128)
    axes.imshow(np.block([[*row] for row in framed]), cmap='gray', vmin=0, vmax=255)
    axes.set_axis_off()
    for axes, (title, counts) in zip(below.subplots(1, 3), histograms.items(), strict=True):
      axes.barh([label for label, _ in counts], [count for _, count in counts])
      axes.set_title(title, fontsize=9)
      axes.grid(axis='y', visible=False)
      axes.invert_yaxis()
      axes.xaxis.set_major_formatter(plots.EngFormatter(sep=''))
    return plots.save(figure, 'png')


def write_video(
  encoded: encoded_shards.EncodedLogs, summaries: Sequence[Summary], path: pathlib.Path
) -> str:
  """Shows the whole episode of the highest return; says which one it is.

  Raises:
    ValueError: there is none.
    OSError: the video cannot be written.
  """
  returns = [np.where(s.is_whole, s.of_episodes.returns, -np.inf) for s in summaries]
  position = int(np.argmax([of_shard.max() for of_shard in returns]))
  episode = int(np.argmax(returns[position]))
  if np.isinf(returns[position][episode]):
    raise ValueError('--video_path: expected logs with whole episodes; none lies whole in a shard')
  start, length, score = (column[episode] for column in summaries[position].of_episodes)
  first = start + STACK_SIZE - 1
  with playing.Mp4(path, _FRAMES_PER_SECOND) as video:
    for row in range(first, first + length, _FRAMES_PER_PIECE):
      rows = np.arange(row, min(row + _FRAMES_PER_PIECE, first + length))
      for frame in encoded.decode(position, rows):
        video.add(frame[..., None].repeat(3, axis=-1))
    video.finish()
  number = summaries[position].number
  return f'shard {number}, rows {first:,} to {first + length - 1:,}, return {score:g}'


def main(config: Config) -> None:
  meanings = None
  if config.environment_name is not None:
    meanings = atari_env.AtariEnv(config.environment_name, seed=0).action_meanings
  if config.picture_path is not None:
    report.import_plots()  # before anything takes time
  replay_dir = bundled.find_or_make(config.replay_dir, config.environment_name or '')
  encoded = encoded_shards.load(
    replay_dir, config.shards, None, None, replay.cache_dir(config.replay_cache_dir)
  )
  files = {files.number: files for files in logs.open_shards(replay_dir)}
  summaries = []
  with program.progress_bar(len(encoded.numbers), 'counting', 'shard') as bar:
    for number, of_shard in zip(encoded.numbers, encoded.shards, strict=True):
      rows = files[number].read_small_files(None)
      summaries.append(summarise(number, of_shard, rows.num_frames - len(rows.action)))
      bar.update()
  print(
    f'{program.printable(str(replay_dir))}: {len(summaries)} {files[encoded.numbers[0]].kind}, '
    f'numbers {", ".join(map(str, encoded.numbers))}\n'
  )
  print(describe(summaries, encoded.num_used[0], meanings))
  if config.picture_path is not None:
    results.write_atomically(
      pathlib.Path(config.picture_path),
      draw(contact_sheet(encoded, summaries), _histograms(summaries, meanings)),
    )
    print(f'\nPicture: {config.picture_path}')
  if config.video_path is not None:
    print(f'Video: {write_video(encoded, summaries, pathlib.Path(config.video_path))}')


if __name__ == '__main__':
  program.run(main, Config)
