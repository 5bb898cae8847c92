"""Evaluation: whole episodes, in this process or in workers beside the learning of what follows.

Episodes are played in groups of consecutive numbers, as many as `eval_steps` says. An episode is a
function of the parameters, of (seed, iteration, its number) and of its group's size. Those count
that come first by number and together have `eval_steps` agent steps: the ones that would have been
played one after the other. So neither how many workers there are nor which of them is faster has a
say in an evaluation, and a group that a worker died in is played again.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from offline_zoo import parts, playing, program, results, seeds

# Agent steps of one of Freeway's, which are long.
_LONG_EPISODE = 2_000

# Which episodes.


def group_size(eval_steps: int) -> int:
  """Chooses how many episodes are played together.

  Four, which take half the time on CPU that they take one after the other; more gain little, and
  are hard to deal out evenly. But not more than count if they are as short as Freeway's, of 2,000
  agent steps; one that does not count costs little next to a long one, see `playing`.

  Args:
    eval_steps: agent steps that an evaluation has at least.
  """
  return min(max(eval_steps // _LONG_EPISODE, 1), 4)


def counting(
  episodes: Mapping[int, playing.Episode], eval_steps: int
) -> list[playing.Episode] | None:
  """Chooses the episodes that count: the first ones that together have so many agent steps.

  Args:
    episodes: those that have been played, by number from 0.
    eval_steps: agent steps, of four frames.

  Returns:
    None if the episodes up to the first that has not been played have fewer.
  """
  chosen: list[playing.Episode] = []
  num_steps = 0
  while num_steps < eval_steps:
    if len(chosen) not in episodes:
      return None
    chosen.append(episodes[len(chosen)])
    num_steps += chosen[-1].num_steps
  return chosen


def summarize(episodes: list[playing.Episode], seconds: float) -> dict[str, float]:
  """Averages over episodes, and of statistics over their frames; names begin with `eval_`."""
  num_frames = sum(episode.num_frames for episode in episodes)
  statistics = {
    f'eval_{name}': sum(episode.statistics[name] for episode in episodes) / num_frames
    for name in episodes[0].statistics
  }
  return {
    'eval_episode_return': float(np.mean([x.episode_return for x in episodes])),
    'eval_episode_clipped_return': float(np.mean([x.clipped_return for x in episodes])),
    'eval_num_episodes': len(episodes),
    'eval_frame_rate': num_frames / seconds,
    'eval_seconds': seconds,
    **statistics,
  }


def missing_steps(episodes: Mapping[int, playing.Episode], number: int, eval_steps: int) -> int:
  """Counts the agent steps that are missing before an episode, as far as is known.

  Args:
    episodes: those that have been played, by number.
    number: of the episode; it cannot count if none are missing.
    eval_steps: agent steps that an evaluation has at least.
  """
  return eval_steps - sum(x.num_steps for n, x in episodes.items() if n < number)


def evaluate(
  play: Callable[..., dict[int, playing.Episode]],
  eval_steps: int,
  seed: int,
  iteration: int,
  stop: parts.StopSignal | None = None,
  video_path: pathlib.Path | None = None,
) -> dict[str, float]:
  """Plays whole episodes here until they have at least `eval_steps` agent steps.

  Args:
    play: plays the next ones, as `playing.Players.play` does.
    eval_steps: agent steps, of four frames.
    seed: of the run.
    iteration: of the run; with the seed it says what the episodes are.
    stop: leaves the evaluation when it is requested.
    video_path: where to record the first episode, as MP4; None: nowhere.

  Returns:
    What `summarize` says of the episodes.
  """
  start = time.perf_counter()
  episodes: dict[int, playing.Episode] = {}
  check = (lambda: None) if stop is None else stop.check
  with program.progress_bar(eval_steps, 'evaluating', 'step') as bar:
    while (counted := counting(episodes, eval_steps)) is None:
      number = len(episodes)
      played = play(
        (seed, iteration, number),
        num_steps=missing_steps(episodes, number, eval_steps),
        video_path=None if number else video_path,
        check=check,
      )
      episodes |= played
      bar.update(sum(episode.num_steps for episode in played.values()))
  return summarize(counted, time.perf_counter() - start)


# Workers.

_PATIENCE = 0.2  # seconds until it is looked whether a wait is still wanted


class _Dropped(Exception):  # noqa: N818, no error
  pass


@dataclasses.dataclass(frozen=True)
class _Task:
  """Episodes to play together, with the parameters if they are others than those of the last task.

  Attributes:
    seeds: with the first episode's number; this and the next two are those of `Players.play`.
  """

  seeds: tuple[int, int, int]
  num_steps: int
  video_path: pathlib.Path | None
  online_params: Any | None


def _work(
  connection: Connection, jax_settings: dict[str, Any], make_agent, make_environment, num_players
):
  """Plays episodes, in a process of its own, for as long as the other end of the pipe is open.

  Says None when it is ready, and answers each `_Task` with its episodes, with the error that
  forbids them, or with None if something else came in meanwhile, which drops the task.
  """
  # Signals to the whole group are for the run, which closes the pipe when it ends.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  for name, value in jax_settings.items():
    jax.config.update(name, value)

  def check() -> None:
    if connection.poll():
      raise _Dropped

  with contextlib.suppress(EOFError, ConnectionError):
    players = playing.Players(make_agent(), make_environment, num_players)
    connection.send(None)
    while True:
      task = connection.recv()
      if task is None:
        continue
      if task.online_params is not None:
        players.set_params(task.online_params)
      answer: dict[int, playing.Episode] | OSError | None
      try:
        answer = players.play(
          task.seeds, num_steps=task.num_steps, video_path=task.video_path, check=check
        )
      except _Dropped:
        answer = None
      except OSError as error:  # of the video
        answer = error
      connection.send(answer)


@dataclasses.dataclass(eq=False)
class _Worker:
  """A process and the pipe to it.

  Attributes:
    busy: whether it is to answer.
    number: of the first episode of the group whose answer is wanted, if any.
    params_of: the seed and the iteration whose parameters it has.
  """

  process: Any
  connection: Connection
  busy: bool = True
  number: int | None = None
  params_of: tuple[int, int] | None = None


class Workers:
  """Processes that play episodes on CPU.

  Should this process be killed, they end by themselves.
  """

  _MAX_DEATHS = 3  # without an answer between them

  def __init__(
    self,
    num_workers: int,
    make_agent: Callable[[], parts.Learner],
    make_environment: Callable[..., playing.Environment],
    num_players: int,
    preload: str = __name__,
  ):
    """Starts none yet.

    Args:
      num_workers: how many.
      make_agent: gives an agent, of any parameters; both are called in the workers, to which they
        are pickled.
      make_environment: gives an environment; has an argument `seed`.
      num_players: how many episodes a worker plays together.
      preload: the module that takes longest to import, which is then done once.
    """
    self._num_workers = num_workers
    self._num_players = num_players
    self._make_players = make_agent, make_environment, num_players
    self._workers: dict[Connection, _Worker] = {}
    self._num_deaths = 0
    # Quick to start, and small: copies of a process that has imported all already.
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload([preload])

  def close(self) -> None:
    """Ends them."""
    for connection in self._workers:
      connection.close()
    for worker in self._workers.values():
      self._end(worker)
    self._workers.clear()

  def _start(self) -> None:
    names = (
      'jax_compilation_cache_dir', 'jax_enable_compilation_cache', 'jax_default_matmul_precision',
      'jax_persistent_cache_min_compile_time_secs', 'jax_numpy_rank_promotion',
    )  # fmt: skip
    settings = {name: getattr(jax.config, name) for name in names}
    settings |= {'jax_platforms': 'cpu', 'jax_cpu_enable_async_dispatch': False}  # no idle threads
    ours, theirs = self._context.Pipe()
    process = self._context.Process(
      target=_work, args=(theirs, settings, *self._make_players), daemon=True
    )
    process.start()
    theirs.close()
    self._workers[ours] = _Worker(process, ours)

  def _end(self, worker: _Worker) -> int:
    """Ends a worker whose pipe is closed; returns its exit code."""
    worker.process.join(5)
    worker.process.kill()
    worker.process.join()
    exit_code = worker.process.exitcode
    worker.process.close()
    return exit_code

  def _bury(self, worker: _Worker) -> None:
    del self._workers[worker.connection]
    worker.connection.close()
    exit_code = self._end(worker)
    self._num_deaths += 1
    if exit_code >= 0:  # which says why: no use in trying again
      raise ChildProcessError('an evaluation worker failed; its traceback is above')
    if self._num_deaths > self._MAX_DEATHS:
      raise ChildProcessError(
        f'{self._num_deaths} evaluation workers died one after the other, the last with exit code '
        f'{exit_code}; is there enough memory? --num_eval_workers=0 does without'
      )

  def play(
    self,
    online_params: Any,
    eval_steps: int,
    seed: int,
    iteration: int,
    video_path: pathlib.Path | None = None,
    cancelled: Callable[[], bool] = lambda: False,
  ) -> dict[str, float] | None:
    """Does what `evaluate` does, with these parameters; None if it was cancelled.

    Raises:
      ChildProcessError: workers die, again and again.
      OSError: the video cannot be written.
    """
    start = time.perf_counter()
    episodes: dict[int, playing.Episode] = {}
    while (counted := counting(episodes, eval_steps)) is None and not cancelled():
      while len(self._workers) < self._num_workers:
        self._start()
      dealt = {worker.number for worker in self._workers.values()}
      for worker in [w for w in self._workers.values() if not w.busy]:
        firsts = itertools.count(step=self._num_players)
        number = next(n for n in firsts if n not in episodes and n not in dealt)
        num_steps = missing_steps(episodes, number, eval_steps)
        if num_steps <= 0:  # what others play is all that counts
          break
        worker.number = number
        dealt.add(number)
        params = online_params if worker.params_of != (seed, iteration) else None
        path = None if number else video_path
        worker.busy, worker.params_of = True, (seed, iteration)
        # Should it be dead, that shows below.
        with contextlib.suppress(ConnectionError):
          worker.connection.send(_Task((seed, iteration, number), num_steps, path, params))
      ready = wait(list(self._workers), timeout=_PATIENCE)
      for worker in [w for w in self._workers.values() if w.connection in ready]:
        try:
          answer = worker.connection.recv()
        except (EOFError, ConnectionError):
          self._bury(worker)
          continue
        if isinstance(answer, OSError):
          raise answer
        if worker.number is not None:
          episodes |= answer
          self._num_deaths = 0
        worker.busy, worker.number = False, None
    for worker in self._workers.values():
      if worker.number is not None:  # plays what is not needed
        worker.number = None
        with contextlib.suppress(ConnectionError):
          worker.connection.send(None)
    return None if counted is None else summarize(counted, time.perf_counter() - start)


def num_workers(flag: int | None, eval_steps: int) -> int:
  """Chooses how many workers --num_eval_workers asks for.

  The default leaves a core to learning, if there is another, and starts no more workers than count
  if episodes are as long as Freeway's: each is a process with a JAX of its own.
  """
  if flag is not None:
    return flag
  useful = eval_steps // (_LONG_EPISODE * group_size(eval_steps))
  return max(min(len(os.sched_getaffinity(0)) - 1, useful), 1)


# A run.


class Config(parts.Config, Protocol):
  """The flags of an experiment that evaluates beside learning."""

  @property
  def num_eval_workers(self) -> int | None: ...


class Evaluator:
  """Evaluates what a run learns in each iteration, completes its row and saves it.

  With workers that goes on beside the next iteration's learning. A checkpoint is then still what
  it is without: the state at the end of an iteration's updates, saved when its row is complete.
  """

  def __init__(
    self,
    config: Config,
    run: results.Results,
    learner: parts.Learner | seeds.Seeds,
    make_agent: Callable[[], parts.Learner],
    make_environment: Callable[..., playing.Environment],
    dataset_episode_return: float,
  ):
    """Starts nothing yet.

    Args:
      config: the flags.
      run: where results go.
      learner: what is evaluated.
      make_agent: gives another such agent, in a worker; see `Workers`.
      make_environment: likewise.
      dataset_episode_return: see `Progress.finish_iteration`.
    """
    self._config, self._run, self._learner = config, run, learner
    self._dataset_episode_return = dataset_episode_return
    self._num_workers = num_workers(config.num_eval_workers, config.eval_steps)
    num_players = group_size(config.eval_steps)
    self._workers = Workers(
      self._num_workers, make_agent, make_environment, num_players, learner.act.__module__
    )
    self._players = (
      None if self._num_workers else playing.Players(learner, make_environment, num_players)
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._left = threading.Event()
    # What goes on beside learning: the evaluation, the learner's state, and how far the run was.
    self._pending: concurrent.futures.Future[None] | None = None
    self._state: Any = None
    self._progress = parts.Progress()

  def __enter__(self) -> 'Evaluator':
    return self

  def __exit__(self, kind: type | None, *unused) -> None:
    # The same command makes updates that go wrong again; those before shall have their row by then.
    if kind is FloatingPointError and self._pending is not None:
      concurrent.futures.wait([self._pending])
    self._left.set()
    self._thread.shutdown()
    self._workers.close()

  def evaluate(self, progress: parts.Progress, stop: parts.StopSignal) -> None:
    """Evaluates the iteration whose updates are done, seed by seed, and begins the next.

    With workers it returns when the evaluation before is done, and this one goes on.

    Args:
      progress: how far the run is; changed.
      stop: leaves an evaluation, or the wait for one, when it is requested.

    Raises:
      ChildProcessError: workers die, again and again.
      FloatingPointError, OSError: see `Results.save`; a video cannot be written.
    """
    if self._players is not None:
      state, evaluations = self._learner.get_state(), {}
      with self._saving_if_it_fails(state, progress):
        for seed, seeds_state in parts.by_seed(self._config, state).items():
          self._players.set_params(seeds_state.online_params)
          evaluations[seed] = evaluate(
            self._players.play, self._config.eval_steps, seed, progress.iteration, stop,
            self._run.video_path(seed, progress.iteration),
          )  # fmt: skip
      progress.finish_iteration(self._config, evaluations, self._dataset_episode_return)
      self._run.save(state, progress)
      return
    self.finish(stop)
    self._state, self._progress = self._learner.get_state(), dataclasses.replace(progress)
    self._pending = self._thread.submit(self._evaluate_beside_learning)
    stop.watch(self._pending)
    progress.begin_next_iteration()

  def _evaluate_beside_learning(self) -> None:
    iteration, evaluations = self._progress.iteration, {}
    with self._saving_if_it_fails(self._state, self._progress):
      for seed, state in parts.by_seed(self._config, self._state).items():
        evaluation = self._workers.play(
          state.online_params, self._config.eval_steps, seed, iteration,
          self._run.video_path(seed, iteration), self._left.is_set,
        )  # fmt: skip
        if evaluation is None:
          return
        evaluations[seed] = evaluation
    with tqdm.external_write_mode(sys.stderr):  # so that what is logged does not tear the bar
      self._progress.finish_iteration(self._config, evaluations, self._dataset_episode_return)
    self._run.save(self._state, self._progress)

  @contextlib.contextmanager
  def _saving_if_it_fails(self, state: Any, progress: parts.Progress) -> Iterator[None]:
    """Keeps the updates of an iteration whose evaluation fails: the same command evaluates them."""
    try:
      yield
    except OSError:
      self._run.save(state, progress)
      raise

  def finish(self, stop: parts.StopSignal) -> None:
    """Waits until nothing is evaluated any more; raises what `evaluate` does."""
    while self._pending is not None:
      stop.check()
      if concurrent.futures.wait([self._pending], _PATIENCE).done:
        self._pending.result()
        self._pending = None

  def save_unfinished(self, progress: parts.Progress) -> None:
    """Saves what was learnt, once a signal has left the block.

    If it has left an evaluation, that is what was to be evaluated: the updates of the iteration
    after it are made again, bit for bit the same.
    """
    if self._pending is not None:
      self._pending.result()
      if self._progress.num_updates:
        self._run.save(self._state, self._progress)
        return
    self._run.save(self._learner.get_state(), progress)
