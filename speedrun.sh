#!/usr/bin/env bash
# Train a LLaVA from scratch on this machine: install, draw the data, train both towers, stages 1 and 2, evaluate.
#
#   bash speedrun.sh                  about 14 minutes on two cores, after installation
#   bash speedrun.sh --minutes 60     the same, with more of everything
#   bash speedrun.sh --help           all flags
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh plots
exec python -m world.speedrun "$@"
