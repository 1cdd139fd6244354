"""``./dev lint`` and ``./dev test``: ruff, mypy and pytest, one after the other."""

import os
import subprocess
import sys
from pathlib import Path

from devtools import reachable

ROOT = Path(__file__).resolve().parent.parent

# Read by tests/conftest.py, which repeats it in pytest's summary and fails the run.
LINT_FAILURES_VARIABLE = "UNIONFS2_LINT_FAILURES"


def run_module(*command: str, variables: dict[str, str] | None = None) -> int:
    """Run ``python -m command`` from the root of the project; its exit status."""
    print("$", *command, flush=True)
    return subprocess.run(
        [*reachable.prefix(ROOT), sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        check=False,
    ).returncode


def lint(*, fix: bool = False) -> list[str]:
    """Names of the static checks that failed; all of them run."""
    checks = {
        "ruff check": ("ruff", "check", *(["--fix"] if fix else []), "."),
        "ruff format": ("ruff", "format", *([] if fix else ["--check"]), "."),
        "mypy --strict": ("mypy", "--strict"),
    }
    return [name for name, command in checks.items() if run_module(*command)]


def main(argv: list[str]) -> int:
    """Perform ``lint [--fix]`` or ``test [pytest's arguments]``."""
    if argv[0] == "lint":
        if argv[1:] not in ([], ["--fix"]):
            print("usage: ./dev lint [--fix]", file=sys.stderr)
            return 2
        failures = lint(fix=bool(argv[1:]))
        print(f"failed: {', '.join(failures)}" if failures else "all static checks passed")
        return 1 if failures else 0
    # The tests run also after a failed check: both answers are wanted, and pytest's summary,
    # which closes the output, repeats the failure.
    failures = lint()
    status = run_module(
        "pytest", *argv[1:], variables={LINT_FAILURES_VARIABLE: ", ".join(failures)}
    )
    return status or (1 if failures else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
