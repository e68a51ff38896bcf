"""Writes as escapes the characters of a text that a terminal or a page would obey, or not show. Imports the standard library only."""

import re

# C0 but tab and line feed, DEL and C1; line and paragraph separators; marks and overrides of direction; what has no width, but the joiners
# that emoji and some scripts need; tags; bytes that were no UTF-8
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Return a text in which what is there can be seen: ESC as \\x1b, an override of direction as \\u202e."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
