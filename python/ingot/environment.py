"""What machine and installation this is: the report of ``ingot env``, and the line that runs and benchmarks print."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("numpy", "safetensors", "torch", "transformers", "tokenizers", "tiktoken")


def report(threads: int | None = None, measure: bool = True) -> dict[str, Any]:
    """The facts as plain values; ``measure`` adds the machine's measured peak (about half a second).

    Returns
    -------
    dict
        ``peak_gflops`` is f32 multiply-adds counted as two operations, over all threads; ``read_gb_per_s`` streams a buffer larger
        than the caches.
    """
    import ingot
    from ingot import _native

    build = ingot.build_info(threads=threads)
    facts: dict[str, Any] = {
        "ingot": build["version"],
        "profile": build["profile"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "level": build["level"],
        "levels_available": build["levels_available"],
        "threads": build["threads"],
        "cpus": psutil.cpu_count(logical=True),
        "memory_gb": round(memory_limit() / 1e9, 1),
        "memory_available_gb": round(psutil.virtual_memory().available / 1e9, 1),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if measure:
        peak = _native.measured_peak(build["threads"])
        facts["peak_gflops"] = round(peak["gflops"], 1)
        facts["read_gb_per_s"] = round(peak["read_gb_per_s"], 1)
    return facts


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or the container's limit where that is less."""
    limit = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


def peak_memory() -> int:
    """Bytes of the largest resident set that this process had."""
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", None)
    if peak is not None:
        return int(peak)
    # On Linux getrusage counts the process that started this one too, up to the moment when this program replaced it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return int(info.rss)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage) if platform.system() == "Darwin" else int(usage) * 1024
