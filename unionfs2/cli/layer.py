"""``unionfs2 layer``: every verb is a few lines over the driver."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from unionfs2.cli import common as shared
from unionfs2.cli import completion
from unionfs2.cli.output import (
    PROGRAM,
    Bytes,
    CountedReader,
    CountedWriter,
    Ident,
    Meter,
    Moment,
    Output,
    escaped,
    short,
    utc,
    write_line,
)
from unionfs2.cli.parser import Parser, store_verb
from unionfs2.cli.settings import Common
from unionfs2.cli.store import layer_id, opened, session
from unionfs2.errors import EXIT_OK, StoreError, UnknownLayerError, UsageError, show
from unionfs2.storemodel import Digest, Kind, LayerId, Size

if TYPE_CHECKING:
    from unionfs2.archive.digest import Writable
    from unionfs2.driver import Driver, Holding, LayerStatus, Parent

_DIGEST: Final = re.compile("sha256:[0-9a-f]{64}")
_OF_THE_LAYER: Final = ("size", "inodes")
_WORDS: Final = {Kind.ADDED: "added", Kind.CHANGED: "changed", Kind.DELETED: "deleted"}


# --- make and remove ------------------------------------------------------------------------------


def _create(args: argparse.Namespace) -> int:
    common = Common.of(args)
    own, rest = _layer_options(common.storage_options)
    out = Output.of(common)
    with opened(common, create=True, storage_options=rest) as driver:
        made = driver.create(
            args.id,
            parent=_named(driver, args.parent),
            writable=args.writable,
            label=args.label,
            options=own,
            template=_named(driver, args.template),
        )
    out.result(made, id=made)
    return EXIT_OK


def _layer_options(texts: list[str]) -> tuple[Mapping[str, str], list[str]]:
    """The --storage-opt words about this layer, and those about the store."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for text in texts:
        key, found, value = text.partition("=")
        if found and key.lower() in _OF_THE_LAYER:
            own[key.lower()] = value
        else:
            rest.append(text)
    return own, rest


def _named(driver: Driver, text: str | None) -> LayerId | None:
    return None if text is None else layer_id(driver, text)


def _rm(args: argparse.Namespace) -> int:
    with session(args) as (driver, _):

        def remove(text: str) -> None:
            try:
                layer = layer_id(driver, text)
            except UnknownLayerError:
                if not args.force:
                    raise
            else:
                driver.remove(layer, force=args.force)

        return shared.for_each(PROGRAM, args.ids, remove)


def _commit(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        made = driver.commit(layer_id(driver, args.id), args.new_id, keep=args.keep)
    out.result(made, id=made)
    return EXIT_OK


def _flatten(args: argparse.Namespace) -> int:
    with session(args) as (driver, out), out.meter("flattening") as meter:
        made = driver.flatten(layer_id(driver, args.id), args.new_id, progress=meter)
    out.result(made, id=made)
    return EXIT_OK


def _rebase(args: argparse.Namespace) -> int:
    with session(args) as (driver, out), out.meter("rebasing") as meter:
        onto = layer_id(driver, args.onto) if args.onto else None
        done = driver.rebase(layer_id(driver, args.id), onto, args.new_id, progress=meter)
    for conflict in done.conflicts:
        out.note(
            f"{escaped(conflict.path)}: {_WORDS[conflict.ours]} by the layer, "
            f"{_WORDS[conflict.theirs]} between the parents: it is as the layer has it"
        )
    found = [
        {"path": os.fsdecode(one.path), "ours": str(one.ours), "theirs": str(one.theirs)}
        for one in done.conflicts
    ]
    out.result(done.id, id=done.id, conflicts=found)
    return EXIT_OK


# --- mount ----------------------------------------------------------------------------------------


def _mount(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        layer = layer_id(driver, args.id)
        target = None if args.target is None else os.path.abspath(args.target)
        path = driver.get(layer, args.label, read_only=args.read_only, target=target)
    out.result(os.fsencode(path), id=layer, path=os.fsdecode(path))
    return EXIT_OK


def _umount(args: argparse.Namespace) -> int:
    with session(args) as (driver, _):
        return shared.for_each(
            PROGRAM, args.ids, lambda text: driver.put(layer_id(driver, text), force=args.force)
        )


# --- tar in, tar out ------------------------------------------------------------------------------


def _apply(args: argparse.Namespace) -> int:
    expected = _digest(args.digest)
    with session(args) as (driver, out):
        layer = layer_id(driver, args.id)
        parent = _parent(driver, args.parent)
        with _source(args.file, out) as stream:
            done = driver.apply(layer, stream, parent, expected=expected)
    out.result(
        done.diff_id,
        diff_id=done.diff_id,
        size_bytes=done.size.bytes,
        inodes=done.size.inodes,
        entries=done.entries,
    )
    return EXIT_OK


def _digest(text: str | None) -> Digest | None:
    if text is None:
        return None
    if not _DIGEST.fullmatch(text):
        raise UsageError(f'digest "{show(text)}" is not "sha256:" and 64 lower-case hex digits')
    return Digest(text)


@contextlib.contextmanager
def _source(name: str, out: Output) -> Iterator[CountedReader]:
    """The file *name*, or standard input for "-", read with a progress bar."""
    if name == "-" and sys.stdin.isatty():
        raise UsageError("standard input is a terminal: name a FILE, or pipe a tar stream in")
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if name == "-" else stack.enter_context(Path(name).open("rb"))
        found = os.fstat(stream.fileno())
        total = found.st_size if stat.S_ISREG(found.st_mode) else None
        yield CountedReader(stream, stack.enter_context(out.meter("applying", total)))


def _diff(args: argparse.Namespace) -> int:
    if args.output == "-" and sys.stdout.isatty():
        raise UsageError("a tar stream is not for a terminal: use -o FILE, or a pipe")
    with session(args) as (driver, out):
        layer = layer_id(driver, args.id)
        parent = _parent(driver, args.parent)
        with out.meter("writing", _expected_size(driver, layer, out)) as meter:
            digest = _write_diff(args, driver, layer, parent, meter)
    if args.output != "-":
        out.result(digest, digest=digest)
    return EXIT_OK


def _expected_size(driver: Driver, layer: LayerId, out: Output) -> int | None:
    """How long the stream will be, about; asked only when somebody looks."""
    if out.quiet or not sys.stderr.isatty():
        return None
    return driver.diff_size(layer).bytes


def _write_diff(
    args: argparse.Namespace, driver: Driver, layer: LayerId, parent: Parent, meter: Meter
) -> Digest:
    from unionfs2.archive.compress import compressor  # noqa: PLC0415 - this verb only

    with contextlib.ExitStack() as stack:
        sink: Writable = stack.enter_context(_sink(args.output))
        if args.compress:
            sink = stack.enter_context(compressor(args.compress, sink))
        return driver.diff(layer, CountedWriter(sink, meter), parent, exact=args.exact)


@contextlib.contextmanager
def _sink(name: str) -> Iterator[BinaryIO]:
    """Where a stream goes. A file appears under its name when it is complete, or not at all."""
    if name == "-":
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(os.path.realpath(name))  # a symbolic link keeps leading to the file
    if path.exists() and not path.is_file():  # a pipe or a device: there is nothing to replace
        with path.open("wb") as stream:
            yield stream
        return
    try:
        descriptor, aside = tempfile.mkstemp(prefix=".unionfs2-", dir=path.parent)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, name) from exc
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            os.fchmod(descriptor, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _umask() -> int:
    """The process's umask; there is no way to ask without setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _parent(driver: Driver, text: str | None) -> Parent:
    """What a difference is taken to: the layer's own parent, nothing (""), or any layer."""
    from unionfs2.driver import DIRECT  # noqa: PLC0415 - loaded by now

    if text is None:
        return DIRECT
    return layer_id(driver, text) if text else None


# --- look -----------------------------------------------------------------------------------------


def _changes(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        found = driver.changes(layer_id(driver, args.id), _parent(driver, args.parent))
        if out.json:
            if args.null:
                raise UsageError("--null and --format json exclude each other")
            out.as_json(
                [{"kind": str(change.kind), "path": os.fsdecode(change.path)} for change in found]
            )
            return EXIT_OK
        sys.stdout.flush()
        write = sys.stdout.buffer.write
        for path, kind in found:
            if args.null:
                write(b"%b %b\0" % (str(kind).encode(), path))
            else:
                write(f"{kind} {escaped(path)}\n".encode())
        sys.stdout.buffer.flush()
    return EXIT_OK


def _ls(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        found = driver.layers()
    out.table(
        ("ID", "PARENT", "STATE", "SIZE", "MOUNTED", "CREATED", "LABEL"),
        [
            (
                Ident(layer.id),
                Ident(layer.parent or ""),
                _state(layer),
                None if layer.size is None else Bytes(layer.size.bytes),
                layer.path,
                None if layer.created is None else Moment(layer.created),
                layer.label,
            )
            for layer in found
        ],
        [_layer_record(layer) for layer in found],
    )
    return EXIT_OK


def _state(layer: LayerStatus) -> str:
    if layer.reason:
        return "damaged"
    if layer.committed:
        return "committed"
    return "writable" if layer.writable else "empty"


def _layer_record(layer: LayerStatus) -> dict[str, Any]:
    size, quota = layer.size, layer.quota
    return {
        "id": layer.id,
        "parent": layer.parent,
        "state": _state(layer),
        "reason": layer.reason or None,
        "size_bytes": size.bytes if size else None,
        "inodes": size.inodes if size else None,
        "mounted": layer.mounted,
        "path": layer.path,
        "created": utc(layer.created),
        "label": layer.label,
        "dialect": layer.dialect,
        "size_max_bytes": quota.size_bytes if quota else None,
        "inodes_max": quota.inodes if quota else None,
    }


def _tree(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        nodes = driver.tree()
    if out.json:
        # Flat, because readers of JSON limit the depth of nesting and chains are long.
        out.as_json(
            [
                {**_layer_record(n.layer), "depth": n.depth, "children": list(n.children)}
                for n in nodes
            ]
        )
        return EXIT_OK
    people = sys.stdout.isatty()
    for node, guide in zip(nodes, _guides([node.depth for node in nodes]), strict=True):
        name = show(short(node.layer.id) if people else node.layer.id)
        write_line(f"{guide}{name}{_remark(node.layer)}".encode())
    return EXIT_OK


def _remark(layer: LayerStatus) -> str:
    words = [_state(layer), *(["mounted"] if layer.path else []), layer.label]
    return f"  ({', '.join(show(word) for word in words if word)})"


def _guides(depths: Sequence[int]) -> list[str]:
    """What to draw before each line of a tree whose lines have these depths, parents first."""
    guides = []
    going_on: set[int] = set()  # depths at which a sibling follows, seen from below
    for depth in reversed(depths):
        above = "".join("|  " if level in going_on else "   " for level in range(1, depth))
        own = "|- " if depth in going_on else "`- "
        guides.append(above + own if depth else "")
        going_on = {level for level in going_on if level < depth} | {depth}
    return guides[::-1]


def _inspect(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        layers = [layer_id(driver, text) for text in args.ids]
        out.as_json([driver.inspect(layer) for layer in layers])
    return EXIT_OK


def _usage(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        found = driver.usage([layer_id(driver, text) for text in args.ids] or None)
    out.table(
        ("ID", "OWN", "EXCLUSIVE", "SHARED", "INODES"),
        [
            (
                Ident(usage.id),
                Bytes(usage.own.bytes),
                Bytes(usage.exclusive.bytes),
                Bytes(usage.shared.bytes),
                usage.exclusive.inodes + usage.shared.inodes,
            )
            for usage in found
        ],
        [
            {
                "id": usage.id,
                **_sizes("own", usage.own),
                **_sizes("exclusive", usage.exclusive),
                **_sizes("shared", usage.shared),
            }
            for usage in found
        ],
    )
    return EXIT_OK


def _sizes(name: str, size: Size) -> dict[str, int]:
    return {f"{name}_bytes": size.bytes, f"{name}_inodes": size.inodes}


def _which(args: argparse.Namespace) -> int:
    path = os.fsencode(args.path)
    with session(args) as (driver, out):
        layer = layer_id(driver, args.id)
        found = driver.which(layer, path)
    if not found:
        raise StoreError(f"{escaped(path)} is in no layer of {show(layer)}", errno=errno.ENOENT)
    out.table(
        ("LAYER", "HOLDS", "ROLE", "SIZE", "PATH"),
        [
            (
                Ident(one.layer),
                one.kind,
                _role(one),
                Bytes(one.size) if one.kind == "file" else None,
                escaped(one.path),
            )
            for one in found
        ],
        [
            {
                "layer": one.layer,
                "holds": one.kind,
                "visible": one.visible,
                "role": one.role or None,
                "hidden_by": one.hidden_by,
                "reason": one.reason or None,
                "size_bytes": one.size,
                "path": os.fsdecode(one.path),
            }
            for one in found
        ],
    )
    return EXIT_OK


def _role(one: Holding) -> str:
    if one.role:
        return one.role
    people = sys.stdout.isatty()
    by = one.hidden_by or "?"
    return f"hidden by {show(short(by) if people else by)} ({one.reason})"


# --- what they take -------------------------------------------------------------------------------


def _one_id(parser: Parser, words: str = "the layer") -> None:
    argument = parser.add_argument("id", metavar="ID", help=words)
    argument.completer = completion.layers  # type: ignore[attr-defined]  # argcomplete's own


def _several_ids(parser: Parser, nargs: str = "+") -> None:
    argument = parser.add_argument("ids", metavar="ID", nargs=nargs, help="layers")
    argument.completer = completion.layers  # type: ignore[attr-defined]


def _id_option(parser: Parser, *names: str, words: str, required: bool = False) -> None:
    argument = parser.add_argument(*names, metavar="ID", help=words, required=required)
    argument.completer = completion.layers  # type: ignore[attr-defined]


def _new_id(parser: Parser) -> None:
    parser.add_argument("--id", dest="new_id", metavar="NEW", help="name of the new layer")


def _other(parser: Parser) -> None:
    _id_option(
        parser,
        "--parent",
        "--against",
        words="compare with this layer instead of the layer's own parent; empty: with nothing",
    )


def _fill_create(parser: Parser) -> None:
    parser.add_argument("--id", metavar="ID", help="its name; by default 64 random hex digits")
    _id_option(parser, "--parent", words="the layer to build on")
    parser.add_argument("--writable", action="store_true", help="a place for changes")
    _id_option(parser, "--template", words="begin with a copy of what this layer holds")
    parser.add_argument("--label", default="", help="a label for the security module")


def _fill_rm(parser: Parser) -> None:
    parser.add_argument(
        "-f", "--force", action="store_true", help="unmount first; a missing layer is no error"
    )
    _several_ids(parser)


def _fill_mount(parser: Parser) -> None:
    _one_id(parser)
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", help="mount here instead of inside the store"
    )
    parser.add_argument("--read-only", action="store_true", help="nothing can be changed")
    parser.add_argument("--label", default="", help="a label for the security module")


def _fill_umount(parser: Parser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="whoever else has mounted it, and even if busy"
    )
    _several_ids(parser)


def _fill_apply(parser: Parser) -> None:
    _one_id(parser)
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="a tar stream; - is standard input"
    )
    parser.add_argument(
        "--digest", metavar="DIGEST", help="sha256:... that the uncompressed stream must have"
    )
    _id_option(parser, "--parent", words="the layer that the stream was made against")


def _fill_diff(parser: Parser) -> None:
    _one_id(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="write here; - is standard output"
    )
    _other(parser)
    parser.add_argument(
        "--exact", action="store_true", help="the very bytes that were once applied"
    )
    parser.add_argument("--compress", choices=("gzip", "zstd"), help="compress the stream")


def _fill_changes(parser: Parser) -> None:
    _one_id(parser)
    _other(parser)
    parser.add_argument(
        "-0", "--null", action="store_true", help="end entries with NUL, write paths as they are"
    )


def _fill_commit(parser: Parser) -> None:
    _one_id(parser)
    _new_id(parser)
    parser.add_argument(
        "--keep", action="store_true", help="go on with a new writable layer under the old id"
    )


def _fill_which(parser: Parser) -> None:
    _one_id(parser)
    parser.add_argument("path", metavar="PATH", help="a path inside the layer")


def _fill_flatten(parser: Parser) -> None:
    _one_id(parser)
    _new_id(parser)


def _fill_rebase(parser: Parser) -> None:
    _one_id(parser)
    _id_option(parser, "--onto", words="the new parent; empty: none", required=True)
    _new_id(parser)


def _fill_nothing(_: Parser) -> None:
    pass


VERBS: Final = (
    store_verb("create", "make a layer and print its id", _create, _fill_create),
    store_verb("rm", "remove layers", _rm, _fill_rm),
    store_verb("mount", "mount a layer and print where", _mount, _fill_mount),
    store_verb("umount", "give back a mount of layers", _umount, _fill_umount),
    store_verb(
        "apply", "unpack a tar stream into a layer and print its DiffID", _apply, _fill_apply
    ),
    store_verb("diff", "write what a layer changes as a tar stream", _diff, _fill_diff),
    store_verb("changes", "list the paths that a layer changes", _changes, _fill_changes),
    store_verb("commit", "freeze a layer under a new id and print it", _commit, _fill_commit),
    store_verb("ls", "list the layers", _ls, _fill_nothing),
    store_verb("tree", "show which layer is built on which", _tree, _fill_nothing),
    store_verb("inspect", "tell everything about layers, as JSON", _inspect, _several_ids),
    store_verb("usage", "tell how much layers take", _usage, lambda p: _several_ids(p, "*")),
    store_verb(
        "which", "tell which layer provides a path, and what lies below", _which, _fill_which
    ),
    store_verb("flatten", "make one layer of a chain and print its id", _flatten, _fill_flatten),
    store_verb("rebase", "put a layer's changes on another parent", _rebase, _fill_rebase),
)
