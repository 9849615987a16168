"""``ingot pretrain``: recipe, configuration file and flags become one PretrainConfig; the loop itself is training/pretrain.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from ingot.cli.settings import LENGTHS, config_of, flag_names, flag_value, parse_run
from ingot.configs import PretrainConfig, load_recipe
from ingot.errors import ConfigError

# Settings that exclude one another.
_GROUPS = (LENGTHS, ("tokenizer", "vocab_size"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainConfig):
    """Train a network to predict the next token of raw text.

    Settings come from --recipe, then --config over it, then the flags over both; the result is saved with the run before
    anything slow starts. Ctrl-C saves and prints the line that resumes.
    """

    recipe: str | None = None
    """Start from a recipe shipped with ingot, such as shakespeare-char-cpu or folder."""
    config: str | None = None
    """Start from a TOML file with these names (dashes as underscores; the network's in a table [model])."""
    resume: str | None = None
    """Go on with an interrupted run: its folder. With --max-steps N a finished one is extended."""
    dry_run: bool = False
    """Print what the run would be, its cost in time and memory, and stop."""
    json: bool = False
    """Print nothing but one JSON line at the end: steps, losses, the folder."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Pretrain:
        """Flags over the configuration file over the recipe over the defaults."""
        recipe = flag_value(arguments, "recipe")
        fields = None if recipe is None else PretrainConfig.fields_of(load_recipe(recipe), f"recipe {recipe}")
        parsed = parse_run(cls, PretrainConfig, arguments, prog="ingot pretrain", groups=_GROUPS, recipe=fields)
        shape = sorted(name for name in flag_names(arguments) if name.startswith("model."))
        if parsed.model is not None and shape:
            flag = "--" + shape[0].replace("_", "-")
            raise ConfigError(f"{flag} shapes a new network, and --model goes on from one: leave one of them out")
        return parsed

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import pretrain

        if self.resume is not None:
            result = pretrain.resume(
                self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level, quiet=self.json
            )
        else:
            if not self.data:
                raise ConfigError("no text to learn from: give --data with files or folders")
            result = pretrain.pretrain(config_of(self, PretrainConfig), dry_run=self.dry_run, quiet=self.json)
        if self.json:
            steps = [line["step"] for line in result.history]
            facts = {
                "output": str(result.output),
                "steps": steps[-1] if steps else 0,
                "best_loss": result.best_loss,
                "final_loss": result.final_loss,
                "num_parameters": result.model.num_parameters,
            }
            print(json.dumps(facts | (result.plan or {})))
        return 0
