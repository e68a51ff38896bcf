"""Runs one trainer once on the data of a benchmark; side_by_side.py starts it on every rank with the `deepspeed` launcher.

contestant.py OUT JSON    JSON: trainer (ours, trl), kind (sft, dpo), world, steps, batch, ds_config, dtype, options; each rank writes
                          OUT/rank_N.json
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this script's folder


class Clock:
    """Records the end of each optimizer step, its useful tokens on this rank, and the memory above what imports take.

    On CPUs memory is counted with and without the pages of files (data and weights), which the system reclaims when it needs them.
    """

    def __init__(self, steps: int, folder: Path):
        self.steps, self.folder = steps, folder
        self.times, self.tokens, self.base, self.peak = [], [], (0, 0), (0, 0)

    def begin(self) -> None:
        """Take the memory so far as the base, and start to watch it."""
        self.base = _memory()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = tuple(map(max, self.peak, _memory()))
            time.sleep(0.05)

    def step(self, tokens: float) -> None:
        """Note a step's end, and end with the last one."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)
        if len(self.times) == self.steps:
            self.end()

    def end(self) -> NoReturn:
        """Write what was seen, and end the process: what follows training differs between trainers and is not measured."""
        import torch

        peaks = [peak - base for peak, base in zip(self.peak, self.base, strict=True)]
        on_gpu = {}
        if torch.cuda.is_available():
            peaks, on_gpu = [torch.cuda.max_memory_allocated()] * 2, {"peak_bytes_reserved": torch.cuda.max_memory_reserved()}
        result = {"times": self.times, "tokens": self.tokens, "peak_bytes": peaks[0], "peak_bytes_without_files": peaks[1], **on_gpu}
        (self.folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)


def _memory() -> tuple[int, int]:
    """Bytes that this process holds, and those of them that are not pages of files."""
    seen = psutil.Process().memory_info()
    return seen.rss, seen.rss - seen.shared


def ours(job: dict, clock: Clock, out: Path) -> None:
    """Run posttrain's own command; its log call at the end of every step is the clock."""
    from posttrain.run.directory import Run
    from posttrain.training.command import dpo, sft

    world, log, ranks = Path(job["world"]), Run.log, int(os.environ["WORLD_SIZE"])

    def timed(self, step: int, split: str, metrics: dict) -> None:
        log(self, step, split, metrics)
        clock.step(metrics["num_tokens"] / ranks - sum(clock.tokens))

    Run.log = timed
    names = {"sft": ("checkpoint_path", "sft_data_dir"), "dpo": ("sft_checkpoint_path", "dpo_data_dir")}[job["kind"]]
    recipe = {names[0]: world / "base", names[1]: world / job["kind"], "out_dir": out / "run", "max_iters": job["steps"]}
    recipe |= {"global_batch_size": job["batch"], "learning_rate": 1e-5, "eval_interval": 0, "save_interval": 0, "warmup_iters": 0}
    recipe |= {"ds_config": job["ds_config"], "dtype": job["dtype"], **job["options"]}
    sys.argv = [job["kind"], *(f"--{name}={value}" for name, value in recipe.items())]
    clock.begin()
    {"sft": sft, "dpo": dpo}[job["kind"]]()


def trl(job: dict, clock: Clock, out: Path) -> None:
    """Run TRL's trainer on the same token ids, trained positions and examples a step, with DeepSpeed by its own integration."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    world, kind, options = Path(job["world"]), job["kind"], dict(job["options"])
    batch, ranks = options.pop("per_device_train_batch_size", 8), int(os.environ["WORLD_SIZE"])
    rows = load_from_disk(str(world / kind / "train"))
    if kind == "dpo":
        rows = rows.rename_columns({name: f"{name}_ids" for name in ("prompt", "chosen", "rejected")})
    base, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[kind]
    zero = json.loads((ROOT / job["ds_config"]).read_text(encoding="utf-8"))
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    in_bfloat16 = job["dtype"] == "bfloat16"
    deepspeed = {**zero, "bf16": {"enabled": in_bfloat16}, **dict.fromkeys(auto, "auto")}
    arguments = config(
        output_dir=str(out / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=options.pop("gradient_accumulation_steps", job["batch"] // ranks // batch),
        deepspeed=deepspeed,
        bf16=in_bfloat16,
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        **{"max_length": None, **options},
    )

    class Timed(base):
        counted = 0

        def _prepare_dataset(self, dataset, *others):
            return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *others)

        def training_step(self, model, inputs, *others):
            mask = inputs.get("attention_mask")
            self.counted += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *others)

    class Stamp(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.step(trainer.counted)
            trainer.counted = 0

    clock.begin()
    load = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": "sdpa"}
    models = {"model": AutoModelForCausalLM.from_pretrained(world / "base", **load)}
    if kind == "dpo":
        models["ref_model"] = AutoModelForCausalLM.from_pretrained(world / "base", **load)
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    trainer = Timed(**models, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Stamp()])
    trainer.train()


def main() -> None:
    place, words = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    out, job = Path(place), json.loads(words)
    clock = Clock(job["steps"], out)
    {"ours": ours, "trl": trl}[job["trainer"]](job, clock, out)
    clock.end()  # before the last step: packed by TRL, rows may make fewer steps


if __name__ == "__main__":
    main()
