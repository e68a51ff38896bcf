"""The ways in which a model computes a micro-batch: packed, or each of its rows apart, as slow but right for any architecture.

Each way is made of a model, which it changes in place; `restore` undoes that. A way gives hidden states or log-probs of the asked rows.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.data.packing import MicroBatch, Packing
from posttrain.operators import attention_segments
from posttrain.operators.layers import text_model
from posttrain.operators.mixers import PackedMixers, mixers_of, rectangles_of, with_calls
from posttrain.operators.positions import RowFrequencies
from posttrain.parallel.ranks import gathered


class Packed:
    """One row of tokens for all examples, with an attention that keeps them apart."""

    name, is_packed = "packed", True
    hands_packing = True  # to the model, which hands further arguments on to its attention

    def __init__(self, model: PreTrainedModel, attention_name: str):
        """Raises ValueError where neither the attention can be replaced nor all layers are such as PackedMixers knows."""
        self.text, self.attention = text_model(model), attention_name
        if not self.text.is_backend_compatible() and not mixers_of(self.text):
            raise ValueError("its attention is its own, and packing needs one that can be replaced")
        self.frequencies, self.mixers = RowFrequencies(self.text), PackedMixers(self.text)
        self.own_attention = self.text.config._attn_implementation
        self.text.set_attn_implementation(attention_name)

    def restore(self) -> None:
        """Undo the changes to the model."""
        self.text.set_attn_implementation(self.own_attention)
        self.frequencies.restore()
        self.mixers.restore()

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Return the hidden states of the asked rows, (N, D)."""
        with self._of(batch.packing):
            given = {"packing": batch.packing} if self.hands_packing else {}
            return _states(self.text, batch.input_ids, position_ids=batch.position_ids, **given)[0].index_select(0, batch.rows)

    @contextlib.contextmanager
    def _of(self, packing: Packing) -> Iterator[None]:
        """Say how the rows that come next are divided, also to a backward pass that computes them again."""
        self.frequencies.packing = self.mixers.packing = packing
        if self.mixers.mixers:
            self.mixers.calls = _calls_of_all(self.text, len(rectangles_of(packing, self.text.device)[0]))
        attention_segments.CURRENT[:] = [packing]
        yield


class PackedByItself(Packed):
    """The same for architectures that hand no further arguments to their attention, which looks up how the rows are divided."""

    name = "packed, without arguments for the attention"
    hands_packing = False


class Apart:
    """Each example a row of its own, padded at the end, with the architecture's own attention: no token sees what comes after it."""

    name, is_packed = "a row at a time", False
    attention = ""  # the architecture's own

    def __init__(self, model: PreTrainedModel, _: str = ""):
        self.model, self.text = model, text_model(model)
        self.frequencies = RowFrequencies(self.text)
        self.each = bool(self.frequencies.changed)  # rows padded to the longest of a group would have its rotary frequencies

    def restore(self) -> None:
        """Undo the changes to the model."""
        self.frequencies.restore()

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Return the hidden states of the asked rows, (N, D)."""
        return self._asked(batch, lambda ids, positions: _states(self.text, ids, position_ids=positions))

    def _asked(self, batch: MicroBatch, compute) -> torch.Tensor:
        """Compute the examples as rows of about one length, and pick what is asked of them."""
        rectangles, order = rectangles_of(batch.packing, batch.input_ids.device, self.each)
        found = []
        for rows, own in with_calls(rectangles, _calls_of_all(self.text, len(rectangles))):
            ids, positions = (x[0].index_select(0, rows.flatten()).view(rows.shape) for x in (batch.input_ids, batch.position_ids))
            found.append(compute(ids, positions).flatten(0, 1).index_select(0, own))
        return torch.cat(found).index_select(0, order.index_select(0, batch.rows))


class Whole(Apart):
    """The same by transformers' own logits, for a head that is not a linear layer with a scale and a bound."""

    name = "a row at a time, with all logits"

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits of the asked rows, (N, V)."""
        return self._asked(batch, lambda ids, positions: _call(self.model, ids, position_ids=positions).logits)


def _calls_of_all(model: nn.Module, calls: int) -> int:
    """Return how often each rank calls a model's layers: at ZeRO-3 one that called them less often would leave the others waiting."""
    return max(gathered(calls)) if hasattr(next(model.parameters()), "ds_id") else calls


def _states(model: nn.Module, ids: torch.Tensor, **given) -> torch.Tensor:
    """Return the hidden states (rows, tokens, D) that a head is given."""
    return _call(model, ids, **given).last_hidden_state


def _call(model: nn.Module, ids: torch.Tensor, **given):
    """Call a model without a cache, with those of the arguments that it takes."""
    known = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    given = {name: value for name, value in (given | {"use_cache": False}).items() if takes_all or name in known}
    return model(input_ids=ids, **given)
