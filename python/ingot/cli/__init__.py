"""The command line: ``ingot VERB ...``. Each command is a frozen dataclass of its flags with a ``run`` method, in a file of its own.

This file only finds the command, so that ``ingot --help`` answers at once and Ctrl-C is understood from the beginning; what a command
needs is imported when it runs.
Exit codes: 0 done, 1 an error (one line on standard error), 2 wrong usage: flags or settings that cannot be, 130 interrupted.
"""

from __future__ import annotations

try:
    import importlib
    import os
    import sys
    from collections.abc import Sequence
    from typing import NamedTuple, NoReturn, Protocol, TypeVar
except KeyboardInterrupt:
    # Nobody is there yet to say more than this.
    raise SystemExit(130) from None

CommandT = TypeVar("CommandT")


class Runnable(Protocol):
    """A parsed command."""

    def run(self) -> int:
        """Do the work; the exit code."""
        ...


class Entry(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    attribute: str
    help: str


COMMANDS: dict[str, Entry] = {
    "demo": Entry("demo", "Demo", "the whole path on a built-in small world, from raw text to an aligned model"),
    "tokenizer train": Entry("tokenizer", "Train", "learn a byte-level BPE vocabulary from text"),
    "tokenizer encode": Entry("tokenizer", "Encode", "turn a text file into token ids (.npy)"),
    "tokenizer decode": Entry("tokenizer", "Decode", "turn token ids back into the same bytes"),
    "tokenizer inspect": Entry("tokenizer", "Inspect", "show how a text is cut into pieces"),
    "plan": Entry("plan", "Plan", "what to train on this machine in a given time"),
    "pretrain": Entry("pretrain", "Pretrain", "train a network to predict the next token of raw text"),
    "data check": Entry("data", "Check", "the kind of rows in files, and what is wrong with each that cannot be used"),
    "data show": Entry("data", "Show", "rows as the model sees them: every token, and which are trained"),
    "data import": Entry("data", "Import", "make rows of data in other formats: HH, Alpaca, ShareGPT, Argilla, ..."),
    "sft": Entry("sft", "SFT", "fine-tune a model on demonstrations, so that it answers"),
    "sample": Entry("sample", "Sample", "several responses to each of many prompts, to be ranked or scored"),
    "label": Entry("label", "Label", "rank responses in the terminal, blind; every judgement is saved at once"),
    "agreement": Entry("agreement", "Agreement", "how far labellers agree, what sways them, what to label again"),
    "reward": Entry(
        "reward", "Reward", "train a model on judgements that scores answers, or their steps, as people would"
    ),
    "ppo": Entry("ppo", "PPO", "train a model on rewards of its own answers, with a critic"),
    "grpo": Entry("grpo", "GRPO", "train a model on rewards of its own answers, several to each prompt, no critic"),
    "dpo": Entry("dpo", "DPO", "train a model on preferences directly: DPO and its relatives, KTO, ORPO, SimPO"),
    "distill": Entry("distill", "Distill", "let a model learn from a better one, on its own answers or the other's"),
    "compare": Entry("compare", "Compare", "which model answers better, by a reward model, a function or you"),
    "report": Entry("report", "Report", "a run on one page: verdict, alarms, curves, samples, where it comes from"),
    "eval": Entry("evaluate", "Evaluate", "loss, perplexity and bits per byte of a model on a text"),
    "generate": Entry("generate", "Generate", "let a model continue a prompt"),
    "chat": Entry("chat", "Chat", "talk with a model; its answers appear as they are written"),
    "cache": Entry("cache", "Cache", "list or clear the tokenized data kept between runs"),
    "env": Entry("environment", "Environment", "a report on this machine and installation, to paste into a question"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ingot`` with these arguments (those of the process unless given); the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (ingot ... | head); Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"ingot: {describe(error)}", file=sys.stderr)
        return exit_code(error)


def exit_code(error: BaseException) -> int:
    """2 for settings that cannot be, 1 for what went wrong with settings that can."""
    from ingot.errors import ConfigError

    return 2 if isinstance(error, ConfigError) else 1


def describe(error: BaseException) -> str:
    """An error as one line for a person."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(COMMANDS))
        return 0
    if arguments[0] in ("-V", "--version"):
        from ingot import __version__

        print(f"ingot {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return _parse(name, arguments[words:]).run()
    group = {name: entry for name, entry in COMMANDS.items() if name.startswith(arguments[0] + " ")}
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_overview(group))
        return 0 if len(arguments) > 1 else 2
    _unknown(" ".join(arguments[: 2 if group else 1]))


def _parse(name: str, arguments: list[str]) -> Runnable:
    entry = COMMANDS[name]
    module = importlib.import_module(f"ingot.cli.{entry.module}")
    command = getattr(module, entry.attribute)
    parse = getattr(command, "parse", None)
    if parse is not None:
        parsed: Runnable = parse(arguments)
        return parsed
    flags: Runnable = parse_flags(command, arguments, prog=f"ingot {name}")
    return flags


def parse_flags(
    command: type[CommandT], arguments: Sequence[str], prog: str, default: CommandT | None = None
) -> CommandT:
    """Build ``command`` from flags with tyro; wrong usage prints why, with the nearest flag, and exits with 2."""
    import tyro

    from ingot.cli.settings import check_resume, put_needed_first
    from ingot.cli.usage import in_one_line

    put_needed_first(command)
    with in_one_line(prog):
        if default is None:
            parsed = tyro.cli(command, prog=prog, args=list(arguments))
        else:
            parsed = tyro.cli(command, prog=prog, args=list(arguments), default=default)
    check_resume(parsed, arguments)
    return parsed


def _overview(commands: dict[str, Entry]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {entry.help}" for name, entry in commands.items()]
    return "\n".join(
        [
            "usage: ingot COMMAND [flags]",
            "",
            "Make and align a language model without a GPU: raw text in, a model that answers as people prefer out.",
            "",
            *lines,
            "",
            "ingot COMMAND --help shows a command's flags; ingot --version the version.",
        ]
    )


def _unknown(name: str) -> NoReturn:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean 'ingot {near[0]}'?" if near else "ingot --help lists the commands"
    print(f"ingot: there is no command {name!r}; {hint}", file=sys.stderr)
    raise SystemExit(2)
