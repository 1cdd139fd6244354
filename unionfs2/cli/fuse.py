"""``fuse-unionfs2``: a FUSE mount in the shape that container engines and mount(8) call.

Three callers, three orders of the same words:

    fuse-unionfs2 -o OPTIONS TARGET                     podman, buildah
    fuse-unionfs2 SOURCE TARGET -o OPTIONS,dev,suid     containerd, through mount.fuse3
    mount -t fuse.fuse-unionfs2 SOURCE TARGET -o ...    mount(8) and fstab, likewise

SOURCE is ignored. The parser is written by hand because a container engine waits for it, dozens of
times in a row; it imports nothing that a mount does not need.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from unionfs2 import __version__
from unionfs2.cli import common
from unionfs2.errors import EXIT_OK, UnionFSError, UsageError, to_record

PROGRAM = "fuse-unionfs2"

USAGE = """\
usage: fuse-unionfs2 [-f] [-d] [-o OPTION[,OPTION...]]... [SOURCE] MOUNTPOINT

Mounts a union of directories through FUSE and returns when the mount answers.
SOURCE is accepted and ignored.

  -o OPTIONS       mount options, see below; may be repeated
  -f               stay in the foreground
  -d, --debug      log every request to standard error; implies -f
  --log FILE       append the server's log to FILE (also -o log=FILE)
  --journal        send the server's log to the journal (also -o journal)
  --transport T    what answers: auto, pyfuse3 or devfuse (also -o transport=T)
  -s               accepted without effect
  -V, --version    print the version and exit
  -h, --help       print this text and exit
"""


class Arguments(NamedTuple):
    """The command line, sorted."""

    options: tuple[bytes, ...] = ()
    positional: tuple[str, ...] = ()
    foreground: bool = False
    debug: bool = False
    help: bool = False
    version: bool = False
    journal: bool = False
    log: str | None = None
    transport: str | None = None
    report_fd: int | None = None


_SWITCHES = {
    "-f": "foreground",
    "--foreground": "foreground",
    "-d": "debug",
    "--debug": "debug",
    "-h": "help",
    "--help": "help",
    "-V": "version",
    "--version": "version",
    "--journal": "journal",
}
_WITHOUT_EFFECT = ("-s", "-n", "-v")  # of libfuse and of mount(8)'s helpers
_VALUED = ("-o", "--log", "--transport", "--report-fd", "-t")


def parse(argv: Sequence[str]) -> Arguments:
    """Sort the words of the command line. Raises UsageError."""
    found: dict[str, Any] = {}
    options: list[bytes] = []
    positional: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":
            positional.extend(words)
        elif word in _SWITCHES:
            found[_SWITCHES[word]] = True
        elif word in _VALUED:
            given = next(words, None)
            if given is None:
                raise UsageError(f"{word} needs a value: see --help")
            _set_value(found, options, word, given)
        elif word.startswith("--") and equals and name in _VALUED:
            _set_value(found, options, name, value)
        elif word.startswith("-o"):
            _set_value(found, options, "-o", word[2:])
        elif word.startswith("-") and word != "-" and word not in _WITHOUT_EFFECT:
            raise UsageError(f'unknown argument "{word}": see --help')
        elif word not in _WITHOUT_EFFECT:
            positional.append(word)
    return Arguments(tuple(options), tuple(positional), **found)


def _set_value(found: dict[str, Any], options: list[bytes], name: str, value: str) -> None:
    if name == "-o":
        options.append(os.fsencode(value))
    elif name == "--log":
        found["log"] = value
    elif name == "--transport":
        found["transport"] = value
    elif name == "--report-fd":
        if not value.isdigit():
            raise UsageError(f'--report-fd needs a number, got "{value}"')
        found["report_fd"] = int(value)


def _target(found: Arguments) -> bytes:
    if not found.positional:
        raise UsageError("the mount point is missing: fuse-unionfs2 -o OPTIONS MOUNTPOINT")
    if len(found.positional) > 2:
        extra = found.positional[2]
        raise UsageError(f'too many arguments, "{extra}" is neither SOURCE nor MOUNTPOINT')
    return os.fsencode(found.positional[-1])


def run(argv: Sequence[str], program: str = PROGRAM) -> int:
    """The whole command; its exit status."""
    found = parse(argv)
    if found.version:
        print(f"{program} {__version__}")
        return EXIT_OK
    if found.help:
        print(USAGE + "\n" + common.options_help())
        return EXIT_OK
    try:
        return _mount(found, program)
    except (UnionFSError, OSError) as exc:
        if found.report_fd is None:
            raise
        _report(found.report_fd, {"error": to_record(exc)})
        return to_record(exc)["exit_code"]  # type: ignore[return-value]  # an int, see to_record()


def _mount(found: Arguments, program: str) -> int:
    target = _target(found)
    spec, _ = common.read_spec(
        list(found.options),
        debug=found.debug,
        log=found.log,
        journal=found.journal,
        transport=found.transport,
    )
    if found.foreground or spec.debug:
        common.serve_in_foreground(spec, target)
        return EXIT_OK
    from unionfs2.cli.forked import mount_by_fork  # noqa: PLC0415 - not in the foreground

    for text in mount_by_fork(spec, target).warnings:
        if found.report_fd is None:
            common.say(program, f"warning: {text}")
        else:
            _report(found.report_fd, {"warning": text})
    return EXIT_OK


def _report(fd: int, value: dict[str, object]) -> None:
    import json  # noqa: PLC0415 - for library callers only

    os.write(fd, json.dumps(value).encode() + b"\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fuse-unionfs2``; with *argv* a function that returns the status."""
    if argv is None:
        # Until a server sets its own rules; what a start makes is needed or freed by its count.
        gc.disable()
        common.leave(common.guarded(PROGRAM, lambda: run(sys.argv[1:])))
    return common.guarded(PROGRAM, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
