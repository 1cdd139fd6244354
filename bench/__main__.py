"""``python -m bench run|compare|store ...``."""

from __future__ import annotations

import sys

from bench import compare, run, store

COMMANDS = {"run": run.main, "compare": compare.main, "store": store.main}


def main(argv: list[str]) -> int:
    """Dispatch to one of the commands; what names none goes to ``run``."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return run.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
