"""Text from networks and files is data: nothing in it may move a terminal's cursor or begin a line of its own."""

import difflib
from collections.abc import Iterable


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
