#!/usr/bin/env bash
# Builds the documentation's site, into site/ or the folder that is named, and fails at a dead link:
#   bash launch/docs.sh [FOLDER]
# It adds the package that builds it (zensical) to the environment, and brings the table of keys in docs/recipes.md up to date.
set -euo pipefail
[ "${1:-}" != --help ] || { sed -n 's/^# //p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
python -c 'import zensical' 2>/dev/null || pip install -q -c constraints.txt -e ".[docs]"
exec python launch/build_docs.py "$@"
