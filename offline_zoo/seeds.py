"""Several seeds of an agent, which learn at once from one replay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offline_zoo import parts


def learn_in_turn(update: Callable) -> Callable:
  """Makes `update` into `learn(states, data, n)`, in which one seed learns after the other.

  `learn` makes n updates of each state of a list, by the very program that a seed alone runs, and
  returns the list of the last ones and for each metric a list of its means.
  """
  learn_one = parts.learn_loop(update)

  def learn(states: Sequence[Any], data: Any, n: int):
    learnt = [learn_one(state, data, n) for state in states]
    metrics = [of_one for _, of_one in learnt]
    return [state for state, _ in learnt], {x: [m[x] for m in metrics] for x in metrics[0]}

  return learn


def learn_together(update: Callable) -> Callable:
  """Does what `learn_in_turn` does, with one update of all seeds in place of one update of each.

  The same but for the last digits: a product of many matrices adds up in another order than that of
  one does.
  """
  learn_all = parts.learn_loop(jax.vmap(update, in_axes=(0, None)))

  @jax.jit
  def stack(states: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

  @jax.jit
  def split(stacked: Any) -> list[Any]:
    num_seeds = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_seeds)]

  def learn(states: Sequence[Any], data: Any, n: int):
    stacked, metrics = learn_all(stack(states), data, n)
    return split(stacked), metrics

  return learn


class Seeds:
  """Learners of several seeds, in place of an agent, which need not know of it.

  Each seed is initialised and draws its batches as it would alone. On CPU they learn in turn, and
  each gives what it gives alone, bit for bit; together they would take 1.7 times as long, since XLA
  there runs the convolutions of several networks as one in groups (see benchmarks/seeds.py).

  Attributes:
    data: what they all learn from; may be replaced between calls of `learn`.
    processor, act, statistics: those of the agent, see `parts.Learner`.
  """

  def __init__(self, agent: parts.Learner, seeds: Sequence[int]):
    """Initialises a learner for each seed.

    Args:
      agent: whose functions and data are used; it is not changed.
      seeds: those that would have made the agent's own key.
    """
    self.data = agent.data
    self.processor, self.act, self.statistics = agent.processor, agent.act, agent.statistics
    self._states = [agent.initial_state(jax.random.PRNGKey(seed)) for seed in seeds]
    on_cpu = jax.default_backend() == 'cpu'
    self._learn = (learn_in_turn if on_cpu else learn_together)(agent.update)

  def learn(self, num_updates: int) -> Mapping[str, list[float]]:
    """Makes this many updates of each seed; returns each seed's mean of each metric over them."""
    self._states, metrics = self._learn(self._states, self.data, num_updates)
    return metrics

  def get_state(self) -> list[Any]:
    """Copies each seed's state, into NumPy arrays."""
    return jax.tree.map(np.array, self._states)

  def set_state(self, state: list[Any]) -> None:
    """Goes on from what `get_state` gave."""
    self._states = jax.tree.map(jnp.array, state)
