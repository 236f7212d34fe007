#!/usr/bin/env bash
# Lint, types and tests, on the CPU: `bash launch/test.sh`. The full checks as well: `bash launch/test.sh --slow`.
# Further arguments go to pytest: `bash launch/test.sh -k config`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"

case ${1:-} in
  -h|--help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0;;
  --slow) shift; set -- -m '' "$@";;
esac

export JAX_PLATFORMS=cpu
prepare "cpu,dev"
"$venv/bin/python" -m ruff check --quiet .
"$venv/bin/python" -m mypy --no-error-summary
# whole files to a process: what a file compiled stays with its tests; in the order of tests/conftest.py
exec "$venv/bin/python" -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
