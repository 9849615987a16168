"""``ingot report``."""

from __future__ import annotations

import dataclasses
import json

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Tell a run on one HTML page that opens without a network: verdict, alarms, curves, samples before and after, where it comes from.

    Several runs are compared: their curves one over the other where the names of metrics match. Unfinished runs are told as far as they came.
    """

    runs: Positional[tuple[str, ...]]
    """Folder of a run, or several to compare."""
    output: str | None = None
    """The page; report.html in the (last) run's folder unless given."""
    open: bool = False
    """Show the page in the browser."""
    json: bool = False
    """Print the facts that the page shows as JSON, and write no page unless --output is given."""

    def run(self) -> int:
        """Write and say where."""
        from ingot import reporting
        from ingot.errors import ConfigError

        if self.json and self.open and self.output is None:
            raise ConfigError("--json writes no page that --open could show: give --output too, or one of the two")
        if self.json:
            print(json.dumps(reporting.facts(*self.runs), ensure_ascii=False))
            if self.output is None:
                return 0
        page = reporting.report(*self.runs, output=self.output)
        if not self.json:
            print(page)
        if self.open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())
        return 0
