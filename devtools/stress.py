"""``./dev stress KIND``: long and heavy use of a mount, judged by what a user must never see."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

from bench import targets
from devtools import (
    stress_changes,
    stress_churn,
    stress_codec,
    stress_crash,
    stress_fsx,
    stress_latency,
    stress_mixed,
    stress_walk,
)


class Kind(NamedTuple):
    """One subcommand."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


KINDS = {
    "fsx": Kind(
        "random operations on one file against a model", stress_fsx.add_arguments, stress_fsx.run
    ),
    "mixed": Kind(
        "several processes do everything at once", stress_mixed.add_arguments, stress_mixed.run
    ),
    "rounds": Kind(
        "the same work five times: memory must not grow",
        stress_mixed.add_round_arguments,
        stress_mixed.run_rounds,
    ),
    "churn": Kind(
        "create and unlink, a million times", stress_churn.add_arguments, stress_churn.run
    ),
    "codec": Kind(
        "messages that no kernel sends, to the transport devfuse",
        stress_codec.add_arguments,
        stress_codec.run,
    ),
    "crash": Kind(
        "kill whoever changes a layer store, at every step and at any time",
        stress_crash.add_arguments,
        stress_crash.run,
    ),
    "walk": Kind("memory per known inode", stress_walk.add_arguments, stress_walk.run),
    "changes": Kind(
        "what layers change, told in every way, on random chains",
        stress_changes.add_arguments,
        stress_changes.run,
    ),
    "latency": Kind(
        "small requests during a large copy-up", stress_latency.add_arguments, stress_latency.run
    ),
}


def main(argv: list[str]) -> int:
    """Run one kind; 0 when its criterion holds, 1 when not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="dev stress", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        kind.add_arguments(kinds.add_parser(name, help=kind.help, description=kind.help))
    arguments = parser.parse_args(argv)
    with targets.cleaning_up_when_told_to_end():
        return KINDS[arguments.kind].run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
