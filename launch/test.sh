#!/usr/bin/env bash
# Sets the environment up where that is still to be done, and runs the tests. Arguments go to pytest:
#   bash launch/test.sh -m "not slow"       the quick loop, under a minute
# It first installs what tests and checks need besides (the extra dev of setup.py).
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export POSTTRAIN_EXTRAS=dev
source launch/env.sh
ruff check .
ruff format --check .
python tests/layout.py
ty check
shellcheck -x launch/*.sh launch/quickstart/*.sh benchmarks/*.sh tests/*.sh .ci/run
shfmt -d -i 4 -ci launch/*.sh launch/quickstart/*.sh benchmarks/*.sh tests/*.sh .ci/run
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two ranks share the machine's cores
# Three workers on two cores, since tests often wait, each file whole in one of them, the longest first (tests/conftest.py); -n 0 for one.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
