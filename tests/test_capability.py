"""The table of families is what the tests found, and a README that says otherwise is noticed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.capability import END, START, Results, table, table_of, with_table
from tests.toys import Case

README = f"before\n{START}old\n{END}after\n"


def fake(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


class Toy(Case):
    """A case that needs no module."""

    @property
    def toy(self):
        return fake(FAMILY=self.module.upper())


def item(name, capability, case, **without):
    mark = fake(args=(capability,), kwargs={"without": without})
    return fake(nodeid=name, callspec=fake(params={"bench": case}), get_closest_marker=lambda _: mark)


def ran(tmp_path, items, failed=(), write=False, args=()):
    (tmp_path / "README.md").write_text(README)
    results = Results(fake(args=args, rootpath=tmp_path, getoption=lambda _: write))
    results.pytest_collection_modifyitems(items)
    for one in items:
        for when in ("setup", "call", "teardown"):
            passed = (one.nodeid, when) not in failed
            results.pytest_runtest_logreport(fake(nodeid=one.nodeid, when=when, passed=passed))
    ended = fake(exitstatus=0)
    results.pytest_sessionfinish(ended)
    return results, ended.exitstatus, (tmp_path / "README.md").read_text()


def test_the_table_says_yes_no_and_why_not():
    results = {("A", "edits"): True, ("A", "maps"): False, ("B", "edits"): True}
    assert table(results, {("B", "maps"): "it has no text"}, {"A": ["big"], "B": []}).splitlines() == [
        "| family | also as | edits | maps |",
        "| --- | --- | --- | --- |",
        "| A | big | yes | no |",
        "| B | | yes | - |",
        "",
        "- No maps for B: it has no text.",
    ]


def test_the_table_stands_between_its_marks():
    assert table_of(README) == "old\n"
    assert with_table(README, "new\n") == README.replace("old", "new")
    assert table_of("no marks") is None
    with pytest.raises(ValueError, match="must hold <!-- families -->"):
        with_table("no marks", "new\n")


def test_one_failure_in_any_phase_and_variant_is_a_no(tmp_path):
    items = [item("1", "edits", Toy("a")), item("2", "edits", Toy("a", "big")), item("3", "edits", Toy("b"))]
    for phase in ("setup", "call", "teardown"):
        results, _, _ = ran(tmp_path, list(items), failed={("2", phase)})
        assert results.proved() == {("A", "edits"): False, ("B", "edits"): True}
        assert results.variants == {"A": ["big"], "B": []}


def test_a_table_that_differs_fails_the_run_and_is_written(tmp_path):
    items = [item("1", "edits", Toy("a"))]
    results, status, text = ran(tmp_path, list(items))
    assert (status, text) == (pytest.ExitCode.TESTS_FAILED, README)
    assert results.said.endswith("Run pytest --write-table tests/probe/test_families.py.")
    results, status, text = ran(tmp_path, list(items), write=True)
    assert (status, results.said) == (0, "")
    assert table_of(text) == "| family | also as | edits |\n| --- | --- | --- |\n| A | | yes |\n"


def test_a_table_that_agrees_is_left_alone(tmp_path, monkeypatch):
    _, _, written = ran(tmp_path, [item("1", "edits", Toy("a"))], write=True)
    monkeypatch.setattr("tests.test_capability.README", written)
    assert ran(tmp_path, [item("1", "edits", Toy("a"))])[1] == 0


def test_a_choice_of_tests_proves_nothing(tmp_path):
    items = [item("1", "edits", Toy("a")), item("2", "edits", Toy("b"))]
    assert ran(tmp_path, list(items), args=["tests/probe/test_families.py::test_edits"])[1] == 0
    results = Results(fake(args=()))
    results.pytest_collection_modifyitems(list(items))
    results.pytest_deselected(items[1:])
    assert results.partly


def test_what_does_not_apply_is_left_out_with_its_reason():
    items = [item("1", "heun", Toy("a"), A="it sets sigmas"), item("2", "heun", Toy("b"))]
    results = Results(fake(args=()))
    results.pytest_collection_modifyitems(items)
    assert [one.nodeid for one in items] == ["2"]
    assert results.reasons == {("A", "heun"): "it sets sigmas"}
