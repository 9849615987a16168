"""Runs told to a person: one page that opens without a network, and the facts behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REPORT_FILE = "report.html"


def report(*folders: str | Path, output: str | Path | None = None) -> Path:
    """Write what runs were, what they showed and how they got there as one HTML page.

    Parameters
    ----------
    folders
        Folders of runs, finished or not. Of one, all of it is told; several are compared.
    output
        The page; report.html in the last folder unless given.

    Returns
    -------
    Path
        Where the page is.

    Raises
    ------
    RunError
        A folder holds no run, or the page cannot be written.
    """
    from ingot.durable import write_file
    from ingot.errors import RunError
    from ingot.reporting.page import draw_page

    target = Path(folders[-1]) / REPORT_FILE if output is None and folders else Path(output or REPORT_FILE)
    page = draw_page(facts(*folders))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, page.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}; choose another --output") from None
    return target


def facts(*folders: str | Path) -> dict[str, Any]:
    """All that the page of these runs shows, as plain values that JSON has.

    Raises
    ------
    RunError
        No folder is given, or one holds no run.
    """
    from ingot.errors import RunError
    from ingot.reporting.tell import compare_runs, tell_run

    if not folders:
        raise RunError("no run to report on: give the folder of one, such as runs/ppo")
    return tell_run(folders[0]) if len(folders) == 1 else compare_runs(folders)
