#!/usr/bin/env bash
# Everything that must hold before a commit: the linter and the tests, on every core; makes its own environment.
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh plots,serve,test
ruff check .
ruff format --check .
python -m pytest -q --durations=5 --numprocesses auto --dist loadfile "$@"
