"""``ingot demo``."""

from __future__ import annotations

import dataclasses

from ingot.demo import DemoConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(DemoConfig):
    """The whole path on a built-in small world, each step measured and explained: no data, no torch.

    Pretraining, fine-tuning on demonstrations, ranked answers, a reward model, PPO, and DPO beside it. The folder holds all models, the data
    between them, and report.html. Ctrl-C stops; the same command goes on.
    """

    def run(self) -> int:
        """Run the demo."""
        from ingot import demo

        names = [field.name for field in dataclasses.fields(DemoConfig)]
        demo.run(DemoConfig(**{name: getattr(self, name) for name in names}))
        return 0
