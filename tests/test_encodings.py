"""Text and file names in other encodings: every file is UTF-8 whatever the locale, and a message is never swallowed."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from posttrain.common.errors import described, is_mistake

LOCALES = {"en_US.ISO-8859-1": ("en_US", "ISO-8859-1"), "zh_CN.GBK": ("zh_CN", "GBK")}
SCRIPT = """
import locale, os, sys
from posttrain.parallel.script import run_script

def main():
    print(os.fsencode(sys.argv[1]).hex(), open(os.devnull).encoding, os.environ["PYTHONUTF8"])
    print("caf\\xe9 \\udcff")
    sys.stdout.flush()
    raise ValueError(f"{sys.argv[1]} is not there \\u2013 \\udcff")

run_script(main)
"""


@pytest.fixture(scope="session")
def locales(tmp_path_factory) -> dict[str, str]:
    """The environment variable that adds two locales which are not UTF-8."""
    folder = tmp_path_factory.mktemp("locales")
    if not shutil.which("localedef") or not Path("/usr/share/i18n/charmaps").is_dir():
        pytest.skip("needs localedef and its sources (Debian: locales)")
    for name, (language, characters) in LOCALES.items():
        subprocess.run(["localedef", "-i", language, "-f", characters, folder / name], capture_output=True)  # warnings make it fail
        assert (folder / name / "LC_CTYPE").is_file()
    return {"LOCPATH": str(folder)}


@pytest.mark.parametrize("name", ["C", *LOCALES])
def test_a_command_reads_utf8_and_prints_its_error_in_any_locale(locales, name):
    """A process without UTF-8 mode starts again in it, with the same arguments to the byte."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    environment = clean | locales | {"LC_ALL": name, "PYTHONPATH": str(ROOT)} | ({"PYTHONUTF8": "0"} if name == "C" else {})
    done = subprocess.run([sys.executable, "-c", SCRIPT, b"caf\xe9/\xc3\xa9"], env=environment, capture_output=True)
    assert done.returncode == 2, done.stderr
    first, second = done.stdout.decode().splitlines()
    assert first.split()[:2] == [b"caf\xe9/\xc3\xa9".hex(), "utf-8"]
    assert second == "caf\xe9 \\udcff"
    assert done.stderr.decode() == "error: caf\\udce9/\xe9 is not there \u2013 \\udcff\n"


def raised(action) -> ValueError:
    with pytest.raises(ValueError) as error:
        action()
    return error.value


@pytest.mark.parametrize(
    ("action", "library"),
    [(lambda: json.loads("{"), " of json"), (lambda: b"\xff".decode(), ""), (lambda: statistics.quantiles([1], n=0), " of statistics")],
)
def test_a_librarys_words_do_not_pass_for_the_users_mistake(action, library):
    with pytest.raises(ValueError) as error:
        action()
    assert not is_mistake(error.value)
    assert described(error.value).startswith(f"{type(error.value).__name__}{library}: ")
    assert is_mistake(ValueError("ours"))
