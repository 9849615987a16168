"""``ingot env``."""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """A report on this machine and installation, to paste into a question."""

    threads: int | None = None
    """CPU threads for the measurement; what affinity and the container allow unless given."""
    measure: bool = True
    """Measure the machine's peak (half a second)."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Print the report."""
        from ingot.environment import report

        facts = report(threads=self.threads, measure=self.measure)
        if self.json:
            print(json.dumps(facts))
            return 0
        width = max(map(len, facts))
        for name, value in facts.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name:<{width}}  {shown}")
        return 0
