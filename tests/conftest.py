"""What all tests share: the instruction levels that this machine has, and a closing line that names those it lacks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator

# One thread pool a process is enough beside the tests' own; set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

import ingot

# A busy machine is no fault of the code.
hypothesis.settings.register_profile("ingot", deadline=None)
hypothesis.settings.load_profile("ingot")

# A shell starts its background jobs with Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ALL_LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(autouse=True, scope="module")
def _freed_memory_goes_back() -> Iterator[None]:
    """What a file's tests have freed goes back to the system, of which glibc keeps hundreds of megabytes after each otherwise."""
    yield
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the levels that could not be run here: they do not count as passed."""
    available = ingot.build_info()["levels_available"]
    lacking = [level for level in ALL_LEVELS if level not in available]
    terminalreporter.write_line(
        f"instruction levels run: {', '.join(available)}; not run on this machine: {', '.join(lacking) or 'none'}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``level`` runs at each level that the machine has."""
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", ingot.build_info()["levels_available"])
