# Sourced by speedrun.sh and test.sh: enter .venv, made and filled on first use. $1: the extras this script needs.
python=$(command -v python3.12 || command -v python3.11 || command -v python3)
[ -d .venv ] || "$python" -m venv .venv
source .venv/bin/activate
stamp=.venv/$(cksum <pyproject.toml | cut -d ' ' -f 1)-$1
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a minute or two) ..." >&2
    python -m pip install --quiet --disable-pip-version-check torch==2.13.0 # alone first: a CPU build at hand is taken
    python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
