"""The parser of the commands' options: argparse, whose mistakes are errors as all others are, told once for all ranks."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from posttrain.common import places
from posttrain.common.errors import nearest


def place(text: str) -> str:
    """The type of an option that is a path, or a name on the hub: `~` becomes the home directory."""
    try:
        return places.expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def named_place(text: str) -> str:
    """The type of an option [NAME=]DIR: `~` at the beginning of DIR becomes the home directory."""
    name, equals, path = text.partition("=")
    return f"{name}={place(path)}" if equals and path.startswith("~") else place(text)


def path(text: str) -> Path:
    """The type of an option that is a path."""
    return Path(place(text))


class Parser(argparse.ArgumentParser):
    """Parses the options of one of places.COMMANDS; its mistakes are ValueErrors, and names are not abbreviated."""

    def __init__(self, name: str, description: str):
        """`description` is what --help begins with; commands in it are shown in the form in which the user calls them."""
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=places.command(name), description=places.in_this_form(description), formatter_class=formatter, allow_abbrev=False
        )

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, and keep the words for `error`."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message, and the option that may have been meant."""
        known = [option for action in self._actions for option in action.option_strings]
        strange = [word.split("=")[0] for word in self._words if word.startswith("--") and word.split("=")[0] not in known]
        hint = "".join(f" {word}:{nearest(word, known)}" for word in strange if nearest(word, known))
        raise ValueError(f"{message}{'.' + hint if hint else ''}\n--help lists every option")
