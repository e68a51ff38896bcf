"""Scripts of launch/ that start runs, on two ranks, from another working directory, with spaces in the paths."""

import subprocess
import sys

import pytest
from conftest import ROOT, free_port, launch_script, metrics, rank_environment

LENGTH = [
    "--max_iters=2",
    "--eval_interval=0",
    "--save_interval=0",
    "--warmup_iters=0",
    "--max_tokens_per_gpu=400",
    "--global_batch_size=8",
]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """A folder with spaces in its name; recipes and a hostfile in it."""
    folder = tmp_path_factory.mktemp("a place") / "with spaces"
    folder.mkdir()
    (folder / "the hosts").write_text("localhost slots=8\n")
    for kind, names in (("sft", ("checkpoint_path", "sft_data_dir")), ("dpo", ("sft_checkpoint_path", "dpo_data_dir"))):
        keys = {names[0]: tiny.base, names[1]: getattr(tiny, kind), "out_dir": f"{folder}/a run", "global_batch_size": 8, "max_iters": 2}
        (folder / f"{kind} recipe.yaml").write_text("".join(f'{key}: "{value}"\n' for key, value in keys.items()))
    return folder


def test_sft_and_dpo_have_the_same_scripts():
    """But for the word, so that one of each is tried below."""
    for name in ("8gpu", "multinode"):
        sft, dpo = ((ROOT / "launch" / f"{kind}_{name}.sh").read_text() for kind in ("sft", "dpo"))
        assert sft.replace("sft", "dpo").replace("SFT", "DPO") == dpo


@pytest.mark.parametrize("script", ["sft_8gpu", "dpo_multinode"])
def test_a_script_runs(place, script):
    """The multi-node one on a single host, without ssh; over ssh it runs in two_hosts.sh."""
    hosts = {"HOSTFILE": f"{place}/the hosts", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    where = hosts if "multinode" in script else {}
    out = place / f"run of {script}"
    done = launch_script(
        f"{script}.sh", *LENGTH, f"--out_dir={out}", RECIPE=f"{place}/{script[:3]} recipe.yaml", MASTER_PORT=str(free_port()), **where
    )
    assert done.returncode == 0, done.stdout
    assert len(metrics(out)) == 2
    assert (out / "final" / "model.safetensors").is_file()


def test_a_sweep_makes_a_run_for_each_value_and_goes_on_where_one_fails(place):
    out, script = place / "a sweep", [sys.executable, str(ROOT / "posttrain" / "sft.py"), f"{place}/sft recipe.yaml"]
    done = launch_script("sweep.sh", "learning_rate", "1e-4", "-1", "1e-5", "--", *script, *LENGTH, f"--out_dir={out}")
    assert done.returncode == 1, done.stdout
    assert "sweep.sh: failed: -1" in done.stdout
    rates = {run.name: metrics(run)[0]["learning_rate"] for run in out.iterdir()}
    assert rates == {"learning_rate_1e-4": 1e-4, "learning_rate_1e-5": 1e-5}


def test_a_rank_waits_for_no_import_that_it_does_not_use():
    """Each of these costs every rank of every start between half a second and several."""
    heavy = {"datasets", "pandas", "tensorboard", "matplotlib", "lm_eval", "wandb", "starlette", "vllm", "trl"}
    code = f"import sys, posttrain.training.run_recipe; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=rank_environment(), cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
