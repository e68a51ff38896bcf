"""The Hugging Face hub: which paths are names on it, and whether it can be reached."""

import functools
import os
import re


def is_hub_name(path: str) -> bool:
    """Whether a path is a name on the hub: it looks like org/name, and there is no folder ./org, in which it would be a mistyped path."""
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) and not path.endswith((".model", ".json", ".yaml", ".yml", ".pt"))
    return bool(looks_like_one) and not os.path.isdir(path.split("/")[0])


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers one short request; False in offline mode. Saves a mistyped path or an offline machine minutes of retries."""
    import huggingface_hub  # in here: to tell a hub name from a path nothing is imported

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # the error's type depends on huggingface_hub's HTTP client; any error means that the hub is out of reach
        return False
    return True
