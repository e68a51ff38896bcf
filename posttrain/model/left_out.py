"""Tells which tensors of a model's files are rightly no part of the model that is trained, and takes wrappers' prefixes off names."""

import re

from transformers import PreTrainedModel

# what torch.compile, DDP, DeepSpeed, FSDP and PEFT put before the names of all tensors, or of those of a part of the model
WRAPPERS = (r"^(?:(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module|base_model\.model)\.)+", r"(?<=\.)_orig_mod\.")
LAYER = re.compile(r".*?\blayers\.(\d+)\.")
MTP, MTP_LAYER = re.compile(r"(?:^|\.)mtp"), re.compile(r"\.(?:eh_proj|enorm|hnorm)\.weight$")  # DeepSeek's MTP layers follow the others
COMPUTED = re.compile(r"(?:^|[._])(?:inv_freq|position_ids|masked_bias|cos_cached|sin_cached)$")  # constants that older versions saved
MASK = re.compile(r"\.(?:attn|attention)\.bias$")  # of four dimensions: GPT-2's causal mask, a constant, too


def unwrapped(name: str) -> str:
    """Return a tensor's name without the prefixes of WRAPPERS."""
    for pattern in WRAPPERS:
        name = re.sub(pattern, "", name, count=1)
    return name


def sort_out(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], unexpected: set[str]) -> tuple[list[str], list[str]]:
    """Return sentences about the tensors of a file that are rightly left out, and the names of those that should not be.

    `shapes` are those of the file's tensors, `unexpected` the names that transformers reports. It does not report all that it leaves out:
    patterns of the model's class hide some.
    """
    names = {unwrapped(name): shape for name, shape in shapes.items()}
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0
    hidden = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    ahead = {layer[0] for name in names if MTP_LAYER.search(name) and (layer := LAYER.match(name))}
    reasons: dict[str, list[str]] = {}
    refused = set(unexpected)
    for name in sorted((names.keys() | unexpected) - set(model.state_dict())):
        layer = LAYER.match(name)
        beyond = layer is not None and int(layer[1]) >= depth
        if MTP.search(name) or (beyond and layer[0] in ahead):
            reason = "of multi-token prediction, which is not trained"
        elif COMPUTED.search(name) or (MASK.search(name) and len(names.get(name, ())) == 4):
            reason = "which are constants that the model computes"
        elif any(pattern.search(name) for pattern in hidden) and (beyond or layer is None):
            reason = "which transformers does not use" if layer is None else ""
        else:
            continue
        reasons.setdefault(reason, []).append(name)
    refused = (refused | set(reasons.pop("", ()))).difference(*reasons.values())
    notes = [f"left out: {len(found)} tensors ({found[0]}{', ...' * (len(found) > 1)}) {reason}" for reason, found in reasons.items()]
    if wrapped := [name for name in shapes if unwrapped(name) != name]:
        notes.append(f"{len(wrapped)} tensors are read without a wrapper's prefix: {wrapped[0]} as {unwrapped(wrapped[0])}")
    return notes, sorted(refused)
