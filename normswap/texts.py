"""Text from networks and files is data: nothing in it may move a terminal's cursor or begin a line of its own."""

import difflib
import json
import re
from collections.abc import Iterable

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


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str, count: int = 4, cutoff: float = 0.5) -> str:
    """Return the nearest of some names, each once, as a question; what to say else where none is near.

    >>> did_you_mean("gruops", ["groups", "ws", "groups"], otherwise="see the help")
    'did you mean groups?'
    """
    by_case: dict[str, str] = {}
    for name in known:
        by_case.setdefault(name.lower(), name)
    near = [by_case[name] for name in difflib.get_close_matches(word.lower(), by_case, n=count, cutoff=cutoff)]
    return f"did you mean {', '.join(near)}?" if near else otherwise
