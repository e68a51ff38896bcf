"""The names that public datasets and trainers give to columns: what each holds, and which would be missed where no reader takes them."""

import functools
import re
import shlex
from collections.abc import Iterator

# What a column holds, and the names for it, in the order in which they are looked for. A name may stand in several lines: what it holds is
# then decided by the columns beside it.
NAMES = {
    "prompt": ("instruction", "prompt", "question", "query", "inputs", "problem", "input"),
    "context": ("input", "context"),
    # a short answer may stand beside its solution
    "answer": ("output", "response", "completion", "solution", "answer", "targets"),
    "system": ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "history": ("history",),
    "messages": ("messages", "conversations", "conversation"),
    "thinking": ("reasoning_content", "reasoning", "thinking", "complex_cot", "chain_of_thought"),
    "chosen": ("chosen", "preferred_output"),
    "rejected": ("rejected", "non_preferred_output"),
    "tools": ("tools", "functions", "toolconfig"),
    "text": ("text",),
}
# columns whose content would be missed, where no reader has taken them: all of the above, and these
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "objects", "img", "image_path", "image_paths", "image_url", "image_urls")
MEDIA += ("pixel_values", "audio_path", "video_path")
LABELS = {"label", "labels", "kto_tag", "is_desirable", "desirable", "is_correct", "is_good", "accepted", "thumbs_up"}
MASKS = ("weights", "loss_masks", "train_mask", "assistant_mask", "assistant_masks", "assistant_only_mask", "loss", "train", "mask_history")
PASSAGES = ("passage", "passages", "document", "documents", "article", "background", "knowledge")
OTHERS = ("weight", "loss_mask", "chat_template_kwargs", "completions", "answers", "options", "choices", "summary")
MISSED = {*MEDIA, *LABELS, *MASKS, *PASSAGES, *OTHERS, *(name for names in NAMES.values() for name in names)}
MISSED_OF_PAIRS = MISSED - {*NAMES["answer"], "text"}  # a third answer is of no use there, and so only told
# names that say whether an answer is right or liked, where the value is a truth value; others may count or grade
VERDICTS = {"is_true", "correct", "correctness", "verified", "is_verified", "passed", "valid", "is_valid", "preferred", "good", "upvoted"}
VERDICTS |= {"helpful", "is_helpful", "liked"}
# words in the name of a column whose text belongs before an answer, by the key of NAMES that they come near
WORDS = {
    "thinking": {"cot", "thought", "thoughts", "think", "thinking", "rationale", "rationales", "reason", "reasoning", "scratchpad"},
    "system": {"sys", "system", "persona", "preamble", "instructions"},
    "context": {"context", "contexts", "paragraph", "paragraphs", "evidence", "evidences", "facts", "hint", "hints", "snippet", "snippets",
                "passage", "passages", "document", "documents", "docs", "article", "background", "schema", "excerpt", "premise", "story",
                "ctx", "ctxs", "retrieved", "grounding", "knowledge", "table", "tables", "shot", "shots", "fewshot",
                "demonstrations", "exemplars"},
    "history": {"history", "dialog", "dialogue", "dialogs", "conversation", "turns"},
}  # fmt: skip
# words that a tool's name goes with where a column describes tools, and a result's where one holds what was found
OF_TOOLS = {"available", "definition", "definitions", "defs", "list", "schema", "schemas", "spec", "specs", "descriptions"}
OF_RESULTS = {"search", "web", "google", "bing", "retrieval", "retrieved", "retriever"}
# what says whether, or how much, is thought
SWITCHES = {"on", "off", "true", "false", "yes", "no", "none", "enabled", "disabled", "enable", "disable", "low", "medium", "high", "max"}
SWITCHES |= {
    "xhigh",
    "min",
    "minimal",
    "auto",
    "adaptive",
    "default",
    "think",
    "no_think",
    "nothink",
    "short",
    "long",
    "detailed",
    "concise",
}
LISTS = ("completions", "answers", "responses", "candidates", "generations")  # columns with several answers
SPEAKER_KEYS = ("speaker", "author", "sender", "who", "user_type", "by")  # keys of a message that say who speaks
TEXT_KEYS = ("text", "message", "body", "utterance", "said", "content", "value")  # and what
# last words of a name that say something about such a text
ABOUT = {"id", "ids", "url", "urls", "uri", "link", "type", "kind", "title", "name", "names", "length", "len", "count", "tokens", "lang"}
ABOUT |= {"language", "source", "date", "category", "topic", "topics", "model", "hash", "score", "scores", "index", "idx", "domain"}
ABOUT |= {"label"}
# choices of a question, each in a column of its own: opa, option_a, choice1, A
CHOICE = re.compile(r"(op|opt|option|choice|ending|distractor|alternative|answer)_?[a-e1-5]|[a-e]|(in)?correct_answer_?[1-5]")
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def quoted(option: str, value: str) -> str:
    """An option with its value as a shell takes it."""
    return f"{option} {shlex.quote(value)}"


@functools.lru_cache(1024)
def words_of(name: str) -> list[str]:
    """The words of a column's name, in small letters: those between other signs, and those of humps, as in reasonSteps."""
    return [*dict.fromkeys(re.findall(r"[a-z]+", f"{name} {HUMP.sub(' ', name.replace('CoT', 'Cot'))}".lower()))]


@functools.lru_cache(1024)
def near(name: str) -> str | None:
    """What a column likely holds whose name has a word for it, a key of WORDS; or a choice of a question; None for any other."""
    if CHOICE.fullmatch(name.lower()):
        return "choice"
    words = words_of(name)
    if not words or words[-1] in ABOUT:
        return None
    if not {"tool", "tools", "function", "functions"}.isdisjoint(words) and not OF_TOOLS.isdisjoint(words):
        return "tools"
    if "results" in words and not OF_RESULTS.isdisjoint(words):
        return "context"
    return next((what for what, known in WORDS.items() if not known.isdisjoint(words)), None)


def is_content(what: str, value) -> bool:
    """Whether the value of a column that is near to `what` would be missed: sentences, not one word; of a choice, any text."""
    if what == "choice":
        return isinstance(value, str)
    if what == "tools":
        return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))
    return any(len(text.split()) > 1 for text in _texts(value))


def _texts(value) -> Iterator[str]:
    """Yield the texts in a value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def is_truth(value) -> bool:
    """Whether a value says yes or no, also as text."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no"))


def is_switch(value) -> bool:
    """Whether a value says if or how much is thought, as low, auto or a number of tokens, and is no thinking itself."""
    if isinstance(value, dict):
        return value.keys() <= {"type", "budget_tokens", "enabled", "effort"} and all(map(is_switch, value.values()))
    return isinstance(value, bool | int | float) or (isinstance(value, str) and value.strip().lower().removeprefix("/") in SWITCHES)
