# Sourced by the other scripts: makes .venv next to this folder and installs the package with the given extras into it.
# Usage: . scripts/setup.sh EXTRAS      PYTHON names another interpreter (3.11 or newer).

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "PYTHON = $python: not Python 3.11 or newer. Remedy: install Python 3.11 with its venv module, or set PYTHON to it." >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
. .venv/bin/activate

# Without a CUDA device this torch is taken first, in its CPU build where pip's indexes offer one (its version 2.13.0+cpu sorts above the
# one with CUDA; PIP_EXTRA_INDEX_URL names further indexes), so that nothing below pulls in another; a torch that is there stays.
if ! python -c 'import torch' 2>/dev/null && ! nvidia-smi >/dev/null 2>&1; then
    pip install --quiet --disable-pip-version-check 'torch==2.13.0'
fi
pip install --quiet --disable-pip-version-check --editable ".[$1]"

# Compiled planner kernels are kept between runs.
export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$PWD/.venv/numba_cache}
