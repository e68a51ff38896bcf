"""A row as preparation trains it: its examples as texts, with what is trained of them in double brackets."""

from collections import Counter

from data_prep.convert import examples_of_rows, parts_of_rows
from data_prep.examples import SFT, Settings
from data_prep.shapes.columns import USUAL
from data_prep.shapes.conversations import read_row
from data_prep.show import blocks, failures
from posttrain.data.chat import ChatFormat
from posttrain.data.parts import Refused


def shown(chat: ChatFormat, row: dict, kind=SFT, **settings) -> tuple[list[str] | str, Counter]:
    """The examples of a row, or why it is refused, and what was counted. Each is proven as preview.py --check does."""
    made, changes = kind(chat, Settings(4096, **settings)), Counter()
    chunk = parts_of_rows(made, [(0, read_row(made.name, row, USUAL))])
    texts = []
    for _, example in examples_of_rows(made, chunk, changes):
        if isinstance(example, Refused):
            return str(example), changes
        stored = {name: ids.tolist() for name, ids in example.columns.items()}
        assert not list(failures(chat, made.name, stored | {"proof": example.proof, "num_trained": example.trained}, 4096))
        texts.append("".join(_marked(block) for block in blocks(chat, made.name, stored)))
    return texts, changes


def _marked(block) -> str:
    return "".join(f"[[{piece.text}]]" if piece.trained else piece.text for piece in block.pieces).replace("]][[", "")
