"""Tests for processors.py against recorded runs of Dopamine and by hand."""

import dm_env
import numpy as np
import pytest

from offline_zoo import processors


def golden_run(golden, game: str) -> dict[str, np.ndarray]:
  with np.load(golden / 'preproc' / f'preproc_{game}.npz', allow_pickle=False) as file:
    return dict(file)


def raw_timesteps(run):
  """The recorded raw frames as the timesteps that the environment would give."""
  for i, frame in enumerate(run['raw_gray']):
    if run['raw_is_reset'][i]:
      yield dm_env.restart(frame)
    elif run['raw_terminated'][i]:
      yield dm_env.termination(float(run['raw_reward'][i]), frame)
    else:
      yield dm_env.transition(float(run['raw_reward'][i]), frame)


@pytest.mark.parametrize('game', ['breakout', 'pong'])
def test_every_observation_equals_dopamines(golden, game: str):
  run = golden_run(golden, game)
  processor = processors.AtariProcessor()
  answers = [processor(timestep) for timestep in raw_timesteps(run)]
  # An answer at the last raw frame of each call of Dopamine's reset and step, and only there.
  answered = np.flatnonzero([answer is not None for answer in answers])
  np.testing.assert_array_equal(answered, run['raw_start'] + run['raw_count'] - 1)

  stack = np.zeros((84, 84, 4), np.uint8)
  for i, row in enumerate(answered):
    answer = answers[row]
    assert answer is not None
    np.testing.assert_array_equal(answer.observation[..., -1], run['obs'][i])
    if run['is_reset'][i]:
      stack = np.zeros_like(stack)
      assert answer.first() and answer.reward is None
    else:
      assert answer.reward == run['reward'][i]
      assert answer.last() == run['terminal'][i]
      assert answer.discount == (0.0 if run['terminal'][i] else 1.0)
    stack = np.concatenate([stack[..., 1:], run['obs'][i][..., None]], axis=-1)
    np.testing.assert_array_equal(answer.observation, stack)
  assert len(answered) == len(run['obs'])


def grey(level: int) -> np.ndarray:
  return np.full((210, 160), level, np.uint8)


@pytest.mark.parametrize(
  'num_frames, expected',
  [
    (1, 40),  # the buffers still hold the previous maximum ...
    (2, 40),
    (3, 40),  # ... then 7 and the previous repeat's fourth frame, 40
    (4, 9),
  ],
)
@pytest.mark.parametrize('cut', [False, True])
def test_an_end_within_a_repeat_shows_what_dopamines_buffers_hold(num_frames, expected, cut):
  processor = processors.AtariProcessor()
  assert processor(dm_env.restart(grey(90))).observation[0, 0].tolist() == [0, 0, 0, 90]
  for level in (200, 200, 30):
    assert processor(dm_env.transition(1.0, grey(level))) is None
  assert processor(dm_env.transition(1.0, grey(40))).observation[0, 0].tolist() == [0, 0, 90, 40]
  levels = (200, 200, 7, 9)[:num_frames]
  for level in levels[:-1]:
    assert processor(dm_env.transition(1.0, grey(level))) is None
  end = dm_env.truncation if cut else dm_env.termination
  answer = processor(end(2.0, grey(levels[-1])))
  assert answer.last()
  assert answer.observation[0, 0].tolist() == [0, 90, 40, expected]
  assert answer.reward == num_frames - 1 + 2.0
  assert answer.discount == (1.0 if cut else 0.0)


def test_an_end_right_after_the_first_frame_pools_with_black():
  for num_frames, expected in [(1, 90), (2, 90), (3, 7)]:
    processor = processors.AtariProcessor()
    processor(dm_env.restart(grey(90)))
    levels = (200, 200, 7)[:num_frames]
    for level in levels[:-1]:
      assert processor(dm_env.transition(0.0, grey(level))) is None
    answer = processor(dm_env.termination(0.0, grey(levels[-1])))
    assert answer.observation[0, 0].tolist() == [0, 0, 90, expected]


def test_resize_is_an_area_average(golden):
  # The average over [i * 210/84, (i+1) * 210/84) x [j * 160/84, ...), written out; OpenCV's float32
  # sums may differ from it by one grey level where it falls on a half.
  frame = golden_run(golden, 'breakout')['raw_gray'][40].astype(np.float64)

  def weights(source: int) -> np.ndarray:
    edges = np.arange(85) * source / 84
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) / (source / 84)

  average = weights(210) @ frame @ weights(160).T
  assert np.abs(processors.resize(frame.astype(np.uint8)) - average).max() <= 0.5 + 1e-4
