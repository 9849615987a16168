"""The command line as a person types it: what it prints, what it leaves on disk, what it says to a mistake, its exit codes."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from ingot.cli import COMMANDS, main
from ingot.cli.generate import read_prompts
from ingot.errors import ConfigError, DataError

TEXT = "".join(
    f"{who} went to the {place} and found a {thing}. It was {number}.\n"
    for number in range(12)
    for who in ("Anna", "Ben", "Clara")
    for place in ("river", "tower", "garden")
    for thing in ("key", "lamp", "letter")
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a text, a tokenizer trained on it and a small finished run."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    assert (
        main(["tokenizer", "train", str(folder / "a.txt"), "--vocab-size", "300", "--output", str(folder / "tok")]) == 0
    )
    assert main(pretrain(folder, folder / "run", "--max-steps", "6")) == 0
    return folder


def pretrain(folder, output, *more):
    shape = ["--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2"]
    batch = ["--max-length", "32", "--per-device-train-batch-size", "4", "--logging-steps", "2", "--sample-tokens", "8"]
    data = ["--data", str(folder / "a.txt"), "--tokenizer", str(folder / "tok"), "--output", str(output)]
    return ["pretrain", *data, *shape, *batch, *more]


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def explanations(help_text):
    """What is said of each flag but for its default, in order. Where the output is no terminal there are spaces in place of a frame."""
    lines = [re.sub(r"^[│ ] ?|│$", "", line).rstrip() for line in help_text.split("\n")]
    options = "\n".join(re.sub(r"^ (?=-)", "", line) for line in lines)
    blocks = re.split(r"^(?=-h,|--[a-z])", options[options.index("-h, --help") :], flags=re.MULTILINE)[1:]
    found = {}
    for block in blocks:
        usage, _, rest = block.partition("  ") if "  " in block.split("\n")[0] else block.partition("\n")
        words = re.sub(r"\((default|repeatable|required)[^)]*\)", "", " ".join(rest.split()))
        found[re.findall(r"--[a-z0-9.-]+", usage)[-1 if usage.startswith("-h") else 0]] = words
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_all_flags_explained(name, capsys):
    code, out, _ = run(capsys, *name.split(), "--help")
    assert code == 0
    assert f"usage: ingot {name}" in out
    found = explanations(out)
    assert next(iter(found)) == "--help"
    for flag, words in found.items():
        assert len(re.findall(r"[A-Za-z]{2,}", words)) >= 2, f"{flag} is not explained"


def test_the_help_of_a_phase_begins_with_what_a_run_is_made_from(capsys):
    begins = {
        "sft": ["--model", "--data", "--output", "--config", "--resume", "--chat-template"],
        "ppo": ["--model", "--prompts", "--reward-model", "--reward", "--output", "--config", "--resume"],
        "distill": ["--model", "--teacher", "--data", "--output", "--config", "--resume", "--lmbda"],
    }
    for name, wanted in begins.items():
        _, out, _ = run(capsys, name, "--help")
        assert list(explanations(out))[: len(wanted) + 1] == ["--help", *wanted]


def test_overview_lists_all_commands_at_once(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, entry in COMMANDS.items():
        assert name in out
        assert entry.help in out


def test_overview_loads_nothing_heavy():
    program = "import sys; from ingot.cli import main; main(['--help']); print(sorted({'numpy','rich','tyro','torch'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_import_loads_neither_torch_nor_rich():
    program = "import sys, ingot; ingot.Tokenizer, ingot.ModelConfig, ingot.build_info(); print(sorted({'torch','rich','transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "did you mean 'ingot pretrain'"),
        (["tokenizer", "encod"], "did you mean 'ingot tokenizer encode'"),
        (["pretrain", "--max-step", "3"], "--max-steps"),
        (["pretrain", "--recipe", "shakespeare", "--data", "x"], "shakespeare-char"),
        (["pretrain"], "--data"),
        (["pretrain", "--model.hiden-size", "3"], "no flag --model.hiden-size; did you mean --model.hidden-size?"),
        (["pretrain", "--learning-rate", "fast"], "ingot pretrain: --learning-rate: could not convert"),
        (["pretrain", "--level", "avx"], "--level"),
        (["pretrain", "--max-steps", "0"], "max_steps must be at least 1, got 0"),
        (["pretrain", "--max-steps", "3", "--max-time", "1h"], "give one of them"),
        (["pretrain", "words"], "'words' is not expected here"),
        (["pretrain", "--qqqq"], "there is no flag --qqqq; ingot pretrain --help"),
        (["tokenizer", "train"], "missing: --output"),
        (["pretrain", "--resume", "runs/a", "--learning-rate", "3"], "leave --learning-rate out"),
        (["sft", "--resume", "runs/a", "--dry-run"], "leave --dry-run out"),
        (["pretrain", "--model", "runs/a", "--model.hidden-size", "3"], "--model.hidden-size shapes a new network"),
        (["generate", "runs/a", "--prompt", "a", "--prompts", "b"], "give --prompt or --prompts"),
    ],
)
def test_wrong_usage_is_one_line_with_the_nearest_name(arguments, message, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_tokenizer_round_trip(workshop, tmp_path, capsys):
    ids, back = tmp_path / "ids.npy", tmp_path / "back.txt"
    code, out, _ = run(
        capsys, "tokenizer", "encode", workshop / "a.txt", "--tokenizer", workshop / "tok", "--output", ids, "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["num_tokens"] == len(np.load(ids))
    assert run(capsys, "tokenizer", "decode", ids, "--tokenizer", workshop / "tok", "--output", back)[0] == 0
    assert back.read_bytes() == (workshop / "a.txt").read_bytes()


def test_a_failed_decode_leaves_nothing(workshop, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.array([1, 2, 999]))
    code, _, err = run(
        capsys, "tokenizer", "decode", tmp_path / "ids.npy", "--tokenizer", workshop / "tok", "--output", tmp_path / "x"
    )
    assert code == 1
    assert "ids.npy: token id 999 at index 2 has no token" in err
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.array([1.5, 2.0]), "expected a one-dimensional array of integers, got float64 of shape (2,)"),
        (np.array([[1, 2]]), "expected a one-dimensional array of integers, got int64 of shape (1, 2)"),
        (np.array([1, -1]), "token id -1 at index 1 has no token"),
        (np.array([1, 2**63 + 5], np.uint64), f"token id {2**63 + 5} at index 1 has no token"),
        (
            np.array([1] * (1 << 20) + [2, 999]),
            "token id 999 at index 1 has no token: ids run from 0 to 299, counted from 1,048,576 on",
        ),
    ],
)
def test_a_file_of_other_numbers_is_refused_in_one_line(workshop, tmp_path, capsys, ids, said):
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    code, _, err = run(capsys, "tokenizer", "decode", path, "--tokenizer", workshop / "tok", "--output", tmp_path / "x")
    assert code == 1
    assert f"{path}: {said}" in err
    assert len(err.splitlines()) == 1


def test_tokenizer_inspect(workshop, capsys):
    code, out, _ = run(capsys, "tokenizer", "inspect", workshop / "tok", "--text", "Anna went", "--json")
    facts = json.loads(out)
    assert code == 0
    assert "".join(facts["tokens"]) == "Anna went"
    assert facts["vocab_size"] == 300
    code, out, _ = run(capsys, "tokenizer", "inspect", workshop / "tok", "--text", "Anna went")
    assert "bytes per token" in out


def test_pretrain_leaves_a_model_that_generates_and_evaluates(workshop, capsys):
    code, out, _ = run(capsys, "eval", workshop / "run", "--data", workshop / "a.txt", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["num_tokens"] > 100
    assert 0 < facts["bits_per_byte"] < 9
    assert facts["rule"]
    generate = (
        "generate",
        workshop / "run",
        "--prompt",
        "Anna",
        "--max-new-tokens",
        "12",
        "--seed",
        "1",
        "--num-samples",
        "2",
    )
    code, first, _ = run(capsys, *generate)
    assert code == 0
    assert first.count("Anna") >= 2
    assert run(capsys, *generate)[1] == first


def test_generate_streams_the_same_text_as_in_a_batch(workshop, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Ben"}\n{"prompt": "Anna"}\n', encoding="utf-8")
    options = ("--max-new-tokens", "10", "--seed", "3")
    _, out, _ = run(capsys, "generate", workshop / "run", "--prompts", prompts, "--num-samples", "2", *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Ben", "Ben", "Anna", "Anna"]
    _, alone, _ = run(capsys, "generate", workshop / "run", "--prompt", "Ben", "--num-samples", "2", *options)
    for row in rows[:2]:
        assert row["prompt"] + row["text"] in alone


def test_prompts_are_rows_or_lines(tmp_path):
    rows = b'{"prompt": "Ben\\n"}\n\n{"prompt": " Anna", "completion": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "a.json").write_text('[{"prompt": "Ben\\n"}, {"prompt": " Anna"}]')
    for path in sorted(tmp_path.iterdir()):
        assert read_prompts(str(path)) == ["Ben\n", " Anna"]
    lines = tmp_path / "a.txt"
    lines.write_text('Ben\n\n{"prompt": "Anna"}\n  tail \n')
    assert read_prompts(str(lines)) == ["Ben", '{"prompt": "Anna"}', "  tail "]
    (tmp_path / "a.json").write_text('[{"prompt": [{"role": "user", "content": "Hi"}]}]')
    with pytest.raises(DataError, match=r'a\.json, row 1: field "prompt" is a conversation; give the prompt as text'):
        read_prompts(str(tmp_path / "a.json"))


def test_resume_extends_a_finished_run(workshop, capsys):
    folder = workshop / "extended"
    assert run(capsys, *pretrain(workshop, folder, "--max-steps", "4"))[0] == 0
    assert run(capsys, "pretrain", "--resume", folder, "--max-steps", "8")[0] == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(steps) == 8
    code, out, _ = run(capsys, "pretrain", "--resume", folder, "--max-steps", "9", "--json")
    facts = json.loads(out)
    assert (code, facts["steps"], facts["output"]) == (0, 9, str(folder))
    assert facts["best_loss"] <= facts["final_loss"]


def test_go_on_from_a_model_with_other_text(workshop, tmp_path, capsys):
    more = tmp_path / "more.txt"
    more.write_text(TEXT.replace("Anna", "Dora"), encoding="utf-8")
    arguments = (
        "pretrain",
        "--model",
        workshop / "run",
        "--data",
        more,
        "--output",
        tmp_path / "next",
        "--max-steps",
        "3",
    )
    assert run(capsys, *arguments, "--max-length", "32", "--per-device-train-batch-size", "2")[0] == 0
    assert (tmp_path / "next" / "model.safetensors").exists()


def test_dry_run_prints_the_cost_and_leaves_no_run(workshop, tmp_path, capsys):
    code, out, err = run(capsys, *pretrain(workshop, tmp_path / "dry", "--max-steps", "5", "--dry-run"))
    assert code == 0
    assert "parameters" in out + err
    assert not (tmp_path / "dry" / "model.safetensors").exists()


def test_configuration_file_and_overrides(workshop, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(
        "max_steps = 50\nlearning_rate = 3e-4\nmax_length = 32\nper_device_train_batch_size = 2\n[model]\nhidden_size = 16\nnum_attention_heads = 2\nnum_hidden_layers = 1\n"
    )
    arguments = ("pretrain", "--config", config, "--data", workshop / "a.txt", "--tokenizer", workshop / "tok")
    assert run(capsys, *arguments, "--output", tmp_path / "run", "--max-steps", "2")[0] == 0
    from ingot.configs import PretrainConfig, load_toml

    saved = PretrainConfig.from_dict(load_toml(tmp_path / "run" / "pretrain.toml"))
    assert (saved.max_steps, saved.learning_rate, saved.architecture.hidden_size) == (2, 3e-4, 16)


def test_plan_names_a_command_that_parses(workshop, capsys):
    code, out, _ = run(capsys, "plan", "--data", workshop / "a.txt", "--max-time", "10m", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["command"].startswith("ingot pretrain")
    from ingot.cli.pretrain import Pretrain

    planned = Pretrain.parse(facts["command"].split()[2:])
    assert planned.max_steps == facts["max_steps"]


def test_plan_takes_a_smaller_network_where_the_machine_has_slowed_down(workshop, monkeypatch):
    from ingot import plan as planning

    corpus = [str(workshop / "a.txt")]
    monkeypatch.setattr(planning, "_measured_flops", lambda *shape: 1e13)
    monkeypatch.setattr(planning, "_probe", lambda *shape: 1e-3)
    swift = planning.plan(corpus, 60.0)
    monkeypatch.setattr(planning, "_probe", lambda config, *shape: config.hidden_size / 256)
    slowed = planning.plan(corpus, 60.0)
    assert swift.architecture.hidden_size > 128 == slowed.architecture.hidden_size
    assert (slowed.architecture.num_hidden_layers, slowed.max_steps) == (6, 108)
    assert "--model.hidden-size 128 --model.num-hidden-layers 6" in slowed.command
    monkeypatch.setattr(planning, "_probe", lambda config, *shape: 1.0)
    with pytest.raises(ConfigError, match="give --max-time more"):
        planning.plan(corpus, 60.0)


def test_env_is_a_report(capsys):
    code, out, _ = run(capsys, "env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["level"] in facts["levels_available"]
    assert facts["peak_gflops"] > 0
    assert "cpu" in run(capsys, "env", "--no-measure")[1]


def test_cache_is_listed_and_cleared(workshop, capsys):
    folder = workshop / ".cache"
    code, out, _ = run(capsys, "cache", "--folder", folder)
    assert code == 0
    assert "tokenized data in" in out
    facts = json.loads(run(capsys, "cache", "--folder", folder, "--json")[1])
    assert len(facts["files"]) >= 1
    assert (min(facts["files"].values()) > 0, facts["bytes_freed"]) == (True, 0)
    assert run(capsys, "cache", "--folder", folder, "--clear")[0] == 0
    assert "0 files of tokenized data" in run(capsys, "cache", "--folder", folder)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "nowhere", "--data", "{a}"), "nowhere"),
        (("generate", "{run}", "--prompts", "{bad}"), "row 2"),
        (("tokenizer", "inspect", "{bad}"), "bad.jsonl"),
        (("tokenizer", "train", "{empty}", "--output", "t"), "empty.txt"),
        (("tokenizer", "train", "{a}", "--vocab-size", "100", "--output", "t"), "256"),
        (("tokenizer", "train", "{a}", "--vocab-size", "50000", "--output", "t"), "50000"),
        (("pretrain", "--data", "missing.txt", "--output", "{new}"), "missing.txt"),
        (("pretrain", "--data", "{a}", "--output", "{run}", "--max-steps", "2"), "--resume"),
        (("pretrain", "--data", "{a}", "--output", "{new}", "--model.num-attention-heads", "7"), "divide"),
        (("pretrain", "--data", "{tiny}", "--output", "{new}", "--max-steps", "2"), "too few"),
        (("pretrain", "--resume", "{nowhere}"), "nowhere"),
        (("pretrain", "--data", "{a}", "--output", "{new}", "--config", "{typed}"), "learning_rate is 'fast'"),
        (("plan", "--data", "{a}", "--max-time", "soon"), "duration"),
        (("tokenizer", "train", "{a}", "--output", "{run}"), "holds a model"),
        (("tokenizer", "encode", "{a}", "--tokenizer", "{run}", "--output", "{a}"), "is the file that is read"),
        (
            ("tokenizer", "decode", "{a}", "--tokenizer", "{run}", "--output", "{new}"),
            "a.txt: not a .npy file of token ids",
        ),
        (("tokenizer", "inspect", "{nowhere}"), "give a tokenizer's folder"),
        (("generate", "{run}", "--prompt", "a", "--top-k", "-1"), "top_k must be 0"),
        (("generate", "{run}", "--prompt", "a", "--num-samples", "0"), "num_samples must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(workshop, tmp_path, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": 3}\n', encoding="utf-8")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "typed.toml").write_text('learning_rate = "fast"', encoding="utf-8")
    (tmp_path / "tiny.txt").write_text("ab", encoding="utf-8")
    names = {"a": workshop / "a.txt", "run": workshop / "run", "new": tmp_path / "new", "nowhere": tmp_path / "nowhere"}
    names |= {
        name: tmp_path / f"{name}.{ending}"
        for name, ending in (("bad", "jsonl"), ("empty", "txt"), ("tiny", "txt"), ("typed", "toml"))
    }
    code, out, err = run(capsys, *(argument.format(**names) for argument in arguments))
    assert code in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert not out.startswith("a"), "a prompt is shown before its settings are known to work"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["pretrain", "plan", "sft", "reward", "ppo", "grpo", "dpo", "distill"])
def test_a_missing_flag_is_wrong_usage(capsys, command):
    code, out, err = run(capsys, command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "give --" in err


INTERRUPTED = """
import os, runpy, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            raise KeyboardInterrupt

sys.modules.pop(os.environ["INTERRUPTED_AT"], None)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["ingot", "sft", "--model", "nowhere", "--data", "nothing"]
runpy.run_module("ingot.cli", run_name="__main__")
"""


@pytest.mark.parametrize("at", ["typing", "dataclasses", "ingot.cli.sft", "tyro", "ingot.training.sft", "numpy"])
def test_ctrl_c_during_imports_ends_without_a_traceback(at):
    environment = {**os.environ, "INTERRUPTED_AT": at}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr in ("", "interrupted\n")


def test_the_package_itself_loads_next_to_nothing():
    code = "import sys; before = set(sys.modules); import ingot; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"typing", "dataclasses", "inspect", "numpy"}.intersection(loaded)
