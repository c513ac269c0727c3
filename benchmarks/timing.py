"""How the benchmarks measure, and how they write their results."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
import transformers

# One where something else has the other core.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
TRL_MISSING = "TRL is not installed, so its side is left out; install it with `pip install -e .[bench]`."


def has_trl() -> bool:
    """Whether TRL is installed, the other side of some comparisons."""
    return importlib.util.find_spec("trl") is not None


def median_seconds(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median wall-clock seconds of each side. The sides take turns, so that other load falls on all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def conditions() -> str:
    """Machine, versions, date and commit, in one line."""
    now = datetime.now(UTC)
    trl = f", trl {importlib.metadata.version('trl')}" if has_trl() else ""
    return (
        f"{_processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}{trl}; {now:%Y-%m-%d}, commit {_commit()}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+changes" if git("status", "--porcelain", "--", "../src", ".") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of section `name` in a Markdown file; add the section or the file if it is missing."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{text.strip()}\n{end}"
    old = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if start in old and end in old:
        head, _, rest = old.partition(start)
        new = head + section + rest.partition(end)[2]
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new, encoding="utf-8")
