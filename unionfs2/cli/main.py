"""``unionfs2``: mount, unmount and list union mounts.

Called in any other way than with one of its verbs it is ``fuse-unionfs2``, because
``mount -t fuse.unionfs2`` runs ``unionfs2 SOURCE TARGET -o OPTIONS``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionfs2 import __version__
from unionfs2.cli import common
from unionfs2.errors import (
    EXIT_OK,
    EXIT_SOMEOK,
    EXIT_USAGE,
    UnionFSError,
    UsageError,
    exit_code_of,
    sentence,
    show,
)

if TYPE_CHECKING:
    from unionfs2.mounts import MountStatus

PROGRAM = "unionfs2"


class _Parser(argparse.ArgumentParser):
    """argparse with the exit status of mount(8) for a wrong command line."""

    def error(self, message: str) -> None:  # type: ignore[override]  # never returns either way
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def _mount(args: argparse.Namespace) -> int:
    target = os.fsencode(args.target)
    texts = [os.fsencode(text) for text in args.options]
    spec, _ = common.read_spec(texts, debug=args.debug, log=args.log, journal=args.journal)
    if args.foreground or spec.debug:
        if args.backend == "native":
            raise UsageError(
                "-f and -d are for a server process, which the native backend does not have: "
                "leave them out or use --backend fuse"
            )
        common.serve_in_foreground(spec, target)
        return EXIT_OK
    from unionfs2 import backends  # noqa: PLC0415 - each verb loads what it needs
    from unionfs2.cli.forked import fork_mounter  # noqa: PLC0415

    def notice(reason: str) -> None:
        if args.verbose:
            common.say(PROGRAM, f"using fuse: {reason}")

    done = backends.mount(spec, target, args.backend, fuse=fork_mounter(), notice=notice)
    for text in done.warnings:
        common.say(PROGRAM, f"warning: {text}")
    if args.verbose:
        common.say(PROGRAM, f"{os.fsdecode(done.target)} is mounted by the {done.backend} backend")
    return EXIT_OK


def _umount(args: argparse.Namespace) -> int:
    from unionfs2 import mounts  # noqa: PLC0415

    codes: list[int] = []
    for target in args.targets:
        try:
            notice = mounts.unmount(os.fsencode(target), lazy=args.lazy)
            if notice:
                common.say(PROGRAM, f"warning: {notice}")
            codes.append(EXIT_OK)
        except (UnionFSError, OSError) as exc:
            common.say(PROGRAM, sentence(exc))
            codes.append(exit_code_of(exc))
    if any(codes) and not all(codes):
        return EXIT_SOMEOK
    return max(codes)


def _mounts(args: argparse.Namespace) -> int:
    from unionfs2 import mounts  # noqa: PLC0415

    found = mounts.list_mounts()
    print(_as_json(found) if args.format == "json" else _as_table(found))
    return EXIT_OK


def _as_json(found: Sequence[MountStatus]) -> str:
    import json  # noqa: PLC0415

    rows = [
        {
            "target": os.fsdecode(status.target),
            "backend": status.backend,
            "since": _when(status.since, utc=True),
            "pid": status.pid,
            "options": status.options,
        }
        for status in found
    ]
    return json.dumps(rows, indent=2)


def _when(since: float | None, *, utc: bool = False) -> str | None:
    """A time for people, or with *utc* one for programs (RFC 3339)."""
    import time  # noqa: PLC0415

    if since is None:
        return None
    if utc:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since))
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))


def _as_table(found: Sequence[MountStatus]) -> str:
    rows = [("MOUNTPOINT", "BACKEND", "SINCE", "PID")]
    rows += [
        (
            show(status.target),
            status.backend,
            _when(status.since) or "-",
            str(status.pid or "-"),
        )
        for status in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Union mounts in the overlay on-disk format.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    mount = verbs.add_parser(
        "mount",
        help="mount layers on a directory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=common.options_help(),
    )
    mount.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[])
    mount.add_argument("target", metavar="MOUNTPOINT")
    mount.add_argument("-f", "--foreground", action="store_true", help="serve in this process")
    mount.add_argument("-d", "--debug", action="store_true", help="log requests; implies -f")
    mount.add_argument("-v", "--verbose", action="store_true", help="say which backend, and why")
    mount.add_argument("--backend", choices=("auto", "native", "fuse"), default="auto")
    mount.add_argument("--log", metavar="FILE", help="append the server's log to FILE")
    mount.add_argument("--journal", action="store_true", help="log to the journal")
    mount.set_defaults(run=_mount)

    umount = verbs.add_parser("umount", help="unmount and wait for the server to end")
    umount.add_argument("-l", "--lazy", action="store_true", help="detach now, even if busy")
    umount.add_argument("targets", metavar="MOUNTPOINT", nargs="+")
    umount.set_defaults(run=_umount)

    mounts = verbs.add_parser("mounts", help="list what is mounted")
    mounts.add_argument("--format", choices=("table", "json"), default="table")
    mounts.set_defaults(run=_mounts)
    return parser


_VERBS = ("mount", "umount", "mounts")


def _is_mount_helper(words: Sequence[str]) -> bool:
    return bool(words) and words[0] not in _VERBS and "-o" in words


def _run(words: Sequence[str]) -> int:
    if _is_mount_helper(words):
        from unionfs2.cli import fuse  # noqa: PLC0415

        return fuse.run(words, PROGRAM)
    args = _parser().parse_args(words)
    status: int = args.run(args)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``unionfs2``."""
    words = list(sys.argv[1:] if argv is None else argv)
    return common.guarded(PROGRAM, lambda: _run(words))


if __name__ == "__main__":
    sys.exit(main())
