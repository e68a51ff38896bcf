"""The documentation: its site has no dead link, its tables and messages are the code's, and its commands run as they are printed.

Indented blocks of README.md and docs/ are commands; fenced blocks are files, pictures or Python.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import warm
from conftest import ROOT, free_port, metrics, rank_environment
from served import request, served

from data_prep.catalogue import HUBS
from posttrain.evaluation.tasks import BENCHMARKS
from posttrain.objectives.losses import LOSSES
from posttrain.recipes.keys import DPORecipe, SFTRecipe
from posttrain.recipes.reading import help_text

sys.path.insert(0, str(ROOT / "launch"))
import build_docs

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = {path.name: path.read_text() for path in (README, *sorted(DOCS.glob("*.md")))}


def test_the_readme_is_a_page_and_names_the_keys():
    assert len(README.read_bytes()) <= 8 * 1024
    commands = " ".join(commands_of(PAGES["README.md"]))
    for option in ["checkpoint_path", "sft_data_dir", "sft_checkpoint_path", "dpo_data_dir", "epochs", "out_dir"]:
        assert f" --{option}=" in commands, option
    rows = PAGES["README.md"].split("The keys that people change")[1].split("##")[0]
    for key in re.findall(r"^\| (`.*?) \|", rows, re.M):
        assert set(re.findall(r"`(\w+)`", key)) <= SFTRecipe.model_fields.keys() | DPORecipe.model_fields.keys()


def test_the_tables_of_keys_are_those_of_the_code():
    assert build_docs.with_all_keys(PAGES["recipes.md"]) == PAGES["recipes.md"], "bash launch/docs.sh brings it up to date"
    for name in DPORecipe.model_fields.keys() | SFTRecipe.model_fields.keys():
        places = PAGES["recipes.md"].split(build_docs.MARKS[0])[1].count(f"\n| `{name}` |")
        assert places == 1 + (name == "learning_rate"), name  # whose default is another in DPO


def test_every_page_is_in_the_sites_navigation():
    nav = re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(nav) == sorted(name for path, name in build_docs.pages(ROOT).items() if path.suffix == ".md" and "/" not in name)


def test_every_attempt_to_break_it_has_a_test():
    rows = [line for line in PAGES["attempts.md"].splitlines() if line.startswith("| ") and not line.startswith("| attempt |")]
    assert len(rows) > 40
    for row in rows:
        file, name = re.search(r"\| `(\w+)::(\w+)` \|$", row).groups()
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.M), row


def test_the_site_has_no_dead_link(tmp_path):
    assert build_docs.build(ROOT, tmp_path / "site") == []
    assert "<title>" in (tmp_path / "site" / "recipes.html").read_text()


def test_a_dead_link_is_found(tmp_path):
    for name in ("zensical.toml", *build_docs.ELSEWHERE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    page = tmp_path / "docs" / "data.md"
    sound = page.read_text()
    page.write_text(sound + "\n[a page](nowhere.md), ![a picture](pictures/nothing.png), [a file](../setup.py)\n")
    dead = ["docs/data.md: nowhere.md", "docs/data.md: pictures/nothing.png", "docs/data.md: ../setup.py"]
    assert build_docs.build(tmp_path, tmp_path / "site") == dead
    page.write_text(sound + '\n[a heading](start.md#nothing), [another](#none), <img src="pictures/nothing.png">\n')
    dead = ["data.html: start.html#nothing", "data.html: #none", "data.html: pictures/nothing.png"]
    assert build_docs.build(tmp_path, tmp_path / "site") == dead
    assert not (tmp_path / "site").exists()


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    """A message is the first column's text in backticks; those of the system are not ours."""
    files = [
        path for folder in ("posttrain", "data_prep", "launch") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")
    ]
    source = "\n".join(path.read_text() for path in files)
    messages = [text for row in re.findall(r"^\| (.*?) \|", PAGES["troubleshooting.md"], re.M) for text in re.findall("`(.*?)`", row)]
    assert len(messages) > 20
    others = {"deepspeed: command not found", "No space left on device"}
    assert [text for text in messages if text not in source and text not in others] == []


def test_the_options_in_comparison_with_other_projects_exist():
    ours = SFTRecipe.model_fields.keys() | DPORecipe.model_fields.keys()
    table = PAGES["coming-from.md"].split("## Their options")[1].split("##")[0]
    for row in re.findall(r"^\| (?!TRL|-).*$", table, re.M):
        for text in re.findall(r"`(\w+)[`:]", row.strip("| ").split(" | ")[-1]):
            assert text in ours | {"chatml", "tokenizer", *LOSSES}, row


def test_lists_in_the_texts_are_those_of_the_code():
    section = PAGES["data.md"].split("## Datasets of the hub")[1].split("For any other")[0]
    assert set(re.findall(r"[a-z]\w+", section.split("short names:")[1])) - {"for"} == {name for kind in HUBS.values() for name in kind}
    assert section.startswith(f"\n{sum(map(len, HUBS.values()))} have short names")
    losses = PAGES["correctness.md"].split("## DPO's losses")[1].split("##")[0]
    assert LOSSES.keys() <= set(re.findall(r"`(\w+)`", losses))
    benchmarks = PAGES["evaluation.md"].split("**Standard benchmarks**")[1].split("- **")[0]
    assert all(re.search(rf"\b{name}\b", benchmarks) for name in BENCHMARKS)


def test_the_commands_of_the_installed_package_are_all_named():
    if not HAS_COMMANDS:
        pytest.skip("there are no commands yet")
    from posttrain.common.places import COMMANDS

    assert {name: in_a_checkout()[name] for name in COMMANDS} == {name: script for name, (script, _) in COMMANDS.items()}


# How the commands of the pages are run with small data. Where one stays out, the reason stands beside it.
LEFT_OUT = {
    "source launch/env.sh": "the environment is that of the tests",
    "export PIP_INDEX_URL": "it is for the command above",
    "bash launch/quickstart.sh": "it takes minutes",
    "bash launch/test.sh": "it would run this test",
    "bash launch/sweep.sh": "tests/test_launch.py runs it",
    "tensorboard": "it ends only when it is told to",
}
RANKS = {"--num_gpus 8": 2, "--include localhost:4,5": 2}  # what stands for them; the launch scripts start two, too
# `hf download NAME --local-dir DIR` becomes a copy of a tiny Llama whose tokenizer knows no chat; the quickstart's runs are such copies;
# a server is asked a question; `posttrain COMMAND` is what the table in docs/installed.md says


def commands_of(text: str) -> list[str]:
    """The commands of a page, each on one line, without comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")).replace("\\\n", " ").splitlines()
    commands = [" ".join(shlex.split(line, comments=True)) if '"' not in line else line.partition("  #")[0] for line in lines]
    return [re.sub(" +", " ", command).strip() for command in commands if command.strip()]


def rows_of(text: str, column: str) -> dict:
    """The example of a row with this column, from a page."""
    return next(row for row in map(json.loads, re.findall(r"^```json\n(.*?)\n```$", text, re.M)) if column in row)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama base whose tokenizer has a begin-of-text and an end-of-text token, and no chat template or ChatML tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel

    folder = tmp_path_factory.mktemp("docs") / "llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PAGES["one-gpu.md"]], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    wrapped.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(wrapped), bos_token_id=0, eos_token_id=1, tie_word_embeddings=True, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


HAS_COMMANDS = find_spec("posttrain.cli") is not None  # the commands and functions of docs/installed.md


@pytest.fixture(params=["README.md", "start.md", "one-gpu.md", "eight-gpus.md", *(["installed.md"] if HAS_COMMANDS else [])])
def page(request, llama, tmp_path) -> SimpleNamespace:
    """A page of commands, and a folder that looks like the checkout, with rows in the shape that the pages show."""
    for name in ("data_prep", "posttrain", "launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file, column in (("my_rows.jsonl", "output"), ("my_pairs.jsonl", "chosen")):
        row = rows_of(PAGES["one-gpu.md"], column)
        rows = [{name: f"{text} {number}" for name, text in row.items()} for number in range(200)]
        (tmp_path / file).write_text("\n".join(map(json.dumps, rows)))
    for name in ("runs/quickstart/sft", "runs/quickstart/dpo", *(["checkpoints/llama"] if request.param == "installed.md" else [])):
        shutil.copytree(llama, tmp_path / name)
    return SimpleNamespace(name=request.param, text=PAGES[request.param], work=tmp_path, llama=llama)


def run(command: str, page: SimpleNamespace) -> None:
    """Run a command of a page as the tables above say."""
    if any(command.startswith(beginning) for beginning in LEFT_OUT):
        return
    ranks = next((number for words, number in RANKS.items() if words in command), None)
    for words in RANKS:
        command = command.replace(f"{words} ", "")
    program, script, *arguments = shlex.split(command)
    if program == "posttrain":
        program, script = "deepspeed" if ranks else "python", in_a_checkout()[script]
    if found := re.fullmatch(r"launch/(sft|dpo)_8gpu\.sh", script):
        program, script, ranks = "deepspeed", f"posttrain/{found[1]}.py", 2
    if program == "hf":
        assert (script, arguments[1]) == ("download", "--local-dir"), command
        shutil.copytree(page.llama, page.work / arguments[2])
    elif script == "posttrain/serve.py":
        ask(page.work, arguments)
    else:
        assert program == ("deepspeed" if ranks else "python"), command
        done = warm.run(script, *arguments, ranks=ranks, port=free_port() if ranks else 0, cwd=page.work)
        assert done.returncode == 0, f"{page.name}: {command}\n{done.stdout}"


def in_a_checkout() -> dict[str, str]:
    """The script of each command of the installed package, from the table in docs/installed.md."""
    found = {}
    for names, scripts in re.findall(r"^\| (`posttrain .*?) \| (.*) \|$", PAGES["installed.md"], re.M):
        commands, files = re.findall("`posttrain ([a-z-]+)`", names), re.findall(r"([\w/]+\.(?:py|sh))", scripts)
        folder = Path(files[0]).parent
        found |= {command: str(folder / f"{command.replace('-', '_')}{Path(files[0]).suffix}") for command in commands}
        if len(commands) == 1:
            found[commands[0]] = files[-1]
    return found


def ask(work: Path, arguments: list[str]) -> None:
    """Start the server, and ask each of its models a question."""
    with served(work / "server.log", *arguments) as server:
        models = [model["id"] for model in json.loads(request(server, "GET", "/v1/models")[1])["data"]]
        assert len(models) == arguments.count("--checkpoint")
        for model in models:
            question = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
            status, answer = request(server, "POST", "/v1/chat/completions", json.dumps(question))
            assert status == 200, answer


@pytest.mark.slow
def test_the_commands_run_as_printed(page):
    commands = commands_of(page.text)
    for command in commands:
        run(command, page)
    for kind, name, steps in (("sft", "mine", 6), ("dpo", "mine_dpo", 2)):
        if any(re.search(rf"(posttrain/{kind}.py|posttrain {kind}) ", command) for command in commands):
            assert len(metrics(page.work / "runs" / name)) == steps  # three passes over 198 rows, one over 198 pairs
            size = json.loads((page.work / "runs" / name / "final" / "config.json").read_text())["vocab_size"]
            assert size == json.loads((page.llama / "config.json").read_text())["vocab_size"] + 2  # ChatML's tokens
    for block in re.findall(r"^```python\n(.*?)^```$", page.text, re.M | re.S):
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=page.work, env=rank_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "runs/notebook/final" in done.stdout


OF_OTHERS = {  # options of programs that are not ours
    "deepspeed": {"num_gpus", "include", "master_port"},
    "hf": {"local-dir", "repo-type"},
    "tensorboard": {"logdir"},
    "sbatch": {"nodes", "gpus-per-node"},
    "torchrun": {"nproc_per_node"},
}


@pytest.mark.slow
def test_the_scripts_and_options_in_all_commands_exist():
    """Also of commands that no test can run."""
    helps: dict[str, str] = {kind: help_text(recipe, f"{kind}_qwen3_1.8b") for kind, recipe in (("sft", SFTRecipe), ("dpo", DPORecipe))}
    for name, text in PAGES.items():
        for command in commands_of(text):
            words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if not words or words[0] in ("source", "export"):
                continue
            if words[0] == "posttrain":
                words[:2] = ["deepspeed" if "--num_gpus" in words else "python", in_a_checkout()[words[1]]]
            scripts = [word for word in words if re.fullmatch(r"[\w/]+\.(py|sh)", word)]
            assert scripts or words[0] in ("hf", "tensorboard", "kubectl"), command
            assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml") and "/" in word), command
            known = set(OF_OTHERS.get(words[0], ()))
            for script in scripts:
                assert (ROOT / script).is_file(), f"{name}: {command}"
                kind = next((kind for kind in ("sft", "dpo") if re.search(rf"\b{kind}(\.py|_8gpu\.sh|_multinode\.sh)$", script)), None)
                helps.setdefault(script, helps[kind] if kind else how_to_use(script))
                known |= set(re.findall(r"--([\w-]+)", helps[script] + (helps["sft"] if "--key=value" in helps[script] else "")))
                known |= {"max_restarts"} if script.endswith(".sh") else set()
            given = set(re.findall(r" --([\w-]+)", command))
            assert given <= known, f"{name}: {command}: {given - known}"


def how_to_use(script: str) -> str:
    """What a command prints for --help, or the text of another script."""
    if Path(script).parts[0] in ("posttrain", "data_prep"):
        return warm.run(script, "--help", separate=True).stdout
    return (ROOT / script).read_text()
