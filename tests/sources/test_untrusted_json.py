"""JSON that somebody else wrote."""

import re
from pathlib import Path

import pytest

from normswap.sources import untrusted_json
from normswap.sources.untrusted_json import parse_json, read_json

REFUSED = {
    "key twice": ('{"a": 1, "b": {"c": 1, "c": 1}}', "names 'c' twice"),
    "not a number": ('{"a": NaN}', "NaN is not a finite number"),
    "infinity": ("[-Infinity]", "-Infinity is not a finite number"),
    "too large a number": ("1e999", "1e999 is not a finite number"),
    "nested too deeply": ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
    "no JSON": ("{'a': 1}", "Expecting property name"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_two_readers_could_understand_differently_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_json(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_json(tmp_path / "config.json")


def test_the_rest_is_read_as_it_is() -> None:
    assert parse_json('{"a": [1, 2.5, true, null, "é"], "b": {"a": -1e-3}}') == {
        "a": [1, 2.5, True, None, "é"],
        "b": {"a": -0.001},
    }


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_json, "MAX_BYTES", 2**20)
    (tmp_path / "config.json").write_text('"' + "x" * (2**20 - 2) + '"')
    assert len(read_json(tmp_path / "config.json")) == 2**20 - 2
    (tmp_path / "config.json").write_text('"' + "x" * 2**20 + '"')
    with pytest.raises(ValueError, match="is larger than 1 MiB"):
        read_json(tmp_path / "config.json")


def test_only_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no regular file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "config.json")
