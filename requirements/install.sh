#!/usr/bin/env bash
# Make .venv with every package at its pinned version. Run it again at any time: it does only what is missing.
# Usage: requirements/install.sh [cpu|gpu]   (default: gpu where nvidia-smi finds one, else cpu)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: error: $*" >&2; exit 1; }

profile=${1:-}
if [ -z "$profile" ]; then
    if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then profile=gpu; else profile=cpu; fi
fi
[ "$profile" = cpu ] || [ "$profile" = gpu ] || fail "profile '$profile' is unknown; use cpu or gpu."

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python python3 \
        "$(command -v uv >/dev/null && uv python find '>=3.12,<3.14' 2>/dev/null || true)"; do
        if [ -n "$candidate" ] && usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

stamp=.venv/.complete
wanted="$profile $(cat requirements/base.txt "requirements/$profile.txt" requirements/install.sh setup.py megatron_instruct/tokenizer/_segments.c | sha256sum | cut -d' ' -f1) $PWD"
if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi

python=$(find_python) || fail "no Python 3.12 or 3.13 with venv found; install one (apt-get install python3.12-venv, \
pyenv install 3.12, or uv python install 3.12), or name it: make setup PYTHON=/path/to/python3.12"
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ -d .venv ] || [ "$free" -ge 12 ] || fail "$PWD has $free GB free; the packages take about 7 GB and 5 GB more while they are installed."

rm -f $stamp
if ! usable .venv/bin/python; then
    echo "setup: .venv with $("$python" --version) ($profile)"
    "$python" -m venv --clear .venv || fail "$python cannot make a virtual environment; install its venv module (apt-get install python3.12-venv)."
fi
echo "setup: installing $(cat requirements/base.txt "requirements/$profile.txt" | grep -c ==) packages; this takes some minutes the first time"
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input --quiet "$@"; }
remedy="run 'make setup' again: it goes on where it stopped. Without a network, give pip a mirror (PIP_INDEX_URL)."
pip install --upgrade pip==26.3 || fail "pip could not be installed; $remedy"
pip install --no-deps -r "requirements/$profile.txt" || fail "a package could not be installed; $remedy"
if [ "$profile" = gpu ]; then
    [ -n "${CUDA_HOME:-}" ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda
    command -v "${CUDA_HOME:-}/bin/nvcc" >/dev/null || fail "Transformer Engine needs the CUDA 13 toolkit; install it and set CUDA_HOME."
    nvidia=$(.venv/bin/python -c 'import nvidia; print(list(nvidia.__path__)[0])')
    include=$(find "$nvidia" -maxdepth 2 -type d -name include | paste -sd:)
    NVTE_FRAMEWORK=pytorch CPATH="$include${CPATH:+:$CPATH}" \
        pip install --no-build-isolation --no-deps transformer-engine-torch==2.20.2 || fail "Transformer Engine did not build; $remedy"
fi
rm -f megatron_instruct/tokenizer/_segments.*.so # or an old one would stay where the new one does not compile
pip install --no-deps --no-build-isolation -e . 2> .venv/install.log || { cat .venv/install.log >&2; fail "the project itself could not be installed; $remedy"; }
compgen -G "megatron_instruct/tokenizer/_segments.*.so" >/dev/null || echo "setup: warning: megatron_instruct/tokenizer/_segments.c did not \
compile, so that texts are tokenized at half the speed; install gcc and run 'rm $stamp && make setup'." >&2
echo "$wanted" > $stamp.partial && mv $stamp.partial $stamp
echo "setup: done; the tools are in tools/, with .venv/bin/python"
