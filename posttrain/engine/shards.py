"""Maps a sharded training state: which elements of which parameter each rank's flat tensors hold, in memory and in DeepSpeed's files.

A checkpoint records this map, so it can be loaded on any number of ranks and at any ZeRO stage: each rank copies the elements that it now
holds, float32 weights and both moments, from wherever they were saved. All checkpoints are loaded in this way, those of the same layout
included. (DeepSpeed's universal checkpoints do not cross between ZeRO 1 to 2 and 3 on 0.19.8.)
"""

import itertools
import math
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import distributed as dist

from posttrain.common.errors import first_line, shown_name
from posttrain.engine.adam import CLOCK, MOMENTS
from posttrain.engine.checkpoint_folder import BUFFERS
from posttrain.operators.saved_form import persistent_buffers

KINDS = ("weights", *MOMENTS)  # all in float32
# Classes in DeepSpeed's files besides tensors and plain values. Nothing else is unpickled, so a file cannot run code.
ALLOWED = [LossScaler, ZeroStageEnum, fragment_address]


class Fragment(NamedTuple):
    """Says that elements [start, start + length) of flattened parameter `name` are [offset, offset + length) of flat tensor `group`."""

    name: str
    start: int
    length: int
    group: int
    offset: int


def fragments(engine) -> list[Fragment]:
    """Returns the parts of parameters that this rank's optimizer holds."""
    stage, optimizer, found = engine.zero_stage, engine.optimizer, []
    parameters = dict(engine.module.named_parameters())
    if stage == 0:
        groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
        index = {id(parameter): i for i, parameter in enumerate(p for group in groups for p in group)}
        return [Fragment(name, 0, parameter.numel(), index[id(parameter)], 0) for name, parameter in parameters.items()]
    for name, parameter in parameters.items():
        if stage == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * length
            length = min(length, parameter.ds_numel - start)  # the last ranks' parts are padded
            if length > 0:
                found.append(Fragment(name, start, length, group, offset))
        elif (part := parameter._hp_mapping) is not None:
            inside, outside = part.lp_fragment_address, part.hp_fragment_address
            found.append(Fragment(name, inside.start, inside.numel, part.param_group_index, outside.start))
    return found


def count(module: torch.nn.Module) -> int:
    """Returns the number of elements of all parameters, all ranks' parts together at ZeRO-3."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def shapes(engine) -> dict[str, list[int]]:
    """Returns every parameter's name and shape, the whole shape at ZeRO-3 too."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def master_weights(engine) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """Returns the flat tensors of float32 weights, one per group, and the torch optimizer whose state is keyed by them."""
    optimizer, stage = engine.optimizer, engine.zero_stage
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat, optimizer.optimizer
    if stage > 0:  # bfloat16 at ZeRO-1 has an optimizer of its own, BF16_Optimizer
        name = "fp32_groups_flat_partition" if hasattr(optimizer, "fp32_groups_flat_partition") else "single_partition_of_fp32_groups"
        return getattr(optimizer, name), optimizer.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return [tensor for group in optimizer.fp32_groups for tensor in group], optimizer.optimizer
    return [tensor for group in optimizer.param_groups for tensor in group["params"]], optimizer


def are_finite(engine) -> bool:
    """Return whether this rank's master weights hold neither NaN nor infinity."""
    ends = [end for weights in master_weights(engine)[0] if weights.numel() for end in weights.detach().aminmax()]  # a NaN is both ends
    return all(bool(end.isfinite()) for end in ends)


@torch.no_grad()
def clear_padding(engine) -> None:
    """Set to zero what pads this rank's parts of parameters that the ranks do not divide evenly, at ZeRO-3.

    DeepSpeed 0.19.8 leaves it as it finds the memory. A NaN there stays, does not change the model, and would be taken for a weight.
    """
    if engine.zero_stage != 3:
        return
    masters, optimizer = master_weights(engine)[0], engine.optimizer
    held = {part.name: part.length for part in fragments(engine)}
    for name, parameter in engine.module.named_parameters():
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        masters[group][offset + held.get(name, 0) : offset + length].zero_()
        parameter.ds_tensor[held.get(name, 0) :].zero_()


def optimizer_step(engine) -> int:
    """Returns how many steps the optimizer has made, by Adam's own count."""
    masters, optimizer = master_weights(engine)
    clocks = {int(optimizer.state[master][CLOCK]) for master in masters if optimizer.state.get(master)}
    assert len(clocks) <= 1, clocks
    return clocks.pop() if clocks else 0


def make_optimizer_states(engine, step: int = 0) -> None:
    """Create Adam's moments, as zeros, where they are missing, and set its step count.

    torch and DeepSpeed 0.19.8 would create them in the first optimizer step: after the run's largest micro-batch has been tried for
    memory, which would then have had 8 bytes per parameter more than later ones.
    """
    masters, optimizer = master_weights(engine)
    fused = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's CPU Adam keeps its step count as an int
    for master in masters:
        state = optimizer.state[master]
        state[CLOCK] = torch.tensor(float(step), device=master.device) if fused else step
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(master)


@torch.no_grad()
def restore(engine, saved: "Saved") -> None:
    """Copy a saved training state into the engine; the two may have different layouts. All ranks.

    Raises ValueError if the checkpoint is of another model.
    """
    buffers = persistent_buffers(engine.module)
    for name, values in saved.buffers().items():
        if name not in buffers or buffers[name].shape != values.shape:
            raise ValueError(f"{saved.folder} holds another model: this one has no buffer {name} of shape {tuple(values.shape)}")
        buffers[name].copy_(values)
    here, stage = shapes(engine), engine.zero_stage
    if here != saved.shapes:
        names = [name for name in {**here, **saved.shapes} if here.get(name) != saved.shapes.get(name)]
        raise ValueError(f"{saved.folder} holds another model: {len(names)} parameters differ, first {names[0]}")
    if stage == 3:  # a forward pass has left small parameters gathered: partitioning makes ZeRO-3 gather the restored values
        engine.optimizer.checkpoint_event_prologue()
    masters, optimizer = master_weights(engine)
    if saved.optimizer_step:
        make_optimizer_states(engine, saved.optimizer_step)
    for part in fragments(engine):
        for kind in KINDS if saved.optimizer_step else KINDS[:1]:
            whole = masters[part.group] if kind == "weights" else optimizer.state[masters[part.group]][kind]
            into = whole.detach().view(-1)[part.offset : part.offset + part.length]
            for start, values in saved.read(part.name, kind, part.start, part.length):
                into[start - part.start : start - part.start + len(values)].copy_(values)
    _weights_from_masters(engine, stage)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def _weights_from_masters(engine, stage: int) -> None:
    """Set the weights that compute from the float32 ones, as DeepSpeed does after a step. All ranks."""
    optimizer = engine.optimizer
    if stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif stage > 0:
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)


class Saved:
    """The training state in a checkpoint's files; reads any range of elements from memory-mapped files."""

    def __init__(self, folder: Path, facts: dict):
        """`facts`: "state" of the checkpoint's manifest. Raises ValueError for parts that lie outside of their parameter, or overlap."""
        self.folder, self.stage, self.optimizer_step, self.shapes = folder, facts["zero_stage"], facts["optimizer_step"], facts["shapes"]
        self.files: list[str] = facts["files"]
        self.has_buffers = facts.get("has_buffers", False)
        self.parts: dict[str, list[tuple[int, Fragment]]] = {name: [] for name in self.shapes}
        for rank, parts in enumerate(facts["fragments"][: len(self.files)]):
            for part in (Fragment(*values) for values in parts):
                if part.name not in self.parts or part.start + part.length > math.prod(self.shapes[part.name]):
                    raise ValueError(f"{folder} is damaged: its manifest.json has {tuple(part)}, which is no part of a parameter there")
                self.parts[part.name].append((rank, part))
        for name, parts in self.parts.items():
            there = sorted((part.start, part.start + part.length) for _, part in parts)
            if any(before[1] > after[0] for before, after in itertools.pairwise(there)):
                raise ValueError(f"{folder} is damaged: its manifest.json has elements of {shown_name(name)} twice")
        self._tensors = cache(self._open)

    def read(self, name: str, kind: str, start: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields elements [start, start + length) of a parameter (`kind` "weights") or a moment of it, as pairs (first element, values).

        Raises ValueError before the first if some of them are in no file.
        """
        end = start + length
        asked = [(rank, part, max(start, part.start), min(end, part.start + part.length)) for rank, part in self.parts[name]]
        asked = [one for one in asked if one[2] < one[3]]
        if (found := sum(last - first for *_, first, last in asked)) != length:
            raise ValueError(f"{self.folder} holds {found} of {length} elements of {shown_name(name)}: it is incomplete")
        for rank, part, first, last in asked:
            groups = self._tensors(rank)[kind]
            flat = groups[part.group] if part.group < len(groups) else torch.empty(0)
            values = flat[part.offset + first - part.start : part.offset + last - part.start]
            if len(values) != last - first:
                path = self.folder / self.files[rank]
                raise ValueError(f"{path} lacks elements of {shown_name(name)} that its manifest.json claims ({kind}): it is damaged")
            yield first, values

    def parameter(self, name: str) -> torch.Tensor:
        """Returns a whole parameter in float32. Raises ValueError if some of its elements are in no file."""
        read = list(self.read(name, "weights", 0, math.prod(self.shapes[name])))  # before memory is taken for what a manifest claims
        whole = torch.empty(self.shapes[name])
        for start, values in read:
            whole.view(-1)[start : start + len(values)] = values
        return whole

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the model's persistent buffers by name, each in its own dtype."""
        found = _load(self.folder / BUFFERS, mmap=False) if self.has_buffers else {}
        if not isinstance(found, dict) or not all(isinstance(one, torch.Tensor) for one in found.values()):
            raise ValueError(f"{self.folder / BUFFERS} holds something else than tensors by name: it is damaged")
        return found

    def _open(self, rank: int) -> dict[str, list[torch.Tensor]]:
        """Maps a rank's file into memory; returns its flat tensors: kind -> one for each group. Raises ValueError if it could run code."""
        path = self.folder / self.files[rank]
        content = _load(path, mmap=True)
        try:
            weights, state = self._states_in(content)
            flat = {"weights": [tensor.detach().view(-1) for tensor in weights]}
            return flat | {kind: [state[i][kind].view(-1) for i in range(len(weights)) if i in state] for kind in MOMENTS}
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path} holds no training state of ZeRO-{self.stage} ({first_line(error)}): it is damaged") from error

    def _states_in(self, content: dict) -> tuple[list[torch.Tensor], dict]:
        """Returns the tensors of weights in a file, and the state that the optimizer keeps for each."""
        if self.stage == 3:
            optimizer = content["optimizer_state_dict"]
            return optimizer["fp32_flat_groups"], optimizer["optimizer_state_dict"]["state"]
        if self.stage > 0:
            optimizer = content["optimizer_state_dict"]
            return optimizer["single_partition_of_fp32_groups"], optimizer["base_optimizer_state"]["state"]
        if "fp32_groups" in content["optimizer"]:
            optimizer = content["optimizer"]
            return [t for group in optimizer["fp32_groups"] for t in group], optimizer["optimizer_state_dict"]["state"]
        names = {parts[0][1].group: name for name, parts in self.parts.items()}
        return [content["module"][names[group]] for group in sorted(names)], content["optimizer"]["state"]


def _load(path: Path, mmap: bool) -> dict:
    """Returns what a checkpoint's file holds. Raises ValueError if it could run code, or is no file of torch.save."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, which would run as code: {str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: it is no file of torch.save ({first_line(error)})") from error
