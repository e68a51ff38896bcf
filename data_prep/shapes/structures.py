"""Reads lists and objects that a column holds as text: as JSON, or as Python writes them, which tables get from str(value)."""

import ast
import io
import itertools
import json
import tokenize
import warnings

NOTHING = ("", "null", "none", "[]", "{}")  # texts that say nothing where a list or an object is expected
LONGEST_PYTHON = 2**20  # characters; its syntax tree takes hundreds of times as much memory
PYTHON = "a column read as Python writes lists and objects, where JSON was expected"


def json_of(value):
    """Return what a text holds that is a JSON list or object; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def structure_of(value):
    """Return what a text holds that is a list or an object, in JSON or as Python writes it; any other value as it is."""
    return python_of(json_of(value))


def says_nothing(value) -> bool:
    """Whether a value that should be a list or an object holds nothing but nulls, as a table fills them in, also as text."""
    if isinstance(value, str):
        return value.strip().lower() in NOTHING
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return (value is None or value != value) if inner is None else all(map(says_nothing, inner))


def python_of(value):
    """Return what a text holds that is a list or object as Python writes it; any other value as it is.

    A text in which strings follow each other without a comma, as numpy prints arrays, is none: Python would read them as one.
    """
    if not isinstance(value, str) or len(value) > LONGEST_PYTHON or value.lstrip()[:1] not in ("[", "{"):
        return value
    text = value.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            found = json.loads(json.dumps(ast.literal_eval(text)))  # tuples as lists, and all keys as text
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value
    is_joined = any(one == other == tokenize.STRING for one, other in itertools.pairwise(kinds))
    return found if isinstance(found, list | dict) and not is_joined else value
