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
_LINE_STYLES = ('-', '--')  # the second from the sixth agent on
_MARKERS = 'os^DvP*Xp<'
_REFERENCES = {
  'logged mean': '--', 'logged mean, clipped': '--', 'random play': ':', 'human': '-.'
}  # fmt: skip
_REFERENCE_COLOUR = '#7A7A7A'
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
  """Gives each agent its looks, by its place among those of the picture."""
  colours = itertools.cycle(itertools.product(_LINE_STYLES, _COLOURS))
  return {
    agent: {
      'color': colour or matplotlib.rcParams['text.color'],
      'linestyle': line_style,
      'marker': marker,
    }
    for agent, (line_style, colour), marker in zip(
      agents, colours, itertools.cycle(_MARKERS), strict=False
    )
  }


def agents_of(some: Sequence[Run]) -> list[str]:
  """Lists the agents of runs, in their order."""
  return list(dict.fromkeys(run.agent for run in some))


def learning_curves(
  drawn: Sequence[Run], published: Mapping[tuple[str, str], tuple[str, np.ndarray]] | None = None
) -> Figure:
  """Draws a panel a game: each agent's return over updates, the mean over seeds and its interval.

  Means are taken where all seeds were evaluated. The interval is Student's, 95%, of three seeds or
  more; of two, thin lines are the seeds. A human score far above all else is written, not drawn.

  Args:
    drawn: the runs.
    published: for (agent, game), a label and points (updates, return) [N, 2] to draw beside ours.
  """
  games = sorted({run.environment_name for run in drawn})
  num_columns = min(len(games), 3)
  num_rows = math.ceil(len(games) / num_columns)
  width, height = (6.4, 3.8) if len(games) == 1 else (3.4, 2.7)
  figure = Figure((width * num_columns, height * num_rows))
  panels = figure.subplots(num_rows, num_columns, squeeze=False)
  styles = _styles(agents_of(drawn))
  for axes, name in itertools.zip_longest(panels.flat, games):
    if name is None:
      axes.set_axis_off()
      continue
    of_game = [run for run in drawn if run.environment_name == name]
    for agent in agents_of(of_game):
      of_agent = [run for run in of_game if run.agent == agent]
      _draw_agent(axes, of_agent, styles[agent])
      if published and (agent, name) in published:
        label, points = published[agent, name]
        axes.plot(
          *points.T, label=label, color=styles[agent]['color'], linestyle=':', linewidth=1,
          marker='d', markerfacecolor='none',
        )  # fmt: skip
    _draw_references(axes, of_game)
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  for axes in panels[:, 0]:
    axes.set_ylabel('mean episode return')
  for axes in panels.flat[max(0, len(games) - num_columns) : len(games)]:
    axes.set_xlabel('gradient updates')
  _add_legend(figure, panels.flat, agents_of(drawn))
  return figure


def _draw_agent(axes: Axes, of_agent: Sequence[Run], style: Mapping[str, Any]) -> None:
  shared = runs.shared_updates(of_agent)
  values = runs.at(of_agent, shared, 'eval_episode_return')
  every = max(1, len(shared) // 10)
  axes.plot(shared, values.mean(0), label=of_agent[0].agent, markevery=every, **style)
  if len(of_agent) >= _MIN_SEEDS_FOR_BAND:
    low, high = statistics.mean_interval(values)
    axes.fill_between(shared, low, high, color=style['color'], alpha=0.18, linewidth=0)
  elif len(of_agent) > 1:
    for run in of_agent:
      axes.plot(
        run.num_updates, run.column('eval_episode_return'),
        color=style['color'], linewidth=0.7, alpha=0.6,
      )  # fmt: skip


def _draw_references(axes: Axes, of_game: Sequence[Run]) -> None:
  """Draws what returns are to be compared with; sets the title and the axes' limits."""
  low, high = runs.limits(of_game)
  references = runs.references(of_game)
  for name, value in references:
    if value <= high:
      style = _REFERENCES[name]
      axes.axhline(value, label=name, color=_REFERENCE_COLOUR, linestyle=style, linewidth=1.2)
  margin = 0.05 * (high - low or 1)
  axes.set_ylim(low - margin, high + margin)
  axes.set_xlim(left=0)
  title = of_game[0].environment_name.replace('_', ' ').title()
  axes.set_title(title, loc='left', weight='bold', pad=16)
  axes.annotate(
    runs.describe_references(of_game),
    (0, 1), (0, 4), xycoords='axes fraction', textcoords='offset points', fontsize=7,
  )  # fmt: skip


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
