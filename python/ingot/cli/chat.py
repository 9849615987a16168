"""``ingot chat``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from tyro.conf import Positional

from ingot.configs import Backend, Level


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with a model; its answers appear as they are written.

    /reset forgets what was said, /system TEXT does so and says how to behave, /regen answers again, /save FILE writes the dialogue as a row
    of demonstrations, /quit ends. Ctrl-C ends an answer, not the chat.
    """

    model: Positional[str]
    """Folder of the model, such as a run of ingot sft. Its chat template is used."""
    system: str | None = None
    """A system message to begin with."""
    max_new_tokens: int = 512
    """Stop an answer after this many tokens."""
    temperature: float = 0.7
    """0 always takes the likeliest token, 1 samples from the model as it is."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely."""
    seed: int = 0
    """Of the random numbers: the same seed and the same words give the same answers."""
    backend: Backend = "native"
    """native or torch."""
    device: str | None = None
    """Of the torch backend: cpu or cuda."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    level: Level | None = None
    """Force an instruction level."""

    def run(self) -> int:
        """Talk until the input ends."""
        import ingot
        from ingot.data.chat import ChatEncoder, ChatTemplate
        from ingot.inference.chat import Conversation, talk
        from ingot.models import Sampling
        from ingot.models.hf import require_writer

        require_writer(self.model)
        model = ingot.load_model(
            self.model, backend=self.backend, device=self.device, threads=self.threads, level=self.level
        )
        encoder = ChatEncoder(ChatTemplate.of_model(self.model), ingot.Tokenizer.from_file(self.model))
        sampling = Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        conversation = Conversation(
            model, encoder, sampling, max_new_tokens=self.max_new_tokens, seed=self.seed, system=self.system
        )
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{Path(self.model).name}: /reset /system TEXT /regen /save FILE /quit; Ctrl-C ends an answer")
        talk(conversation, sys.stdin, sys.stdout, interactive=interactive)
        return 0
