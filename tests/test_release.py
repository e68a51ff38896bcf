"""One version: in posttrain/__init__.py, which the package's metadata and the changelog repeat."""

import re
import subprocess
import sys

from conftest import ROOT

import posttrain


def test_metadata_and_changelog_have_the_packages_version():
    told = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == posttrain.__version__
    newest = re.search(r"^## \[(\d\S*)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == posttrain.__version__


def test_the_version_is_told_without_torch():
    code = "import posttrain, sys; print(posttrain.__version__, 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [posttrain.__version__, "False"]
