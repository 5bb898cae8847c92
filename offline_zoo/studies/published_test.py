"""Tests for published.py: others' scores are drawn where they match ours, and only there."""

import re

import numpy as np
import pytest

from offline_zoo.studies import published, runs

MATCHING = {
  'replay_dir': '/data/Pong/1/replay_logs', 'shards': None, 'max_random_transitions': 500_000,
  'sticky_action_probability': 0.25, 'eval_epsilon': 0.001, 'batch_size': 32,
}  # fmt: skip


def make_run(write_csv, agent: str = 'cql', num_rows: int = 4, **flags):
  path = write_csv(
    f'{agent}/results.csv', [-20.0] * num_rows, agent, 'pong', every=125_000, **MATCHING | flags
  )
  return runs.read([path])[0]


def test_scores_beside_a_run_of_the_same_protocol_and_data(write_csv):
  found, notes = published.beside([make_run(write_csv)])
  label, points = found['cql', 'pong']
  assert label == 'd3rlpy CQL (QR-200, alpha 4)' and not notes
  # Up to the run's last update: of the later ones none.
  np.testing.assert_array_equal(points, [[125_000, -20.59], [250_000, -10.03], [500_000, 5.32]])
  assert published.beside([make_run(write_csv, num_rows=1)])[0]['cql', 'pong'][1].shape == (1, 2)
  assert list(published.beside([make_run(write_csv, 'bcq')])[0]) == [('bcq', 'pong')]
  # REM is not among the published.
  assert published.beside([make_run(write_csv, 'rem')]) == ({}, [])


@pytest.mark.parametrize(
  'flags, reason',
  [
    (
      {'replay_dir': None},
      '--replay_dir of cql on pong, seed 1 does not end with Pong/1/replay_logs',
    ),
    ({'replay_dir': '/data/Pong/2/replay_logs'}, 'does not end with Pong/1/replay_logs'),
    ({'shards': [0, 1]}, r'--shards=\[0, 1\], not all 50 of them'),
    ({'max_random_transitions': None}, '--max_random_transitions=None, not 500000'),
    ({'max_rows_per_shard': 10_000}, '--max_rows_per_shard=10000, not None'),
    ({'sticky_action_probability': 0.0}, r'--sticky_action_probability=0\.0, not 0\.25'),
    ({'eval_epsilon': 0.0}, r'--eval_epsilon=0\.0, not 0\.001'),
    ({'top_fraction': 0.1}, r'--top_fraction=0\.1, not None'),
    ({'batch_size': 64}, '--batch_size=64, not 32'),
  ],
)
def test_nothing_beside_another_protocol_or_other_data(write_csv, flags, reason: str):
  found, (note,) = published.beside([make_run(write_csv, **flags)])
  assert not found
  assert note.startswith('No published scores beside pong: ')
  assert re.search(reason, note)


def test_nothing_where_one_run_of_the_game_does_not_match(write_csv, tmp_path):
  matching = make_run(write_csv)
  found, notes = published.beside([matching, make_run(write_csv, 'bcq', batch_size=64)])
  assert not found and len(notes) == 1
  # Nor beside runs from an archive, which holds no flags.
  (tmp_path / 'results.tar.gz').write_bytes(runs.pack([matching]))
  found, (note,) = published.beside(runs.read([tmp_path / 'results.tar.gz']))
  assert not found and 'has no config.json beside it' in note


def test_data_of_one_game_are_looked_at_apart(write_csv):
  paths = [
    write_csv(f'{data}/cql/1/results.csv', [-20.0], 'cql', 'pong', every=125_000, **flags)
    for data, flags in (('one', MATCHING), ('all', MATCHING | {'max_random_transitions': None}))
  ]
  found, (note,) = published.beside(runs.read(paths, {'one', 'all'}))
  assert list(found) == [('cql', 'one')]
  assert note.startswith('No published scores beside all: cql on all, seed 1 has --max_random')


def test_every_published_row_has_a_source():
  table = published.read_table()
  assert len(table) == 120
  for row in table:
    assert row['source'].startswith('takuseno/d3rlpy-benchmarks@1771c9b2 ')
    assert row['agent'] in ('bcq', 'cql', 'qrdqn') and int(row['num_seeds']) == 10
    assert row['dqn_replay_run'] == ('2' if row['environment_name'] == 'asterix' else '1')
