"""Tests for plots.py: what is drawn is read back from matplotlib's axes."""

import pathlib

import numpy as np
import pytest
import scipy.stats

from offline_zoo import program
from offline_zoo.studies import plots, runs

CQL = np.array([[6.0, 14.0, 21.0], [7.0, 15.0, 24.0], [9.0, 15.5, 22.5]])  # seeds, evaluations
REM = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 6.0]])


@pytest.fixture
def drawn(write_csv):
  """Three seeds of CQL and two of REM on Freeway; one of REM on Seaquest and on Pooyan."""
  paths = [
    write_csv(f'{agent}/{seed}/results.csv', values, agent, seed=seed)
    for agent, seeds in (('cql', CQL), ('rem', REM))
    for seed, values in enumerate(seeds, start=1)
  ]
  paths.append(write_csv('s/results.csv', [100.0, 300.0], 'rem', 'seaquest', logged=150.0))
  paths.append(write_csv('p/results.csv', [500.0], 'rem', 'pooyan', logged=None))
  return runs.read(paths)


def lines(axes) -> dict[str, np.ndarray]:
  """What is drawn under each label: points [N, 2]."""
  return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def bounds(collection) -> np.ndarray:
  """The band that `fill_between` has drawn: rows of (x, low, high)."""
  vertices = collection.get_paths()[0].vertices
  return np.array(
    [
      (x, vertices[vertices[:, 0] == x, 1].min(), vertices[vertices[:, 0] == x, 1].max())
      for x in np.unique(vertices[:, 0])
    ]
  )


def test_learning_curves(drawn):
  figure = plots.learning_curves(drawn)
  freeway, pooyan, seaquest = figure.axes
  assert [axes.get_title('left') for axes in figure.axes] == ['Freeway', 'Pooyan', 'Seaquest']
  updates = [1000, 2000, 3000]
  of = lines(freeway)
  np.testing.assert_allclose(of['cql'], np.transpose([updates, CQL.mean(0)]))
  np.testing.assert_allclose(of['rem'], np.transpose([updates, REM.mean(0)]))
  # Three seeds have a band, their interval by SciPy's own words; two are drawn one by one.
  (band,) = freeway.collections
  low, high = scipy.stats.t.interval(0.95, 2, loc=CQL.mean(0), scale=scipy.stats.sem(CQL, axis=0))
  np.testing.assert_allclose(bounds(band), np.transpose([updates, low, high]))
  thin = [line.get_xydata() for line in freeway.get_lines() if line.get_linewidth() < 1]
  np.testing.assert_allclose(thin, [np.transpose([updates, values]) for values in REM])
  for name, value in {'logged mean': 7.5, 'random play': 0.0, 'human': 29.6}.items():
    assert of[name][:, 1].tolist() == [value, value]
  assert freeway.get_ylim() == pytest.approx((-0.05 * 29.6, 1.05 * 29.6))
  # A human score far away would flatten the rest: it is written only.
  assert {'rem', 'logged mean', 'random play'} == set(lines(seaquest))
  assert seaquest.texts[0].get_text() == 'logged mean 150.0, random play 68.4, human 42,054.7'
  assert set(lines(pooyan)) == {'rem'}
  # Of one run, one point, there is no band.
  assert not pooyan.collections and lines(pooyan)['rem'].tolist() == [[1000, 500]]
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [
    'cql', 'rem', 'logged mean', 'random play', 'human'
  ]  # fmt: skip


def test_an_online_agents_own_play_is_a_curve(write_csv):
  paths = [
    write_csv(f'{seed}/results.csv', [1, 5, 9], 'online_dqn', seed=seed, logged=logged)
    for seed, logged in ((1, 2.0), (2, 4.0))
  ]
  (axes,) = plots.learning_curves(runs.read(paths)).axes
  played = lines(axes)['online_dqn, as it plays to learn']
  assert played.tolist() == [[1000, 3], [2000, 3], [3000, 3]]
  assert 'logged mean' not in lines(axes)


def test_an_agent_looks_the_same_in_every_panel_and_like_no_other(drawn):
  freeway, _, seaquest = plots.learning_curves(drawn).axes

  def looks(axes, name):
    (line,) = [line for line in axes.get_lines() if line.get_label() == name]
    return line.get_color(), line.get_marker(), line.get_linestyle()

  assert looks(freeway, 'rem') == looks(seaquest, 'rem') != looks(freeway, 'cql')
  # In every picture, whatever else is there.
  of = plots._styles
  assert of(['cql'])['cql'] == of(['fork', 'bcq', 'cql', 'other'])['cql']
  agents = {path.parent.name for path in pathlib.Path(program.__file__).parent.glob('*/agent.py')}
  assert plots._LOOKS.keys() <= {*agents, 'online_dqn'}
  styles = of([*plots._LOOKS, *map(str, range(9))])
  assert len({tuple(style.values()) for style in styles.values()}) == 20
  # Others have no look of ours, as long as there are others.
  of_ours = {tuple(style.values()) for style in of([*plots._LOOKS]).values()}
  assert not of_ours & {tuple(style.values()) for style in of([*'abcdefghi']).values()}
  styles = [tuple(style.values()) for style in plots._styles([str(i) for i in range(20)]).values()]
  assert len(set(styles)) == 20
  # In black and white, markers alone tell them apart, full or hollow.
  assert len({marker for *_, marker in styles}) == 10
  assert len({looks[-2:] for looks in styles}) == 20


def test_last_evaluations(study):
  figure = plots.last_evaluations(runs.read(study['sweep'], {'mixed', 'random', 'asterix_10k'}))
  assert [axes.get_title('left') for axes in figure.axes] == ['asterix_10k', 'mixed', 'random']
  # Rows are BC and CQL. For each: its seeds, then their mean.
  for axes, want in zip(
    figure.axes,
    [
      [[(1250, 1), (1300, 1)], [(1275, 1)]],
      [[(9.5, 0), (6.75, 0)], [(8.125, 0)], [(13, 1), (8, 1)], [(10.5, 1)]],
      [[(1, 0), (0, 0)], [(0.5, 0)], [(4, 1), (3, 1)], [(3.5, 1)]],
    ],
    strict=True,
  ):
    drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [[*map(tuple, points)] for points in drawn[: len(want)]] == want
  asterix, mixed, random = figure.axes
  assert lines(mixed)['logged mean'][:, 0].tolist() == [7.5, 7.5]
  assert lines(mixed)['random play'][:, 0].tolist() == [0, 0]
  # Lines of what is in reach, as in the curves, but only of what is shown here.
  assert 'human' not in {**lines(asterix), **lines(random)} and 'human' not in lines(mixed)
  assert random.get_xlim() == pytest.approx((-0.2, 4.2))
  assert asterix.texts[0].get_text() == 'logged mean 1,300.0, random play 210.0, human 8,503.3'
  assert [label.get_text() for label in asterix.get_yticklabels()] == ['bc', 'cql']
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [
    'mean of seeds', 'one seed', 'logged mean', 'random play'
  ]  # fmt: skip


def test_data_of_one_game_have_panels_of_their_own(study):
  figure = plots.learning_curves(runs.read(study['sweep'], {'mixed', 'random', 'asterix_10k'}))
  _, mixed, random = figure.axes
  assert random.get_title('left') == 'random'
  assert lines(mixed)['cql'].tolist() == [[1000, 5], [2000, 10.5]]
  assert lines(random)['cql'].tolist() == [[1000, 1], [2000, 2]]
  assert lines(random)['logged mean'][:, 1].tolist() == [0.5, 0.5]


def test_what_has_neither_reference_nor_evaluation_in_common_is_drawn(write_csv):
  read = runs.read(
    [
      write_csv(f'{seed}/results.csv', [100.0], 'cql', 'pooyan', seed, every=seed, logged=None)
      for seed in (1, 2)
    ]
  )
  figure = plots.last_evaluations(read)
  assert [line.get_label() for line in figure.axes[0].get_lines()] == ['one seed', 'mean of seeds']
  assert figure.axes[0].get_xlim() == pytest.approx((99.95, 100.05))


def test_published_scores_are_drawn_beside_their_agent(drawn):
  points = np.array([[1000.0, 10.0], [2000.0, 12.0]])
  figure = plots.learning_curves(drawn, {('cql', 'freeway'): ('d3rlpy CQL', points)})
  axes, (legend,) = figure.axes[0], figure.legends
  labels = [text.get_text() for text in legend.get_texts()]
  assert labels[:4] == ['cql', 'rem', 'd3rlpy CQL', 'logged mean']
  np.testing.assert_array_equal(lines(axes)['d3rlpy CQL'], points)
  colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
  assert colours['d3rlpy CQL'] == colours['cql'] != colours['rem']


def test_the_legend_fits_in_the_picture(write_csv):
  names = ('bc', 'c51', 'cql', 'crr', 'multi_network_rem', 'off_policy_dqn', 'rem')
  read = runs.read([write_csv(f'{name}/results.csv', [1.0], name) for name in names])
  label = 'd3rlpy CQL (QR-200, alpha 4)'
  for published in ({}, {('cql', 'freeway'): (label, np.ones((1, 2)))}):
    figure = plots.learning_curves(read, published)
    plots.save(figure, 'png')
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


def test_long_curves_have_few_markers(write_csv):
  (run,) = runs.read([write_csv('1/results.csv', np.arange(200.0), 'cql')])
  (axes,) = plots.learning_curves([run]).axes
  assert axes.get_lines()[0].get_markevery() == 20


def test_intervals():
  nan = float('nan')
  panels = {
    'median': {'cql': (0.5, 0.4, 0.7), 'rem': (0.2, nan, nan)},
    'mean': {'cql': (0.6, 0.5, 0.8), 'rem': (0.3, nan, nan)},
  }
  figure = plots.intervals(panels)
  for axes, (title, of_names) in zip(figure.axes, panels.items(), strict=True):
    assert axes.get_title() == title
    drawn = [line.get_xydata() for line in axes.get_lines()]
    for row, (bar, point, (value, low, high)) in enumerate(
      zip(drawn[::2], drawn[1::2], of_names.values(), strict=True)
    ):
      np.testing.assert_array_equal(bar, [[low, row], [high, row]])
      np.testing.assert_array_equal(point, [[value, row]])
  assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ['cql', 'rem']
  (axes,) = plots.intervals({'p': {'cql over rem': (0.9, 0.7, 1.0)}}, chance=0.5).axes
  assert axes.get_lines()[-1].get_xdata() == [0.5, 0.5]


def test_performance_profiles():
  scores = {'cql': np.array([[0.0, 1.0], [0.5, 2.0], [0.5, 2.0]]), 'rem': np.array([[0.25, 0.25]])}
  (axes,) = plots.performance_profiles(scores).axes
  of = lines(axes)
  thresholds = np.linspace(0, 2, 201)
  for name, x in scores.items():
    np.testing.assert_allclose(of[name][:, 0], thresholds)
    want = [(x > t).mean() for t in thresholds]
    np.testing.assert_allclose(of[name][:, 1], want)
  # Above 0.75 are all runs of the second game and none of the first, however they are drawn; above
  # 0.25, in 8 and 1 of 27 resamples, all of the first or none.
  band = bounds(axes.collections[0])
  for threshold, low_and_high in ((0.75, [0.5, 0.5]), (0.25, [0.5, 1.0])):
    (row,) = band[np.isclose(band[:, 0], threshold)]
    assert row[1:].tolist() == low_and_high


def contrast(a: str, b: str) -> float:
  """The contrast of two colours as the Web Content Accessibility Guidelines define it."""

  def luminance(colour: str) -> float:
    levels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]

  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('dark', [False, True])
def test_everything_stands_out_from_the_background(drawn, dark: bool):
  with plots.theme(dark):
    figure = plots.learning_curves(drawn)
    last = plots.last_evaluations(drawn)
    background = plots.matplotlib.rcParams['figure.facecolor']
    assert (contrast(background, '#FFFFFF') > 10) == dark
    colours = {line.get_color() for axes in figure.axes + last.axes for line in axes.get_lines()}
    colours |= {style['color'] for style in plots._styles('abcdefghij').values()}
    colours |= {text.get_color() for axes in figure.axes for text in axes.texts}
    assert min(contrast(colour, background) for colour in colours) > 3


def test_pictures_are_the_same_bytes_again(drawn):
  for kind, begins in (('png', b'\x89PNG'), ('svg', b'<?xml')):
    pictures = []
    for _ in range(2):
      with plots.theme(dark=False):
        pictures.append(plots.save(plots.learning_curves(drawn[-1:]), kind))
    assert pictures[0] == pictures[1] and pictures[0].startswith(begins)
