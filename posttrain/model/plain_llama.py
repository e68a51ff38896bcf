"""The model in a ckpt.pt written out in plain torch, to compare conversions with: it shares no code with transformers."""

import torch


@torch.no_grad()
def ckpt_pt_logits(content: dict, ids: torch.Tensor) -> torch.Tensor:
    """Return float32 logits (T, V) of ids (T,) for a ckpt.pt's content, as ckpt_pt.read gives it.

    The architecture is Llama's (pre-norm, rotary positions, gated feed-forward), but rotary pairs are neighbours in a head.
    """
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in content["model"].items()}
    args, time = content["model_args"], len(ids)
    heads, dim = args["n_head"], state["token_embeddings.weight"].shape[1]
    head = dim // heads

    def weight(name: str) -> torch.Tensor:
        return state[f"{name}.weight"].float()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + args["norm_eps"]) * weight(name)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (heads, T, head)
        angle = torch.outer(torch.arange(time).float(), args["rope_theta"] ** (-torch.arange(0, head, 2) / head))
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
        return torch.stack(pairs, -1).flatten(-2)

    x = weight("token_embeddings")[ids]
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        block = f"blocks.{i}"
        h = norm(x, f"{block}.norm1")
        if f"{block}.attn.c_attn.weight" in state:
            q, k, v = (h @ weight(f"{block}.attn.c_attn").T).chunk(3, -1)
        else:
            q, (k, v) = h @ weight(f"{block}.attn.c_q").T, (h @ weight(f"{block}.attn.c_kv").T).chunk(2, -1)
        q, k, v = (t.view(time, -1, head).transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
        scores = rotate(q) @ rotate(k).transpose(1, 2) / head**0.5
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(time, dim) @ weight(f"{block}.attn.c_proj").T
        h = norm(x, f"{block}.norm2")
        gate, value = h @ weight(f"{block}.ffn.w_gate").T, h @ weight(f"{block}.ffn.w_value").T
        x = x + (torch.nn.functional.silu(gate) * value) @ weight(f"{block}.ffn.w_out").T
    return norm(x, "final_norm") @ weight("lm_head").T
