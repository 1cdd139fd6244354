"""Where figures come from: machine, kernel, file system, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def environment(scratch: Path, peer: str = "fuse-overlayfs") -> dict[str, Any]:
    """Facts of a run that works in `scratch`."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "fs": _file_system(scratch),
        "python": platform.python_version(),
        "commit": commit(),
        "fuse_overlayfs": _peer_version(peer),
        "load": load(),
    }


def _file_system(path: Path) -> str:
    kind, _, source = _said("findmnt", "-rno", "FSTYPE,SOURCE", "-T", os.fspath(path)).partition(
        " "
    )
    return f"{kind} image" if source.startswith("/dev/loop") else kind


def load() -> float:
    """How many processes wanted to run in the last minute."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    """The commit at work, marked when the package differs from it."""
    here = os.fspath(Path(__file__).parent)
    found = _said("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = _said("git", "-C", here, "status", "--porcelain", "-uno", "--", "../unionfs2")
    return found + ("+changes" if changed else "")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _peer_version(peer: str) -> str:
    for line in _said(peer, "--version").splitlines():
        if line.startswith("fuse-overlayfs"):
            return line
    return ""


def _said(*command: str) -> str:
    """Output of a program; empty when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
