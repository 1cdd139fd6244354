"""``unionfs2 image``: images that come into the store, leave it, and what they are called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from unionfs2.cli import common as shared
from unionfs2.cli import completion
from unionfs2.cli.output import PROGRAM, Bytes, Ident, Moment, Output, utc
from unionfs2.cli.parser import Parser, store_verb
from unionfs2.cli.store import layer_id, session
from unionfs2.errors import EXIT_OK, UsageError, show

if TYPE_CHECKING:
    from unionfs2.images import Image

FORMS: Final = ("oci", "oci-archive", "docker-archive")


def _import(args: argparse.Namespace) -> int:
    from unionfs2 import images  # noqa: PLC0415 - each verb loads what it needs

    if args.source == "-" and sys.stdin.isatty():
        raise UsageError("standard input is a terminal: name a SOURCE, or pipe an archive in")
    source = sys.stdin.buffer if args.source == "-" else os.path.abspath(args.source)
    with session(args, create=True) as (driver, out), out.meter("importing") as meter:
        found = images.import_image(
            driver,
            source,
            select=args.select,
            names=args.names,
            platform=args.platform,
            progress=meter.labelled,
        )
    if out.json:
        _show(out, found)
    else:
        for image in found:
            out.result(image.id)
    return EXIT_OK


def _show(out: Output, found: Iterable[Image]) -> None:
    """A list of images, each as often as it has names."""
    named = [(name, image) for image in found for name in (image.names or (None,))]
    out.table(
        ("NAME", "IMAGE", "PLATFORM", "LAYERS", "SIZE", "CREATED", "LAYER"),
        [
            (
                name or Ident(image.id),
                Ident(image.id),
                image.platform,
                len(image.layers),
                None if image.size is None else Bytes(image.size),
                None if image.created is None else Moment(image.created),
                Ident(image.layer or ""),
            )
            for name, image in named
        ],
        [
            {
                "name": name,
                "image_id": image.id,
                "platform": image.platform,
                "layers": list(image.layers),
                "size_bytes": image.size,
                "created": utc(image.created),
                "layer": image.layer,
            }
            for name, image in named
        ],
    )


def _export(args: argparse.Namespace) -> int:
    from unionfs2 import images  # noqa: PLC0415

    to_stream = args.output == "-"
    if to_stream and args.to == "oci":
        raise UsageError("an image layout is a directory: use --to oci-archive to write a stream")
    if to_stream and sys.stdout.isatty():
        raise UsageError("an archive is not for a terminal: use -o FILE, or a pipe")
    target = sys.stdout.buffer if to_stream else os.path.abspath(args.output)
    with session(args) as (driver, out), out.meter("exporting") as meter:
        done = images.export_image(
            driver,
            args.name,
            target,
            form=args.to,
            compression=args.compress,
            progress=meter.labelled,
        )
    if not to_stream:
        out.result(
            done.digest,
            name=args.name,
            image_id=done.image_id,
            digest=done.digest,
            exact=done.exact,
            reason=done.reason or None,
        )
    return EXIT_OK


def _ls(args: argparse.Namespace) -> int:
    from unionfs2 import images  # noqa: PLC0415

    with session(args) as (driver, out):
        found = images.list_images(driver)
        for damaged in images.damaged_images(driver):
            out.warn(damaged.reason)
    _show(out, found)
    return EXIT_OK


def _rm(args: argparse.Namespace) -> int:
    from unionfs2 import images  # noqa: PLC0415

    with session(args) as (driver, _):
        return shared.for_each(
            PROGRAM,
            args.names,
            lambda name: images.remove_image(driver, name, layers=args.layers),
        )


def _tag(args: argparse.Namespace) -> int:
    from unionfs2 import images  # noqa: PLC0415

    with session(args) as (driver, _):
        images.tag_image(driver, args.name, args.new)
    return EXIT_OK


def _assignments(option: str, texts: Sequence[str]) -> dict[str, str] | None:
    """NAME=VALUE of a repeated option; None when it was not given."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise UsageError(f'{option} needs NAME=VALUE, got "{show(name)}": add the missing part')
    return {name: value for name, _, value in pairs} or None


def _words(text: str) -> list[str]:
    """A command line as its words, as a shell splits it."""
    import shlex  # noqa: PLC0415

    try:
        return shlex.split(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be split into words: {exc}") from exc


def _create(args: argparse.Namespace) -> int:
    from unionfs2 import images  # noqa: PLC0415

    with session(args) as (driver, out), out.meter("reading layers") as meter:
        made = images.create_image(
            driver,
            layer_id(driver, args.id),
            args.name,
            cmd=args.cmd,
            entrypoint=args.entrypoint,
            env=_assignments("--env", args.env),
            labels=_assignments("--label", args.label),
            working_dir=args.workdir,
            user=args.user,
            architecture=args.architecture,
            author=args.author,
            inherit=not args.no_inherit,
            progress=meter.labelled,
        )
    out.result(made.id, name=args.name, image_id=made.id, layer=made.layer)
    return EXIT_OK


# --- what they take -------------------------------------------------------------------------------


def _image_name(parser: Parser, *names: str, **more: Any) -> None:
    argument = parser.add_argument(*names, metavar="NAME", help="name of an image", **more)
    argument.completer = completion.images  # type: ignore[attr-defined]  # argcomplete's own


def _fill_import(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="an image layout or an archive; - is standard input"
    )
    parser.add_argument(
        "--name",
        dest="names",
        metavar="NAME",
        action="append",
        default=[],
        help="what to call the image; may be repeated",
    )
    parser.add_argument(
        "--select",
        metavar="NAME",
        action="append",
        default=[],
        help="take this one of the images in SOURCE; may be repeated",
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH", help="which of several; by default this machine's"
    )


def _fill_export(parser: Parser) -> None:
    _image_name(parser, "name")
    parser.add_argument(
        "-o", "--output", metavar="TARGET", required=True, help="a directory or a file"
    )
    parser.add_argument("--to", choices=FORMS, default="oci", help="the form; by default oci")
    parser.add_argument(
        "--compress", choices=("none", "gzip", "zstd"), help="how layers are written"
    )


def _fill_nothing(_: Parser) -> None:
    pass


def _fill_rm(parser: Parser) -> None:
    parser.add_argument(
        "--layers", action="store_true", help="also layers that nothing else needs then"
    )
    _image_name(parser, "names", nargs="+")


def _fill_tag(parser: Parser) -> None:
    _image_name(parser, "name")
    parser.add_argument("new", metavar="NEW", help="another name")


def _fill_create(parser: Parser) -> None:
    argument = parser.add_argument("id", metavar="LAYER", help="its last layer")
    argument.completer = completion.layers  # type: ignore[attr-defined]
    parser.add_argument("name", metavar="NAME", help="what to call the image")
    for option, what in (("--cmd", "what it runs"), ("--entrypoint", "what runs the command")):
        parser.add_argument(option, metavar="WORDS", type=_words, help=f"{what}, as in a shell")
    for option, what in (("--env", "environment"), ("--label", "label")):
        parser.add_argument(option, metavar="NAME=VALUE", action="append", default=[], help=what)
    parser.add_argument("--workdir", metavar="DIR", help="directory it starts in")
    parser.add_argument("--user", metavar="USER", help="user it runs as: UID[:GID] or names")
    parser.add_argument("--architecture", metavar="ARCH", help="amd64, arm64, ...")
    parser.add_argument("--author", metavar="TEXT", default="", help="who made it")
    parser.add_argument(
        "--no-inherit", action="store_true", help="take nothing over from the image below"
    )


VERBS: Final = (
    store_verb("import", "take images into the store", _import, _fill_import),
    store_verb("export", "write an image out", _export, _fill_export),
    store_verb("ls", "list the images", _ls, _fill_nothing),
    store_verb("rm", "remove names of images", _rm, _fill_rm),
    store_verb("tag", "give an image another name", _tag, _fill_tag),
    store_verb("create", "make an image of a layer and print its id", _create, _fill_create),
)
