"""The Hugging Face hub: which paths mean it, and whether it can be reached."""

import functools
import os
import re

import huggingface_hub


def is_hub_name(path: str) -> bool:
    """Whether a path means org/name on the hub: it looks like one, and ./org is no folder, where it would be a mistyped path."""
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) and not path.endswith((".model", ".json", ".pt"))
    return bool(looks_like_one) and not os.path.isdir(path.split("/")[0])


@functools.cache
def is_reachable() -> bool:
    """One short request: without it a mistyped path or an offline machine would cost minutes of retries. False in offline mode."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # the type depends on the HTTP client that huggingface_hub was built on; whatever it is, there is no hub
        return False
    return True
