"""A pytest plugin: the table of the README that says what each model family can do, made of test results.

A test marked `@pytest.mark.capability("...")` that is parametrised by a `tests.toys.Case` proves that capability of its
family; `without={family: reason}` says where it does not apply. After a run of all such tests the table must be the
one in README.md; `--write-table` writes it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.toys import Case

START, END = "<!-- families -->\n", "<!-- /families -->\n"
COMMAND = "pytest --write-table tests/probe/test_families.py"

Proof = tuple[str, str]
"""(family, capability)."""


def table(results: Mapping[Proof, bool], reasons: Mapping[Proof, str], variants: Mapping[str, Iterable[str]]) -> str:
    """Markdown, one row per family: yes where every test passed, no where one did not, a dash where there is none.

    `variants` names the configurations of each family beyond its first; `reasons` say why there is a dash.
    """
    capabilities = list(dict.fromkeys(capability for _, capability in results))
    rows = [["family", "also as", *capabilities], ["---"] * (2 + len(capabilities))]
    for family, names in variants.items():
        cells = [results.get((family, capability)) for capability in capabilities]
        rows.append([family, ", ".join(names), *({True: "yes", False: "no", None: "-"}[cell] for cell in cells)])
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    notes: dict[tuple[str, str], list[str]] = {}
    for (family, capability), reason in reasons.items():
        notes.setdefault((capability, reason), []).append(family)
    said = [f"- No {capability} for {', '.join(names)}: {reason}." for (capability, reason), names in notes.items()]
    return "\n".join([*lines, *([""] if said else []), *said, ""])


def table_of(readme: str) -> str | None:
    """The table a README holds between its marks, None without marks."""
    _, start, rest = readme.partition(START)
    inside, end, _ = rest.partition(END)
    return inside if start and end else None


def with_table(readme: str, new: str) -> str:
    """The README with another table.

    Raises:
        ValueError: it has no marks.
    """
    if table_of(readme) is None:
        raise ValueError(f"README.md must hold {START.strip()} and {END.strip()}. Got none. Put them in.")
    before, _, rest = readme.partition(START)
    return before + START + new + END + rest.partition(END)[2]


@dataclass(eq=False)  # pytest keeps its plugins in sets
class Results:
    """What the marked tests of one run proved."""

    config: pytest.Config
    due: dict[str, Proof] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)
    reasons: dict[Proof, str] = field(default_factory=dict)
    variants: dict[str, list[str]] = field(default_factory=dict)
    partly: bool = False
    said: str = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note what is to be proved; leave out what does not apply."""
        self.partly = any("::" in argument for argument in self.config.args)
        for item in list(items):
            mark, case = item.get_closest_marker("capability"), _case_of(item)
            if mark is None or case is None:
                continue
            proof = _family_of(case), mark.args[0]
            self._note(case)
            if proof[0] in mark.kwargs.get("without", {}):
                self.reasons[proof] = mark.kwargs["without"][proof[0]]
                items.remove(item)
            else:
                self.due[item.nodeid] = proof

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """A choice of tests proves nothing."""
        self.partly = self.partly or any(item.nodeid in self.due for item in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test; all must pass."""
        if report.nodeid in self.due and (report.when == "call" or not report.passed):
            self.passed[report.nodeid] = report.passed and self.passed.get(report.nodeid, True)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare the table with the README's, or write it."""
        if not self.due or self.partly or set(self.due) - set(self.passed):
            return
        readme = self.config.rootpath / "README.md"
        text, new = readme.read_text(encoding="utf-8"), table(self.proved(), self.reasons, self.variants)
        if self.config.getoption("--write-table"):
            readme.write_text(with_table(text, new), encoding="utf-8")
        elif table_of(text) != new:
            self.said = f"The table of families in README.md must say what the tests found. Got another. Run {COMMAND}."
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say why the run failed."""
        if self.said:
            terminalreporter.write_line(self.said, red=True)

    def proved(self) -> dict[Proof, bool]:
        """Whether every test of a capability passed."""
        proved: dict[Proof, bool] = {}
        for node, proof in self.due.items():
            proved[proof] = proved.get(proof, True) and self.passed[node]
        return proved

    def _note(self, case: Case) -> None:
        names = self.variants.setdefault(_family_of(case), [])
        if case.variant and case.variant not in names:
            names.append(case.variant)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --write-table."""
    parser.addoption("--write-table", action="store_true", help="write the table of families into README.md")


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker, and start to listen."""
    config.addinivalue_line("markers", "capability(name, without={}): what a test proves of a model family")
    config.pluginmanager.register(Results(config), "capabilities")


def _case_of(item: pytest.Item) -> Case | None:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return next((value for value in params.values() if isinstance(value, Case)), None)


def _family_of(case: Case) -> str:
    try:
        return case.toy.FAMILY
    except ImportError:
        return case.module
