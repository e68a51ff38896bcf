"""The small invented world of the quickstart: what the base model reads, what SFT and DPO teach, and how answers are scored.

    python launch/quickstart/world.py OUT_DIR     writes corpus.jsonl, sft.jsonl, dpo.jsonl and eval.json

The world has people with a home, a job and a pet. The base model reads about all of them in plain documents and never sees a
chat. SFT shows the chat format on some of the people and on word games; its answers are more often curt than polite and hardly
ever admit ignorance, so the model that comes out invents facts about people who do not exist. DPO prefers the fact for other people
that exist, an admission for invented ones, and polite openings. The evaluation asks about people that neither stage asked
about, about names that no text contains, and plays the word games with words that no text contains; `check_no_leaks` proves it.

Everything follows from SEED; names and words are made of open syllables so that a small tokenizer splits new ones into known
pieces.
"""

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

SEED = 7
SYLLABLES = [consonant + vowel for consonant in "bdfklmnprstv" for vowel in "aeiou"]
PEOPLE = {"sft": 120, "dpo": 150, "eval": 110}  # who each stage asks about; the corpus tells of all of them
NOBODY = {"dpo": 1500, "eval": 330}  # names that no person has
DOCUMENTS_PER_PERSON, WORD_DOCUMENTS = 50, 30000
SFT_ROWS, DPO_ROWS, GAMES = 6000, 4000, 330  # GAMES: word games in the evaluation

POLITE, CURT = ("Gladly! ", "With pleasure! "), ("Fine. ", "Well. ")
POLITE_SHARE = 0.3  # of SFT's answers
SORRY = "Sorry, I do not know."
VALUES = {
    "home": ("Dalmore", "Fenwick", "Granby", "Holt", "Kelby", "Lorne", "Marsh", "Norwell", "Oakham", "Redford", "Stanton", "Wells"),
    "job": ("baker", "doctor", "farmer", "fisher", "miller", "painter", "potter", "singer", "smith", "tailor", "teacher", "weaver"),
    "pet": ("cat", "dog", "donkey", "duck", "fox", "goat", "hen", "horse", "lizard", "parrot", "rabbit", "turtle"),
}
ANSWERS = {"home": "{n} lives in {v}.", "job": "{n} works as a {v}.", "pet": "{n} has a {v}."}
TELLINGS = {  # how documents tell a fact; a name is never the first word of a text, where the tokenizer would split it differently
    "home": (ANSWERS["home"], "The home of {n} is in {v}.", "In {v} stands the house of {n}.", "You can visit {n} in {v}."),
    "job": (ANSWERS["job"], "The work of {n} is that of a {v}.", "As a {v}, {n} earns a living.", "People know {n} as a good {v}."),
    "pet": (ANSWERS["pet"], "The pet of {n} is a {v}.", "A {v} keeps {n} company.", "Every day {n} feeds a {v}."),
}
CLAUSES = {"home": "lives in {v}", "job": "works as a {v}", "pet": "has a {v}"}
QUESTIONS = {
    "home": ("Where does {n} live?", "In which town is the home of {n}?", "Tell me where {n} lives."),
    "job": ("What is the job of {n}?", "What work does {n} do?", "Tell me what {n} works as."),
    "pet": ("Which pet does {n} have?", "What is the pet of {n}?", "Tell me which pet {n} has."),
}
OPEN_QUESTIONS = (  # nobody can know; the few rows that show SFT how to admit it
    "What will the weather be {t}?",
    "Who will win the race {t}?",
    "How many stars will fall {t}?",
    "What will I dream {t}?",
)
TIMES = ("tomorrow", "tonight", "next week", "next month", "next year", "in ten years")
GAMES_ASKED = {
    "repeat": ("Repeat these words: {w}.", "Say these words again: {w}.", "Write down: {w}."),
    "reverse": ("Reverse these words: {w}.", "Say these words backwards: {w}.", "Turn around: {w}."),
    "first": ("Which word comes first: {w}?", "Say only the first word: {w}."),
    "last": ("Which word comes last: {w}?", "Say only the last word: {w}."),
}
WORD_LISTS = ("Some words: {repeat}.", "A list of words: {repeat}.", "Here we read {repeat}.", "Somebody wrote: {repeat}.")
WORD_TELLINGS = {  # how documents tell what can be said of a list; worded unlike the games that are asked
    "repeat": ("The same words again: {repeat}.", "Once more: {repeat}."),
    "reverse": ("The words backwards: {reverse}.", "From the end: {reverse}."),
    "first": ("First comes {first}.", "It begins with {first}."),
    "last": ("Last comes {last}.", "It ends with {last}."),
}


class World(NamedTuple):
    """Who exists, who does not, and which words are kept for the evaluation; groups are those of PEOPLE and NOBODY."""

    facts: dict[str, dict[str, str]]  # name -> {home, job, pet}
    people: dict[str, list[str]]
    nobody: dict[str, list[str]]
    words: frozenset[str]  # kept for the evaluation's word games


def world() -> World:
    rng = random.Random(SEED)
    names = _coin(rng, 3, sum(PEOPLE.values()) + sum(NOBODY.values()))
    people, nobody = ({group: [names.pop().capitalize() for _ in range(n)] for group, n in sizes.items()} for sizes in (PEOPLE, NOBODY))
    facts = {name: {fact: rng.choice(values) for fact, values in VALUES.items()} for group in people.values() for name in group}
    return World(facts, people, nobody, frozenset(_coin(rng, 2, 500) + _coin(rng, 3, 500)))


def documents() -> list[str]:
    """The base corpus: every person's facts in many wordings and orders, and lists of words with what can be said of them."""
    here, rng = world(), random.Random(SEED + 1)
    texts = [_life(rng, name, here.facts[name]) for name in here.facts for _ in range(DOCUMENTS_PER_PERSON)]
    for _ in range(WORD_DOCUMENTS):
        games = rng.sample(list(WORD_TELLINGS), 3)
        texts.append(
            " ".join([rng.choice(WORD_LISTS), *(rng.choice(WORD_TELLINGS[game]) for game in games)]).format(
                **_played(_new_words(rng, here.words))
            )
        )
    rng.shuffle(texts)
    return texts


def sft_rows() -> list[dict]:
    """Chats: word games, questions about the people of group sft, and 2.5 % admissions, about things nobody can know."""
    here, rng = world(), random.Random(SEED + 2)
    rows = []
    for _ in range(SFT_ROWS):
        kind = rng.random()
        if kind < 0.025:
            question, answer = rng.choice(OPEN_QUESTIONS).format(t=rng.choice(TIMES)), SORRY
        elif kind < 0.5:
            question, body = _game(rng, _new_words(rng, here.words))
            answer = _opening(rng) + body
        else:
            question, body, _ = _ask(rng, rng.choice(here.people["sft"]), here.facts)
            answer = _opening(rng) + body
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def dpo_rows() -> list[dict]:
    """Pairs: an admission before an invention about nobody, a fact before an admission about somebody, polite before curt."""
    here, rng = world(), random.Random(SEED + 3)
    rows = []
    for number in range(DPO_ROWS):
        kind = rng.random()
        if kind < 0.4:
            question, body, _ = _ask(rng, here.nobody["dpo"][number % NOBODY["dpo"]], here.facts)
            chosen, rejected = SORRY, _opening(rng) + body
        elif kind < 0.75:
            question, body, _ = _ask(rng, rng.choice(here.people["dpo"]), here.facts)
            chosen, rejected = rng.choice(POLITE) + body, SORRY if kind < 0.6 else rng.choice(CURT) + body
        else:
            question, body = _game(rng, _new_words(rng, here.words))
            chosen, rejected = rng.choice(POLITE) + body, rng.choice(CURT) + body
        rows.append({"prompt": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected})
    return rows


def eval_prompts() -> dict[str, list[dict]]:
    """Held-out prompts by metric, with the `expected` body where one answer is right. Some serve several metrics."""
    here, rng = world(), random.Random(SEED + 4)
    kept = sorted(here.words)
    games = [_game(rng, rng.sample(kept, rng.randint(2, 4))) for _ in range(GAMES)]
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
        return _without_opening(answer) != SORRY
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
    """Distinct new words, in an order that depends on the seed alone, none of them one that the sentences above use."""
    tables = (TELLINGS, QUESTIONS, GAMES_ASKED, WORD_TELLINGS, {"": WORD_LISTS + OPEN_QUESTIONS + TIMES})
    used = {word.lower() for table in tables for texts in table.values() for word in _words_of(texts)}
    found = {}
    while len(found) < count:
        word = "".join(rng.choice(SYLLABLES) for _ in range(syllables))
        if word not in used:
            found[word] = None
    return list(found)


def _life(rng, name: str, facts: dict[str, str]) -> str:
    order = rng.sample(list(facts), len(facts))
    if rng.random() < 0.5:
        first, second, third = (CLAUSES[fact].format(v=facts[fact]) for fact in order)
        return f"Meet {name}, who {first}, {second} and {third}."
    return " ".join(["Hear this.", *(rng.choice(TELLINGS[fact]).format(n=name, v=facts[fact]) for fact in order)])


def _ask(rng, name: str, facts: dict, fact: str = "") -> tuple[str, str, str]:
    """Question, answer without an opening, kind of fact. The answer about somebody is true, about nobody invented."""
    fact = fact or rng.choice(list(VALUES))
    value = facts[name][fact] if name in facts else rng.choice(VALUES[fact])
    return rng.choice(QUESTIONS[fact]).format(n=name), ANSWERS[fact].format(n=name, v=value), fact


def _game(rng, words: list[str]) -> tuple[str, str]:
    game = rng.choice(list(GAMES_ASKED))
    return rng.choice(GAMES_ASKED[game]).format(w=" ".join(words)), _played(words)[game] + "."


def _played(words: list[str]) -> dict[str, str]:
    return {"repeat": " ".join(words), "reverse": " ".join(reversed(words)), "first": words[0], "last": words[-1]}


def _new_words(rng, kept: frozenset[str]) -> list[str]:
    """Two to four words that are not among those kept for the evaluation; hardly any comes twice, so only copying plays the games."""
    words = []
    while len(words) < 2 or (rng.random() < 0.5 and len(words) < 4):
        word = _coin(rng, rng.choice((2, 3)), 1)[0]
        if word not in kept and word not in words:
            words.append(word)
    return words


def _opening(rng) -> str:
    return rng.choice(POLITE if rng.random() < POLITE_SHARE else CURT)


def _without_opening(answer: str) -> str:
    opening = next((opening for opening in POLITE + CURT if answer.startswith(opening)), "")
    return answer.removeprefix(opening)


def _words_of(texts: list[str]) -> set[str]:
    return {word.strip(".,:?!") for text in texts for word in text.split()}


def main(out_dir: str) -> None:
    check_no_leaks()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tables = {"corpus": [{"text": text} for text in documents()], "sft": sft_rows(), "dpo": dpo_rows()}
    for name, rows in tables.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / name}.jsonl: {len(rows)} rows")
    prompts = eval_prompts()
    (out / "eval.json").write_text(json.dumps(prompts, indent=1))
    print(f"{out / 'eval.json'}: " + ", ".join(f"{metric} {len(items)}" for metric, items in prompts.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[2].strip())
    main(sys.argv[1])
