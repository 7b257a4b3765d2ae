#!/usr/bin/env bash
# Makes .venv, installs, and runs every check: style, types, import rules, tests. Needs no GPU and no Megatron-LM checkout.
# Arguments are handed to pytest, for example: bash scripts/test.sh -k plan
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh dev

ruff check .
mypy
lint-imports
python -m pytest -p no:cacheprovider -n 2 --dist loadfile "$@"
