"""The lines of JSON between a benchmark and another library, which has an environment of its own.

  out  {"ready": true, "versions": {...}, ...}       once
  in   {"algorithm": "dqn", "updates": 200}          a request
  out  {"seconds": 9.87, "loss": 0.5}                its answer, after all of its work is done
  in   {"algorithm": "dqn", "act": "AAAA..."}        base64 of stacks, see `Learner`
  out  {"actions": [3, 0, 0, 1]}

The end of the input ends the process. Whatever else a library prints goes to stderr. The scripts of
this directory serve; `Peer` asks. Both are here, since neither needs more than Python has.
"""

import base64
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple, TextIO


class Learner(NamedTuple):
  """What a library's algorithm can be asked for.

  Attributes:
    learn: makes a number of updates, each with its own sampling, and returns after the last; gives
      the mean of their losses, if the library tells.
    act: takes stacks [N, 4, 84, 84] uint8, newest frame last, as bytes, and gives the best action
      in each; None if the benchmark that asks does not play.
  """

  learn: Callable[[int], float | None]
  act: Callable[[bytes], list[int]] | None = None


def take_stdout() -> TextIO:
  """Opens what answers are written to: stdout, which from here on is stderr for all others."""
  replies = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  return replies


def serve(
  replies: TextIO, packages: tuple[str, ...], facts: dict, answer: Callable[[Any], dict]
) -> None:
  """Says that it is ready, then answers one request after another.

  Args:
    replies: what `take_stdout` gave.
    packages: whose versions the first line holds, beside Python's.
    facts: what else it holds.
    answer: what it answers to a request.
  """
  versions = {'python': platform.python_version()}
  versions |= {package: importlib.metadata.version(package) for package in packages}
  print(json.dumps({'ready': True, 'versions': versions, **facts}), file=replies)
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), file=replies)


def serve_learners(
  replies: TextIO,
  packages: tuple[str, ...],
  make: Callable[[str], Learner],
  facts: dict | None = None,
) -> None:
  """Serves learners, each made when it is first asked for.

  Args:
    replies: what `take_stdout` gave.
    packages: as in `serve`.
    make: takes an algorithm's name.
    facts: as in `serve`.
  """
  make = functools.cache(make)

  def answer(request: dict) -> dict:
    learner = make(request['algorithm'])
    if 'act' in request:
      assert learner.act is not None
      return {'actions': learner.act(base64.b64decode(request['act']))}
    start = time.perf_counter()
    loss = learner.learn(request['updates'])
    return {'seconds': time.perf_counter() - start, 'loss': loss}

  serve(replies, packages, facts or {}, answer)


class Peer:
  """What a script of this directory serves. `ready`: its first line."""

  def __init__(
    self, python: str, script: str, *flags: str, stderr: int | IO[Any] = subprocess.DEVNULL
  ):
    self._script = pathlib.Path(__file__).parent / script
    self._process = subprocess.Popen(
      [python, str(self._script), *flags],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
      process_group=0,  # Ctrl-C is for the benchmark, whose end ends it
    )  # fmt: skip
    self.ready = self._answer()

  def _answer(self) -> dict:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'the peer ended; run {self._script} by hand to see why')
    return json.loads(line)

  def ask(self, request: object) -> dict:
    """Its answer to one line of JSON."""
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it says below that the peer has ended
      print(json.dumps(request), file=self._process.stdin, flush=True)
    return self._answer()

  def close(self) -> None:
    """Ends it, when it has answered."""
    self._process.communicate()

  def seconds(self, algorithm: str, num_updates: int) -> float:
    """How long so many updates took; of what `serve_learners` serves."""
    return self.ask({'algorithm': algorithm, 'updates': num_updates})['seconds']

  def loss(self, algorithm: str, num_updates: int) -> float:
    """The mean loss of so many updates more; likewise."""
    return self.ask({'algorithm': algorithm, 'updates': num_updates})['loss']

  def actions(self, algorithm: str, stacks: bytes) -> list[int]:
    """The best actions in stacks, see `Learner`; likewise."""
    return self.ask({'algorithm': algorithm, 'act': base64.b64encode(stacks).decode()})['actions']
