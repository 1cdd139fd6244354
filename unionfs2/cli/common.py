"""What both commands share: running a mount, and turning an error into words and a status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

from unionfs2.errors import (
    EXIT_OK,
    EXIT_SOMEOK,
    UnionFSError,
    exit_code_of,
    is_expected,
    sentence,
)
from unionfs2.options import MountSpec, escape, parse_options

_T = TypeVar("_T")


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run *command*; an error becomes one line on standard error and an exit status."""
    try:
        status = command()
        sys.stdout.flush()  # here, and not when the interpreter ends, a closed pipe is no error
        return status
    except BrokenPipeError:
        # Whoever read our output has seen enough; do not complain again while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt as exc:
        say(program, "interrupted")
        return exit_code_of(exc)
    except Exception as exc:  # noqa: BLE001 - every way out of a command is a sentence
        if not is_expected(exc):
            import traceback  # noqa: PLC0415 - a bug in this program, for its authors

            traceback.print_exc()
        say(program, sentence(exc))
        return exit_code_of(exc)


def leave(status: int) -> NoReturn:
    """End this process without taking the interpreter apart, which takes longer than a mount."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say(program: str, text: str) -> None:
    """One line for people, on standard error."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def for_each(program: str, targets: Iterable[_T], act: Callable[[_T], object]) -> int:
    """Do *act* to each of *targets*; one that fails does not stop the others. Exit status."""
    codes: list[int] = []
    for target in targets:
        try:
            act(target)
            codes.append(EXIT_OK)
        except (UnionFSError, OSError) as exc:
            say(program, sentence(exc))
            codes.append(exit_code_of(exc))
    if any(codes) and not all(codes):
        return EXIT_SOMEOK
    return max(codes, default=EXIT_OK)


def read_spec(
    texts: list[bytes], *, debug: bool, log: str | None, journal: bool, transport: str | None
) -> tuple[MountSpec, tuple[str, ...]]:
    """The spec of all -o texts and switches together, and the options without effect."""
    if transport is not None:
        texts = [*texts, b"transport=" + escape(os.fsencode(transport))]
    parsed = parse_options(texts)
    spec = parsed.spec
    if debug:
        spec = spec._replace(debug=True)
    if journal:
        spec = spec._replace(journal=True)
    if log is not None:
        spec = spec._replace(log=os.fsencode(log))
    return spec, parsed.ignored


def serve_in_foreground(spec: MountSpec, target: bytes) -> None:
    """Be the server of *target* until it is unmounted or a signal arrives."""
    from unionfs2 import logs  # noqa: PLC0415 - a daemon sets this up in its own process
    from unionfs2.mounter import open_target, resolve_target  # noqa: PLC0415
    from unionfs2.options import absolute  # noqa: PLC0415
    from unionfs2.serving import serve_mount  # noqa: PLC0415

    spec = absolute(spec, os.getcwdb())
    target = resolve_target(target)
    os.close(open_target(target))
    logs.set_up(spec, foreground=True)
    os.umask(0)
    serve_mount(spec, target, pid=os.getpid())


def options_help() -> str:
    """The list of mount options for --help."""
    import textwrap  # noqa: PLC0415

    from unionfs2.option_names import IGNORED, known_names  # noqa: PLC0415

    ignored = sorted(IGNORED)
    acted_on = [name for name in known_names() if name not in IGNORED]
    parts = [
        "mount options (-o), separated by commas; a backslash takes the next character literally:",
        "  lowerdir=DIR[:DIR...]   layers, topmost first; a colon in a name is written \\:",
        "  upperdir=DIR            where changes go",
        "  workdir=DIR             an empty directory on the file system of the upper one",
        "known options:",
        textwrap.fill(" ".join(acted_on), 78, initial_indent="  ", subsequent_indent="  "),
        "accepted without effect (also x-*, X-*):",
        textwrap.fill(" ".join(ignored), 78, initial_indent="  ", subsequent_indent="  "),
    ]
    return "\n".join(parts)
