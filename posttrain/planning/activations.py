"""Bytes that forward and backward of a micro-batch take.

The model's own code runs, forward and backward, on tensors that have shapes and no values, with one decoder layer and with two, and every
storage is counted while it lives. The difference is a layer's.
"""

import contextlib
import copy
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedModel

from posttrain.data.packing import MicroBatch
from posttrain.model.policy import Policy, checkpoint_activations
from posttrain.operators import logprob
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.planning.memory import Working


class _FusedNorm(torch.autograd.Function):
    """What liger-kernel's RMSNorm keeps: its input and a number a row; its gradient takes the place of the output's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.empty_like(ctx.saved_tensors[1])


class _FusedSwiGLU(torch.autograd.Function):
    """What liger-kernel's SwiGLU keeps: its two inputs, whose places their gradients take."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors


def _fuse(model: PreTrainedModel) -> None:
    """Fused kernels, as far as memory goes. torch.compile takes about as much (91.4 GB where this says 94.4, on an H200)."""
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = lambda x, part=part: _FusedNorm.apply(x, part.weight)
        elif hasattr(part, "gate_proj") and hasattr(part, "down_proj"):
            part.forward = lambda x, part=part: part.down_proj(_FusedSwiGLU.apply(part.gate_proj(x), part.up_proj(x)))


@contextlib.contextmanager
def _rotary_in_place(model: PreTrainedModel):
    """As liger-kernel's; transformers' attention calls it by its module's name for it."""
    module = sys.modules[type(model).__module__]
    rotary = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = lambda query, key, *others, **settings: (query, key)
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = rotary


@contextlib.contextmanager
def _products_in_place():
    """As on a GPU, whatever CPU this is: one without bfloat16 copies into float32 what it multiplies."""
    workable = logprob.workable
    logprob.workable = lambda x: x
    try:
        yield
    finally:
        logprob.workable = workable


class Living(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still live, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def know(self, tensors) -> None:
        """These were there before: not counted."""
        for tensor in tensors:
            self.seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
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


def peak_of(config, layers: int, batch: MicroBatch, dtype: torch.dtype, checkpointing: str, fused: bool) -> int:
    """Bytes that forward and backward of a model with so many layers take at most, beside weights and finished gradients."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        policy = Policy(model, SEGMENTS)
        if fused:
            _fuse(model)
        checkpoint_activations(model, checkpointing)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        batch = batch._replace(
            **{name: fake.from_tensor(value) for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
        )
        living = Living()
        living.know([*model.parameters(), *model.buffers()])
        with living, _rotary_in_place(model) if fused else contextlib.nullcontext():
            policy(batch).sum().backward()
    return living.most


def count_working(config, batch: MicroBatch, dtype: torch.dtype, checkpointing: str, fused: bool) -> Working:
    """What forward and backward of a micro-batch take, by its shapes; `fused`: with liger-kernel's layers, as on a GPU."""
    with _products_in_place() if fused else contextlib.nullcontext():
        one, two = (peak_of(config, layers, batch, dtype, checkpointing, fused) for layers in (1, 2))
        return Working(one + (config.num_hidden_layers - 1) * (two - one), peak_of_head(config, len(batch.rows), dtype))


def peak_of_head(config, rows: int, dtype: torch.dtype) -> int:
    """Bytes that the log-probs of `rows` trained positions take at most, forward and backward, beside the head's weights."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, config.hidden_size, dtype=dtype, requires_grad=True) for n in (rows, config.vocab_size))
        living = Living()
        living.know([hidden, weight])
        with living:
            logprob.token_logps(hidden, weight, torch.zeros(rows, dtype=torch.int64)).sum().backward()
    return living.most
