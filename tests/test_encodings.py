"""Text and file names in other encodings: every file is UTF-8 whatever the locale, and a message is never swallowed."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT

from data_prep import options as prepare_options
from posttrain.common import options, places
from posttrain.common.errors import described, is_mistake
from posttrain.model import command_line
from posttrain.recipes.keys import DPORecipe, SFTRecipe
from posttrain.recipes.reading import build_recipe

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


CLOSED = """
import sys
from posttrain.common import terminal
from posttrain.parallel.script import run_script

def main():
    with open(sys.argv[1], "w") as file:
        print("noise")
        terminal.keep_noise()
        terminal.say("a line")
        file.write(str(file.fileno() > 2))
    raise ValueError("what is wrong")

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


def test_every_path_of_a_recipe_may_begin_with_a_tilde(monkeypatch):
    """A key is either a path or known not to be one."""
    monkeypatch.setenv("HOME", "/home/me")
    others = {"benchmarks", "wandb_project", "wandb_run_name"}
    for kind in (SFTRecipe, DPORecipe):
        texts = {name for name, field in kind.model_fields.items() if field.annotation is str or str in get_args_deep(field.annotation)}
        values = {name: f"~/{name}" for name in texts - others}
        recipe = build_recipe(kind, values | {"max_iters": 1, "global_batch_size": 1, "benchmarks": "arc_easy"}, {})
        assert {name: getattr(recipe, name) for name in values} == {name: f"/home/me/{name}" for name in values}
        assert len(values) == 7


def get_args_deep(annotation) -> set:
    """The types in a union, without what annotates them."""
    return {get_args(one)[0] if get_args(one) else one for one in get_args(annotation)}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody-here/run", "home directory of ~nobody-here is not known.*whole path"),
        ("/tmp/\udcff", r"/tmp/\\udcff has bytes that are not"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_by_its_name(path, message):
    with pytest.raises(ValueError, match=f"out_dir=.*{message}"):
        build_recipe(SFTRecipe, {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": path, "max_iters": 1, "global_batch_size": 1}, {})
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        options.place(path)


def test_paths_in_options_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = options.Parser("serve", "")
    command_line.add_checkpoint_options(parser)
    given = ["--checkpoint=base=~/base", "--checkpoint=~/run", "--checkpoint=a=b", "--tokenizer=~/t"]
    found = parser.parse_args(given)
    assert (found.checkpoint, found.tokenizer) == (["base=/home/me/base", "/home/me/run", "a=b"], "/home/me/t")
    given = ["--dataset=~/rows.jsonl:0.5", "--output_dir=~/data", "--tokenizer=~/t", "--decontaminate=~/b"]
    found = prepare_options.parse("sft", given)
    assert found.dataset == ["/home/me/rows.jsonl:0.5"]
    assert [found.output_dir, found.tokenizer, *found.decontaminate] == ["/home/me/data", "/home/me/t", "/home/me/b"]


def test_no_option_of_a_command_is_a_bare_path():
    """Else a `~` in it would become a folder of that name."""
    for name, (script, _) in places.COMMANDS.items():
        text = (ROOT / script).read_text(encoding="utf-8")
        assert "type=Path" not in text, name


@pytest.mark.parametrize("closed", ["<&- >&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(tmp_path, closed):
    """As of a service, or of a job that nohup would start: no file is opened in their place, and the error is told where it can be."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", CLOSED, str(tmp_path / "file")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == ("" if "2>&-" in closed else "error: what is wrong\n")
    assert (tmp_path / "file").read_text() == "True"
