"""Models of a type that transformers does not know, with code of their own: refused, or with trust_remote_code trained as any other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch, metrics, python
from test_model_folders import configure

from posttrain.model import loading, own_code

CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
CONFIGURATION = """
from transformers import Qwen3Config


class OwnConfig(Qwen3Config):
    model_type = "own_kind"
"""
MODELING = """
from transformers import Qwen3ForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, **others):
        out = super().forward(input_ids, **others)
        if out.logits is not None:
            out.logits = out.logits * 0.5
        return out
"""
OPEN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
torch.save(model.state_dict(), sys.argv[2])
print(type(model).__name__)
"""


@pytest.fixture
def own(tiny, tmp_path) -> Path:
    """A folder whose model is Qwen3's with logits of half the size, so that the fast head does not agree with it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "own"
    AutoModelForCausalLM.from_pretrained(tiny.base).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    configure(folder, model_type="own_kind", auto_map=CODE, architectures=["OwnForCausalLM"])
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


def arguments(own, tiny, out_dir: Path, *more: str) -> list[str]:
    numbers = ["--max_iters=4", "--global_batch_size=16", "--warmup_iters=0", "--learning_rate=1e-3", "--dtype=float32"]
    numbers += [
        "--max_tokens_per_gpu=300",
        "--eval_interval=0",
        "--save_interval=2",
        "--log_interval=1",
        "--ds_config=ds_configs/zero3.json",
    ]
    return ["posttrain/sft.py", f"--checkpoint_path={own}", f"--sft_data_dir={tiny.sft}", f"--out_dir={out_dir}", *numbers, *more]


def test_it_is_compared_and_trained_as_any_other(own, tiny, tmp_path):
    refused = launch(*arguments(own, tiny, tmp_path / "run"))
    assert refused.returncode and "such code is not run unasked: read it, and set trust_remote_code" in refused.stdout
    done = launch(*arguments(own, tiny, tmp_path / "run", "--trust_remote_code=True"))
    assert done.returncode == 0, done.stdout
    assert "configuration_own.py, modeling_own.py of " in done.stdout and "as trust_remote_code says: OwnForCausalLM" in done.stdout
    assert "a row at a time" in done.stdout and "its log-probs differ from transformers' own" in done.stdout
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_000004")
    shutil.rmtree(tmp_path / "again" / "final")
    again = launch(*arguments(own, tiny, tmp_path / "again", "--trust_remote_code=True"))
    assert again.returncode == 0 and "continuing after step 2" in again.stdout, again.stdout
    curves = [[(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name)] for name in ("run", "again")]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    final = tmp_path / "run" / "final"
    assert (final / "model.safetensors").read_bytes() == (tmp_path / "again" / "final" / "model.safetensors").read_bytes()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000004"
    refused = python("posttrain/convert.py", checkpoint, tmp_path / "converted")
    assert refused.returncode and "own_kind" in refused.stdout
    done = python("posttrain/convert.py", checkpoint, tmp_path / "converted", "--trust_remote_code")
    assert done.returncode == 0, done.stdout
    assert json.loads((final / "config.json").read_text())["auto_map"] == CODE
    assert (final / "modeling_own.py").read_text() == MODELING and not (own / "__pycache__").exists()
    command = [sys.executable, "-c", OPEN, str(final), str(tmp_path / "state.pt")]
    opened = subprocess.run(command, capture_output=True, text=True, env={"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"})
    assert opened.returncode == 0 and "OwnForCausalLM" in opened.stdout, opened.stderr
    state = torch.load(tmp_path / "state.pt")
    assert any((state[name] != tensor).any() for name, tensor in loading.load_model(tiny.base, torch.float32, "").state_dict().items())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ({"modeling_own.py": "raise RuntimeError('no luck')"}, "cannot be run: .*no luck"),
        ({"modeling_own.py": MODELING.replace("OwnForCausalLM", "Other")}, "cannot be run: .*OwnForCausalLM"),
        ({"configuration_own.py": CONFIGURATION.replace("own_kind", "other")}, "are no config of type 'own_kind'"),
        ({"config.json": {"auto_map": {"AutoConfig": CODE["AutoConfig"]}}}, "names no AutoModelForCausalLM"),
        ({"config.json": {"auto_map": CODE | {"AutoConfig": "other/repo--configuration.OwnConfig"}}}, "which is no class in a file of its"),
    ],
)
def test_code_that_cannot_be_run_is_refused_in_one_sentence(code, said, own, tiny, tmp_path):
    for name, content in code.items():
        configure(own, **content) if isinstance(content, dict) else (own / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        own_code.register(str(own))
