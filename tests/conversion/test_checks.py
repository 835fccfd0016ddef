"""What was checked, as a truth, as a table and as data."""

import pytest

from normswap.conversion.checks import Check, Checks

GOOD, BAD, UNTOLD = Check("shapes", True, "kept"), Check("finite", False, "NaN"), Check("gradients", None, "no weights")


@pytest.mark.parametrize(
    ("rows", "holds"),
    [((), True), ((GOOD,), True), ((GOOD, UNTOLD), True), ((GOOD, BAD), False), ((BAD, UNTOLD, GOOD), False)],
    ids=["nothing", "good", "not judged", "bad last", "bad first"],
)
def test_checks_hold_unless_one_failed(rows: tuple[Check, ...], holds: bool) -> None:
    checks = Checks(rows)
    assert bool(checks) is holds
    assert checks.to_dict()["ok"] is holds
    assert checks.failed == tuple(row for row in rows if row is BAD)


def test_a_table_for_people() -> None:
    assert str(Checks((GOOD, BAD, UNTOLD))) == (
        "        check      found\n"
        "-----------------------------\n"
        "ok      shapes     kept\n"
        "FAILED  finite     NaN\n"
        "n/a     gradients  no weights"
    )


def test_data_for_programs() -> None:
    assert Checks((UNTOLD,)).to_dict() == {
        "ok": True,
        "checks": [{"name": "gradients", "ok": None, "detail": "no weights"}],
    }
