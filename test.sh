#!/usr/bin/env bash
# Everything that must hold before a commit: the linter and the tests, environment included.
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh plots,serve,test
ruff check .
ruff format --check .
python -m pytest -q --durations=5 "$@"
