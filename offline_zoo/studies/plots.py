"""Draws many runs. Needs matplotlib, which the extra `plots` installs.

Agents are told apart by colour, marker and line style at once, so that print in black and white
and colour-blind eyes do as well. Each colour has a contrast of 3 or more to either background.
"""

import contextlib
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from offline_zoo.studies import runs, statistics
from offline_zoo.studies.runs import Run

# Blue, vermilion, bluish green and reddish purple of Okabe and Ito (2008); and the text's colour.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', None)
_LINE_STYLES = ('-', '--')
_MARKERS = 'os^DvP*Xp<'
# Of the looks that `_styles` makes of these, which one an agent has in every picture.
_LOOKS = {
  'bcq': 0, 'cql': 1, 'dqn': 2, 'qrdqn': 3, 'rem': 4, 'bc': 5, 'c51': 6, 'off_policy_dqn': 7,
  'crr': 8, 'multi_network_rem': 9, 'online_dqn': 12,
}  # fmt: skip
_REFERENCES = {
  'logged mean': '--', 'logged mean, clipped': '--', 'random play': ':', 'human': '-.'
}  # fmt: skip
_REFERENCE_COLOUR = '#7A7A7A'
# One seed's last evaluation.
_SEED: dict[str, Any] = {'linestyle': 'none', 'marker': '|', 'markersize': 11}
# Fewer seeds have an interval as well, but one that dwarfs the curves.
_MIN_SEEDS_FOR_BAND = 3


def theme(dark: bool) -> contextlib.AbstractContextManager[None]:
  """Sets matplotlib's colours and sizes, within which to draw and to save."""
  background, text, grid = (
    ('#0D1117', '#F0F6FC', '#30363D') if dark else ('#FFFFFF', '#1F2328', '#D8DEE4')
  )
  settings: Any = {
    'axes.axisbelow': True, 'axes.grid': True, 'axes.spines.right': False,
    'axes.spines.top': False, 'figure.constrained_layout.use': True, 'font.size': 9,
    'grid.linewidth': 0.6, 'legend.frameon': False, 'legend.handlelength': 3,
    'lines.linewidth': 1.6, 'lines.markersize': 5, 'savefig.dpi': 200,
    'svg.hashsalt': 'offline_zoo',  # the same picture, the same bytes
    'axes.facecolor': background, 'figure.facecolor': background, 'grid.color': grid,
  }  # fmt: skip
  for name in ('axes.edgecolor', 'axes.labelcolor', 'text.color', 'xtick.color', 'ytick.color'):
    settings[name] = text
  return matplotlib.rc_context(settings)


def save(figure: Figure, file_format: str) -> bytes:
  """Renders a figure as `png` or `svg`; without a date, so that it can be made again."""
  content = io.BytesIO()
  figure.savefig(
    content, format=file_format, metadata={'Date': None} if file_format == 'svg' else {}
  )
  return content.getvalue()


def _styles(agents: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Gives each agent its looks: ours their own, others what is free in the picture."""
  looks = list(itertools.product(('full', 'none'), _LINE_STYLES, _COLOURS))
  ours = {_LOOKS[agent] for agent in agents if agent in _LOOKS}
  free = [i for i in range(len(looks)) if i not in ours]
  free.sort(key=lambda i: i in _LOOKS.values())  # last, what is another agent's elsewhere
  of_others = itertools.cycle(free or range(len(looks)))
  styles = {}
  for agent in agents:
    look = _LOOKS[agent] if agent in _LOOKS else next(of_others)
    fill, line_style, colour = looks[look]
    styles[agent] = {
      'color': colour or matplotlib.rcParams['text.color'],
      'linestyle': line_style,
      'fillstyle': fill,
      'marker': _MARKERS[look % len(_MARKERS)],
    }
  return styles


def agents_of(some: Sequence[Run]) -> list[str]:
  """Lists the agents of runs, in their order."""
  return list(dict.fromkeys(run.agent for run in some))


def learning_curves(
  drawn: Sequence[Run], published: Mapping[tuple[str, str], tuple[str, np.ndarray]] | None = None
) -> Figure:
  """Draws a panel a data set: each agent's return over updates, the mean over seeds, its interval.

  Means are taken where all seeds were evaluated. The interval is Student's, 95%, of three seeds or
  more; of two, thin lines are the seeds. A human score far above all else is written, not drawn.
  Beside an agent that learns online, a dotted line is its own play, which it learns from.

  Args:
    drawn: the runs.
    published: for (agent, data), a label and points (updates, return) [N, 2] to draw beside ours.
  """
  figure, panels, of_panels = _panels(drawn, (6.4, 3.8), (3.4, 2.7))
  styles = _styles(agents_of(drawn))
  for axes, of_data in of_panels:
    for agent in agents_of(of_data):
      _draw_agent(axes, [run for run in of_data if run.agent == agent], styles[agent])
      if published and (agent, of_data[0].data) in published:
        label, points = published[agent, of_data[0].data]
        axes.plot(
          *points.T, label=label, color=styles[agent]['color'], linestyle=':', linewidth=1,
          marker='d', markerfacecolor='none',
        )  # fmt: skip
    limits = runs.limits(of_data)
    _draw_references(axes.axhline, of_data, limits)
    axes.set_ylim(*_widened(limits))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  for axes in panels[:, 0]:
    axes.set_ylabel('mean episode return')
  for axes, _ in of_panels[-panels.shape[1] :]:
    axes.set_xlabel('gradient updates')
  _add_legend(figure, panels.flat, agents_of(drawn))
  return figure


def _panels(
  drawn: Sequence[Run],
  size: tuple[float, float],
  size_of_many: tuple[float, float],
  sharey: bool = False,
) -> tuple[Figure, np.ndarray, list[tuple[Axes, list[Run]]]]:
  """Makes a panel a data set, under its name and what its returns are to be compared with.

  Args:
    drawn: the runs.
    size: of the panel, if there is but one, in inches.
    size_of_many: of each, if there are more.
    sharey: whether all have one y axis.

  Returns:
    The picture, its panels [num_rows, num_columns], and those with data, with their runs.
  """
  data = sorted({run.data for run in drawn})
  num_rows = math.ceil(len(data) / 3)
  num_columns = math.ceil(len(data) / num_rows)  # four: two and two
  width, height = size if len(data) == 1 else size_of_many
  figure = Figure((width * num_columns, height * num_rows))
  panels = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey)
  of_panels = [
    (axes, [run for run in drawn if run.data == name])
    for axes, name in zip(panels.flat, data, strict=False)
  ]
  for axes, of_data in of_panels:
    run = of_data[0]
    of_game = run.data == run.environment_name
    title = run.data.replace('_', ' ').title() if of_game else run.data
    axes.set_title(title, loc='left', weight='bold', pad=16)
    axes.annotate(
      runs.describe_references(of_data),
      (0, 1), (0, 4), xycoords='axes fraction', textcoords='offset points', fontsize=7,
    )  # fmt: skip
  for axes in panels.flat[len(data) :]:
    axes.set_axis_off()
  return figure, panels, of_panels


def _draw_agent(axes: Axes, of_agent: Sequence[Run], style: Mapping[str, Any]) -> None:
  shared = runs.shared_updates(of_agent)
  values = runs.at(of_agent, shared, 'eval_episode_return')
  every = max(1, len(shared) // 10)
  axes.plot(shared, values.mean(0), label=of_agent[0].agent, markevery=every, **style)
  if of_agent[0].learns_online:
    played = runs.at(of_agent, shared, 'dataset_episode_return').mean(0)
    label = f'{of_agent[0].agent}, as it plays to learn'
    axes.plot(shared, played, label=label, color=style['color'], linestyle=':')
  if len(of_agent) >= _MIN_SEEDS_FOR_BAND:
    low, high = statistics.mean_interval(values)
    axes.fill_between(shared, low, high, color=style['color'], alpha=0.18, linewidth=0)
  elif len(of_agent) > 1:
    for run in of_agent:
      axes.plot(
        run.num_updates, run.column('eval_episode_return'),
        color=style['color'], linewidth=0.7, alpha=0.6,
      )  # fmt: skip


def _draw_references(
  draw: Callable[..., Any], of_data: Sequence[Run], limits: tuple[float, float]
) -> None:
  """Draws lines, across or upright, at what returns are to be compared with within the limits."""
  for name, value in runs.references(of_data):
    if value <= limits[1]:
      style = _REFERENCES[name]
      draw(value, label=name, color=_REFERENCE_COLOUR, linestyle=style, linewidth=1.2)


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
  low, high = limits
  margin = 0.05 * (high - low or 1)
  return low - margin, high + margin


def last_evaluations(drawn: Sequence[Run]) -> Figure:
  """Draws a panel a data set, a row an agent: the mean of its last evaluation, and each seed's.

  It is the last one that all seeds have had. The mean is the agent's mark, seeds are strokes.
  """
  agents = agents_of(drawn)
  styles = _styles(agents)
  height = 1.1 + 0.22 * len(agents)
  figure, panels, of_panels = _panels(drawn, (6.4, height), (3.4, height), sharey=True)
  for axes, of_data in of_panels:
    shown: list[float] = []
    for agent in agents_of(of_data):
      last = runs.last_evaluation([run for run in of_data if run.agent == agent])
      if last is None:
        continue
      row, style = agents.index(agent), styles[agent]
      shown += [*last.returns]
      axes.plot(last.returns, np.full(len(last.returns), row), color=style['color'], **_SEED)
      axes.plot([last.returns.mean()], [row], **style)
    limits = runs.limits(of_data, shown or None)
    _draw_references(axes.axvline, of_data, limits)
    axes.set_xlim(*_widened(limits))
    axes.grid(axis='y', visible=False)
  text_colour = matplotlib.rcParams['text.color']
  panels[0, 0].plot([], [], label='one seed', color=text_colour, **_SEED)
  panels[0, 0].plot([], [], 'o', label='mean of seeds', color=text_colour)
  panels[0, 0].set_yticks(range(len(agents)), agents)
  panels[0, 0].set_ylim(len(agents) - 0.5, -0.5)
  for axes, _ in of_panels[-panels.shape[1] :]:
    axes.set_xlabel('mean episode return')
  _add_legend(figure, panels.flat, [])
  return figure


def _add_legend(figure: Figure, panels: Iterable[Axes], agents: Sequence[str]) -> None:
  """Explains, below the panels, what is drawn in any of them: agents first, references last."""
  entries: dict[str, Artist] = {}
  for axes in panels:
    handles, labels = axes.get_legend_handles_labels()
    entries = {**dict(zip(labels, handles, strict=True)), **entries}
  others = sorted(entries.keys() - {*agents, *_REFERENCES})  # what was published
  labels = [label for label in (*agents, *others, *_REFERENCES) if label in entries]
  width = 0.62 + 0.072 * max(map(len, labels))  # inches of an entry
  columns = max(1, int(figure.get_figwidth() / width))
  rows = math.ceil(len(labels) / columns)
  columns = math.ceil(len(labels) / rows)  # so that no entry is left alone
  figure.set_figheight(figure.get_figheight() + 0.19 * rows)
  handles = [entries[label] for label in labels]
  figure.legend(handles, labels, loc='outside lower center', ncols=columns, columnspacing=1)


def intervals(
  panels: Mapping[str, Mapping[str, tuple[float, float, float]]], chance: float | None = None
) -> Figure:
  """Draws estimates with their intervals, a panel for each statistic and a row for each name.

  Args:
    panels: for each statistic and name, a point and both ends of its interval, which may be NaN.
    chance: where to draw a line to compare with.
  """
  names = list(next(iter(panels.values())))
  figure = Figure((max(2.3 * len(panels), 4.6), 0.9 + 0.28 * len(names)))
  styles = _styles(names)
  all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (title, estimates) in zip(all_axes, panels.items(), strict=True):
    for row, name in enumerate(names):
      point, low, high = estimates[name]
      style = styles[name] if chance is None else {'color': _COLOURS[0], 'marker': 'o'}
      axes.plot(
        [low, high], [row, row], color=style['color'], linewidth=5, alpha=0.45,
        solid_capstyle='butt',
      )  # fmt: skip
      axes.plot([point], [row], **style)
    axes.set_title(title, fontsize=9)
    axes.grid(axis='y', visible=False)
    axes.margins(x=0.1)
    if chance is not None:
      axes.set_xlim(-0.03, 1.03)
      axes.axvline(chance, color=_REFERENCE_COLOUR, linestyle=':', linewidth=1.2)
  all_axes[0].set_yticks(range(len(names)), names)
  all_axes[0].set_ylim(len(names) - 0.5, -0.5)
  return figure


def performance_profiles(scores: Mapping[str, np.ndarray]) -> Figure:
  """Draws which fraction of an agent's runs scores above each threshold, with its interval.

  Args:
    scores: human-normalised, [num_runs, num_games], for each agent.
  """
  figure = Figure((6.4, 3.8))
  axes = figure.subplots()
  every = np.concatenate([x.ravel() for x in scores.values()])
  thresholds = np.linspace(min(0, every.min()), every.max(), 201)
  profile: Callable = functools.partial(statistics.performance_profile, thresholds=thresholds)
  for (agent, x), style in zip(scores.items(), _styles(list(scores)).values(), strict=True):
    axes.plot(thresholds, profile(x), label=agent, drawstyle='steps-post', markevery=20, **style)
    low, high = statistics.bootstrap_interval(profile, x, num_resamples=2_000)
    axes.fill_between(
      thresholds, low, high, step='post', color=style['color'], alpha=0.18, linewidth=0
    )
  axes.set_xlabel('human-normalised score')
  axes.set_ylabel('fraction of runs that score more')
  axes.set_ylim(-0.03, 1.03)
  _add_legend(figure, [axes], list(scores))
  return figure
