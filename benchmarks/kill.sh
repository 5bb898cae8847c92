#!/usr/bin/env bash
# benchmarks/kill.sh [KILLS]: kills a run of each agent that many times (default 100) at random
# moments, goes on from its checkpoint each time, and compares CSV and parameters with those of an
# undisturbed run, bit for bit, on a small torso. The test suite does the same with one kill of each
# agent.
set -euo pipefail
cd "$(dirname "$0")/.."
OFFLINE_ZOO_NUM_KILLS=${1:-100} .venv/bin/python -m pytest offline_zoo/run_atari_test.py \
  -k sigkill -v --durations=0
