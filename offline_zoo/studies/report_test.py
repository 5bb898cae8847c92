"""Tests for report.py: the curve as text, the tables, the files, sweeps, the command."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from offline_zoo.studies import plan, plots, report, runs, statistics


def test_a_curve_as_text(write_csv):
  read = runs.read([write_csv('1/results.csv', [5.0, 14.8, 20.0], 'cql', logged=7.4)])
  # 50 characters are a human's 29.6.
  assert report.text_curve(read).splitlines() == [
    'cql on freeway, seed 1: mean return of an episode',
    '1,000 updates        5.0  ' + 8 * '#',
    '2,000 updates       14.8  ' + 25 * '#',
    '3,000 updates       20.0  ' + 34 * '#',
    '  logged mean        7.4  ' + 12 * '#',
    '  random play        0.0',
    '        human       29.6  ' + 50 * '#',
  ]


def test_a_curve_as_text_of_many_evaluations_and_seeds_far_below_a_human(write_csv):
  read = runs.read(
    [
      write_csv(f'{seed}/results.csv', np.arange(100.0, 300.0) + seed, 'cql', 'seaquest', seed,
                logged=120.0)
      for seed in (1, 3)
    ]
  )  # fmt: skip
  head, *evaluations, logged, random, human = report.text_curve(read).splitlines()
  assert head == 'cql on seaquest, mean of 2 seeds: mean return of an episode'
  # 20 of the 200 evaluations, the first and the last among them.
  assert len(evaluations) == 20
  assert evaluations[0].split()[:3] == ['1,000', 'updates', '102.0']
  assert evaluations[-1].split() == ['200,000', 'updates', '301.0', 50 * '#']
  assert (logged.split()[2], random.split()) == ('120.0', ['random', 'play', '68.4'])
  assert human.split() == ['human', '42,054.7', 49 * '#' + '>']


@pytest.fixture
def games(write_csv):
  """Two agents; three and two seeds on Freeway, two each on Boxing, CQL alone on Pooyan."""
  table = {
    ('cql', 'freeway'): [[10, 20], [12, 24], [14, 22]],
    ('cql', 'boxing'): [[1, 3], [2, 9.7]],
    ('rem', 'freeway'): [[1, 2, 30], [3, 5, 30]],
    ('rem', 'boxing'): [[0, 0.1], [0, 6.1]],
    ('cql', 'pooyan'): [[100, 200]],
    ('rem', 'pooyan'): [[100, 300]],
    ('cql', 'pong'): [[-20, -10]],
  }
  return [
    write_csv(f'{agent}/{game}/{seed}/results.csv', values, agent, game, seed)
    for (agent, game), seeds in table.items()
    for seed, values in enumerate(seeds, start=1)
  ]


def test_scores_are_put_together_where_they_compare(games):
  scores, left_out = report.comparable_scores(runs.read(games))
  assert scores.data == ['boxing', 'freeway']
  # The third evaluation of REM on Freeway has none beside it.
  assert scores.last.num_updates == 2000
  want = {
    'cql': [[(3 - 0.1) / 12, 20 / 29.6], [(9.7 - 0.1) / 12, 24 / 29.6]],
    'rem': [[0, 2 / 29.6], [6 / 12, 5 / 29.6]],
  }
  for agent, x in scores.of_agents.items():
    np.testing.assert_allclose(x, want[agent], atol=1e-12)
  assert left_out == [
    'pong: there is none of rem.',
    'pooyan: no human score is published.',
    'cql on freeway, seed 3: another game has fewer seeds.',
  ]


def test_without_scores_that_compare_there_are_none(write_csv):
  one = write_csv('1/results.csv', [1.0], 'cql', every=1000)
  two = write_csv('2/results.csv', [1.0], 'rem', every=1500)
  assert report.comparable_scores(runs.read([one, two])) == (
    None,
    ['All: there is no number of updates after which every run was evaluated.'],
  )
  other = write_csv('3/results.csv', [1.0], 'rem', 'pooyan')
  scores, left_out = report.comparable_scores(runs.read([one, other]))
  assert scores is None and left_out[0] == 'freeway: there is none of rem.'
  files = report.make_report(runs.read([one, other]), with_published=False, dark=False)
  assert set(files) == {'curves.png', 'curves.svg', 'report.md', 'results.tar.gz'}


def test_the_tables(games):
  table = report.last_evaluations(runs.read(games)).splitlines()
  assert table[0] == '| game | agent | seeds | updates | return | beside |'
  # 20, 24, 22: mean 22, half-width 4.3027 * 2 / sqrt(3) = 4.97.
  beside = 'logged mean 7.5, random play 0.0, human 29.6'
  assert f'| freeway | cql | 3 | 2,000 | 22.0 [17.0, 27.0] | {beside} |' in table
  assert '| pooyan | rem | 1 | 2,000 | 300.0 | logged mean 7.5 |' in table
  scores, _ = report.comparable_scores(runs.read(games))
  files = report.make_report(runs.read(games), with_published=True, dark=False)
  text = files['report.md'].decode()
  assert '\n'.join(table) in text
  assert (
    'Human-normalised scores after 2,000 updates; runs of each game: 2 of cql, 2 of rem. In' in text
  )
  x = scores.of_agents['cql']
  functions = (
    statistics.interquartile_mean, statistics.median, statistics.mean, statistics.optimality_gap
  )  # fmt: skip
  assert f'| cql | {" | ".join(f"{f(x):.3f}" for f in functions)} |' in text
  # From three runs on, with an interval.
  x = np.array([[0.0, 0.1], [0.5, 0.2], [0.6, 0.9]])
  of_x = report.aggregates({'cql': x})
  for f, estimates in zip(functions, of_x.values(), strict=True):
    low, high = statistics.bootstrap_interval(f, x)
    assert format(estimates['cql'], '.3f') == f'{f(x):.3f} [{low:.3f}, {high:.3f}]'
  # On Freeway CQL's runs beat REM's; on Boxing 3 lies between 0.1 and 6.1, and 9.7 above.
  assert '| cql over rem | 0.875 |' in text
  assert 'No published scores beside pong: --replay_dir of cql on pong' not in text  # no protocol
  assert 'No published scores beside pong: cql on pong, seed 1 has --sticky' in text
  assert '* pong: there is none of rem.' in text
  for name in ('curves', 'aggregates', 'profiles', 'improvement'):
    assert f'({name}.png)' in text and files[f'{name}.png'] and files[f'{name}.svg']


DATA = {'mixed', 'random', 'asterix_10k'}


def read_study(study) -> list[runs.Run]:
  return runs.read(study['sweep'] + study['peers'], DATA)


def test_last_evaluations_of_a_study_by_hand(study):
  said, table = report.compare_returns(read_study(study))
  assert said.endswith(
    'Each cell is of 2 seeds, 2 episodes after 2,000 updates, where it does not say otherwise.'
  )
  assert table.splitlines() == [
    '| agent | asterix_10k | mixed | random |',
    '| --- | --- | --- | --- |',
    # On `mixed` one of BC's seeds is below the logged mean; on `random` one is half done.
    '| bc |  | 8.1 (6.8 to 9.5) | 0.5 (0.0 to 1.0); 2 seeds, evaluated on its way after 1,000 '
    'updates |',
    # 12 and 14, 8 and 8; not the 10 and 11 of the runs' own last evaluations.
    '| cql | 1,275.0 (1,250.0 to 1,300.0) | **10.5** (8.0 to 13.0) | **3.5** (3.0 to 4.0) |',
    '| tianshou_cql |  | **14.8**; 1 seed, 2 episodes after 2,000 updates |  |',
    '| *logged mean* | 1,300.0 | 7.5 | 0.5 |',
    '| *random play* | 210.0 | 0.0 | 0.0 |',
    '| *human* | 8,503.3 | 29.6 | 29.6 |',
  ]


def test_clipped_logged_means_are_not_passed(write_csv):
  public = '/data/Freeway/3/replay_logs'
  path = write_csv('m/cql/1/results.csv', [8.0], 'cql', replay_dir=public)
  _, table = report.compare_returns(runs.read([path], {'m'}))
  assert table.splitlines()[2:4] == ['| cql | 8.0 |', '| *logged mean* | 7.5, clipped |']


def test_an_agent_that_learns_online_has_no_logged_mean(write_csv):
  path = write_csv('o/results.csv', [8.0], 'online_dqn', logged=7.5)
  _, table = report.compare_returns(runs.read([path]))
  assert table.splitlines()[2:] == [
    '| online_dqn | 8.0 |', '| *random play* | 0.0 |', '| *human* | 29.6 |'
  ]  # fmt: skip


def test_the_speed_of_a_study_by_hand(study):
  read = read_study(study)
  said, table = report.compare_speed(read)
  assert 'mean over seeds, for 2,000 updates, where a cell' in said
  assert table.splitlines() == [
    '| agent | asterix_10k | mixed | random |',
    '| --- | --- | --- | --- |',
    '| bc |  | 3.0 | 2.2; 1,000 to 2,000 updates |',  # 180 s; and 90
    '| cql | 20.0 | 20.0 | 20.0 |',
    '| tianshou_cql |  | 20.0 |  |',
  ]
  unknown = [
    dataclasses.replace(run, rows=tuple({**row, 'seconds': ''} for row in run.rows)) for run in read
  ]
  assert report.compare_speed(unknown) == []
  together = [dataclasses.replace(run, flags={'num_seeds': 2}) for run in read]
  assert 'for 2,000 updates, 2 seeds at once, where' in report.compare_speed(together)[0]


def test_scores_of_a_study_are_of_its_episodes_where_all_have_them(study):
  scores, left_out = report.comparable_scores(read_study(study))
  assert scores.data == ['mixed'] and scores.last.num_episodes == (2,) * 5
  want = {'bc': [9.5, 6.75], 'cql': [13, 8], 'tianshou_cql': [14.8]}
  for agent, x in scores.of_agents.items():
    np.testing.assert_allclose(x, np.transpose([want[agent]]) / 29.6)
  assert left_out == [
    'asterix_10k: there is none of bc, tianshou_cql.', 'random: there is none of tianshou_cql.'
  ]  # fmt: skip
  # Else what all have had on their way counts, although some are further.
  scores, _ = report.comparable_scores(runs.read(study['sweep'], DATA))
  assert scores.data == ['mixed', 'random'] and scores.last.num_episodes == ()
  want = {'bc': [[6, 1], [6, 0]], 'cql': [[5, 1], [5, 1]]}
  for agent, x in scores.of_agents.items():
    np.testing.assert_allclose(x, np.array(want[agent]) / 29.6)


def test_the_report_of_a_study(study, monkeypatch):
  monkeypatch.setattr(plots, 'save', lambda figure, kind: kind.encode())  # takes seconds
  read = read_study(study)
  files = report.make_report(read, with_published=True, dark=False)
  text = files['report.md'].decode()
  for part in (*report.compare_returns(read), *report.compare_speed(read)):
    assert f'\n{part}\n' in text
  assert '![Last evaluations](last_evaluations.png)' in text
  assert '| game |' not in text and 'In brackets below' not in text
  assert (
    '## All of mixed\n\nHuman-normalised scores of 2 episodes after 2,000 updates; runs of each '
    'data set: 1 of tianshou_cql, 2 of bc, 2 of cql. In' in text
  )
  assert {name for name in files if 'last' in name} == {
    'last_evaluations.png', 'last_evaluations.svg'
  }  # fmt: skip
  assert files['results.tar.gz'] == runs.pack(read)


def test_a_sweep_is_read_with_peers_beside_it(study, tmp_path, monkeypatch):
  text = f"directory = '{tmp_path}/runs'\nagents = ['cql', 'bc']\nseeds = [1, 2]\n" + ''.join(
    f"[[data]]\nname = '{name}'\nreplay_dir = 'gone'\nenvironment_name = '{game}'\n"
    for name, game in (('mixed', 'freeway'), ('random', 'freeway'), ('asterix_10k', 'asterix'))
  )
  path = tmp_path / 'sweep.toml'
  path.write_text(text)
  for run in plan.read(path):
    if (run.directory / 'results.csv').exists():
      identity = {'agent': run.agent, 'flags': dataclasses.asdict(run.config)}
      (run.directory / 'config.json').write_text(json.dumps(identity))
  found, names = report.paths_of_sweep(path)
  assert sorted(found) == sorted(study['sweep']) and names == DATA
  config = report.Config(
    tuple(map(str, study['peers'])), sweep=str(path), report_dir=str(tmp_path / 'report')
  )
  monkeypatch.setattr(report, 'make_report', lambda read, *_: {'packed': runs.pack(read)})
  report.main(config)
  assert (tmp_path / 'report' / 'packed').read_bytes() == runs.pack(read_study(study))
  # A run that had other flags than the file says now is none of its runs.
  path.write_text(text + "flags = ['--batch_size=16']\n")
  of_others = [x for x in study['sweep'] if 'asterix_10k' not in str(x)]
  assert sorted(report.paths_of_sweep(path)[0]) == sorted(of_others)
  path.write_text(text.replace('/runs', '/none'))
  with pytest.raises(ValueError, match=r'sweep\.toml: none of its runs has results yet'):
    report.main(config)


def test_a_report_is_written_and_its_archive_read_again(games, tmp_path):
  paths = tuple(map(str, games[:1]))
  report.main(report.Config(paths, report_dir=str(tmp_path / 'a')))
  names = {path.name for path in (tmp_path / 'a').iterdir()}
  pictures = {
    f'{name}.{kind}' for name in ('curves', 'aggregates', 'profiles') for kind in ('png', 'svg')
  }
  assert names == {*pictures, 'report.md', 'results.tar.gz'}
  (run,) = runs.read([tmp_path / 'a' / 'results.tar.gz'])
  assert run.identity == ('cql', 'freeway', 1)


def test_the_command(write_csv):
  path = write_csv('1/results.csv', [5.0, 14.8], 'cql')

  def run(*arguments):
    return subprocess.run(
      [sys.executable, '-m', 'offline_zoo.studies.report', *map(str, arguments)],
      capture_output=True, text=True, check=False,
    )  # fmt: skip

  done = run(path)
  assert done.returncode == 0
  assert done.stdout == report.text_curve(runs.read([path])) + '\n'
  assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
  assert f'Picture: {path.with_suffix(".png")}' in done.stderr
  done = run(path, 'nowhere.csv')
  assert done.returncode == 1
  assert done.stderr == 'error: nowhere.csv: no such file\n'


def test_something_must_be_named():
  with pytest.raises(ValueError, match=r'expected one results\.csv or more'):
    report.Config(())
  report.Config((), sweep='sweep.toml')


def test_without_matplotlib_the_curve_is_still_printed(write_csv, monkeypatch, capsys):
  path = write_csv('1/results.csv', [5.0, 14.8], 'cql')
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  monkeypatch.delitem(sys.modules, 'offline_zoo.studies.plots', raising=False)
  monkeypatch.delattr('offline_zoo.studies.plots', raising=False)
  with pytest.raises(
    ValueError, match=r'pictures need matplotlib, which the extra `plots` installs'
  ):
    report.main(report.Config((str(path),)))
  assert 'cql on freeway' in capsys.readouterr().out
  assert [p.name for p in path.parent.iterdir()] == ['results.csv', 'config.json']
