#!/usr/bin/env bash
# A LLaVA from nothing on this machine, in one command: installs, trains both towers, stage 1 and stage 2, evaluates.
#
#   bash speedrun.sh                  about 14 minutes on two cores, after installation
#   bash speedrun.sh --minutes 60     the same, with more of everything
#   bash speedrun.sh --help           the other knobs
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh plots
exec python -m world.speedrun "$@"
