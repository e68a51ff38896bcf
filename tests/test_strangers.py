"""Folders and rows of strangers: no code of theirs runs, no other file of this machine is read or written, and what is there is seen."""

import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from bases import parquet
from conftest import ROOT, launch, python, rank_environment
from served import served
from test_runs import sft_arguments

from data_prep.formats.rows import file_rows
from posttrain.common import links
from posttrain.common.limits import TookTooLong, time_limit
from posttrain.common.links import open_own, refuse_links
from posttrain.common.visible import visible
from posttrain.data import own_template
from posttrain.data.chat import ChatFormat, render_prompt
from posttrain.data.parts import Refused
from posttrain.data.tokenization import grow_embeddings, load_tokenizer
from posttrain.evaluation import tasks
from posttrain.model.forms import find_model
from posttrain.model.loading import load_model

# ---- links ----


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_text("mine\n")
    return path


@pytest.mark.parametrize("name", [".lock", "logs/rank_0.log", "model/notes.txt", "metrics.jsonl", "checkpoints", "deep/er/link", "wandb"])
def test_a_link_out_of_a_folder_is_refused_by_its_name(tmp_path, secret, name):
    run = tmp_path / "run"
    path = run / name
    path.parent.mkdir(parents=True)
    path.symlink_to(secret)
    with pytest.raises(ValueError, match=f"{path} is a link to {secret}, outside of {run}.*cp --remove-destination"):
        refuse_links(run)
    path.unlink()
    (run / "step_000001").mkdir()
    (run / "latest").symlink_to("step_000001")
    (run / "nowhere").symlink_to("not_there")
    (run / "wandb" / "logs").mkdir(parents=True)
    (run / "wandb" / "logs" / "debug.log").symlink_to(secret)  # as wandb makes it
    refuse_links(run)  # what stays within, as a link to the best checkpoint does


def test_a_folder_of_the_hubs_cache_and_linked_weights_are_no_harm(tiny, tmp_path):
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(Path(tiny.base).iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    find_model(str(snapshot), "")
    load_tokenizer(snapshot)
    linked = Path(shutil.copytree(tiny.base, tmp_path / "linked"))
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(Path(tiny.base) / "model.safetensors")
    find_model(str(linked), "")


@pytest.mark.parametrize("name", ["system_prompt.txt", "chat_template.jinja", "generation_config.json"])
def test_a_models_text_that_is_a_link_to_a_file_of_this_machine_is_refused(tiny, tmp_path, secret, name):
    """They are shown to every client of a server, and copied into results, which people publish."""
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    for read in (lambda: find_model(str(folder), ""), lambda: load_tokenizer(folder)):
        with pytest.raises(ValueError, match=f"{folder / name} is a link to {secret}"):
            read()


def test_a_lock_is_neither_emptied_nor_followed(tmp_path, secret):
    lock = tmp_path / ".lock"
    lock.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        open_own(lock)
    assert secret.read_text() == "mine\n"
    assert links.open_own(tmp_path / "new") > 2


@pytest.mark.slow
def test_a_run_with_links_is_not_continued_and_nothing_is_written_through_them(tiny, tmp_path, secret):
    run = tmp_path / "run"
    arguments = sft_arguments(tiny, run)
    done = launch("posttrain/sft.py", *arguments, "--time_limit=1s", ranks=1)
    assert done.returncode == 0, done.stdout
    for name in (".lock", "logs/rank_0.log", "model/notes.txt"):
        path, aside = run / name, tmp_path / "aside"
        if path.exists():
            path.rename(aside)
        path.symlink_to(secret)
        for script, words in (
            ("sft.py", arguments),
            ("report.py", [run]),
            ("convert.py", [next(run.glob("checkpoints/step_*")), tmp_path / "new"]),
        ):
            done = python(f"posttrain/{script}", *words)
            assert done.returncode == 2, done.stdout
            assert f"error: {path} is a link to {secret}, outside of {run}" in done.stdout
        path.unlink()
        if aside.exists():
            aside.rename(path)
        assert secret.read_text() == "mine\n"
    assert not (tmp_path / "new").exists()


# ---- code ----


def test_the_code_of_a_strangers_task_file_does_not_run(tmp_path):
    """The harness would take the first file by name that has the task, and run the function that it names."""
    folder, marker = tmp_path / "tasks", tmp_path / "it_ran"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(*_): return 'q'\n")
    (folder / "00.yaml").write_text("task: posttrain_arc_easy\ndataset_path: json\ndoc_to_text: !function evil.run\n")
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 1}) + "\n")
    (folder / "posttrain_arc_easy.yaml").symlink_to(tmp_path / "other")
    tasks.write_tasks(["arc_easy"], "logprob", tmp_path, folder)
    loaded = tasks.load_tasks(str(folder), ["posttrain_arc_easy"], 10**9)["tasks"]["posttrain_arc_easy"]
    assert len(loaded.eval_docs) == 1
    assert not marker.exists()
    assert not (tmp_path / "other").exists()  # nor was a file written through the link


TRAP = """
import os
open(os.environ["MARKER"], "a").write(__name__ + "\\n")
"""


@pytest.mark.slow
def test_no_command_runs_code_of_a_folder(tiny, tmp_path):
    """Each meets a model, a tokenizer and prepared data full of traps."""
    base, marker = Path(shutil.copytree(tiny.base, tmp_path / "base")), tmp_path / "it_ran"
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Tokenizer", None]}
    traps = ("own.py", "modeling_own.py", "tokenization_own.py", "configuration_own.py", "sitecustomize.py", "conftest.py", "setup.py")

    def trap(folder: Path) -> None:
        for name in traps:
            (folder / name).write_text(TRAP)
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(TRAP)
        for file, keys in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("AutoTokenizer",))):
            path = folder / file
            if path.is_file():
                path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {key: own[key] for key in keys}}))

    trap(base)
    data, run = tmp_path / "data", tmp_path / "run"
    environment = {"MARKER": str(marker)}
    source = ("--source", f"{tiny.folder}/sft.jsonl", "--tokenizer", base, "--output_dir", data)
    sft = [*(one for one in sft_arguments(tiny, run) if not one.startswith(("--checkpoint_path", "--sft_data_dir")))]
    sft += [f"--checkpoint_path={base}", f"--sft_data_dir={data}"]
    dpo = [
        f"--sft_checkpoint_path={base}",
        f"--dpo_data_dir={tiny.dpo}",
        f"--out_dir={tmp_path}/dpo",
        "--max_iters=1",
        "--global_batch_size=4",
    ]
    dpo += ["--dtype=float32", "--warmup_iters=0", "--eval_interval=0"]
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 1}) + "\n")
    evaluation = ("--benchmark", "arc_easy", "--data", tmp_path, "--output", tmp_path / "eval")
    commands = [
        ("data_prep/prepare_sft.py", *source),
        ("data_prep/preview.py", data),
        ("posttrain/plan.py", f"--checkpoint_path={base}", f"--sft_data_dir={data}"),
        ("posttrain/sft.py", *sft),
        ("posttrain/dpo.py", *dpo),
        ("posttrain/eval_benchmarks.py", "--checkpoint", base, *evaluation),
        ("posttrain/convert.py", base, tmp_path / "model.pt"),
        ("posttrain/report.py", run),
    ]
    for command in commands:
        done = python(*command, env=rank_environment() | environment)
        is_refused = "a ckpt.pt can hold a Llama model only" in done.stdout  # by convert.py, once it has loaded the model
        assert done.returncode == 0 or is_refused, (command[0], done.stdout[-2000:])
        if "prepare" in command[0]:
            trap(data / "tokenizer")
            trap(data)
    with served(tmp_path / "log", "--checkpoint", base, **environment) as server:
        assert server.health()[0] == 200
    assert not marker.exists(), marker.read_text()


@pytest.mark.slow
def test_code_does_not_run_where_somebody_says_yes(tiny, tmp_path):
    """transformers asks on standard input whether to run a folder's code that it has no class for."""
    base, marker = Path(shutil.copytree(tiny.base, tmp_path / "base")), tmp_path / "it_ran"
    (base / "own.py").write_text(TRAP)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Tokenizer", None]}
    (base / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Own"], "auto_map": own}))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": own}))
    (base / "tokenizer.json").unlink()
    source = ("--source", f"{tiny.folder}/sft.jsonl", "--tokenizer", base, "--output_dir", tmp_path / "data")
    commands = [
        ("data_prep/prepare_sft.py", *source),
        ("posttrain/convert.py", base, tmp_path / "model.pt"),
        ("posttrain/serve.py", "--checkpoint", base),
    ]
    running = []
    for script, *arguments in commands:
        shown = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = rank_environment() | {"MARKER": str(marker)}
        running.append(subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)], env=environment, **shown))
    for process in running:
        said, _ = process.communicate("y\n" * 20, timeout=200)
        assert process.returncode, said
        assert said.splitlines()[-1].startswith("error: "), said
        assert "Traceback" not in said
    assert not marker.exists(), marker.read_text()


# ---- templates and tokenizers ----

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"


@pytest.fixture
def limited(monkeypatch):
    monkeypatch.setattr(own_template, "RENDER_SECONDS", 0.3)


def test_a_template_that_does_not_end_is_refused(tiny, limited):
    tokenizer = load_tokenizer(tiny.base)
    tokenizer.chat_template = LOOP + tiny.chat.jinja
    began = time.monotonic()
    with pytest.raises(ValueError, match="chat template cannot be used: the template refuses it: it takes too long"):
        ChatFormat(tokenizer, "tokenizer")
    assert time.monotonic() - began < 5


def test_a_template_that_does_not_end_for_one_conversation_is_refused_for_that(tiny, limited):
    tokenizer = load_tokenizer(tiny.base)
    tokenizer.chat_template = "{% if 'BOOM' in messages[0]['content'] %}" + LOOP + "{% endif %}" + tiny.chat.jinja
    chat = ChatFormat(tokenizer, "tokenizer")
    with pytest.raises(Refused, match="it takes too long"):
        render_prompt(chat, [{"role": "user", "content": "BOOM"}])
    assert render_prompt(chat, [{"role": "user", "content": "ta"}])


GREEDY = [
    "{% set x = 'a' * 10**11 %}",
    "{{ 'a' * (messages | length * 10**10) }}",
    "{{ '%09999999999d' % 1 }}",
    "{{ 'a' | center(10**10) }}",
]
GREEDY += ["{% set x = namespace(y='aaaaaaaa') %}{% for i in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}", "{{ 'a' * 10**8 }}"]


def test_a_template_that_takes_all_memory_is_refused(tiny):
    """In a process of its own, whose largest memory is read; afterwards the process may take as much as before."""
    script = f"""import resource, sys
from posttrain.data.chat import ChatFormat
from posttrain.data.tokenization import load_tokenizer
tokenizer = load_tokenizer({str(tiny.base)!r})
before = resource.getrlimit(resource.RLIMIT_AS)
for expression in {GREEDY!r}:
    tokenizer.chat_template = expression + {tiny.chat.jinja!r}
    try:
        ChatFormat(tokenizer, "tokenizer")
    except ValueError as error:
        print(error)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    *said, most = done.stdout.splitlines()
    assert len(said) == len(GREEDY), said
    for line in said:
        assert re.search("takes too much memory|takes too long|writes 100,0..,... characters|range too big", line), line
    assert int(most) < 6e6  # kilobytes


def test_a_time_limit_ends_its_block_and_nothing_after_it():
    for _ in range(3):
        with pytest.raises(TookTooLong), time_limit(0.05):
            while True:
                sum(range(100))
        with time_limit(0.2):
            pass
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            sum(range(100))


def test_a_tokenizer_of_another_size_does_not_take_all_memory(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    for far in (3_000, 30_000_000):
        content["model"]["vocab"]["far"] = far
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"ids up to {far:,}, (the model has rows for .*: it is another model's|but only 4.. tokens)"):
            grow_embeddings(load_model(str(tiny.base), None, ""), load_tokenizer(folder))


# ---- rows, and what is shown of them ----


def test_a_key_that_is_twice_in_a_row_refuses_the_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "output": "first", "output": "second"}\n{"a": 2}\n{"messages": [{"role": "user", "role": "x"}]}\n')
    first, second, third = file_rows(path)
    assert (str(first), second, str(third)) == ("the key 'output' is there twice", {"a": 2}, "the key 'role' is there twice")
    (tmp_path / "list.json").write_text('[{"a": 1, "a": 2}]')
    with pytest.raises(ValueError, match=r"list.json: row 1 is not valid JSON: the key 'a' is there twice"):
        list(file_rows(tmp_path / "list.json"))


def test_a_line_that_does_not_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.formats.opening.LONGEST_LINE", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 2**21)
    with pytest.raises(ValueError, match="rows.jsonl: line 2 has more than 1 MB, which no row for training has"):
        list(file_rows(path))


MANY = {
    "list.json.gz": (gzip.compress(b"[" + b" \n" * 2**20), "row 1 has more than 1 MB"),
    "numbers.json.gz": (gzip.compress(b'[{"a": 1},\n{"b": [' + b"1,\n" * 2**20), "row 2 has more than 1 MB"),
    "end.json.gz": (gzip.compress(b'[{"a": 1}]' + b"\n" * 2**21), "row 1 has more than 1 MB"),
    "quote.csv.gz": (gzip.compress(b'a,b\n1,2\n"' + b"x\n" * 2**20), r"the row from line 3 on \(is a quote not closed"),
    "fields.csv.gz": (gzip.compress(b"a,b\n" + b'"x\n",' * 2**19), "the row from line 2 on"),
    "zeros.csv": (b"a," + bytes(2**21), "the row from line 1 on"),
    "value.parquet": (parquet(a=["x", "y" * 2**21]), "row 2 has more than 1 MB"),
    "values.parquet": (parquet(a=pa.array(["x"] * 9 + ["y" * 2**21] * 99).dictionary_encode()), "row 10 has more than 1 MB"),
}


@pytest.mark.parametrize("name", MANY)
def test_a_row_that_does_not_end_is_not_read_to_its_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr("data_prep.formats.opening.LONGEST_LINE", 2**20)
    content, expected = MANY[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {expected}.*, which no row for training has"):
        list(file_rows(tmp_path / name))


def test_a_value_that_a_file_holds_once_for_many_rows_is_in_memory_for_few(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet(a=pa.array(["x" * 2**20] * 512).dictionary_encode()))
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    assert sum(len(row["a"]) for row in file_rows(path)) == 2**29
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]0;title\x07b", r"a\x1b]0;title\x07b"),
        ("\x9b31m \x9d8;;x", r"\x9b31m \x9d8;;x"),
        ("user\u202e\u2066x", r"user\u202e\u2066x"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("\U000e0041", r"\U000e0041"),
        ("a\rb", r"a\rb"),
        ("caf\udce9", r"caf\udce9"),
        ("two\nlines\tand a tab, é, \U0001f469\u200d\U0001f467, עברית", "two\nlines\tand a tab, é, \U0001f469\u200d\U0001f467, עברית"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_seen(text, shown):
    assert visible(text) == shown


@pytest.mark.slow
def test_a_warning_that_quotes_a_file_shows_what_is_there(tmp_path):
    """As of a ckpt.pt with a setting of that name: Python itself would print the characters, and the line of code below."""
    (tmp_path / "script.py").write_text(
        "import warnings\nfrom posttrain.parallel.script import run_script\n"
        "run_script(lambda: warnings.warn('settings \\x1b]0;OWNED\\x07 \\n[2J', stacklevel=1))\n"
    )
    command, places = [sys.executable, tmp_path / "script.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=places)
    assert done.stderr == f"warning  settings \\x1b]0;OWNED\\x07 [2J (UserWarning at {tmp_path}/script.py:3)\n"


def test_preparation_and_preview_show_what_is_there(tiny, tmp_path):
    """A role that is markup to the terminal's library ended preparation with a traceback, after the folder was there."""
    rows = [{"messages": [{"role": "user", "content": "ta\u202e ke\x9b31m"}, {"role": "assistant", "content": "mu\u200b"}]}] * 3
    rows += [{"messages": [{"role": "[/red]\x1b]0;x\x07", "content": "ta"}]}]
    source = tmp_path / "ro\x1b[1mws.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    options = (
        "--source",
        source,
        "--tokenizer",
        tiny.base,
        "--output_dir",
        data,
        "--max_dropped",
        "1",
        "--val_size",
        "0",
        "--duplicates",
        "keep",
    )
    done = python("data_prep/prepare_sft.py", *options)
    assert done.returncode == 0, done.stdout
    assert r"[/red]\x1b]0;x\x07" in done.stdout
    assert "note: 3 rows hold characters that are not seen" in done.stdout
    page = tmp_path / "page.html"
    shown = python("data_prep/preview.py", data)
    python("data_prep/preview.py", data, "--html", page)
    for text in (shown.stdout, page.read_text()):
        assert r"ta\u202e ke\x9b31m" in text
        assert r"mu\u200b" in text
    for text in (done.stdout, shown.stdout, page.read_text()):
        assert not set(text) & set("\x1b\x07\x9b\u202e\u200b")


# ---- secrets ----

# without the library path, a cluster's plug-in of NCCL's is not found on the other hosts, which then fall back to TCP
SETTINGS = {"NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/opt/ofi/lib", "FI_PROVIDER": "efa", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
SETTINGS |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_secrets_go_to_other_hosts_in_a_file_and_on_no_command_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    multinode = importlib.import_module("multinode")
    for name, value in {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "wb 2", "POSTTRAIN_API_KEY": "own_3", **SETTINGS}.items():
        monkeypatch.setenv(name, value)
    for name in ("POSTTRAIN_OVER_SSH", "POSTTRAIN_STARTED", "POSTTRAIN_SECRETS", "DS_ENV_FILE", "PDSH_SSH_ARGS_APPEND"):
        monkeypatch.setenv(name, "")  # put back afterwards
    ask_all = multinode.ask_all
    monkeypatch.setattr(multinode, "ask_all", lambda commands, script="": ask_all(commands, script, over_ssh=False))
    monkeypatch.setattr(multinode, "check_hosts", lambda *_: None)
    monkeypatch.setattr(multinode.shutil, "which", str)
    words = multinode.over_ssh({"here": 1}, Path("sft.py"), [], tmp_path / "environment")
    shown = (tmp_path / "environment").read_text() + " ".join(words)
    assert all(f"{name}={value}" in shown for name, value in SETTINGS.items())
    assert "CUDA_VISIBLE_DEVICES" not in shown  # which of a host's GPUs are taken is what the hostfile says
    assert not any(secret in shown for secret in ("hf_1", "wb 2", "own_3"))
    (path,) = (Path(line.partition("=")[2]) for line in shown.splitlines() if line.startswith("POSTTRAIN_SECRETS="))
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        assert json.loads(path.read_text()) == {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "wb 2"}
        code = "import os; from posttrain.parallel.script import run_script; run_script(lambda: print(os.environ['HF_TOKEN']))"
        environment = {"POSTTRAIN_SECRETS": str(path), "PATH": os.environ["PATH"], "PYTHONUTF8": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "hf_1\n", done.stderr
    finally:
        path.unlink()
