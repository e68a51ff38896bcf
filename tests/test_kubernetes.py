"""launch/kubernetes.yaml: its parts fit together, and its shell line, started for each pod, makes the run that deepspeed makes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, free_port, launch, metrics, rank_environment
from test_runs import CURVE, sft_arguments

from posttrain.recipes.keys import SFTRecipe

SERVICE, JOB = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
ENVIRONMENT = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}


def test_the_parts_of_the_manifest_fit_together():
    assert (SERVICE["apiVersion"], SERVICE["kind"], JOB["apiVersion"], JOB["kind"]) == ("v1", "Service", "batch/v1", "Job")
    name = JOB["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"].items() <= POD["metadata"]["labels"].items()
    assert POD["spec"]["subdomain"] == SERVICE["metadata"]["name"]
    assert ENVIRONMENT["MASTER_ADDR"] == f"{name}-0.{SERVICE['metadata']['name']}"  # an indexed Job's pods are called NAME-INDEX
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(ENVIRONMENT["NODES"]) == 2
    assert CONTAINER["resources"]["limits"] == {"nvidia.com/gpu": int(ENVIRONMENT["NUM_GPUS"])}
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts[CONTAINER["workingDir"]]["persistentVolumeClaim"]
    assert all(isinstance(value, str) for value in [*ENVIRONMENT.values(), *CONTAINER["command"], *CONTAINER["args"]])
    assert {word[2:].partition("=")[0] for word in CONTAINER["args"]} <= SFTRecipe.model_fields.keys()
    waits = int(re.search(r"--shutdown_timeout (\d+)", CONTAINER["command"][2])[1])
    assert waits < POD["spec"]["terminationGracePeriodSeconds"]


def start_pod(index: int, port: int, arguments: list[str], cwd: Path) -> subprocess.Popen:
    """Run the container's command for a pod with one rank, on this machine."""
    own = {"JOB_COMPLETION_INDEX": str(index), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NUM_GPUS": "1"}
    environment = rank_environment() | ENVIRONMENT | own
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*CONTAINER["command"], *arguments], env=environment, cwd=cwd, **shown)


def run_pods(arguments: list[str], cwd: Path) -> list[tuple[int, str]]:
    """The exit code of each of two pods, and what it printed."""
    port = free_port()
    pods = [start_pod(index, port, arguments, cwd) for index in range(2)]
    try:
        return [(pod.returncode, output) for pod in pods for output, _ in [pod.communicate(timeout=280)]]
    finally:
        for pod in pods:
            pod.kill()


@pytest.mark.slow
def test_two_pods_make_the_same_run_as_deepspeeds_launcher(tiny, tmp_path):
    (code, output), other = run_pods(sft_arguments(tiny, tmp_path / "pods"), tmp_path)
    assert (code, other[0]) == (0, 0), output + other[1]
    assert "on 2 ranks in micro-batches" in output
    assert "step 1/" not in other[1]
    assert (tmp_path / "pods" / "final" / "model.safetensors").is_file()
    done = launch("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "run"))
    assert done.returncode == 0, done.stdout
    for mine, its in zip(metrics(tmp_path / "pods"), metrics(tmp_path / "run"), strict=True):
        assert [mine[name] for name in CURVE] == pytest.approx([its[name] for name in CURVE], abs=1e-5)


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_one_message(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "posttrain" / "sft.py")]
    command += sft_arguments(tiny, tmp_path / "run", "--lerning_rate=1")
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1  # torchrun's, whatever a rank's is
    assert (done.stdout + done.stderr).count("Did you mean learning_rate?") == 1
    assert "exitcode: 2" in done.stderr
