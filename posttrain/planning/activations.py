"""Counts the bytes of activations that the forward and backward pass of a micro-batch take, without computing anything.

The model's own code runs, forward and backward, on tensors that have shapes and no values (torch's FakeTensorMode), and every storage is
counted while it lives: once with one decoder layer and once with two. The difference is what each further layer takes.
"""

import contextlib
import copy
import sys
import weakref
from collections import Counter
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import moe

from posttrain.common.errors import first_line
from posttrain.data.packing import MicroBatch
from posttrain.model.classes import class_of
from posttrain.model.policy import Policy, checkpoint_activations, fastest_policy, set_dropout
from posttrain.operators import logprob
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.operators.positions import same_frequencies_until
from posttrain.planning.memory import Working


class _FusedNorm(torch.autograd.Function):
    """Keeps for backward what liger-kernel's RMSNorm keeps: its input and one number a row. The gradient is written over the one given."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.empty_like(ctx.saved_tensors[1])


class _FusedSwiGLU(torch.autograd.Function):
    """Keeps for backward what liger-kernel's SwiGLU keeps: its two inputs. Their gradients are written over them."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors


def _take_memory_of_fused_kernels(model: PreTrainedModel) -> None:
    """Make RMSNorm and feed-forward layers allocate what liger-kernel's would; their values are never looked at.

    torch.compile takes about as much (91.4 GB where this says 94.4, on an H200).
    """
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = lambda x, part=part: _FusedNorm.apply(x, part.weight)
        elif hasattr(part, "gate_proj") and hasattr(part, "down_proj"):
            part.forward = lambda x, part=part: part.down_proj(_FusedSwiGLU.apply(part.gate_proj(x), part.up_proj(x)))


@contextlib.contextmanager
def _rotary_without_memory(model: PreTrainedModel):
    """Let the rotary embedding allocate nothing, as liger-kernel's does; transformers' attention looks it up in its module."""
    module = sys.modules[type(model).__module__]
    rotary = getattr(module, "apply_rotary_pos_emb", None)
    if rotary is None:  # GPT-2's positions are learned
        yield
        return
    module.apply_rotary_pos_emb = lambda query, key, *others, **settings: (query, key)
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = rotary


@contextlib.contextmanager
def matmuls_without_copies():
    """Let matrix products make no float32 copies of bfloat16 operands, as on a GPU; on a CPU without bfloat16 they would."""
    workable = logprob.workable
    logprob.workable = lambda x: x
    try:
        yield
    finally:
        logprob.workable = workable


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made: `now` of those still alive, `most` at their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def leave_out(self, tensors) -> None:
        """Do not count these tensors, which were there before."""
        for tensor in tensors:
            self.seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":  # such a tensor has a size, but takes nothing
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = weakref.finalize(storage, self._free, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


@contextlib.contextmanager
def _few_pieces():
    """Let the head work on the first three of its pieces of logits only: the peak is theirs, as all but the last are of one size."""
    pieces = logprob.pieces
    logprob.pieces = lambda *sizes: pieces(*sizes)[:3]
    try:
        yield
    finally:
        logprob.pieces = pieces


@contextlib.contextmanager
def _logits_in_one_pass():
    """Let what the head compiles allocate what the compiled kernels do; their values are never looked at."""
    compiled = logprob.compiled_parts

    def of_rows(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate log-probs and normalizers."""
        return logits.new_empty(len(targets), dtype=torch.float32), logits.new_empty(len(targets), dtype=torch.float32)

    logprob.compiled_parts = lambda: (of_rows, lambda logits, *others: torch.empty_like(logits))
    try:
        yield
    finally:
        logprob.compiled_parts = compiled


@contextlib.contextmanager
def _experts_of_any_dtype():
    """Let transformers multiply experts by its operator that has shapes for every dtype; torch 2.13's grouped_mm has bfloat16's only."""
    possible = getattr(moe, "_can_use_grouped_mm", None)
    moe._can_use_grouped_mm = lambda *tensors: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = possible


class Peaks(NamedTuple):
    """The most bytes that forward and backward take, weights and finished gradients left out."""

    layers: int  # until the backward pass has left the first layer
    embedding: int  # afterwards: gradients as large as the embedding, whatever the number of layers


def peak_bytes(config, batch: MicroBatch, dtype: torch.dtype, checkpointing: str, fused: bool, head: logprob.Way) -> Peaks:
    """Count the bytes that forward and backward of `config`'s model take at their peaks."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy = policy_without_values(config, dtype, checkpointing, fused, head)
        for parameter in filter(lambda one: one.requires_grad, policy.parameters()):  # some routers' bias is a frozen parameter
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        live = LiveBytes()
        live.leave_out([*policy.parameters(), *policy.buffers()])
        batch = batch_without_values(batch, fake)
        most_of_layers = 0

        def leave_layers(_) -> None:
            nonlocal most_of_layers
            most_of_layers, live.most = live.most, live.now

        def watch(_, inputs: tuple, embedded: torch.Tensor) -> None:
            embedded.register_hook(leave_layers)

        policy.model.get_input_embeddings().register_forward_hook(watch)
        with live, allocating_as_counted(policy, fused):
            policy(batch).sum().backward()
    return Peaks(most_of_layers, live.most)


def policy_without_values(config, dtype: torch.dtype, checkpointing: str, fused: bool, head: logprob.Way) -> Policy:
    """Build a policy of a transformers config whose weights, within a FakeTensorMode, have shapes and no values."""
    model = model_of(config, dtype).train()
    set_dropout(model, 0.0)
    policy = fastest_policy(model, SEGMENTS)
    policy.head.way = head
    if fused:
        _take_memory_of_fused_kernels(model)
    checkpoint_activations(model, checkpointing)
    return policy


def batch_without_values(batch: MicroBatch, fake: FakeTensorMode) -> MicroBatch:
    """Return a micro-batch of the same shapes that has no values."""
    return batch._replace(**{name: fake.from_tensor(value) for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)})


@contextlib.contextmanager
def allocating_as_counted(policy: Policy, fused: bool):
    """Let forward and backward of policy_without_values allocate at their peak what they would with values, with `fused` on a GPU."""
    rotary = _rotary_without_memory(policy.model) if fused else contextlib.nullcontext()
    with _few_pieces(), _logits_in_one_pass(), rotary, _experts_of_any_dtype():
        yield


def count_working(
    config,
    batch: MicroBatch,
    dtype: torch.dtype,
    checkpointing: str,
    fused: bool,
    head: logprob.Way = logprob.PLAIN,
    on_gpu: bool = False,
) -> Working:
    """Count what forward and backward of `config`'s model take at their peak for a micro-batch of `batch`'s shapes.

    `checkpointing` is the recipe's activation_checkpointing; `fused` counts liger-kernel's layers, which only a GPU has; `head` is the way
    of the log-probs. Raises ValueError for an architecture whose layers cannot be counted, or that `checkpointing` is not possible with.
    """
    head = head._replace(adds_products=False)  # which has no product without values, and takes no memory of its own
    with matmuls_without_copies() if fused or on_gpu else contextlib.nullcontext():
        kept, besides = 0, []  # bytes that the layers keep, and the most that is there besides, by kind of layer
        try:
            for layer, count in _kinds_of_layers(config.get_text_config()).items():
                one, two = (peak_bytes(with_layers(config, [layer] * n), batch, dtype, checkpointing, fused, head) for n in (1, 2))
                kept += count * (two.layers - one.layers)
                besides.append(Peaks(2 * one.layers - two.layers, one.embedding))
        except Exception as error:
            if isinstance(error, ValueError):
                raise
            # whatever the code of an architecture raises that looks at values
            raise ValueError(
                f"the memory that a {architecture_of(config)} takes cannot be counted ({first_line(error)}), so neither plan.py nor "
                "max_tokens_per_gpu: auto is possible with it; give max_tokens_per_gpu a number"
            ) from error
        most = max(kept + max(peaks.layers for peaks in besides), *(peaks.embedding for peaks in besides))
        return Working(most, peak_bytes_of_head(config.get_text_config(), len(batch.rows), dtype, head))


def possible_ways(config, ways) -> list[str]:
    """Return those of some ways of checkpointing activations that the architecture of a config has."""
    found = []
    for way in ways:
        with torch.device("meta"):
            model = model_of(with_layers(config, [0]), torch.float32)
        with contextlib.suppress(ValueError):
            checkpoint_activations(model, way)
            found.append(way)
    return found


def _kinds_of_layers(config) -> dict[int, int]:
    """Return, by the number of the first layer of each kind, how many layers of that kind a model has."""
    of_layers = list(zip(*_lists_of_layers(config).values(), strict=True)) or [()] * config.num_hidden_layers
    counts = Counter(of_layers)
    return {of_layers.index(kind): count for kind, count in counts.items()}


def _lists_of_layers(config) -> dict[str, list]:
    """Return those attributes of a config that say something of each layer: which attention it has, or whether it has experts."""
    found = {**vars(config), **{name: getattr(config, name, None) for name in ("layer_types", "layers_block_type")}}  # some derive these
    if names := getattr(config, "per_layer_attributes", None):  # Gemma 4's heads, which are wider in some layers
        found["per_layer_config"] = [tuple((name, getattr(one, name)) for name in sorted(names)) for one in config.per_layer_config]
    return {
        name: value
        for name, value in sorted(found.items())
        if "layer" in name and isinstance(value, list | tuple) and len(value) == config.num_hidden_layers
    }


def with_layers(whole: PreTrainedConfig, numbers: list[int]) -> PreTrainedConfig:
    """Return a copy of a config for a model with some of the layers, by their numbers, whose forward pass asks for no values."""
    whole = copy.deepcopy(whole)
    config = whole.get_text_config()
    of_layers = _lists_of_layers(config)
    config.num_hidden_layers = len(numbers)
    if getattr(config, "num_kv_shared_layers", 0):
        config.num_kv_shared_layers = 0  # no layer takes the keys of one that is left out
    for name, values in of_layers.items():
        chosen = [values[number] for number in numbers]
        with contextlib.suppress(AttributeError):  # of a config that derives them, as Mamba's
            setattr(config, name, {n: dict(one) for n, one in enumerate(chosen)} if name == "per_layer_config" else chosen)
    if same_frequencies_until(config):  # which frequencies a row gets is read from its positions
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    return whole


def architecture_of(config: PreTrainedConfig) -> str:
    """Return the name of the class of a config's model."""
    kind = class_of(config)
    assert kind is not None  # read_config has looked
    return kind.__name__


def model_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a config with random weights, or none within a FakeTensorMode or on the meta device."""
    kind = class_of(config)
    assert kind is not None
    return kind._from_config(copy.deepcopy(config), dtype=dtype)


def peak_bytes_of_head(config, rows: int, dtype: torch.dtype, way: logprob.Way) -> int:
    """Count the bytes that the log-probs of `rows` trained tokens take at their peak, forward and backward, beside the head's weights."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, config.hidden_size, dtype=dtype, requires_grad=True) for n in (rows, config.vocab_size))
        live = LiveBytes()
        live.leave_out([hidden, weight])
        with live, _few_pieces(), _logits_in_one_pass():
            logprob.token_logps(hidden, weight, torch.zeros(rows, dtype=torch.int64), way).sum().backward()
    return live.most
