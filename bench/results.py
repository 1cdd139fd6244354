"""What a run leaves: one JSON file, written anew after each workload.

The file is what tables, charts and comparisons are made from, on another machine too; so it holds
what they need to know of targets and workloads, not only their names.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.targets import OptionSet


@dataclass(frozen=True, slots=True)
class Measurement:
    """One workload on one target in one turn. What the server used belongs to the work alone."""

    workload: str
    family: str
    target: str
    turn: int
    operations: int
    unit: str
    prepare_s: float
    mount_s: float
    work_s: float
    unmount_s: float
    server_cpu_s: float | None = None
    rss_kib: int | None = None
    private_kib: int | None = None


@dataclass(frozen=True, slots=True)
class Requests:
    """Round trips of one workload on one FUSE target, by opcode, counted in its warm-up."""

    workload: str
    target: str
    operations: int
    unit: str
    by_opcode: dict[str, int]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A target that could not mount what a workload needs, in its own words."""

    workload: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many mounts asked for at the same moment; memory is that of all their servers together."""

    target: str
    turn: int
    mounts: int
    mount_s: float
    unmount_s: float
    private_kib: int
    rss_kib: int


@dataclass(slots=True)
class Results:
    """Everything of one run."""

    environment: dict[str, Any] = field(default_factory=dict)
    sets: list[OptionSet] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    requests: list[Requests] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    crowds: list[Crowd] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file; whoever reads it meanwhile sees the old one or the new one.

        One line per record, so that two files can be compared line by line.
        """
        parts = [f'"{name}": {_array(value)}' for name, value in self._parts()]
        text = "{\n" + ",\n".join(parts) + "\n}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.new")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)

    def _parts(self) -> list[tuple[str, Any]]:
        return [(part.name, getattr(self, part.name)) for part in fields(self)]


def _array(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return "[" + ",".join(f"\n{json.dumps(asdict(record))}" for record in value) + "\n]"


def load(path: Path) -> Results:
    """Read a file back. ValueError, KeyError or TypeError when it is not one of ours."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Results(
        environment=raw["environment"],
        sets=[OptionSet(**{**one, "families": tuple(one["families"])}) for one in raw["sets"]],
        measurements=[Measurement(**one) for one in raw["measurements"]],
        requests=[Requests(**one) for one in raw["requests"]],
        refusals=[Refusal(**one) for one in raw["refusals"]],
        crowds=[Crowd(**one) for one in raw["crowds"]],
    )
