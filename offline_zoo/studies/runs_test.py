"""Tests for runs.py: what is read, what is refused, and what is packed."""

import gzip
import io
import math
import os
import tarfile

import numpy as np
import pytest

from offline_zoo.studies import runs


def test_a_csv_is_read_with_its_agent_and_flags(write_csv):
  (run,) = runs.read([write_csv('a/results.csv', [1.0, 20.5], 'cql', seed=3, n_step=10)])
  assert run.identity == ('cql', 'freeway', 3)
  assert run.flags == {'n_step': 10}
  assert run.num_updates.tolist() == [1000, 2000]
  assert run.column('eval_episode_return').tolist() == [1, 20.5]
  np.testing.assert_allclose(run.column('normalized_return'), [1 / 29.6, 20.5 / 29.6])


def test_a_csv_may_name_its_agent_and_lack_scores(write_csv):
  (run,) = runs.read([write_csv('rem.csv', [100.0], game='pooyan', logged=None)])
  assert run.agent == 'rem' and run.flags is None
  assert math.isnan(run.column('normalized_return')[0])
  assert math.isnan(run.column('dataset_episode_return')[0])


DATA = {'mixed', 'random', 'asterix_10k'}


def test_a_sweeps_runs_are_told_apart_by_their_data(study):
  mixed = [path for path in study['sweep'] if 'mixed' in path.parts]
  assert [run.identity for run in runs.read(mixed + study['peers'], {'mixed'})] == [
    ('bc', 'mixed', 1), ('bc', 'mixed', 2), ('cql', 'mixed', 1), ('cql', 'mixed', 2),
    ('tianshou_cql', 'mixed', 1),
  ]  # fmt: skip
  read = runs.read(study['sweep'], DATA)
  assert len(read) == 10
  assert str(read[-1]) == 'cql on random, seed 2' and read[-1].environment_name == 'freeway'
  # Without the names, runs are told apart by game, and need to say which agent's they are.
  with pytest.raises(ValueError, match=r'random/cql/1/results\.csv: another run of cql on freeway'):
    runs.read(study['sweep'])
  assert runs.read(mixed)[0].identity == ('bc', 'freeway', 1)
  with pytest.raises(ValueError, match=r'tianshou_cql/1/results\.csv: no config\.json beside it'):
    runs.read(study['peers'], {'random'})


def test_a_name_of_data_is_of_one_game(write_csv):
  paths = [
    write_csv(f'{place}/mixed/cql/{seed}/results.csv', [1.0], 'cql', game, seed)
    for place, game, seed in (('a', 'freeway', 1), ('b', 'pong', 2))
  ]
  with pytest.raises(
    ValueError, match=r'b/mixed/cql/2/results\.csv: mixed is of pong, and of free'
  ):
    runs.read(paths, {'mixed'})


def test_the_last_evaluation_is_of_the_episodes_where_all_runs_have_them(write_csv, write_episodes):
  def read(*seeds):
    return runs.read([write_csv(f'{s}/results.csv', [1.0, s], 'cql', seed=s) for s in seeds])

  assert runs.last_evaluation(read(4))[:1] == (2000,)
  write_episodes('4/evaluation.csv', [3, 6], 'cql', seed=4)
  write_episodes('5/evaluation.csv', [9, 6, 0], 'cql', seed=5)
  last = runs.last_evaluation(read(4, 5))
  assert (last.num_updates, last.num_episodes) == (2000, (2, 3))
  assert last.returns.tolist() == [4.5, 5]
  last = runs.last_evaluation(read(4, 5, 6))  # the third was not evaluated
  assert (last.num_updates, last.num_episodes) == (2000, ())
  assert last.returns.tolist() == [4, 5, 6]
  # Of a run that went on, it is no longer the last one.
  write_episodes('5/evaluation.csv', [9, 6], 'cql', seed=5, num_updates=1000)
  (run,) = read(5)
  assert not run.episodes and runs.last_evaluation([run]).returns.tolist() == [5]
  # And another that ended before shares the earlier one.
  shorter = runs.read([write_csv('7/results.csv', [7.0], 'cql', seed=7)])
  assert runs.last_evaluation(read(4) + shorter).returns.tolist() == [1, 7]
  apart = runs.read([write_csv('7/results.csv', [7.0], 'cql', seed=7, every=1500)])
  assert runs.last_evaluation(read(4) + apart) is None


@pytest.mark.parametrize(
  'values, message',
  [
    ({'agent': 'rem'}, r'of rem on mixed \(freeway\), seed 1, which is not among the results'),
    ({'seed': 2}, r'of cql on mixed \(freeway\), seed 2, which is not'),
    ({'game': 'pong'}, r'of cql on mixed \(pong\), seed 1, which is not'),
    ({'returns': [1, 'nan']}, "line 3: episode_return is 'nan', expected a number"),
    ({'returns': ['']}, "line 2: episode_return is '', expected a number"),
    ({'num_updates': 'all'}, "num_updates is 'all', expected an integer"),
  ],
)
def test_a_bad_evaluation_is_named(write_csv, write_episodes, values, message: str):
  csv_path = write_csv('mixed/cql/1/results.csv', [1.0, 2.0], 'cql')
  path = write_episodes('mixed/cql/1/evaluation.csv', **{'returns': [1], 'agent': 'cql', **values})
  with pytest.raises(ValueError, match=message) as error:
    runs.read([csv_path], {'mixed'})
  assert str(error.value).startswith(f'{path}: ')
  path.write_bytes(HEAD)
  with pytest.raises(ValueError, match='not an evaluation CSV: no column agent'):
    runs.read([csv_path], {'mixed'})


def test_logged_means(write_csv):
  def read(*means, **flags):
    return runs.read(
      [
        write_csv(f'{seed}/results.csv', [1.0], 'cql', seed=seed, logged=mean, **flags)
        for seed, mean in enumerate(means)
      ]
    )

  assert runs.logged_mean(read(7.4, None, 7.5, 7.3)) == 7.5
  assert math.isnan(runs.logged_mean(read(None)))
  assert math.isnan(runs.logged_mean(read(7.5, replay_dir='/data/Freeway/3/replay_logs')))


def test_own_play_is_no_log(write_csv):
  online = write_csv('o/results.csv', [1, 2], 'online_dqn', logged=9.0)
  assert math.isnan(runs.logged_mean(runs.read([online])))
  assert [name for name, _ in runs.references(runs.read([online]))] == ['random play', 'human']
  both = runs.read([online, write_csv('c/results.csv', [1, 2], 'cql', logged=7.5)])
  assert runs.logged_mean(both) == 7.5
  assert runs.references(both)[0] == ('logged mean', 7.5)


def test_an_archive_of_a_study_reads_back(study, write_csv, tmp_path):
  plain = write_csv('runs/cql/freeway/1/results.csv', [1.0], 'cql')
  read = runs.read(study['sweep'] + study['peers'] + [plain], DATA)
  packed = runs.pack(read[::-1])
  with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
    of_members = {m.name: archive.extractfile(m).read().decode().splitlines() for m in archive}
  assert list(of_members) == [
    'bc.csv', 'evaluation/bc.csv', 'cql.csv', 'evaluation/cql.csv',
    'tianshou_cql.csv', 'evaluation/tianshou_cql.csv',
  ]  # fmt: skip
  assert of_members['bc.csv'][:2] == [
    'data,environment_name,seed,iteration,num_updates,eval_episode_return,normalized_return,'
    'dataset_episode_return,seconds',
    f'mixed,freeway,1,1,1000,6,{6 / 29.6},7.5,90.0',
  ]
  # Of all data in one file, those of the game's own name too.
  assert [line.split(',')[0] for line in of_members['cql.csv'][1:]] == (
    ['asterix_10k'] * 4 + ['freeway'] + ['mixed'] * 4 + ['random'] * 4
  )
  assert of_members['evaluation/bc.csv'] == [
    'data,agent,environment_name,seed,num_updates,eval_seed,episode,episode_return',
    'mixed,bc,freeway,1,2000,0,1,9', 'mixed,bc,freeway,1,2000,0,2,10',
    'mixed,bc,freeway,2,2000,0,1,6', 'mixed,bc,freeway,2,2000,0,2,7.5',
    'random,bc,freeway,1,2000,0,1,5', 'random,bc,freeway,1,2000,0,2,5',
  ]  # fmt: skip
  path = tmp_path / 'results.tar.gz'
  path.write_bytes(packed)
  again = runs.read([path])
  assert runs.pack(again) == packed
  assert [(run.identity, run.episodes) for run in again] == [
    (run.identity, run.episodes) for run in read
  ]
  # What is in both counts once.
  csv_paths = [*study['sweep'], *study['peers'], plain]
  for paths in ([path, *csv_paths], [*csv_paths, path]):
    assert runs.pack(runs.read(paths, DATA)) == packed
  # An evaluation that only one of the two has is kept.
  (study['sweep'][0].parent / 'evaluation.csv').unlink()
  (run,) = runs.read(study['sweep'][:1], DATA)
  assert not run.episodes
  both = {run.identity: run for run in runs.read([*study['sweep'], path], DATA)}
  assert len(both[run.identity].episodes) == 2


def test_archives_are_the_same_whatever_the_order_and_read_back(write_csv, tmp_path):
  paths = [
    write_csv(f'{agent}/{seed}/results.csv', [seed, 2.0], agent, seed=seed)
    for agent in ('rem', 'cql')
    for seed in (2, 1)
  ]
  packed = runs.pack(runs.read(paths))
  for path in paths:
    os.utime(path, (0, 0))
  assert runs.pack(runs.read(paths[::-1])[::-1]) == packed
  with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
    assert archive.getnames() == ['cql.csv', 'rem.csv']
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(0, 0, 0, '', 0o644)}
    lines = archive.extractfile('cql.csv').read().decode().splitlines()
  assert lines[0] == paths[0].read_text().splitlines()[0]
  assert lines[1:] == [line for path in paths[:1:-1] for line in path.read_text().splitlines()[1:]]
  (tmp_path / 'results.tar.gz').write_bytes(packed)
  again = runs.read([tmp_path / 'results.tar.gz'])
  assert [run.identity for run in again] == [
    (a, 'freeway', s) for a in ('cql', 'rem') for s in (1, 2)
  ]
  assert runs.pack(again) == packed


def test_the_published_archive_is_what_pack_makes_of_it():
  """Its bytes are those of another zlib perhaps; its content is not."""
  root = runs.pathlib.Path(__file__).parents[2]
  read = runs.read([root / 'results.tar.gz'])
  with (
    tarfile.open(root / 'results.tar.gz') as a,
    tarfile.open(fileobj=io.BytesIO(runs.pack(read))) as b,
  ):
    assert a.getnames() == b.getnames()
    for name in a.getnames():
      assert a.extractfile(name).read() == b.extractfile(name).read()


def test_a_run_that_went_on_replaces_its_beginning(write_csv, tmp_path):
  short = write_csv('short/results.csv', [1.0, 2.0], 'cql', n_step=1)
  long = write_csv('long/results.csv', [1.0, 2.0, 3.0], 'cql', n_step=2)
  archive = tmp_path / 'results.tar.gz'
  archive.write_bytes(runs.pack(runs.read([short])))
  for paths in ([short, long], [long, short], [archive, long]):
    (run,) = runs.read(paths)
    assert run.source == str(long) and len(run.rows) == 3
  (run,) = runs.read([archive, short])
  assert run.flags == {'n_step': 1}  # which the archive has not
  other = write_csv('other/results.csv', [1.0, 5.0, 3.0], 'cql')
  with pytest.raises(
    ValueError, match=r'other/results\.csv: another run of cql on freeway, seed 1'
  ):
    runs.read([long, other])


def test_means_are_taken_where_all_were_evaluated(write_csv):
  read = runs.read(
    [
      write_csv('1/results.csv', [1.0, 2.0, 3.0, 4.0], 'cql', seed=1),
      write_csv('2/results.csv', [5.0, 7.0], 'cql', seed=2, every=2000),
    ]
  )
  shared = runs.shared_updates(read)
  assert shared.tolist() == [2000, 4000]
  assert runs.at(read, shared, 'eval_episode_return').tolist() == [[2, 4], [5, 7]]


def test_references(write_csv, tmp_path):
  one = write_csv('1/results.csv', [1.0], 'cql', seed=1, logged=7.4000001)
  two = write_csv('2/results.csv', [1.0], 'cql', seed=2, logged=7.3999999)
  assert runs.references(runs.read([one, two])) == [
    ('logged mean', 7.4), ('random play', 0.0), ('human', 29.6)
  ]  # fmt: skip
  public = '/data/Freeway/3/replay_logs'
  (run,) = runs.read([write_csv('3/results.csv', [1.0], 'cql', replay_dir=public)])
  assert run.dqn_replay_run == 3
  assert runs.references([run])[0] == ('logged mean, clipped', 7.5)
  # An archive keeps that, and a CSV its flags, whichever is read first.
  archive = tmp_path / 'results.tar.gz'
  archive.write_bytes(runs.pack([run]))
  (unpacked,) = runs.read([archive])
  assert unpacked.dqn_replay_run == 3 and unpacked.rows == run.rows and unpacked.flags is None
  assert runs.pack([unpacked]) == archive.read_bytes()
  for paths in ([archive, tmp_path / '3/results.csv'], [tmp_path / '3/results.csv', archive]):
    (both,) = runs.read(paths)
    assert both.flags == {'replay_dir': public} and both.dqn_replay_run == 3
    assert both.source == str(tmp_path / '3/results.csv')
  for other in (None, '/data/Pong/3/replay_logs', 'replay_logs', '/data/Freeway/x/replay_logs'):
    (run,) = runs.read([write_csv('3/results.csv', [1.0], 'cql', replay_dir=other)])
    assert run.dqn_replay_run is None


@pytest.mark.parametrize(
  'returns, limits',
  [
    ([20.0], (0, 29.6)),  # the human's is in reach
    ([3.0], (0, 7.5)),  # and here beyond twice the logged mean
    ([-5.0, 40.0], (-5, 40)),
  ],
)
def test_limits(write_csv, returns, limits):
  assert runs.limits(runs.read([write_csv('1/results.csv', returns, 'cql')])) == limits


HEAD = (
  b'environment_name,seed,num_updates,eval_episode_return,normalized_return,'
  b'dataset_episode_return\n'
)


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'not a results CSV: no column environment_name'),
    (HEAD.replace(b'seed', b'sed'), 'no column seed'),
    (HEAD, 'no rows'),
    (HEAD + b'freeway,1,1000,1,,\nfreeway,1,2000\n', 'line 3: expected as many cells'),
    (HEAD + b'freeway,1,1000,1,,,7\n', 'line 2: expected as many cells'),
    (HEAD + b'freway,1,1000,1,,\n', "unknown game 'freway'; did you mean 'freeway'"),
    (HEAD + b'freeway,1.5,1000,1,,\n', "seed is '1.5', expected an integer"),
    (HEAD + b'freeway,1,1000,,,\n', "eval_episode_return is '', expected a number"),
    (HEAD + b'freeway,1,1000,nan,,\n', "eval_episode_return is 'nan', expected a number"),
    (HEAD + b'freeway,1,1000,1,,inf\n', "dataset_episode_return is 'inf'"),
    (HEAD.replace(b'seed', b'data,seed') + b'freeway,a|b,1,1,1,,\n', "'a|b' cannot be the name of"),
    (HEAD.replace(b'normalized_return', b'seconds') + b'freeway,1,1,1,x,\n', "seconds is 'x'"),
    (HEAD + b'freeway,1,1000,1,,\nfreeway,1,1000,1,,\n', 'num_updates does not ascend'),
    (HEAD + b'\xff', 'codec'),
    (HEAD + b'"freeway', 'unexpected end of data'),
  ],
)
def test_a_bad_csv_is_named(tmp_path, content: bytes, message: str):
  path = tmp_path / 'cql.csv'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    runs.read([path])
  assert str(error.value).startswith(f'{path}: ')


def test_other_files_are_refused(write_csv, tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='nowhere: no such file'):
    runs.read([tmp_path / 'nowhere'])
  os.mkfifo(tmp_path / 'cql.csv')
  with pytest.raises(FileNotFoundError, match=r'cql\.csv: no such file'):
    runs.read([tmp_path / 'cql.csv'])
  path = write_csv('results.csv', [1.0])
  with pytest.raises(ValueError, match=r'no config\.json beside it'):
    runs.read([path])
  path.with_name('config.json').write_text('{"agent": "cql"}')
  with pytest.raises(ValueError, match=r"config\.json: not the config\.json of a run: .*'flags'"):
    runs.read([path])
  path.with_name('config.json').write_text('{"agent": "../cql", "flags": {}}')
  with pytest.raises(ValueError, match=r"'\.\./cql' cannot be the name of an agent"):
    runs.read([path])
  monkeypatch.setattr(runs, 'MAX_BYTES', 10)
  with pytest.raises(ValueError, match=r'^\S*config\.json: too large'):
    runs.read([path])
  with pytest.raises(ValueError, match=r'rem\.csv: too large'):
    runs.read([write_csv('other/rem.csv', [1.0])])


def archive_of(member: tarfile.TarInfo, content: bytes = b'') -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as archive:
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
  return file.getvalue()


def test_bad_archives_are_refused(tmp_path, monkeypatch):
  path = tmp_path / 'results.tar.gz'
  link = tarfile.TarInfo('cql.csv')
  link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
  monkeypatch.setattr(runs, 'MAX_BYTES', 1000)
  whole = archive_of(tarfile.TarInfo('cql.csv'), HEAD + b'freeway,1,1000,1,,\n')
  for content, message in (
    (b'nothing', 'not a tar archive, or damaged'),
    (gzip.compress(b'nothing'), 'not a tar archive, or damaged'),
    (whole[: len(whole) // 2], 'not a tar archive, or damaged'),
    (archive_of(link), r'results\.tar\.gz:cql\.csv: expected CSV files only'),
    (archive_of(tarfile.TarInfo('cql.txt')), r'cql\.txt: expected CSV files only'),
    (archive_of(tarfile.TarInfo('cql.csv'), bytes(1001)), 'too large'),
    (archive_of(tarfile.TarInfo('cql.csv'), HEAD), r'results\.tar\.gz:cql\.csv: no rows'),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      runs.read([path])
  path.write_bytes(whole)
  assert len(runs.read([path])) == 1
