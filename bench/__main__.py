"""``python -m bench run|compare|store ...``."""

from __future__ import annotations

import sys

from bench import compare, run, store

COMMANDS = {"run": run.main, "compare": compare.main, "store": store.main}


def main(argv: list[str]) -> int:
    """Dispatch to one of the commands."""
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        print(f"usage: python -m bench {'|'.join(COMMANDS)} [--help]", file=sys.stderr)
        return 2
    return command(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
