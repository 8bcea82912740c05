#!/bin/sh
# The tests: `sh tests/run.sh`, `sh tests/run.sh slow` for the long ones, further arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
export PATH # an empty environment leaves it to the shell
sh setup_venv.sh dev

# One thread a process: the models of the tests are so small that threads only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
if [ "${1:-}" = slow ]; then
    shift
    exec .venv/bin/python -m pytest -m slow "$@"
fi
# Two processes, each file in one of them: the fixtures of a file are made once.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
