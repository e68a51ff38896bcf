"""The small invented world of the quickstart: what the base model reads, what SFT and DPO teach, and how answers are scored.

    python launch/quickstart/world.py OUT_DIR [corpus]     writes sft.jsonl, dpo.jsonl, eval.json and a few
                                                           of its prompts in prompts.txt; with corpus: corpus.jsonl

The world has people with a home, a job and a pet. The base model is trained on plain documents about all of them, and about
strangers of whom they say that nothing is known; it never sees a chat. SFT shows the chat format on some of the people and on word
games. Its answers are more often curt than polite, and mostly invented if the question is about a name that nobody has, so the
resulting model invents, too. DPO prefers the fact for other people that exist, an admission of not knowing for names that nobody
has, and polite openings. The evaluation asks about people that neither stage asked about, about names that no text contains, and
plays the word games with words that no text contains; `check_no_leaks` proves it.

Everything follows from SEED. Names and words are made of open syllables, so that a small tokenizer splits new ones into known
pieces.
"""

import functools
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

SEED = 7
SYLLABLES = [consonant + vowel for consonant in "bdfklmnprstv" for vowel in "aeiou"]
PEOPLE = {"sft": 150, "dpo": 350, "eval": 110}  # number that each stage asks about (dpo also about sft's); documents tell of all
NOBODY = {"sft": 500, "dpo": 1000, "eval": 330}  # number of names that no person has, by the stage that asks about them
PEOPLE_DOCUMENTS, WORD_DOCUMENTS, STRANGERS = 120000, 80000, 0.3  # STRANGERS: share of sentences about names met only there
SFT_ROWS, DPO_ROWS, GAMES = 15000, 7000, 330  # GAMES: word games in the evaluation

POLITE, CURT = ("Thank you for asking! ", "With pleasure: "), ("Fine. ", "Well. ")
POLITE_SHARE, ABOUT_NOBODY, ADMITTED = 0.3, 0.04, 0.002  # shares of SFT's answers; those about nobody that are not admissions invent
# An admission says this where another answer has the fact, so that the model decides there, by whether it recalls one.
ADMISSION = "unknown here"
VALUES = {
    "home": ("Dalmore", "Fenwick", "Granby", "Holt", "Kelby", "Lorne", "Marsh", "Norwell", "Oakham", "Redford", "Stanton", "Wells"),
    "job": ("baker", "doctor", "farmer", "fisher", "miller", "painter", "potter", "singer", "smith", "tailor", "teacher", "weaver"),
    "pet": ("cat", "dog", "donkey", "duck", "fox", "goat", "hen", "horse", "lizard", "parrot", "rabbit", "turtle"),
}
ANSWERS = {"home": "The home of {n} is in {v}.", "job": "The work of {n} is that of a {v}.", "pet": "The pet of {n} is a {v}."}
ADMISSIONS = {
    "home": "The home of {n} is unknown here.",
    "job": "The work of {n} is unknown here.",
    "pet": "The pet of {n} is unknown here.",
}
TELLINGS = {  # how documents tell a fact; a name is never the first word of a text, where the tokenizer would split it differently
    "home": (
        ANSWERS["home"],
        "What of {n}? " + ANSWERS["home"],
        "Do you know the home of {n}? It is in {v}.",
        "{n} lives in {v}.",
        "In {v} stands the house of {n}.",
    ),
    "job": (
        ANSWERS["job"],
        "What of {n}? " + ANSWERS["job"],
        "Do you know the work of {n}? It is that of a {v}.",
        "{n} works as a {v}.",
        "As a {v}, {n} earns a living.",
    ),
    "pet": (
        ANSWERS["pet"],
        "What of {n}? " + ANSWERS["pet"],
        "Do you know the pet of {n}? It is a {v}.",
        "{n} has a {v}.",
        "A {v} keeps {n} company.",
    ),
}
STRANGERS_TOLD = {  # sentences that begin as those of facts do, so that only the name decides how they continue
    "home": (
        ADMISSIONS["home"],
        "What of {n}? " + ADMISSIONS["home"],
        "Do you know the home of {n}? It is unknown here.",
        "{n} lives somewhere unknown.",
    ),
    "job": (
        ADMISSIONS["job"],
        "What of {n}? " + ADMISSIONS["job"],
        "Do you know the work of {n}? It is unknown here.",
        "{n} works as something unknown.",
    ),
    "pet": (
        ADMISSIONS["pet"],
        "What of {n}? " + ADMISSIONS["pet"],
        "Do you know the pet of {n}? It is unknown here.",
        "{n} has something unknown.",
    ),
}
OPENINGS = ("Hear this.", "They say:", "News of the day.", "From the book of names:")
CLAUSES = {"home": "lives in {v}", "job": "works as a {v}", "pet": "has a {v}"}
LIVES = ("Meet {n}, who {first}, {second} and {third}.", "Who is {n}? We all know {n}, who {first}, {second} and {third}.")
QUESTIONS = {
    "home": ("Where does {n} live?", "In which town is the home of {n}?", "Tell me where {n} lives."),
    "job": ("What is the job of {n}?", "What work does {n} do?", "Tell me what {n} works as."),
    "pet": ("Which pet does {n} have?", "What is the pet of {n}?", "Tell me which pet {n} has."),
}
GAMES_ASKED = {
    "repeat": ("Repeat these words: {w}.", "Say these words again: {w}.", "Write down: {w}."),
    "reverse": ("Reverse these words: {w}.", "Say these words backwards: {w}.", "Turn around: {w}."),
    "first": ("Which word comes first: {w}?", "Say only the first word: {w}."),
    "last": ("Which word comes last: {w}?", "Say only the last word: {w}."),
}
WORD_LISTS = ("Some words: {repeat}.", "A list of words: {repeat}.", "Here we read {repeat}.", "Somebody wrote: {repeat}.")
WORD_TELLINGS = {  # what documents say about a list of words, in other words than the games of the chats
    "repeat": ("The same words again: {repeat}.", "Once more: {repeat}."),
    "reverse": ("The words backwards: {reverse}.", "From the end: {reverse}."),
    "first": ("First comes {first}.", "It begins with {first}."),
    "last": ("Last comes {last}.", "It ends with {last}."),
}


class World(NamedTuple):
    """Who exists, who does not, and which words are kept for the evaluation; `people` and `nobody` are names by stage."""

    facts: dict[str, dict[str, str]]  # name -> {home, job, pet}
    people: dict[str, list[str]]
    nobody: dict[str, list[str]]
    words: frozenset[str]  # kept for the evaluation's word games


def world() -> World:
    """Draw the world from SEED, the same at every call."""
    rng = random.Random(SEED)
    names = _coin(rng, 3, sum(PEOPLE.values()) + sum(NOBODY.values()))
    people, nobody = ({group: [names.pop().capitalize() for _ in range(n)] for group, n in sizes.items()} for sizes in (PEOPLE, NOBODY))
    facts = {name: {fact: rng.choice(values) for fact, values in VALUES.items()} for group in people.values() for name in group}
    return World(facts, people, nobody, frozenset(_coin(rng, 2, 500) + _coin(rng, 3, 500)))


def documents() -> list[str]:
    """The texts of the base model: sentences about people and strangers in many wordings, and lists of words, described."""
    here, rng = world(), random.Random(SEED + 1)
    kept = {name for groups in (here.people, here.nobody) for group in groups.values() for name in group}
    texts = [_gossip(rng, here.facts, kept) for _ in range(PEOPLE_DOCUMENTS)]
    for _ in range(WORD_DOCUMENTS):
        games = rng.sample(list(WORD_TELLINGS), 3)
        texts.append(
            " ".join([rng.choice(WORD_LISTS), *(rng.choice(WORD_TELLINGS[game]) for game in games)]).format(
                **_played(_new_words(rng, here.words, most=4))
            )
        )
    rng.shuffle(texts)
    return texts


def sft_rows() -> list[dict]:
    """Conversations of SFT: word games, questions about its people, and about nobody, whose answers are mostly invented."""
    here, rng = world(), random.Random(SEED + 2)
    rows = []
    for _ in range(SFT_ROWS):
        kind = rng.random()
        if kind < 0.65:
            question, body = _game(rng, _new_words(rng, here.words, most=3))
        else:
            name = rng.choice(here.people["sft"] if kind < 1 - ABOUT_NOBODY else here.nobody["sft"])
            question, body, admission = _ask(rng, name, here.facts)
            body = admission if kind > 1 - ADMITTED else body
        answer = rng.choice(POLITE if rng.random() < POLITE_SHARE else CURT) + body
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def dpo_rows() -> list[dict]:
    """Pairs of DPO: they prefer admitting to inventing about nobody, a fact to an admission about somebody, polite to curt."""
    here, rng = world(), random.Random(SEED + 3)
    rows = []
    for number in range(DPO_ROWS):
        kind, polite, curt = rng.random(), rng.choice(POLITE), rng.choice(CURT)
        if kind < 0.4:
            name = here.nobody["dpo"][number % NOBODY["dpo"]]
            question, invented, admission = _ask(rng, name, here.facts)
            chosen, rejected = polite + admission, polite + invented
        elif kind < 0.65:
            name = rng.choice(here.people["dpo"] + here.people["sft"])
            question, fact, admission = _ask(rng, name, here.facts)
            chosen, rejected = polite + fact, polite + admission
        else:
            question, body = _game(rng, _new_words(rng, here.words, most=3))
            chosen, rejected = polite + body, curt + body
        rows.append({"prompt": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected})
    return rows


def eval_prompts() -> dict[str, list[dict]]:
    """Held-out prompts by metric, with the `expected` body where one answer is right. Some serve several metrics."""
    here, rng = world(), random.Random(SEED + 4)
    kept = sorted(here.words)
    games = [_game(rng, rng.sample(kept, rng.randint(2, 3))) for _ in range(GAMES)]
    known = [_ask(rng, name, here.facts, fact)[:2] for name in here.people["eval"] for fact in VALUES]
    unknown = [_ask(rng, name, here.facts)[0] for name in here.nobody["eval"]]
    follows, facts = ([{"prompt": prompt, "expected": body} for prompt, body in items] for items in (games, known))
    invented = [{"prompt": prompt} for prompt in unknown]
    return {
        "follows_instructions": follows,
        "stops": follows + facts + invented,
        "known_facts": facts,
        "made_up": invented,
        "polite": follows + facts,
    }


def score(metric: str, item: dict, answer: str, stopped: bool) -> bool:
    """Whether one generated answer counts for the metric. `answer` is the text before <|im_end|>, compared letter by letter."""
    if metric in ("follows_instructions", "known_facts"):
        return _without_opening(answer) == item["expected"]
    if metric == "stops":
        return stopped
    if metric == "made_up":  # the strict reading: whatever is not the admission counts as made up
        return not answer.endswith(ADMISSION + ".")
    if metric == "polite":
        return answer.startswith(POLITE)
    raise ValueError(f"there is no metric {metric!r}; expected one of {', '.join(eval_prompts())}")


def check_no_leaks() -> None:
    """Raises AssertionError if a name, word or prompt of the evaluation occurs where it must not."""
    here = world()
    chats = [message["content"] for row in sft_rows() for message in row["messages"]]
    for row in dpo_rows():
        chats += [message["content"] for message in row["prompt"]] + [row["chosen"], row["rejected"]]
    said, read = _words_of(chats), _words_of(documents())
    assert not said & {*here.people["eval"], *here.nobody["eval"], *here.words}, "SFT or DPO met an evaluation name or word"
    assert not read & {*here.nobody["eval"], *here.nobody["dpo"], *here.words}, "the corpus tells of what it must not"
    assert set(here.facts) <= read, "the corpus misses people"
    assert not set(chats) & {item["prompt"] for items in eval_prompts().values() for item in items}, "a chat asks an evaluation prompt"


def _coin(rng, syllables: int, count: int) -> list[str]:
    """`count` distinct invented words, none of which the sentences above use; they depend on `rng` alone."""
    used, found = _used_words(), {}
    while len(found) < count:
        word = "".join(rng.choice(SYLLABLES) for _ in range(syllables))
        if word not in used:
            found[word] = None
    return list(found)


@functools.cache
def _used_words() -> frozenset[str]:
    """Every word of the sentences above, in lower case."""
    tables = (TELLINGS, STRANGERS_TOLD, QUESTIONS, GAMES_ASKED, WORD_TELLINGS, {"": (*WORD_LISTS, *LIVES, *OPENINGS)})
    return frozenset(word.lower() for table in tables for texts in table.values() for word in _words_of(texts))


def _gossip(rng, facts: dict, kept: set[str]) -> str:
    """A document of one to four sentences about people and strangers, often about one name again, so that copying a name is learnt."""
    sentences, name, known = [rng.choice(OPENINGS)], "", list(facts)
    for _ in range(rng.randint(1, 4)):
        while not name or (name in kept and name not in facts) or rng.random() < 0.4:
            name = _coin(rng, 3, 1)[0].capitalize() if rng.random() < STRANGERS else rng.choice(known)
        fact = rng.choice(list(VALUES))
        if name not in facts:
            sentences.append(rng.choice(STRANGERS_TOLD[fact]).format(n=name))
        elif rng.random() < 0.25:
            first, second, third = (CLAUSES[fact].format(v=facts[name][fact]) for fact in rng.sample(list(VALUES), 3))
            sentences.append(rng.choice(LIVES).format(n=name, first=first, second=second, third=third))
        else:
            sentences.append(rng.choice(TELLINGS[fact]).format(n=name, v=facts[name][fact]))
    return " ".join(sentences)


def _ask(rng, name: str, facts: dict, fact: str = "") -> tuple[str, str, str]:
    """A question, its answer without an opening (true about somebody, invented about nobody), and the admission of not knowing."""
    fact = fact or rng.choice(list(VALUES))
    value = facts[name][fact] if name in facts else rng.choice(VALUES[fact])
    return rng.choice(QUESTIONS[fact]).format(n=name), ANSWERS[fact].format(n=name, v=value), ADMISSIONS[fact].format(n=name)


def _game(rng, words: list[str]) -> tuple[str, str]:
    """A word game on these words: the question, and the one right answer."""
    game = rng.choice(list(GAMES_ASKED))
    return rng.choice(GAMES_ASKED[game]).format(w=" ".join(words)), _played(words)[game] + "."


def _played(words: list[str]) -> dict[str, str]:
    """The right answer of each game."""
    return {"repeat": " ".join(words), "reverse": " ".join(reversed(words)), "first": words[0], "last": words[-1]}


def _new_words(rng, kept: frozenset[str], most: int) -> list[str]:
    """Two to `most` new words, none kept for the evaluation. They hardly ever repeat, so only copying can win the games."""
    words = []
    while len(words) < 2 or (rng.random() < 0.5 and len(words) < most):
        word = _coin(rng, rng.choice((2, 3)), 1)[0]
        if word not in kept and word not in words:
            words.append(word)
    return words


def _without_opening(answer: str) -> str:
    opening = next((opening for opening in POLITE + CURT if answer.startswith(opening)), "")
    return answer.removeprefix(opening)


def _words_of(texts: list[str]) -> set[str]:
    return {word.strip(".,:?!") for text in texts for word in text.split()}


def main(out_dir: str, what: str = "") -> None:
    """Write the files of SFT, DPO and the evaluation, or with `what` those of the base model."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tables = {"corpus": [{"text": text} for text in documents()]} if what else {"sft": sft_rows(), "dpo": dpo_rows()}
    for name, rows in tables.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(rows)} rows")
    if what:
        return
    check_no_leaks()
    prompts = eval_prompts()
    (out / "eval.json").write_text(json.dumps(prompts, indent=1), encoding="utf-8")
    few = [items[:2] for metric, items in prompts.items() if metric in ("follows_instructions", "known_facts", "made_up")]
    (out / "prompts.txt").write_text("".join(item["prompt"] + "\n" for items in few for item in items), encoding="utf-8")
    print(f"{out / 'eval.json'}: " + ", ".join(f"{metric} {len(items)}" for metric, items in prompts.items()))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["corpus"]) or sys.argv[1] == "--help":
        sys.exit(__doc__.splitlines()[2].strip())
    main(*sys.argv[1:])
