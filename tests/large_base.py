"""LoRA PPO with five roles on a base that is large beside everything else, in a process of its own, for a test that measures its memory.

``python large_base.py FOLDER shared|apart`` writes bytes as JSON: resident before the run, the most while it ran, and of the base.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

import ingot
from ingot.inference.scoring import RewardModel
from ingot.models import Model
from ingot.models.sharing import SharedBase, weights_hash
from ingot.training import pace
from killable_ppo import chat_encoder, prompt_rows, settings, shape_of, write_companions

RANK = 4
SHAPE = {"hidden_size": 640, "num_hidden_layers": 5, "num_attention_heads": 10, "intermediate_size": 1920}


def write_inputs(root: Path) -> None:
    """A base of 27 M weights, a reward model and a judge that are adapters on it, prompts."""
    encoder = chat_encoder()
    base = Model(shape_of(encoder, **SHAPE), seed=3)
    base.save(root / "base")
    write_companions(root / "base", encoder)
    for name in ("rm", "judge"):
        adapter = base.add_adapter(name, RANK, num_values=1, seed=len(name))
        rng = np.random.default_rng(len(name))
        noise = {
            key: (0.05 * rng.standard_normal(each.shape)).astype(np.float32) for key, each in adapter.state().items()
        }
        adapter.load_state(noise)
        adapter.base_hash = weights_hash(base)
        base.active_adapter = name
        model = RewardModel(base, encoder)
        model.save(root / name)
        model.save_adapter(name, root / name / "adapter")
        write_companions(root / name, encoder)
        base.active_adapter = None
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(8)))


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` the most so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(root: Path, how: str) -> None:
    """Two updates."""
    if how == "apart":
        SharedBase.adapted = lambda *given: None  # type: ignore[method-assign]
    config = settings(
        root,
        root / how / "run",
        reward=(),
        gold=None,
        reward_weights=None,
        ptx_data=(),
        critic="reward_model",
        lora_rank=RANK,
        per_device_train_batch_size=2,
        response_length=4,
        held_out=0.0,
        max_steps=2,
        save_steps=2,
        sample_prompts=0,
        pack_length=96,
        force=True,
    )
    # The machine's speed is measured over a buffer of its own.
    pace._peak_flops = lambda model: None
    (root / how).mkdir()
    run = ingot.ppo  # imports what it needs
    before = resident("VmRSS")
    result = run(config, quiet=True)
    most = resident("VmHWM")
    adapter = next(iter(result.model.adapters.values()))
    sizes = {"base": 4 * result.model.num_parameters, "adapter": 4 * adapter.num_parameters}
    sys.stdout.write(json.dumps({"before": before, "most": most, **sizes}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
