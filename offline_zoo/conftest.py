"""Settings and data that the tests share."""

import os
import pathlib

import jax
import pytest

from offline_zoo import replay, testing

# Half of the suite is compiling, which takes a fifth less with XLA's former way to emit loops. What
# a user's run compiles is compiled in the README's main command, see .ci/run.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'
# As program.run sets them.
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'float32')


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Many tests, and the programs that they start, compile the same; here it is done once."""
  directory = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    directory = directory.parent  # which all of pytest's processes share
  directory = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(directory / 'compiled')
  for name, value in (
    ('jax_compilation_cache_dir', directory),
    ('jax_persistent_cache_min_compile_time_secs', 0.0),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture(scope='module')
def compiled_quickly():
  """All tests of a module compile as `testing.compiled_quickly` says."""
  with testing.compiled_quickly():
    yield


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """Encoded shards are kept here, not where the user's are."""
  os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
  """Inputs and outputs recorded from other implementations; see tests/data/README.md."""
  return pathlib.Path(__file__).parents[1] / 'tests' / 'data'


@pytest.fixture(scope='session')
def logs(golden) -> pathlib.Path:
  """Four shards of Breakout, logged by Dopamine's own buffer."""
  return golden / 'replay' / 'Breakout' / '1' / 'replay_logs'


@pytest.fixture
def whole_batch(tmp_path, monkeypatch):
  """The replay of the two-state problem and a batch of all its rows, which every update gets."""
  testing.write_logs(tmp_path, num_transitions=60)
  data = replay.load(tmp_path, discount=testing.DISCOUNT)
  batch = replay.gather(data, replay.valid_rows(data))
  monkeypatch.setattr(replay, 'sample', lambda *_: batch)
  return data, batch
