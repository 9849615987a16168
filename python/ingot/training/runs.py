"""A run's folder: a Hugging Face directory at its top, and beside it all that the run needs to go on.

``run.json`` (settings, decisions, facts) is written before anything slow, so a run can be resumed from its first second on. A new run
whose settings or data are refused before it has begun leaves no folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ingot.durable import (
    crash_points as crash_points,  # tests listen here
)
from ingot.durable import (
    reached,
    remove_unfinished,
    rename,
    sync_file,
    temporary_name,
    write_file,
)
from ingot.errors import IngotError, RunError
from ingot.models.adapters import ADAPTER_FOLDER
from ingot.training.checkpoints import MODEL_FILE
from ingot.training.companions import write_generation_config, write_tokenizer_config
from ingot.training.locks import RunLock
from ingot.training.lora import save_beside
from ingot.training.metrics import MetricsLog

if TYPE_CHECKING:
    from ingot.configs import ModelConfig
    from ingot.data.chat import ChatEncoder
    from ingot.tokenizer import Tokenizer

FORMAT_VERSION = 1
RUN_FILE = "run.json"
CARD_FILE = "README.md"


class Exported(Protocol):
    """What the top of a run's folder holds."""

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        ...


class RunFolder:
    """An output folder under lock. Use as a context manager; made by :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, lock: RunLock, facts: dict[str, Any]) -> None:
        self.path = path
        self.facts = facts
        """Content of run.json; :meth:`save_facts` writes it."""
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.samples = MetricsLog(path / "samples.jsonl")
        self._lock = lock
        self._made: list[Path] | None = None
        """Files and folders that a new run made and takes back where it is refused; None once it has begun."""

    @classmethod
    def create(cls, path: str | Path, kind: str, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder of a new run and save its settings, as run.json and as a TOML file that --config reads.

        Where an :class:`~ingot.errors.IngotError` or a ``FileNotFoundError`` leaves the ``with`` block before :meth:`begun`, all that was made goes again.

        Raises
        ------
        RunError
            The folder is in use by a live run, holds a run already, or holds other files.
        """
        import tomli_w

        path = Path(path)
        made = [each for each in (path, *path.parents) if not each.exists()][::-1]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be made: {error.strerror or error}; choose another --output") from None
        lock = RunLock(path)
        lock.acquire()
        try:
            _refuse_used(path, kind)
            remove_unfinished(path)
            facts = {"format_version": FORMAT_VERSION, "kind": kind, "finished": False, "config": dict(config)}
            folder = cls(path, lock, facts)
            folder._made = [*made, *(file for file in (path / f"{kind}.toml", path / RUN_FILE) if not file.exists())]
            write_file(path / f"{kind}.toml", tomli_w.dumps(dict(config)).encode())
            folder.save_facts()
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an existing run.

        Raises
        ------
        RunError
            There is no run in it, it is in use, or a newer version made it.
        """
        path = Path(path)
        if not (path / RUN_FILE).is_file():
            raise RunError(
                f"{path}: no run to resume ({RUN_FILE} is missing); give the --output folder of an earlier run"
            )
        lock = RunLock(path)
        lock.acquire()
        try:
            facts = _read_facts(path)
            remove_unfinished(path)
            remove_unfinished(path / ADAPTER_FOLDER)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, facts)

    def require_kind(self, kind: str) -> None:
        """Refuse to go on with a run of another phase.

        Raises
        ------
        RunError
            Says which command goes on with it.
        """
        if self.facts["kind"] != kind:
            found = self.facts["kind"]
            raise RunError(f"{self.path}: a run of ingot {found}; go on with it: ingot {found} --resume {self.path}")

    def save_facts(self) -> None:
        """Write run.json."""
        write_file(self.path / RUN_FILE, json.dumps(self.facts, indent=1).encode() + b"\n")

    def save_tokenizer(self, tokenizer: Tokenizer, encoder: ChatEncoder | None = None) -> None:
        """Put the tokenizer, and the chat template where there is one, at the top of the folder; tokenizer.json appears last."""

        def write(folder: Path) -> None:
            tokenizer.save(folder)
            write_tokenizer_config(folder, tokenizer, encoder=encoder)

        self._publish(write, last="tokenizer.json")

    def export(self, model: Exported, tokenizer: Tokenizer, card: str, encoder: ChatEncoder | None = None) -> None:
        """Make the top of the folder a Hugging Face directory of this model; each file is replaced in one step, weights last.

        Where an adapter is trained those are merged, and ``adapter/`` holds it alone.

        Raises
        ------
        OSError
            There is no space, say; the files that were there stay.
        """

        def write(folder: Path) -> None:
            model.save(folder)
            tokenizer.save(folder)
            write_tokenizer_config(folder, tokenizer, model.config.max_position_embeddings, encoder)
            write_generation_config(folder, tokenizer, encoder)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")

        save_beside(model, self.path)
        self._publish(write, last=MODEL_FILE)

    def _publish(self, write: Callable[[Path], None], last: str) -> None:
        """Write files aside, sync them, and move each to the top of the folder."""
        temporary = temporary_name(self.path / "export")
        try:
            temporary.mkdir()
            reached(f"{last}: before write with its companions")
            write(temporary)
            files = sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name))
            for file in files:
                sync_file(file)
            for file in files:
                if self._made is not None and not (self.path / file.name).exists():
                    self._made.append(self.path / file.name)
                rename(file, self.path / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def begun(self) -> None:
        """From now on it stays, whatever happens: models, data and settings fit together."""
        self._made = None

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        made = self._made or [] if isinstance(error, IngotError | FileNotFoundError) else []
        folders = [path for path in made if path.is_dir()]
        with contextlib.suppress(OSError):
            for file in made:
                if file not in folders:
                    file.unlink(missing_ok=True)
        self.close()
        # Deepest first; one with something else in it stays.
        with contextlib.suppress(OSError):
            for folder in reversed(folders):
                folder.rmdir()


def _refuse_used(path: Path, kind: str) -> None:
    """A new run takes an empty folder only, so that no file is ever lost."""
    if (path / RUN_FILE).is_file():
        facts = _read_facts(path)
        if facts.get("finished"):
            steps = facts.get("decisions", {}).get("max_steps", "?")
            raise RunError(
                f"{path}: holds a finished run of {steps} steps; choose another --output, or extend it: "
                f"ingot {facts['kind']} --resume {path} --max-steps N"
            )
        raise RunError(
            f"{path}: holds an unfinished run; go on with it: ingot {facts['kind']} --resume {path}, or choose another --output"
        )
    # What is here while a run begins, and all that one killed in its first instant leaves.
    own = {"run.lock", f"{kind}.toml"}
    others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in own)
    if others:
        raise RunError(
            f"{path}: holds other files ({', '.join(others[:3])}); choose an empty or new folder as --output"
        )


def _read_facts(path: Path) -> dict[str, Any]:
    file = path / RUN_FILE
    try:
        facts: dict[str, Any] = json.loads(file.read_bytes())
        version = int(facts["format_version"])
        kind, config = facts["kind"], facts["config"]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{file}: damaged, cannot be read; start a new run, with --model {path} from its weights"
        ) from None
    if version > FORMAT_VERSION or not isinstance(kind, str) or not isinstance(config, dict):
        raise RunError(f"{file}: made by a newer version of ingot (format {version}); upgrade ingot to go on with it")
    return facts
