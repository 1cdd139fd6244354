"""Dispatch of ``./dev COMMAND``: every command is a module that can be run by itself."""

import os
import sys
from typing import NoReturn

# command -> module and the arguments put before the caller's own
COMMANDS: dict[str, tuple[str, ...]] = {
    "demo": ("devtools.demo",),
    "test": ("devtools.checks", "test"),
    "lint": ("devtools.checks", "lint"),
    "fuzz": ("devtools.fuzz",),
    "stress": ("devtools.stress",),
    "bench": ("bench",),
}


def become(*module_and_arguments: str) -> NoReturn:
    """Replace this process, so that signals and exit status need no forwarding."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *module_and_arguments])


def main(argv: list[str]) -> int:
    """Run the module that performs ``argv[0]``."""
    if argv[:1] == ["setup"]:
        print(f"ready: {os.path.dirname(sys.executable)}/unionfs2")
        return 0
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        print(f"dev: no command {' '.join(argv)!r}; ./dev --help lists them", file=sys.stderr)
        return 2
    become(*command, *argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
