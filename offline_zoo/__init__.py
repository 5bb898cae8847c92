"""Offline Zoo: forkable JAX reference implementations of offline RL agents on Atari."""

import signal
import sys

__version__ = '0.1.0'

# `python -m offline_zoo...` imports for seconds before it can say anything: until `program.run`
# begins, Ctrl-C just ends it. (Python calls itself -m while it looks for such a program's module.)
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)
