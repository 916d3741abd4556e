#!/usr/bin/env bash
# Lint, types, import rules, documentation and tests, in an environment of their own making: scripts/test.sh [--slow] [pytest arguments].
# --slow runs the tests that take more than a minute, and only those.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment requirements-dev.txt

selection=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    selection=(-m slow --timeout 3600)
    shift
elif [ $# = 0 ]; then
    # The whole suite in two processes, file by file: the tests of a file share what they have trained. In the order of
    # tests/conftest.py, not by the number of tests.
    selection+=(-n 2 --dist loadfile --no-loadscope-reorder)
fi
ruff format --check .
ruff check .
mypy
lint-imports
python -m mkdocs build --strict
python -m pytest "${selection[@]}" "$@"
