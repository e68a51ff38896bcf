"""Converts a model between the forms that this package reads and writes; posttrain/convert.py is the command."""

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from posttrain.common import hub
from posttrain.data import tokenization
from posttrain.engine.checkpoint_folder import is_checkpoint, model_description, read_manifest
from posttrain.model import ckpt_pt
from posttrain.model.classes import class_in
from posttrain.model.export import write_description, write_model
from posttrain.model.forms import is_ckpt_pt
from posttrain.model.loading import load_model
from posttrain.model.plain_llama import ckpt_pt_logits
from posttrain.run.stored import files_in, read_facts, read_log

LIMIT = 1e-4  # largest difference of logits, relative to the largest logit; another order of operations rounds differently


def convert(src: Path, dst: Path, tokenizer: str | None) -> None:
    """Convert the model at `src` to `dst`, and compare the logits; posttrain/convert.py describes the forms."""
    src = Path(hub.snapshot_in(str(src)))
    to_ckpt_pt = _direction(src, dst)
    if to_ckpt_pt and tokenizer:
        raise ValueError("a ckpt.pt holds no tokenizer, so --tokenizer would not be read; remove it")
    transformers.utils.logging.disable_progress_bar()
    model = load_model(str(src), None, "Name a ckpt.pt file, a Hugging Face folder or a folder of a run's checkpoints")
    ids = torch.arange(24) * 7919 % model.config.get_text_config().vocab_size
    expected = ckpt_pt_logits(ckpt_pt.read(src), ids) if is_ckpt_pt(src) else _logits(model, ids)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with _removed_on_failure(dst):
        if to_ckpt_pt:
            ckpt_pt.save_ckpt_pt(model, dst, **_history(src))
            found = ckpt_pt_logits(ckpt_pt.read(dst), ids)
        else:
            describe = partial(_describe, src, model, tokenizer)
            write_model(model, model.state_dict(), describe, dst, f"Converted from `{src}` by posttrain.\n")
            found = _logits(class_in(dst).from_pretrained(dst, dtype=torch.float32), ids)
        difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        if not difference <= LIMIT:
            raise ValueError(
                f"{src} as {dst} gives other logits: they differ by {difference:.2g} of the largest (limit {LIMIT:g}). The model "
                "computes something that the other form does not express; nothing was written"
            )
    print(f"converted {src} to {dst}: {model.num_parameters():,} parameters, logits equal to {difference:.1e} of the largest")


@contextlib.contextmanager
def _removed_on_failure(dst: Path) -> Iterator[None]:
    """Remove DST where the block inside fails, for whatever reason."""
    try:
        yield
    except BaseException:
        if dst.exists():
            shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
        raise


def _direction(src: Path, dst: Path) -> bool:
    """Return whether DST becomes a ckpt.pt file. Raises ValueError for a SRC and a DST that do not fit."""
    if dst.exists():
        raise ValueError(f"{dst} exists; name another, or remove it")
    if is_ckpt_pt(src) and is_ckpt_pt(dst):
        raise ValueError(f"{src} is a ckpt.pt file already; DST should be a folder")
    if is_ckpt_pt(src) or is_checkpoint(src):
        return is_ckpt_pt(dst)
    if (src / "config.json").is_file() and not is_ckpt_pt(dst):
        raise ValueError(f"{src} is a Hugging Face folder already; DST should be a file named *.pt")
    return True


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return logits (T, V) of ids (T,), computed in float32 whatever the weights are stored in."""
    stored = model.dtype
    logits = model.float().eval()(ids[None]).logits[0]
    model.to(stored)
    return logits


def _history(src: Path) -> dict:
    """Return save_ckpt_pt's iter_num and best_val_loss, where SRC belongs to a run that tells them."""
    if is_checkpoint(src):
        facts = read_manifest(src)
        return {"iter_num": facts["step"], "best_val_loss": facts["validation"]}
    if not (records := read_log(src.parent, "metrics.jsonl")):
        return {}
    losses = [record["loss"] for record in records if record["split"] == "eval" and record.get("loss") is not None]
    return {"iter_num": max(record["step"] for record in records), "best_val_loss": min(losses, default=None)}


def _describe(src: Path, model: PreTrainedModel, tokenizer: str | None, folder: Path) -> None:
    """Write what belongs into the new folder besides weights."""
    if is_checkpoint(src) and not tokenizer:
        description = model_description(src)
        there, written = files_in(description), read_facts(description.parent).get("model_files")
        for name in there if written is None else there.keys() & written.keys():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(description / name, folder / name)
        return
    write_description(model, None, folder)
    if tokenizer and tokenizer.endswith(".model"):
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    elif tokenizer:
        loaded = tokenization.open_tokenizer(tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        if (needed := 1 + max(loaded.get_vocab().values())) > rows:
            print(f"warning  {tokenizer} has ids up to {needed - 1}, the model has rows for {rows}: training adds the rest")
        loaded.save_pretrained(folder)
