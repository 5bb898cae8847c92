#!/usr/bin/env bash
# ./run.sh        sets everything up in .venv, then trains CQL on logged Freeway for a few minutes
# ./run.sh test   sets everything up in .venv, then passes the tests; what follows goes to pytest
# ./run.sh lock   renews both lock files from pyproject.toml
#
# Needs Python 3.11 or newer: the one that $PYTHON names, or python3.
set -euo pipefail
cd "$(dirname "$0")"

set_up() {
  # The copy of the lock says what is installed; it is made last.
  if cmp -s requirements.lock .venv/requirements.lock; then
    return
  fi
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "run.sh: $python is $("$python" --version 2>&1); need Python 3.11 or newer (set PYTHON)" >&2
    exit 1
  fi
  echo "Setting up .venv with $("$python" --version): about 1.4 GB"
  "$python" -m venv --clear .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  cp requirements.lock .venv/requirements.lock
}

lock() {
  set_up
  .venv/bin/pip install --quiet uv
  local compile=(.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11
    --fork-strategy fewest --generate-hashes --no-emit-index-url --no-emit-find-links
    --custom-compile-command './run.sh lock' pyproject.toml)
  "${compile[@]}" --extra build --extra plots --extra tensorboard --extra dev -o requirements.lock
  # The same versions with CUDA, for the container.
  "${compile[@]}" --extra build --extra plots --extra tensorboard --extra cuda \
    -c requirements.lock -o requirements-cuda.lock
}

train() {
  set_up
  local logs=runs/short/logs csv=runs/short/results.csv
  if [ ! -d "$logs" ]; then
    .venv/bin/python -m offline_zoo.logs.demo --environment_name=freeway --num_transitions=50000 \
      --replay_dir="$logs"
  fi
  .venv/bin/python -m offline_zoo.cql.run_atari --environment_name=freeway --replay_dir="$logs" \
    --flagfile=offline_zoo/cql/laptop.flags --num_iterations=5 --num_updates_per_iteration=500 \
    --results_csv_path="$csv"
  .venv/bin/python -m offline_zoo.studies.report "$csv"
  echo "All columns: $csv   Config: runs/short/config.json   Checkpoint: runs/short/checkpoint"
}

case "${1:-train}" in
  train) train ;;
  test) set_up; shift; .venv/bin/python -m pytest "$@" ;;
  lock) lock ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
