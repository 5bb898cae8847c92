"""Settings and data that the tests share."""

import pathlib

import jax
import pytest

# As parts.run sets them.
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'float32')


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
  """Inputs and outputs recorded from other implementations; see tests/data/README.md."""
  return pathlib.Path(__file__).parents[1] / 'tests' / 'data'
