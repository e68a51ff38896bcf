"""Compiles the DeepSpeed ops that training uses, once, before any rank starts: ranks that compile at the same time wait for each other."""

import torch
from deepspeed.accelerator import get_accelerator

ops = ["CPUAdamBuilder"]  # the optimizer of ds_configs/zero3_offload.json
if get_accelerator().device_name() == "cpu":
    ops.append("ShareMemCommBuilder")  # collectives between ranks of one machine, through shared memory

for name in ops:
    builder = get_accelerator().create_op_builder(name)
    if builder is None or not builder.is_compatible(verbose=True):
        raise SystemExit(f"DeepSpeed's {name} cannot be built here: is a C++ compiler (and nvcc, with a GPU) installed?")
    builder.load()
    print(f"built {name} for torch {torch.__version__}")
