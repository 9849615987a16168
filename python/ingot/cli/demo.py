"""``ingot demo``."""

from __future__ import annotations

import dataclasses

from ingot.demo import DemoConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(DemoConfig):
    """Train on the built-in small world, and show what the model can do before, during and after: no data, no torch."""

    def run(self) -> int:
        """Run the demo."""
        from ingot import demo

        names = [field.name for field in dataclasses.fields(DemoConfig)]
        demo.run(DemoConfig(**{name: getattr(self, name) for name in names}))
        return 0
