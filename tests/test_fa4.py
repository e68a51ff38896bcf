"""The extra fa4: a version whose functions return what torch unpacks, and whose kernels the pinned compiler compiles, without a GPU.

Of flash-attn-4 and its compiler the newest releases do neither, and a run would pass over it in one line of its first screen.
"""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_setup import pinned

from posttrain.operators import attention

# that the extra installs beside torch's build for CUDA, and, last, what that brings along
PACKAGES = "flash-attn-4 nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base quack-kernels apache-tvm-ffi torch-c-dlpack-ext"
OF_TORCH = "cuda-bindings==13.4.4 cuda-pathfinder triton==3.7.1"
COMPILED = """
import json, os, site, sys
site.addsitedir(sys.argv[1])  # for its .pth file
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import _fa4
_fa4._FA4_MODULE_PATH = "flash_attn.cute.interface"
with FakeTensorMode():
    shapes = {"query": (777, 16, 128), "key": (827, 8, 128), "value": (827, 8, 128)}
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes.values())
    offsets = [torch.empty(5, dtype=torch.int32, device="cuda") for _ in range(2)]
    output, normalizers = _fa4._fa4_run_forward(query, key, value, *offsets, 300, 350, 0.1, True, -1, 0, None)
    given = torch.empty_like(output), query, key, value, output, normalizers
    print(json.dumps([output.shape, normalizers.shape, *(x.shape for x in _fa4._fa4_run_backward(*given, *offsets, 0.1, True, -1, 0))]))
"""


def wheel(folder: Path, release: str) -> zipfile.ZipFile:
    """A release of flash-attn-4, downloaded."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"flash-attn-4=={release}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"flash-attn-4 {release} cannot be downloaded here: {done.stderr.strip().splitlines()[-1]}")
    return zipfile.ZipFile(next(folder.glob(f"flash_attn_4-{release}-*.whl")))


def misfits(wheel: zipfile.ZipFile) -> list[str]:
    """What torch's calls of the wheel's functions would stumble over: keywords that are unknown, and results of another length."""
    calls = ast.walk(ast.parse((Path(torch.__file__).parent / "nn" / "attention" / "_fa4.py").read_text()))
    offered = {node.name: node for node in ast.parse(wheel.read("flash_attn/cute/interface.py")).body if isinstance(node, ast.FunctionDef)}
    found, seen = [], set()
    keywords = {"_flash_attn_fwd": [], "_flash_attn_bwd": []}
    for node in calls:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "kwargs":  # of the forward pass, which gets them all from there
            keywords["_flash_attn_fwd"] += [ast.literal_eval(key) for key in node.value.keys]
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("module.")):
            continue
        name = node.value.func.attr
        function, wanted = offered[name], len(node.targets[0].elts)
        keywords[name] += [one.arg for one in node.value.keywords if one.arg]
        seen.add(name)
        for returned in (one.value for one in ast.walk(function) if isinstance(one, ast.Return)):
            if not isinstance(returned, ast.Tuple) or len(returned.elts) != wanted:
                found.append(f"{name} returns {ast.unparse(returned)}, of which torch unpacks {wanted}")
    assert seen == keywords.keys() and all(keywords.values())  # torch's file is as this function reads it
    known = {name: {one.arg for one in (*offered[name].args.args, *offered[name].args.kwonlyargs)} for name in keywords}
    return found + [f"{name} has no {word}" for name, words in keywords.items() for word in words if word not in known[name]]


@pytest.mark.slow
def test_torch_unpacks_what_the_pinned_version_returns(tmp_path):
    """And not what the next one does: where that changes, with another torch, the pin in setup.py has lost its reason."""
    pin = re.search(r"flash-attn-4==(4\.0\.0b)(\d+)", (ROOT / "setup.py").read_text())
    assert pin[0] == f"flash-attn-4=={pinned()['flash-attn-4']}"
    assert misfits(wheel(tmp_path, pin[1] + pin[2])) == []
    assert misfits(wheel(tmp_path, f"{pin[1]}{int(pin[2]) + 1}")) == [
        "_flash_attn_fwd returns (out, lse, p, row_max), of which torch unpacks 2"
    ]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the extra's packages, in the versions of constraints.txt."""
    folder, pins = tmp_path_factory.mktemp("fa4"), pinned()
    packages = [f"{name}=={pins[name]}" for name in PACKAGES.split()] + OF_TORCH.split()
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"flash-attn-4 and its compiler cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("card", ["sm_90a", "sm_100a"])
def test_torchs_calls_compile(installed, card):
    """The forward and the backward pass of packed rows with grouped heads, up to the card's machine code."""
    environment = os.environ | {"FLASH_ATTENTION_ARCH": card, "CUTE_DSL_ARCH": card}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED, str(installed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [[777, 16, 128], [16, 777], [777, 16, 128], [827, 8, 128], [827, 8, 128]]


def test_a_gpu_that_could_use_it_is_told_how_to_get_it():
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        with pytest.raises(ValueError, match=r"flash-attn-4 is not installed \(export POSTTRAIN_EXTRAS=fa4 and source .*posttrain\[fa4\]"):
            attention._activate("FA4")
    else:
        pytest.skip("flash-attn-4 is installed here")
