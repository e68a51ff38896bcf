"""Columns, and keys of messages, that say of a row that it is bad or not to be trained: refused with the option that takes others.

What such a column is called is known by the last word of its name: is_safe, answer_correct, data_split.
"""

from data_prep.shapes.names import LABELS, VERDICTS, is_truth, quoted, words_of
from data_prep.splits import role_of
from posttrain.common.errors import shown_name
from posttrain.data.parts import Refused

GOOD = {"correct", "correctness", "verified", "valid", "passed", "pass", "good", "preferred", "helpful", "liked", "safe", "success"}
GOOD |= {"successful", "accepted", "approved", "usable", "upvoted", "right", "true"}
BAD = {
    "toxic",
    "harmful",
    "unsafe",
    "flagged",
    "duplicate",
    "duplicated",
    "deleted",
    "excluded",
    "exclude",
    "hallucination",
    "hallucinated",
}
BAD |= {"error", "wrong", "incorrect", "bad", "spam", "banned", "disliked", "downvoted", "invalid", "skip", "contaminated"}
GRADED = {"quality", "rating", "feedback", "thumbs", "verdict", "status", "judgement", "judgment", "grade", "result", "outcome", "score"}
GRADED |= {"correctness"}
TRAINED = {"train", "training", "trainable", "include", "included", "keep"}  # of a truth value
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "heldout", "holdout", "held"}
SPLITS = {"split", "partition", "subset", "fold", "set", "phase"}
# words of a name that speaks of one answer of several
OF_ANSWERS = {"chosen", "rejected", "response", "answer", "completion", "output", "a", "b", "preferred", "dispreferred"}
WEIGHTS = ("weight", "sample_weight", "train_weight", "loss_weight", "row_weight", "example_weight", "training_weight")
SAYS_BAD = {"bad", "wrong", "incorrect", "negative", "down", "thumbs_down", "thumbs down", "fail", "failed", "reject", "rejected", "unsafe"}
SAYS_BAD |= {"toxic", "invalid", "dislike", "disliked", "poor", "harmful", "spam", "error", "unusable"}
# words in the names of a number that rates a message
RATES = {"rating", "score", "reward", "rank", "quality", "grade", "vote", "votes", "upvotes", "thumbs", "up", "down", "label", "feedback"}


def may_say(name: str) -> bool:
    """Whether a column of this name may say that its row is not to be trained."""
    words = words_of(name)
    return bool(words) and (words[-1] in GOOD | BAD | GRADED | TRAINED | HELD_OUT | SPLITS or name.lower() in WEIGHTS or "out" in words)


def refuse_rating(name: str, shown: str, value) -> None:
    """Raise Refused for a column that rates the row's answer as good or bad: the name in small letters, and as the row has it."""
    is_one = is_truth(value) if name in VERDICTS else isinstance(value, int | float) or (isinstance(value, str) and len(value.split()) < 3)
    if name in VERDICTS | LABELS and is_one:
        good = "true" if is_truth(value) or value in (0, 1, "0", "1") else "VALUE"
        how = f"take the good ones with {quoted('--keep', f'{shown}={good}')}, or all with {quoted('--ignore', shown)}"
        raise Refused(f"{shown} rates the answer (unpaired preferences): {how}")
    if words_of(shown)[-1:] and words_of(shown)[-1] in GOOD | GRADED and (_is(value, False, words_of(shown)[-1]) or _says_bad(value)):
        raise Refused(_bad(shown, value))


def refuse_bad(shown: str, value, *, held_out: bool) -> None:
    """Raise Refused for a column that says of its row that it is not to be trained, or held out, where those are not asked for."""
    words = words_of(shown)
    last, text = words[-1] if words else "", str(value).strip().lower()
    if last in SPLITS and isinstance(value, str) and not held_out:
        if (words[-1] == "split" or text in HELD_OUT) and role_of(text) in ("validation", "test"):
            how = f"take the others alone with {quoted('--keep', f'{shown}=train')}, or all with {quoted('--ignore', shown)}"
            raise Refused(f"its {shown} is {value.strip()}: {how}")
        return
    is_out = last in HELD_OUT - {"valid"} and (len(words) > 1 or isinstance(value, bool))  # a number called test may be anything
    is_out = (is_out or words[-2:] == ["held", "out"]) and not held_out
    is_use = last in TRAINED and len(words) > 1
    if ((last in BAD or is_out) and _is(value, True, last)) or (is_use and _is(value, False, last)):
        raise Refused(_bad(shown, value))


def refuse_rated_message(key: str, value) -> None:
    """Raise Refused for a message's key that rates it, which no reader takes."""
    last = words_of(key)[-1:]
    is_number = isinstance(value, bool | int | float)
    if last and is_number and (last[0] in GOOD | RATES or (last[0] in BAD and value)):
        how = f"write weight, 0 or 1, by what it says, or leave it out with --ignore {shown_name(key)}"
        raise Refused(f"a message has {shown_name(key)}, which rates it: {how}")


def _is(value, wanted: bool, word: str) -> bool:
    """Whether a value says yes or no, as wanted, also as a letter or as 0 and 1; a grade of 0 says neither."""
    text = str(value).strip().lower()
    numbers = ("1", "1.0") if wanted else ("0", "0.0")
    return text in (("true", "yes", "y") if wanted else ("false", "no", "n")) or (text in numbers and word not in GRADED)


def _says_bad(value) -> bool:
    return isinstance(value, str) and value.strip().lower() in SAYS_BAD


def _bad(shown: str, value) -> str:
    """The cause of a row that a column says is not to be trained."""
    text = str(value).strip()
    how = f"={'false' if text.lower() == 'true' else 'true'}" if text.lower() in ("true", "false") else f"!={text}"
    how = f"take the others with {quoted('--keep', shown + how)}, or all with {quoted('--ignore', shown)}"
    return f"its {shown} is {text}, so it is not to be trained: {how}"
