"""Rows of text in columns."""

import pytest

from normswap.tables import table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text() -> None:
    assert table([("conv1", "Conv2d"), ("bn", "")], header=("layer", "is")) == (
        "layer  is\n"
        "-------------\n"
        "conv1  Conv2d\n"
        "bn"
    )  # fmt: skip


def test_a_table_without_rows_is_its_header() -> None:
    assert table([], header=("layer", "is")) == "layer  is\n---------"


def test_a_notebook_gets_text_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert table([["a", "1"]], header=["name", "count"]).splitlines()[-1].split() == ["a", "1"]
