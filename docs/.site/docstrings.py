"""Examples at the head of a docstring, which stand after ``>>>``, are code."""

import re
from typing import Any

import griffe

PROMPTS = re.compile(r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\n|\Z)", flags=re.DOTALL)


class Examples(griffe.Extension):
    """Fence what is after a prompt."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the examples of one docstring into blocks of code."""
        if obj.docstring is not None:
            said = re.sub(r" +# doctest: \+\w+", "", obj.docstring.value)
            obj.docstring.value = PROMPTS.sub(r"```pycon\n\1\n```", said)
