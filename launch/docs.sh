#!/usr/bin/env bash
# Builds the documentation's site, into site/ or the folder that is named, and fails at a dead link:
#   bash launch/docs.sh [FOLDER]
# It adds the package that builds it (the extra docs of setup.py) to the environment, and brings the keys in docs/recipes.md up to date.
[ "${1:-}" != --help ] || exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export POSTTRAIN_EXTRAS=docs
source launch/env.sh
exec python launch/build_docs.py "$@"
