"""What the fuzz tests share: how many tries they make, damage to files, and which end of an action counts as clean."""

import contextlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import distributed as dist

from posttrain.common.errors import is_mistake

HUNT = int(os.environ.get("FUZZ_TRIES", "0"))  # so many tries from a new seed; 0: always the same ones, as many as each test says
LONGEST = 2000  # characters of a message
MEMORY = 2**30  # bytes that an action may take besides what the process has
SECONDS = 20  # that an action may take, on a busy machine


def tries(count: int) -> settings:
    """Settings for a test of `count` tries, which are the same each time unless FUZZ_TRIES asks to hunt for new faults."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example, HealthCheck.data_too_large]
    return settings(max_examples=HUNT or count, derandomize=not HUNT, database=None, deadline=None, suppress_health_check=slow)


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fail if the block takes longer; what it takes of memory beyond `memory` bytes is refused by the system."""

    def too_long(*_) -> None:
        pytest.fail(f"it takes longer than {seconds} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before, handler = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize(), signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (before + memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def ended(action: Callable, *places, **limits):
    """Return what an action returns, None where it told a mistake. Anything else that it raises escapes, and fails the test.

    The message of a mistake is bounded, names one of `places`, and is not that the memory was too little.
    """
    try:
        with bounded(**limits):
            return action()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        if not is_mistake(error):
            raise
        assert len(message) <= LONGEST, (len(message), message[:300])
        assert not places or any(str(place) in message for place in places), message
        assert not any(word in message.lower() for word in ("memoryerror", "allocat", "enough memory")), message
        return None


# values of every type and size that JSON has, some of which Python's parser takes and JSON has not
SCALARS = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**9, 10**30, 10**400, 0.5, -1.5, 1e300, float("inf"), float("nan")]
SCALARS += ["", "x", "1", "\0", "\ud800", "null", "float32", "../x", "/etc/passwd", "y" * 10_000, "\x1b[31m", "\u202e"]
VALUES: list = [*SCALARS, [], {}, [1], ["x"], [None], [[1]], {"a": 1}, {"": None}, [1] * 10_000, {str(n): n for n in range(1000)}]
OF_JSON = st.sampled_from(VALUES) | st.recursive(
    st.sampled_from(SCALARS) | st.text(max_size=5) | st.integers(-(2**70), 2**70) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places_in(value, where=()) -> Iterator[tuple]:
    """Yield the path to every value in a JSON value, to the first 40 of each list or object."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, one in inner[:40]:
        yield (*where, key)
        yield from places_in(one, (*where, key))


@st.composite
def damage_to_bytes(draw, size: int, begin: int = 2**16):
    """Draw how bytes are damaged, as (how, place, value): a flipped bit, mostly among the first `begin`, a cut, or other bytes."""
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "put", "zeros"]))
    place = draw(st.integers(0, max(0, min(size, begin) - 1)) | st.integers(0, max(0, size - 1)))
    return how, place, draw(st.integers(0, 7) if how == "flip" else st.binary(min_size=1, max_size=9))


def damaged_bytes(content: bytes, damage: tuple) -> bytes:
    how, place, value = damage
    if how == "flip" and content:
        return content[:place] + bytes([content[place] ^ 1 << value]) + content[place + 1 :]
    if how == "cut":
        return content[:place]
    if how == "zeros":
        return content[:place] + bytes(len(content) - place)
    return content[:place] + (value if isinstance(value, bytes) else b"") + content[place + 1 :]


def replaced(content: bytes, where: tuple, value) -> bytes:
    """Return a JSON text with another value at a path; the value ... removes the key."""
    whole = json.loads(content)
    inner = whole
    for key in where[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return json.dumps(whole).encode()


def damage(files: dict[str, bytes]):
    """Draw (file, damage) of one of these files: to its bytes, or for JSON to one of its values, which another takes the place of."""

    @st.composite
    def drawn(draw):
        name = draw(st.sampled_from(sorted(files)))
        if name.endswith(".json") and draw(st.booleans()):
            where = draw(st.sampled_from(list(places_in(json.loads(files[name])))))
            return name, where, draw(OF_JSON | st.just(...))
        return name, *draw(damage_to_bytes(len(files[name])))

    return drawn()


def put(folder: Path, files: dict[str, bytes], name: str, *how) -> None:
    """Write one file of a folder anew, damaged."""
    content = files[name]
    damaged = damaged_bytes(content, how) if len(how) == 3 else replaced(content, *how)
    (folder / name).write_bytes(damaged)


def files_of(folder: Path, *left_out: str) -> dict[str, bytes]:
    """Every file of a folder and of those in it, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(left_out or ("\0",))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@contextlib.contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A process group of one, as training has it; another test of this process may have left one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
