"""TensorBoard and Weights & Biases get what metrics.jsonl has, and more; each as one run whatever the number of starts."""

import contextlib
import http.server
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port, last_of_each, launch, metrics, python, rank_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from test_runs import sft_arguments

from posttrain.run import trackers, wandb_mode


def events_of(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), {"tensors": 0, "scalars": 0, "histograms": 0}).Reload()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_tensorboard_has_a_layout_and_what_a_sweep_compares(tmp_path, kind):
    tracker = trackers.TensorBoard(tmp_path, kind, {"learning_rate": 1e-3, "decay_lr": True, "loss": "sigmoid"}, 1)
    tracker.histograms({"eval/x": np.array([1.0, 2, 2])}, 4)
    tracker.close()
    events = events_of(tmp_path)
    content = events.SummaryMetadata("custom_scalars__config__")
    assert content.plugin_data.plugin_name == "custom_scalars"
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["loss"] == ["train/loss", "eval/loss"]
    assert ("margin" in charts) == (kind == "dpo")
    plugin = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert plugin["learning_rate"].number_value == 1e-3
    assert plugin["decay_lr"].string_value == "True"
    assert plugin["loss"].string_value == "sigmoid"


def test_a_ledger_reads_as_a_table():
    manifest = {"counts": {"train": 9000, "validation": 12}, "rows": 9100, "sources": ["a.jsonl"], "notes": ["mind the gap"]}
    manifest |= {"tokens": {"per_epoch": 10**6, "trained_per_epoch": 10**5}, "changes": {"cut": 3}}
    manifest["ledger"] = {"too long": {"rows": 88, "first": "a.jsonl:5"}}
    text = trackers.ledger(manifest)
    assert text.startswith("9,000 rows for training and 12 for validation of 9,100 read from a.jsonl")
    assert "\n| 88 | too long | a.jsonl:5 |\n| 3 | changed: cut | |\n" in text
    assert text.endswith("- mind the gap")
    assert "|" not in trackers.ledger(manifest | {"ledger": {}, "changes": {}})  # no table of nothing


def test_a_models_text_is_shown_and_not_obeyed():
    assert trackers.as_cell("a|b\n**c** <i>") == "a&#124;b<br>&#42;&#42;c&#42;&#42; &#60;i&#62;"
    assert trackers.as_cell("") == "(empty)"


def entries(data: bytes) -> Iterator[bytes]:
    """Of a .wandb file, a LevelDB log after 7 bytes: blocks of 32 KiB, entries with checksum, length and kind, cut where a block ends."""
    at, entry = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7]) if left >= 7 else (0, 0)
        if not kind:  # padding
            at += left
            continue
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield entry
            entry = b""


@pytest.mark.slow
def test_weights_and_biases_is_one_run_with_the_same_content(tiny, tmp_path):
    from wandb.proto import wandb_internal_pb2

    offline = rank_environment() | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    arguments = sft_arguments(tiny, tmp_path / "run", "--wandb_log=True", "--wandb_project=some project", "--lr_decay_iters=8")
    for steps in (4, 6):
        more = ["--extend"] if steps == 6 else []
        done = launch("posttrain/sft.py", *last_of_each([*arguments, f"--max_iters={steps}"]), *more, env=offline)
        assert done.returncode == 0, done.stdout
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1  # run-ID: the same
    history: dict[int, dict] = {}
    for file in files:
        for data in entries(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                assert record.run.project == "some project"
                assert record.run.display_name == "run"
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                history.setdefault(int(values["_step"]), {}).update(values)
    for split in ("train", "eval"):
        for record in metrics(tmp_path / "run", split):
            for name in set(record) - {"step", "split"}:
                assert history[record["step"]][f"{split}/{name}"] == pytest.approx(record[name]), (record["step"], name)
    for step, names in ((0, ("samples", "recipe", "data")), (3, ("samples", "examples/nll"))):
        told = {name for key in history[step] for name in names if key.startswith(name)}  # each in several parts
        assert told == set(names)


class Refuses(http.server.BaseHTTPRequestHandler):
    """Answers every request, and knows nothing."""

    def do_GET(self):
        with contextlib.suppress(ConnectionError):  # wandb may be gone by then
            self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_): ...


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """Addresses: of a server that knows nothing, of one that accepts connections and is silent, and of none."""
    answering = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"answering": answering.server_port, "silent": silent.getsockname()[1], "nobody": free_port()}
        yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    answering.shutdown()


KEY = {"WANDB_API_KEY": "0" * 40}


@pytest.mark.parametrize(
    ("server", "environment", "said"),
    [
        ("answering", KEY, ""),
        ("answering", {"NETRC": "netrc"}, ""),
        (
            "answering",
            {},
            "note: there is no API key for http.* keeps this run offline.* wandb sync a run/wandb/offline-run",
        ),
        ("silent", KEY, "note: waiting for an answer of .*, for at most 1 s\nnote: http.* does not answer: Weights & Biases keeps"),
        ("nobody", KEY, "^note: http.* does not answer"),
        ("nobody", {"WANDB_MODE": "disabled"}, ""),
        ("nobody", {"WANDB_CONFIG_DIR": "settings of mine"}, ""),
    ],
)
def test_weights_and_biases_goes_offline_where_it_must(monkeypatch, tmp_path, capsys, servers, server, environment, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_mode, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(wandb_mode, "QUICK_SECONDS", 0.3)
    (tmp_path / "netrc").write_text(f"machine {servers[server].removeprefix('http://')} login user password {KEY['WANDB_API_KEY']}\n")
    (tmp_path / "settings of mine").mkdir()
    (tmp_path / "settings of mine" / "settings").write_text("[default]\nmode = offline\n")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.setenv(name, "")
    for name, value in {"HOME": str(tmp_path), "WANDB_BASE_URL": servers[server], **environment}.items():
        monkeypatch.setenv(name, value)
    wandb_mode.settle_mode(Path("a run"))
    output = capsys.readouterr().out
    assert re.search(said, output) if said else not output
    assert os.environ["WANDB_MODE"] == ("offline" if said else environment.get("WANDB_MODE", ""))


@pytest.mark.slow
def test_a_run_that_weights_and_biases_does_not_open_goes_on_offline(tiny, tmp_path, servers):
    online = rank_environment() | KEY | {"WANDB_BASE_URL": servers["answering"], "WANDB_INIT_TIMEOUT": "5", "HOME": str(tmp_path)}
    arguments = sft_arguments(tiny, tmp_path / "run", "--wandb_log=True", "--max_iters=1", "--eval_interval=0", "--warmup_iters=0")
    done = python("posttrain/sft.py", *last_of_each(arguments), env=online)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Weights & Biases keeps this run offline: ") == 1
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*" in done.stdout
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
