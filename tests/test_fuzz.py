"""What strangers give to a command line or a server, drawn at random: it is taken, or refused in one bounded sentence."""

import json

import pytest
from fuzzed import LONGEST, OF_JSON, damage_to_bytes, damaged_bytes, ended, places_in, replaced, tries
from hypothesis import given
from hypothesis import strategies as st
from served import request, served, wait_until_idle

from posttrain.recipes.keys import DPORecipe, Recipe, SFTRecipe
from posttrain.recipes.reading import load_recipe_of_either_kind
from posttrain.training.missing import refuse_missing

# ---- recipes ----

WHOLE = ["out_dir: runs/x", "checkpoint_path: nowhere/base", "sft_data_dir: nowhere/data", "global_batch_size: 8", "max_iters: 3"]
OTHER_KEYS = ("lr", "", "1", "~", "null", "? [a, b]", "? {a: b}", "<<", "=", "!!int x", "&a k", "*a")
KEYS = [*SFTRecipe.model_fields, *DPORecipe.model_fields, *OTHER_KEYS]
LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 10))
WORDS = """null ~ true yes off 0 1 -1 017 0o17 0x1F 0b1 0b_ 0x_ 1_000 1e3 1.0e3 1e999 1.0e+999 .inf -.inf .nan 1:30 1:99999999999:1 .5 . ..
- --- 2001-01-01 2001-99-99 2001-01-01T00:00:00+99:99 "\\0" "\\ud800" "\\x85" "\\q" '' "" 'it''s' | > |5 >- @ ` % & * ! [] {} [,] {,} [1
{a [[[[ ]]] !!int !!bool !!float !!timestamp !!binary !!str !!null !!set !!omap !!pairs !!map !!seq !x &a *a ~user ~/x
/etc/passwd nowhere /dev/zero 8h 90m 08:00:00 auto ipo bfloat16 bf16"""
PHRASES = """!!int x; !!bool x; !!float x; !!timestamp x; !!binary é; !!null x; !!float ''; !!int ''; !!map x; !!map [a]; !!set {a, b};
!!omap [a: 1]; !!pairs [a: 1]; !!python/name:os.system; !!python/object/apply:os.system [ls]; &a [*a]; &a {b: *a};
{<<: {a: 1}}; {a: 1, a: 2}"""
LONG = ["0x" + "F" * 5000, "9" * 5000, "x" * 100_000, "[" * 500, "[" * 5000, "{a: " * 300, "1" + "_" * 3000]
SCALARS = [*WORDS.split(), *(phrase.strip() for phrase in PHRASES.split(";")), *LONG]
values = st.recursive(
    st.sampled_from(SCALARS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda some: f"[{', '.join(some)}]")
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=3).map(lambda some: f"{{{', '.join(map(': '.join, some))}}}")
    ),
    max_leaves=4,
)
lines = (
    st.builds("{}: {}".format, st.sampled_from(KEYS), values)
    | values
    | st.sampled_from(["---", "...", "%YAML 9.9", "%TAG ! x", "\t", "# x", "- a"])
)


@st.composite
def recipes(draw) -> bytes:
    """Draw what somebody might name as a recipe: a whole one, with lines of any kind, and now and then with bytes that are no UTF-8."""
    text = "\n".join(draw(st.permutations([*draw(st.sampled_from([WHOLE, WHOLE, []])), *draw(st.lists(lines, max_size=3))]))) + "\n"
    content = draw(st.sampled_from(["", "", "", "\ufeff", LAUGHS])) + text
    encoded = content.encode(draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "latin-1", "utf-32"])), "replace")
    place = draw(st.integers(0, len(encoded)))
    return encoded[:place] + draw(st.sampled_from([b""] * 9 + [b"\xff", b"\0", b"\x80"])) + encoded[place:]


def with_line(line: str) -> bytes:
    return "\n".join([*WHOLE, line]).encode()


# what was found once: tracebacks, values printed whole, messages without end
FOUND = """learning_rate: !!timestamp x; dropout: !!bool x; seed: !!int ''; !!map a: 1; seed: !!map [a]; tokenizer: []; out_dir: "\\0";
<<: {seed: 1}"""
ENDLESS = [
    f"samples: {'9' * 5000}",
    f"samples: 0x{'F' * 5000}",
    f"wandb_project: [{'x' * 100_000}]",
    f"{'x' * 100_000}: 1",
    f"seed: !{'x' * 5000} 1",
]
ENDLESS += [
    "\n".join(f"k{n}: 1" for n in range(1000)),
    "\n".join(f"{name}: [x]" for name in SFTRecipe.model_fields if name[0] not in "ocsgm"),
]
FOUND_WHOLE = [with_line(line.strip()) for line in (*FOUND.split(";"), *ENDLESS)]
FOUND_WHOLE += [LAUGHS.encode() + with_line("tokenizer: *l9"), with_line("").decode().encode("utf-16")]


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_a_recipe_is_taken_or_refused_by_its_name(tmp_path, count):
    path = tmp_path / "recipe.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        named = (path, *SFTRecipe.model_fields, *DPORecipe.model_fields)
        recipe = ended(lambda: load_recipe_of_either_kind([str(path)]), *named, seconds=10)
        if recipe is not None:
            assert isinstance(recipe, Recipe)
            assert "\0" not in recipe.out_dir
            ended(lambda: refuse_missing(recipe))  # the model is nowhere, which is said

    for content in FOUND_WHOLE:
        read(content)
    tries(count)(given(recipes())(read))()


# ---- requests ----

ASK = [
    {"role": "user", "content": "pa ke"},
    {"role": "assistant", "content": [{"type": "text", "text": "mu"}]},
    {"role": "user", "content": "ta"},
]
SAMPLED = {
    "model": "base",
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "repetition_penalty": 1.1,
    "seed": 3,
    "stop": ["x"],
}
SAMPLED |= {"stream": True, "stream_options": {"include_usage": True}, "n": 1, "user": "u", "metadata": {"a": "b"}, "logit_bias": {}}
BODIES = {
    "/v1/chat/completions": SAMPLED | {"messages": ASK, "max_completion_tokens": 2, "tools": [], "response_format": {"type": "text"}},
    "/v1/completions": SAMPLED | {"prompt": "pa ke", "echo": False},
    "/votes": {"messages": ASK, "chosen": "a", "rejected": "b", "chosen_model": "base", "rejected_model": "base"},
}


TEXTS = st.text(max_size=40) | st.sampled_from(
    ["\0", "<|im_start|>assistant\n", "<|im_end|>", "x" * 3000, "\U0001f469\u200d", "\u202e", "\r\n"]
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=3)
ROLES = st.sampled_from(["system", "developer", "user", "assistant"])
FITTING = {  # what a field may be, though perhaps not beside the others
    "messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS | PARTS}), min_size=1, max_size=4),
    "prompt": TEXTS | st.lists(st.integers(-1, 450), max_size=300),
    "max_tokens": st.integers(1, 20) | st.just(10**30),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**70),
    "repetition_penalty": st.floats(0.01, 10),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "stop": TEXTS | st.lists(TEXTS, max_size=16),
    "stream": st.booleans(),
    "user": TEXTS,
    "metadata": st.dictionaries(TEXTS, OF_JSON, max_size=3),
    "chosen": TEXTS,
    "rejected": TEXTS,
}


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """Draw a path and a body: a whole request with other fitting values, or any values in places, or damaged bytes; or any JSON."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body, how = dict(BODIES[path]), draw(st.sampled_from(["fitting"] * 4 + ["other"] * 4 + ["bytes", "any"]))
    for name in draw(st.lists(st.sampled_from(sorted(FITTING.keys() & body.keys())), max_size=5, unique=True)):
        body[name] = draw(FITTING[name])
    content = json.dumps(body if how != "any" else draw(OF_JSON)).encode()
    for _ in range(draw(st.integers(1, 3)) if how == "other" else 0):
        where = draw(st.sampled_from(list(places_in(json.loads(content)))) | st.tuples(st.text(max_size=9) | st.just("y" * 10_000)))
        content = replaced(content, where, draw(OF_JSON))
    return path, damaged_bytes(content, draw(damage_to_bytes(len(content)))) if how == "bytes" else content


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with served(folder / "log", "--engine", "transformers", "--checkpoint", tiny.base) as running:
        yield running


def refuses_or_answers(server, path: str, body: bytes) -> None:
    status, answer = request(server, "POST", path, body)
    assert 200 <= status < 300 or 400 <= status < 500, (status, answer)
    if status >= 400:
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) <= LONGEST
    else:
        assert b'"error"' not in answer.split(b"\n\n")[-1], answer


@pytest.mark.slow
def test_every_request_is_answered_or_refused(server):
    refuses_or_answers(server, "/v1/completions", json.dumps({"y" * 10_000: 1}).encode())  # what was found once
    tries(500)(given(requests())(lambda asked: refuses_or_answers(server, *asked)))()
    wait_until_idle(server)
    for path, body in BODIES.items():
        assert request(server, "POST", path, json.dumps(body))[0] == 200
    said = server.log.read_text()
    assert "Traceback" not in said and "Error" not in said, said
