"""Text from networks and files is data: nothing in it may move a terminal's cursor or begin a line of its own."""

import json
import re

UNQUOTED = re.compile(r"[A-Za-z][\w.+/-]*", re.ASCII)
KEYWORDS = frozenset("y n yes no on off true false null".split())


def plain(text: str) -> str:
    r"""Return a text in one line of printable characters; others are written as Python escapes them.

    >>> plain("bn\x1b[31m")
    'bn\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plain_lines(text: str) -> str:
    """Return a text of several lines with each of them as `plain` has it."""
    return "\n".join(map(plain, text.split("\n")))


def yaml_scalar(value: object) -> str:
    """Return a value as a YAML string: quoted, unless nothing in it could mean anything to YAML."""
    text = plain(str(value))
    is_word = UNQUOTED.fullmatch(text) and text.lower() not in KEYWORDS
    return text if is_word else json.dumps(text, ensure_ascii=False)
