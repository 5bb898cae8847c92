"""Acting and learning, as every experiment does them: run loop, updates, signals, progress."""

import concurrent.futures
import dataclasses
import itertools
import math
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import dm_env
import jax
import numpy as np
from absl import logging

from offline_zoo import atari_data, program

# DQN's usual limit, 30 minutes of play (Bellemare et al. 2013): 27,000 agent steps.
MAX_FRAMES_PER_EPISODE = 108_000
# What an online agent plays for an update: four agent steps of four frames.
FRAMES_PER_UPDATE = 4 * atari_data.NUM_ACTION_REPEATS
# On a CPU, XLA's own convolutions are faster than YNNPACK's, which it prefers (jax 0.10.2): they
# save a twentieth of a DQN update's time with SAME padding, a fifth with VALID. Products of
# matrices stay YNNPACK's.
CPU_COMPILER_OPTIONS = {
  'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT',
}

# What the shared files ask of an experiment and its agent: what a fork must have.


class Config(Protocol):
  """The flags that every experiment has, a dataclass; an agent's Config adds its own."""

  __dataclass_fields__: ClassVar[dict[str, Any]]

  @property
  def environment_name(self) -> str: ...
  @property
  def seed(self) -> int: ...
  @property
  def num_seeds(self) -> int: ...
  @property
  def num_iterations(self) -> int: ...
  @property
  def num_updates_per_iteration(self) -> int: ...
  @property
  def eval_steps(self) -> int: ...
  @property
  def results_csv_path(self) -> str | None: ...
  @property
  def checkpoint_dir(self) -> str | None: ...
  @property
  def keep_checkpoints(self) -> str: ...
  @property
  def tensorboard_dir(self) -> str | None: ...
  @property
  def video_dir(self) -> str | None: ...


def seeds(config: Config) -> range:
  """Lists the seeds that learn in this run."""
  return range(config.seed, config.seed + config.num_seeds)


def by_seed(config: Config, value: Any) -> dict[int, Any]:
  """Maps each seed to its part of what learning gives: one seed's, or a list of each seed's."""
  return dict(zip(seeds(config), value if config.num_seeds > 1 else [value], strict=True))


class Agent(Protocol):
  """What the run loop needs of an agent."""

  def reset(self, rng_key: jax.Array | None = None) -> None:
    """Forgets the episode. With a key, acts from now on with randomness drawn from that key."""

  def step(self, timestep: dm_env.TimeStep) -> int:
    """Takes a raw timestep, returns the action; after an episode's last one that is not used."""

  @property
  def statistics(self) -> Mapping[str, float]:
    """Says what the agent thinks of its last action, such as `state_value`."""


class Trainable(Protocol):
  """What iterations and checkpoints need of what learns: an agent, or several (see seeds.py)."""

  def learn(self, num_updates: int) -> Mapping[str, float | list[float]]:
    """Makes this many updates; returns the mean of each metric over them, or each seed's."""

  def get_state(self) -> Any:
    """Copies the learner's state, a pytree, into NumPy arrays."""

  def set_state(self, state: Any) -> None:
    """Goes on from a state that `get_state` gave."""


class Processor(Protocol):
  """What acting needs of an agent's preprocessing; see `processors.AtariProcessor`."""

  def reset(self) -> None:
    """Forgets the episode."""

  def __call__(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep | None:
    """Takes a raw timestep; returns what the network sees, or None: repeat the last action."""


class Learner(Agent, Trainable, Protocol):
  """What an experiment needs of an agent: data to learn from, and its pure functions.

  Attributes:
    data: what it learns from; may be replaced between calls of `learn`.
    processor: makes raw timesteps into what `act` sees.
    initial_state: (rng_key) -> state; pure.
    update: (state, data) -> (state, metrics, each []), one gradient step; pure. The state has
      `online_params`, which acting needs, and `num_updates`.
    act: (online_params, rng_key, s_t [84, 84, 4]) -> (rng_key, action, value); pure. The value is
      what `statistics`, which has one entry, says of the action.
  """

  data: Any
  initial_state: Callable[..., Any]
  update: Callable[..., Any]
  act: Callable[..., Any]

  @property
  def processor(self) -> Processor: ...


# Acting.


def run_loop(
  agent: Agent, environment: dm_env.Environment
) -> Iterator[tuple[dm_env.Environment, dm_env.TimeStep, Agent, int | None]]:
  """Plays episode after episode, one raw frame at a time, for as long as the caller iterates.

  Yields (environment, timestep, agent, action): the action is the agent's answer to the timestep,
  or None for the last timestep of an episode, which the agent has seen as well. An episode ends
  `MAX_FRAMES_PER_EPISODE` frames after its first one if the game has not ended it; its discount is
  then left as it is.
  """
  while True:
    agent.reset()
    timestep = environment.reset()
    for frame in itertools.count(1):
      action = agent.step(timestep)
      yield environment, timestep, agent, action
      timestep = environment.step(action)
      if frame == MAX_FRAMES_PER_EPISODE:
        timestep = timestep._replace(step_type=dm_env.StepType.LAST)
      if timestep.last():
        agent.step(timestep)
        yield environment, timestep, agent, None
        break


# Learning.


def learn_loop(update: Callable) -> Callable:
  """Makes `update(state, data) -> (state, metrics)` into `learn(state, data, n)`.

  `learn` runs n updates and returns the last state and the mean of each metric: a float, or a list
  if the metric is a vector. The state that it is given is donated, that is, gone afterwards.

  On accelerators it is one jitted scan, which compiles once for each n. On CPU, XLA runs
  convolutions in a loop body ten times slower than elsewhere (jax issue 12868), so there it is a
  loop over the jitted update. It waits for each update: queued ones would each hold a state.
  """

  def mean(metrics: Mapping[str, Any]) -> dict[str, float | list[float]]:
    return {name: np.mean(values, axis=0).tolist() for name, values in metrics.items()}

  if jax.default_backend() == 'cpu':
    _keep_freed_memory()
    jitted_update = jax.jit(update, donate_argnums=0, compiler_options=CPU_COMPILER_OPTIONS)

    def learn(state, data, n: int):
      history: list[Mapping[str, Any]] = []
      for _ in range(n):
        state, metrics = jitted_update(state, data)
        history.append(jax.device_get(metrics))
      return state, mean({name: [m[name] for m in history] for name in history[0]})

    return learn

  def scan(state, data, n: int):
    return jax.lax.scan(lambda state, _: update(state, data), state, length=n)

  jitted_scan = jax.jit(scan, static_argnums=2, donate_argnums=0)

  def learn_on_accelerator(state, data, n: int):
    state, metrics = jitted_scan(state, data, n)
    return state, mean(jax.device_get(metrics))

  return learn_on_accelerator


def _keep_freed_memory() -> None:
  """Lets malloc keep what is freed from now on, where it is glibc's.

  An update frees tens of megabytes of what it computes in between. To give them back to the system,
  and to be given empty pages for the next update, takes a sixth of the time of BCQ, C51 and CRR.
  """
  program.set_malloc_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
  program.set_malloc_option(-4, 0)  # M_MMAP_MAX


def map_examples(loss: Callable) -> Callable:
  """Maps a loss of one example over batches, as `jax.vmap` does.

  It is for a loss that compares all pairs of quantiles.

  On CPU it takes one example after the other, and finds anew for the gradient what came in between:
  32 times 200 x 200 pairs of quantiles would go to memory and back for every operation, those of
  one example stay in the cache.
  """
  if jax.default_backend() != 'cpu':
    return jax.vmap(loss)
  remembering_nothing = jax.checkpoint(loss)
  return lambda *batches: jax.lax.map(lambda example: remembering_nothing(*example), batches)


class StopSignal:
  """A block that SIGTERM and Ctrl-C end early, but only where it calls `check`.

  A second signal acts as it would have without the block. What fails beside the block may end it
  likewise, see `watch`.

  Attributes:
    requested: the name of the signal that has come, or None.
  """

  class _Stopped(Exception):  # noqa: N818, no error
    pass

  def __enter__(self) -> 'StopSignal':
    self.requested: str | None = None
    self._watched: concurrent.futures.Future | None = None
    self._handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for number in self._handlers:
      signal.signal(number, self._request)
    return self

  def __exit__(self, kind: type | None, *unused) -> bool:
    self._restore_handlers()
    return kind is self._Stopped

  def watch(self, future: concurrent.futures.Future) -> None:
    """Lets `check` raise what goes wrong in it, and no longer in the one before."""
    self._watched = future

  def check(self) -> None:
    """Leaves the block if a signal has come, or with an error if there was one beside it."""
    if self.requested:
      logging.warning('%s: stopping; the same command goes on', self.requested)
      raise self._Stopped
    if self._watched is not None and self._watched.done():
      self._watched.result()

  def _request(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.requested = signal.Signals(number).name
    self._restore_handlers()

  def _restore_handlers(self) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)


@dataclasses.dataclass
class Progress:
  """How far a run is: with the agent's state, all that a checkpoint holds.

  Attributes:
    iteration: the one under way, from 1 on.
    num_updates: updates done in it.
    metric_sums: for each metric of `learn`, its sum over these updates; of several seeds, sums.
    seconds: wall time spent on these updates.
    rows: the CSV's rows, one for each evaluated iteration and seed.
    num_resident_shards: how many log shards are sampled from at a time; None before it is known.
  """

  iteration: int = 1
  num_updates: int = 0
  metric_sums: dict[str, float | list[float]] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  num_resident_shards: int | None = None

  def add(
    self, metrics: Mapping[str, float | list[float]], num_updates: int, seconds: float
  ) -> None:
    """Counts a chunk of updates in, with the means of its metrics."""
    for name, mean in metrics.items():
      total = np.asarray(mean) * num_updates + self.metric_sums.get(name, 0.0)
      self.metric_sums[name] = total.tolist()
    self.num_updates += num_updates
    self.seconds += seconds

  def means(self) -> dict[str, float | list[float]]:
    """Averages the metrics over the iteration so far."""
    return {
      name: (np.asarray(value) / self.num_updates).tolist()
      for name, value in self.metric_sums.items()
    }

  def finish_iteration(
    self,
    config: Config,
    evaluations: Mapping[int, Mapping[str, float]],
    dataset_episode_return: float,
  ) -> None:
    """Adds the rows of the iteration under way, logs them and begins the next.

    Args:
      config: the flags.
      evaluations: for each seed, what `evaluation.evaluate` returned.
      dataset_episode_return: mean return of the logged episodes; NaN, if there are none, makes an
        empty cell, as the normalised returns of a game without a published human score do.
    """
    for seed, evaluation in evaluations.items():
      self._add_row(config, seed, evaluation, dataset_episode_return)
    self.begin_next_iteration()

  def _add_row(
    self,
    config: Config,
    seed: int,
    evaluation: Mapping[str, float],
    dataset_episode_return: float,
  ) -> None:
    means = {name: by_seed(config, mean)[seed] for name, mean in self.means().items()}
    total_updates = self.iteration * self.num_updates
    scores = (config.environment_name, evaluation['eval_episode_return'])
    dataset = None if math.isnan(dataset_episode_return) else dataset_episode_return
    row = {
      'environment_name': config.environment_name,
      'seed': seed,
      'iteration': self.iteration,
      'num_updates': total_updates,
      'frame': FRAMES_PER_UPDATE * total_updates,
      'eval_episode_return': evaluation['eval_episode_return'],
      'normalized_return': atari_data.human_normalized_score(*scores),
      'capped_normalized_return': atari_data.capped_human_normalized_score(*scores),
      'dataset_episode_return': dataset,
      **means,
      **{k: v for k, v in evaluation.items() if k not in ('eval_episode_return', 'eval_seconds')},
      'updates_per_second': self.num_updates / self.seconds,
      'seconds': self.seconds + evaluation['eval_seconds'],
    }
    logging.info(
      'iteration %d of %d%s: return %.1f over %d episodes (logged: %s), %s, '
      '%.0f updates/s, %.0f frames/s, %.0f s',
      self.iteration, config.num_iterations, f', seed {seed}' if config.num_seeds > 1 else '',
      row['eval_episode_return'], row['eval_num_episodes'],
      'none whole' if dataset is None else f'{dataset:.1f}',
      ', '.join(f'{name} {mean:.4g}' for name, mean in means.items()),
      row['updates_per_second'], row['eval_frame_rate'], row['seconds'],
    )  # fmt: skip
    self.rows.append(row)

  def begin_next_iteration(self) -> None:
    """Counts the iteration, and from then on the next one's updates."""
    self.iteration += 1
    self.num_updates, self.metric_sums, self.seconds = 0, {}, 0.0


def max_updates_per_chunk() -> int:
  """After how many updates a run heeds signals and looks at its metrics.

  That takes a tenth of a second on a GPU, where they are one scan, and a second or a few on a CPU.
  """
  return 25 if jax.default_backend() == 'cpu' else 250


def learn_iteration(
  agent: Trainable, progress: Progress, num_updates: int, stop: StopSignal
) -> None:
  """Lets the agent learn, in chunks, until the iteration has its updates.

  Between chunks it heeds `stop` and checks all metrics.

  Raises:
    FloatingPointError: a metric is NaN or infinite.
  """
  with program.progress_bar(num_updates, 'learning', 'update', progress.num_updates) as bar:
    while progress.num_updates < num_updates:
      stop.check()
      start = time.perf_counter()
      # Equal but for the last one: `learn` compiles once for each size.
      chunk = min(max_updates_per_chunk(), num_updates - progress.num_updates)
      metrics = agent.learn(chunk)
      progress.add(metrics, chunk, time.perf_counter() - start)
      bar.update(chunk)
      for name, mean in metrics.items():
        if not np.isfinite(mean).all():
          raise FloatingPointError(
            f'{name} is {mean} in iteration {progress.iteration}, within its updates up to '
            f'{progress.num_updates}; the last checkpoint is from before'
          )
