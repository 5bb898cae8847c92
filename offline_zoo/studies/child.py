"""Becomes a program that is told to end when the process that started it ends, even by SIGKILL.

  python -m offline_zoo.studies.child <pid of that process> <cores, such as 0,1> <niceness> \
    offline_zoo.dqn.run_atari --environment_name=pong ...

The program, and whatever it starts, runs on these cores alone, with this niceness beyond its
parent's. Linux sends it SIGTERM.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); kept by exec


def main(parent: str, cores: str, niceness: str, *program: str) -> None:
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
  if os.getppid() != int(parent):  # which ended before that call
    sys.exit(128 + signal.SIGTERM)
  os.sched_setaffinity(0, map(int, cores.split(',')))
  total = os.nice(int(niceness))
  # Where Linux divides time among sessions first, that counts only within this one (sched(7)).
  with contextlib.suppress(OSError), open('/proc/self/autogroup', 'w') as file:
    file.write(str(total))
  os.execv(sys.executable, [sys.executable, '-m', *program])


if __name__ == '__main__':
  main(*sys.argv[1:])
