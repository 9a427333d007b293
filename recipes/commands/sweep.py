"""`mmdit sweep`: recipes on a prompt suite over seeds, one table of what was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probe.errors import MmditError
from recipes.commands import console
from recipes.commands.read import Format

if TYPE_CHECKING:
    from recipes.sweep import Task
    from recipes.sweep_store import Row, Table


def sweep(
    file: Annotated[str, typer.Argument(help="A sweep by name, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for runs and results; runs/sweeps/<name> by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, each with a GPU where there are some; 1 by default.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Run on Ray: auto (one that runs already), local, or an address.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many groups, from each kind in turn.")] = None,
    format: Format = "text",
) -> None:
    """Run recipes on a whole prompt suite over seeds, and compare them.

    Called again it goes on: what is finished is not made again, what failed is tried again.
    """
    from recipes import suite
    from recipes import sweep as plans
    from recipes.sweep_store import Table
    from recipes.sweep_table import summary

    plan = plans.load(file)
    select = plan.suite if limit is None else plan.suite.model_copy(update={"limit": limit})
    folder = (out or Path("runs") / "sweeps" / Path(file).stem).expanduser()
    tasks = plans.tasks(plan, suite.chosen(select), folder)
    plans.refuse_changed(tasks)
    table = Table(folder)
    missing = [task for task in tasks if not table.has(task)]
    if missing:
        _refuse_unable(missing)
    with _kept(folder):
        _carry_out(missing, table, workers, cluster, format == "json")
        rows = [table.rows[task.key] for task in tasks]
        found = summary(rows, plan.compared_with)
        table.write(found)
    _show(rows, found, plan.compared_with, folder, format)
    _refuse_failed([row for row in rows if row.status == "failed"], len(rows), folder)


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """The folder, which no other sweep writes meanwhile."""
    from probe.errors import StoreError
    from probe.folder import lock, unlock

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The folder of a sweep must be writable. Got '{error.strerror}' for {folder}. Choose another --out."
        ) from error
    lock(folder)
    try:
        yield
    finally:
        unlock(folder)


def _refuse_unable(tasks: Sequence[Task]) -> None:
    """What no run of an arm could do is refused before the first is made: its first recipe is resolved."""
    from recipes.job import prepare

    for task in {task.arm: task for task in reversed(tasks)}.values():
        prepare(task.recipe)


def _carry_out(tasks: Sequence[Task], table: Table, workers: int | None, cluster: str | None, quiet: bool) -> None:
    from tqdm import tqdm

    from recipes.sweep_workers import carried_out

    if not tasks:
        return
    failed, bar = 0, tqdm(total=len(tasks), desc="sweep", unit="run", disable=quiet)
    try:
        with bar, _workers(min(workers or 1, len(tasks)) if cluster is None else workers, cluster) as there:
            for row in carried_out(tasks, there):
                table.add(row)
                failed += row.status == "failed"
                bar.set_postfix(failed=failed, refresh=False)
                bar.update()
    except KeyboardInterrupt:
        raise MmditError(
            f"A sweep must finish to be summed up. Got an interrupt after {bar.n} of {len(tasks)} runs, which are in "
            f"{table.out}. Start it again to go on."
        ) from None


def _workers(count: int | None, cluster: str | None) -> Any:
    from recipes.sweep_run import Maker

    if cluster is None:
        from recipes.sweep_workers import local

        return local(count or 1, Maker)
    from recipes import sweep_ray

    return sweep_ray.cluster(cluster, count, Maker)


def _show(rows: Sequence[Row], found: Sequence[dict[str, Any]], reference: str, folder: Path, format: str) -> None:
    from dataclasses import asdict

    from recipes.sweep_table import by_arm, by_difference, counted

    if format == "json":
        console.data({"out": str(folder), "rows": [asdict(row) for row in rows], "summary": list(found)})
        return
    console.table(f"runs in {folder}", counted(rows))
    if found:
        console.table("means and their 95 % intervals", by_arm(found))
    if differences := by_difference(found):
        console.table(f"difference to {reference}, within pairs", differences)
    console.text(f"every run: {folder / 'results.csv'}")


def _refuse_failed(failed: Sequence[Row], count: int, folder: Path) -> None:
    if failed:
        first = failed[0]
        raise MmditError(
            f"Every run of a sweep must finish. Got {len(failed)} of {count} that failed, first {first.arm} with "
            f"{first.group}, seed {first.seed}: {first.error} Start it again to try these again; see "
            f"{folder / 'results.csv'}."
        )
