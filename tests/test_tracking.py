"""TensorBoard and Weights & Biases get what metrics.jsonl has, and more; each as one run whatever the number of starts."""

import json
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import last_of_each, launch, metrics, rank_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from test_runs import sft_arguments

from posttrain.run import trackers


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
