"""``./dev bench [run|compare|chart|row|store] ...``: without a word, ``run``."""

from __future__ import annotations

import sys

from bench import chart, compare, row, run

USAGE = """\
usage: ./dev bench [run] [--quick] [--workload NAME]... [--target NAME]... [...]
       ./dev bench compare FILE [LATER]    tables of a run, or how ratios moved between two
       ./dev bench chart FILE [FOLDER]     draw the charts of a run
       ./dev bench row FILE                a row for bench/RESULTS.md
       ./dev bench store ...               the layer store beside tar and mount
       each of them takes --help
"""
COMMANDS = {"run": run.main, "compare": compare.main, "chart": chart.main, "row": row.main}


def main(argv: list[str]) -> int:
    """Dispatch to one of the commands."""
    word = argv[0] if argv else "run"
    if word.startswith("-"):
        return run.main(argv)
    if word == "store":
        from bench import store  # noqa: PLC0415 - it loads the driver, which no mount needs

        return store.main(argv[1:])
    if word not in COMMANDS:
        print(USAGE, end="", file=sys.stderr)
        return 2
    return COMMANDS[word](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
