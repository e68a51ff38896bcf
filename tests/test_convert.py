"""Every form of a model in and out: round trips that keep the logits, refusals, and files that would do harm."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import python
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from posttrain.model.ckpt_pt import load_ckpt_pt, save_ckpt_pt
from posttrain.model.convert import convert
from posttrain.model.loading import load_model
from posttrain.run.stored import read_facts, write_facts

NUMBERS = ["--max_iters=2", "--global_batch_size=4", "--max_tokens_per_gpu=400", "--dtype=float32", "--eval_interval=2", "--warmup_iters=0"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None] * 13 % model.config.vocab_size).logits[0]


def llama(vocabulary: int, **more) -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, **shape, **more))


@pytest.mark.slow
def test_ckpt_pt_through_sft_and_back(tiny, tmp_path):
    """The logits stay those of the trained model: ckpt.pt -> SFT -> ckpt.pt -> a Hugging Face folder."""
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    save_ckpt_pt(llama(len(tiny.tokenizer)), tmp_path / "base" / "ckpt.pt")
    paths = [f"--checkpoint_path={tmp_path}/base/ckpt.pt", f"--sft_data_dir={tiny.sft}", f"--out_dir={tmp_path}/run"]
    done = python("posttrain/sft.py", *paths, *NUMBERS, "--learning_rate=1e-2")
    assert done.returncode == 0, done.stdout
    trained = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32))
    assert (trained - logits(load_ckpt_pt(tmp_path / "base" / "ckpt.pt"))).abs().max() > 0.01
    done = python("posttrain/convert.py", tmp_path / "run" / "final", tmp_path / "ckpt.pt")
    assert "logits equal to" in done.stdout, done.stdout
    written = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    evals = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert (written["iter_num"], written["best_val_loss"]) == (2, min(record["loss"] for record in evals))
    torch.testing.assert_close(logits(load_ckpt_pt(tmp_path / "ckpt.pt")), trained, atol=1e-5, rtol=0)
    done = python("posttrain/convert.py", tmp_path / "ckpt.pt", tmp_path / "again", "--tokenizer", tmp_path / "run" / "final")
    assert done.returncode == 0, done.stdout
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)), trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == tiny.chat.jinja


@pytest.mark.slow
def test_a_checkpoint_of_a_dpo_run_becomes_its_result(tiny, tmp_path):
    """A Hugging Face folder is made of the training state alone, and the state can be loaded as a model by its name."""
    paths = [f"--sft_checkpoint_path={tiny.base}", f"--dpo_data_dir={tiny.dpo}", f"--out_dir={tmp_path}/run"]
    done = python("posttrain/dpo.py", *paths, *NUMBERS, "--learning_rate=1e-3", "--ds_config=ds_configs/zero3.json")
    assert done.returncode == 0, done.stdout
    state = tmp_path / "run" / "checkpoints" / "step_000002"
    done = python("posttrain/convert.py", state, tmp_path / "model")
    assert done.returncode == 0, done.stdout
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "run" / "final" / name).read_bytes(), name
    model = load_model(str(state), torch.float32, "")
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32)
    assert torch.equal(logits(model), logits(right))
    assert not torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)))
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    for text in ("Direct Preference Optimization of", "at step 0 | validation at step 2", "beta: ", '"kind": "dpo"', "| dpo.jsonl |"):
        assert text in card, text
    damaged = (
        state / "mp_rank_00_model_states.pt" if (state / "mp_rank_00_model_states.pt").exists() else next(state.glob("*model_states.pt"))
    )
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"step_000002 is damaged: .* bytes, .* were written"):
        load_model(str(state), torch.float32, "")
    shutil.copytree(state, tmp_path / "elsewhere" / "checkpoints" / "step_000002")
    with pytest.raises(FileNotFoundError, match="a checkpoint outside its run"):
        load_model(str(tmp_path / "elsewhere" / "checkpoints" / "step_000002"), torch.float32, "")
    with pytest.raises(FileNotFoundError, match=r"is a run; name its result, .*/run/final, or one of"):
        load_model(str(tmp_path / "run"), torch.float32, "")


@pytest.mark.slow
def test_a_conversion_that_changes_the_logits_leaves_nothing(tmp_path, monkeypatch):
    """A wrong permutation of the rotary pairs is such a conversion."""
    from posttrain.model import ckpt_pt, ckpt_pt_tensors, convert

    llama(40).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ckpt_pt_tensors, "_halves_to_pairs", lambda rows, heads: rows)
    with pytest.raises(ValueError, match=r"gives other logits"):
        convert.convert(tmp_path / "model", tmp_path / "ckpt.pt", None)
    assert not (tmp_path / "ckpt.pt").exists()

    monkeypatch.setattr(ckpt_pt, "read", lambda path: 1 / 0)  # neither does one whose proof fails for another reason
    with pytest.raises(ZeroDivisionError):
        convert.convert(tmp_path / "model", tmp_path / "ckpt.pt", None)
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.slow
def test_what_cannot_be_converted_is_told(tiny, tmp_path):
    llama(40).save_pretrained(tmp_path / "llama")
    cases = [
        ((tiny.base, tmp_path / "x.pt"), "a ckpt.pt can hold a Llama model only, not qwen3"),
        ((tmp_path / "llama", tmp_path / "x"), "is a Hugging Face folder already; DST should be a file named *.pt"),
        ((tmp_path / "llama", tmp_path / "x.pt", "--tokenizer", tiny.base), "--tokenizer would not be read"),
        ((tmp_path / "llama", tmp_path / "llama"), "exists; name another, or remove it"),
        ((tmp_path / "nothing", tmp_path / "x.pt"), "there is no model at"),
    ]
    for arguments, message in cases:
        done = python("posttrain/convert.py", *arguments)
        assert done.returncode != 0
        assert message in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
    assert not (tmp_path / "x").exists()


def test_folders_beside_the_new_one_are_left_alone(tmp_path):
    """What is half-written has a name of its own, by which the next call knows what a killed one left."""
    save_ckpt_pt(llama(64), tmp_path / "ckpt.pt")
    for name in ("model.previous", "model.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f"model.{os.uname().nodename}.{gone.pid}.incomplete").mkdir()
    convert(tmp_path / "ckpt.pt", tmp_path / "model", None)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "model", "model.previous", "model.incomplete"}
    assert all((tmp_path / name / "precious.txt").is_file() for name in ("model.previous", "model.incomplete"))


def test_a_run_names_no_file_outside_of_its_model(tmp_path):
    """A stranger's run.json, checksum and all, names a file that would be written outside of the new folder."""
    for name in ("k/../../../../payload.txt", "/etc/hostname", "..", ".", "a//b", "a\0b"):
        with pytest.raises(ValueError, match=r"run\.json is damaged: model_files\..*expected the path of a file within the folder"):
            read_facts(run_of(tmp_path / "run", name))
    assert read_facts(run_of(tmp_path / "run", "deep/er/notes.txt"))["model_files"]


def run_of(run: Path, name: str) -> Path:
    """Write the run.json of a run whose model has a file of this name, and return the run."""
    run.mkdir(exist_ok=True)
    write_facts(run, {"model_files": {name: {}}})
    return run


def test_weights_that_carry_code_do_not_run_it(tmp_path):
    """pytorch_model.bin is a pickle, which may hold code."""
    harm = tmp_path / "harm"

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(harm),)

    model = llama(40)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict() | {"model.norm.weight": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"which would run as code"):
        load_model(str(tmp_path), torch.float32, "")
    assert not harm.exists()


def test_a_sharded_folder_loads_as_a_whole_one(tmp_path):
    model = llama(40)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list(Path(tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (load_model(str(tmp_path / name), torch.float32, "") for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))
