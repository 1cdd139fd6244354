"""``unionfs2``: mount, unmount and list union mounts; keep layers and images in a store.

Called in any other way than with one of its verbs it is ``fuse-unionfs2``, because
``mount -t fuse.unionfs2`` runs ``unionfs2 SOURCE TARGET -o OPTIONS``.

The verbs of mounts are here; those of the store are loaded when one of them is called.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from unionfs2 import __version__, transports
from unionfs2.cli import common
from unionfs2.cli.parser import COMMON, Parser, Verb, add_common, group, store_verb
from unionfs2.errors import EXIT_OK, UsageError, show

if TYPE_CHECKING:
    from unionfs2.backends import Choice
    from unionfs2.mounts import MountStatus

PROGRAM: Final = "unionfs2"


def _mount(args: argparse.Namespace) -> int:
    target = os.fsencode(args.target)
    backend: Choice = getattr(args, "backend", "auto")
    texts = [os.fsencode(text) for text in args.options]
    spec, _ = common.read_spec(
        texts, debug=args.debug, log=args.log, journal=args.journal, transport=args.transport
    )
    if args.foreground or spec.debug:
        if backend == "native":
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

    done = backends.mount(spec, target, backend, fuse=fork_mounter(), notice=notice)
    for text in done.warnings:
        common.say(PROGRAM, f"warning: {text}")
    if args.verbose:
        how = f"{done.backend} backend" + (f", {done.transport}" if done.transport else "")
        common.say(PROGRAM, f"{os.fsdecode(done.target)} is mounted by the {how}")
    return EXIT_OK


def _umount(args: argparse.Namespace) -> int:
    from unionfs2 import mounts  # noqa: PLC0415

    def unmount(target: str) -> None:
        notice = mounts.unmount(os.fsencode(target), lazy=args.lazy)
        if notice:
            common.say(PROGRAM, f"warning: {notice}")

    return common.for_each(PROGRAM, args.targets, unmount)


def _mounts(args: argparse.Namespace) -> int:
    from unionfs2 import mounts  # noqa: PLC0415

    found = mounts.list_mounts()
    as_json = getattr(args, "format", "table") == "json"
    print(_as_json(found) if as_json else _as_table(found))
    return EXIT_OK


def _as_json(found: Sequence[MountStatus]) -> str:
    import json  # noqa: PLC0415

    rows = [
        {
            "target": os.fsdecode(status.target),
            "backend": status.backend,
            "transport": status.transport,
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
    rows = [("MOUNTPOINT", "BACKEND", "TRANSPORT", "SINCE", "PID")]
    rows += [
        (
            show(status.target),
            status.backend,
            status.transport or "-",
            _when(status.since) or "-",
            str(status.pid or "-"),
        )
        for status in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# --- the command line -----------------------------------------------------------------------------


def _fill_mount(parser: Parser, _: Sequence[str] | None) -> None:
    parser.epilog = common.options_help()
    parser.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[])
    parser.add_argument("target", metavar="MOUNTPOINT")
    parser.add_argument("-f", "--foreground", action="store_true", help="serve in this process")
    parser.add_argument("-d", "--debug", action="store_true", help="log requests; implies -f")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which backend, and why")
    parser.add_argument("--backend", choices=("auto", "native", "fuse"), default=argparse.SUPPRESS)
    parser.add_argument(
        "--transport",
        choices=("auto", *transports.NAMES),
        help="what answers on /dev/fuse; the same as -o transport=",
    )
    parser.add_argument("--log", metavar="FILE", help="append the server's log to FILE")
    parser.add_argument("--journal", action="store_true", help="log to the journal")
    parser.set_defaults(run=_mount, takes=("backend",))


def _fill_umount(parser: Parser, _: Sequence[str] | None) -> None:
    parser.add_argument("-l", "--lazy", action="store_true", help="detach now, even if busy")
    parser.add_argument("targets", metavar="MOUNTPOINT", nargs="+")
    parser.set_defaults(run=_umount, takes=())


def _fill_mounts(parser: Parser, _: Sequence[str] | None) -> None:
    parser.add_argument("--format", choices=("table", "json"), default=argparse.SUPPRESS)
    parser.set_defaults(run=_mounts, takes=("format",))


def _layer_verbs() -> Sequence[Verb]:
    from unionfs2.cli import layer  # noqa: PLC0415 - nothing of the store is loaded to mount

    return layer.VERBS


def _image_verbs() -> Sequence[Verb]:
    from unionfs2.cli import image  # noqa: PLC0415

    return image.VERBS


def _store_verb(name: str, words: str) -> Verb:
    def fill(parser: Parser, given: Sequence[str] | None) -> None:
        from unionfs2.cli import store  # noqa: PLC0415

        store.VERBS[name].fill(parser, given)

    return Verb(name, words, fill)


def _completion(args: argparse.Namespace) -> int:
    from unionfs2.cli import completion  # noqa: PLC0415

    print(completion.script(args.shell), end="")
    return EXIT_OK


def _fill_completion(parser: Parser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"))


MOUNT_VERBS: Final = (
    Verb("mount", "mount layers on a directory", _fill_mount, brief=False),
    Verb("umount", "unmount and wait for the server to end", _fill_umount, brief=False),
    Verb("mounts", "list what is mounted", _fill_mounts, brief=False),
)
VERBS: Final = (
    *MOUNT_VERBS,
    group("layer", "make, fill, mount and compare the layers of a store", _layer_verbs),
    group("image", "import, export and list the images of a store", _image_verbs),
    _store_verb("check", "look for damage in the store"),
    _store_verb("repair", "mend what can be mended, set the rest aside"),
    _store_verb("prune", "remove what interrupted work left behind"),
    _store_verb("info", "tell what the store is, and what this machine can do"),
    store_verb(
        "completion",
        "print the script that completes words in a shell",
        _completion,
        _fill_completion,
    ),
)


def build_parser(words: Sequence[str] | None) -> Parser:
    """The parser for the command line *words*, or for all of them (None)."""
    parser = Parser(
        prog=PROGRAM,
        brief=True,
        description="Union mounts in the overlay on-disk format, and a store of layers for them.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    add_common(parser, 0)
    parser.add_verbs(VERBS, words)
    return parser


def _is_mount_helper(words: Sequence[str]) -> bool:
    """Whether mount(8) or one of its helpers calls: [SOURCE] MOUNTPOINT -o OPTIONS.

    SOURCE may be any word, also one that is a verb of the store; mount points are absolute then.
    """
    if "-o" not in words or words[0].partition("=")[0] in COMMON:
        return False
    if words[0] in {verb.name for verb in MOUNT_VERBS}:
        return False
    return words[0] not in {verb.name for verb in VERBS} or words[1].startswith("/")


def _refuse_stray(args: argparse.Namespace) -> None:
    """The common options are for the store; those that mean nothing to a mount verb are refused."""
    takes: Sequence[str] | None = getattr(args, "takes", None)
    if takes is None:
        return
    for name in vars(args):
        option = "storage_opt" if name.startswith("storage_opt_") else name
        option = f"--{option.replace('_', '-')}"
        if option in COMMON and name not in takes:
            raise UsageError(f"{option} is for the layer store, {args.parser.prog} does not use it")


def _run(words: Sequence[str]) -> int:
    if _is_mount_helper(words):
        from unionfs2.cli import fuse  # noqa: PLC0415

        return fuse.run(words, PROGRAM)
    args, extra = build_parser(words).parse_known_args(words)
    if extra:
        args.parser.refuse_extra(extra)
    _refuse_stray(args)
    status: int = args.run(args)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``unionfs2``."""
    if "_ARGCOMPLETE" in os.environ:
        from unionfs2.cli import completion  # noqa: PLC0415 - the shell asks for words

        completion.answer(build_parser(None))
    words = list(sys.argv[1:] if argv is None else argv)
    return common.guarded(PROGRAM, lambda: _run(words))


if __name__ == "__main__":
    sys.exit(main())
