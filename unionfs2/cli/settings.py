"""What the common options of a verb of the store say."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Common:
    """The common options of one command line."""

    root: str
    storage_options: list[str] = field(default_factory=list)
    backend: Literal["auto", "native", "fuse"] | None = None  # None: a storage option may say
    json: bool = False
    log_level: str = "warning"
    quiet: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Common:
        given: dict[str, Any] = vars(args)
        return cls(
            root=given.get("root") or default_root(),
            storage_options=[
                text for depth in range(3) for text in given.get(f"storage_opt_{depth}", ())
            ],
            backend=given.get("backend"),
            json=given.get("format") == "json",
            log_level=given.get("log_level", "warning"),
            quiet=given.get("quiet", False),
        )


def default_root() -> str:
    """Where the store is when nobody says: of the machine for root, else of the user."""
    chosen = os.environ.get("UNIONFS2_ROOT")
    if chosen:
        return chosen
    if os.geteuid() == 0:
        return "/var/lib/unionfs2"
    data = os.environ.get("XDG_DATA_HOME", "")
    # The specification of base directories: a relative value is to be ignored.
    if not os.path.isabs(data):
        data = os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data, "unionfs2")
