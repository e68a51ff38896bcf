"""Python values between ranks. All ranks call these, the same number of times."""

from collections.abc import Callable

from torch import distributed as dist


def gathered(value) -> list:
    """Every rank's value, on every rank. All ranks."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(action: Callable):
    """What `action` returns on rank 0, on every rank; its OSError or ValueError is raised on every rank. All ranks."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (OSError, ValueError) as error:
            box[1] = (ValueError if isinstance(error, ValueError) else OSError, str(error))
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        kind, message = box[1]
        raise kind(message)
    return box[0]
