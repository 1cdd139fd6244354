"""Opening the store for a verb, naming its layers, and the verbs about the store as a whole."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from unionfs2.cli.output import Ident, Output, set_up_log, write_line
from unionfs2.cli.parser import Parser, Verb, nearest, store_verb
from unionfs2.cli.settings import Common
from unionfs2.errors import EXIT_DAMAGED, EXIT_OK, UnknownLayerError, UsageError, show
from unionfs2.storemodel import LayerId

if TYPE_CHECKING:
    from unionfs2.driver import Driver
    from unionfs2.storecheck import Finding

_GENERATED: Final = re.compile("[0-9a-f]{64}")
_PREFIX: Final = re.compile("[0-9a-f]{6,63}")


# --- opening --------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    common: Common, *, create: bool = False, storage_options: list[str] | None = None
) -> Iterator[Driver]:
    """The store that the common options name. It is made only when *create* says so."""
    from unionfs2.cli.forked import fork_mounter  # noqa: PLC0415 - not to complete words
    from unionfs2.driver import Driver  # noqa: PLC0415

    set_up_log(common)
    options = common.storage_options if storage_options is None else storage_options
    with Driver.open(
        os.path.abspath(common.root),
        options=options,
        backend=common.backend,
        fuse=fork_mounter(),
        create=create,
    ) as driver:
        yield driver


@contextlib.contextmanager
def session(args: argparse.Namespace, *, create: bool = False) -> Iterator[tuple[Driver, Output]]:
    """The store and the streams of one command line."""
    common = Common.of(args)
    with opened(common, create=create) as driver:
        yield driver, Output.of(common)


# --- naming layers --------------------------------------------------------------------------------


def layer_id(driver: Driver, text: str) -> LayerId:
    """The layer that *text* names: its id, or the beginning of a generated one.

    An id always means itself. Otherwise six or more of the 64 hex digits of a generated id are
    enough while no other generated id begins with them.
    """
    if not text:
        raise UsageError("the layer id is empty: name a layer, see unionfs2 layer ls")
    if driver.exists(text):
        return LayerId(text)
    known = driver.ids()
    if _PREFIX.fullmatch(text):
        found = [name for name in known if name.startswith(text) and _GENERATED.fullmatch(name)]
        if len(found) > 1:
            raise UsageError(
                f'"{text}" is the beginning of {len(found)} layer ids, {found[0]} and {found[1]} '
                "among them: give more digits"
            )
        if found:
            return found[0]
    close = nearest(text, known)
    hint = f'did you mean "{show(close)}"?' if close else "see unionfs2 layer ls"
    raise UnknownLayerError(f'there is no layer "{show(text)}": {hint}')


def layer_ids(driver: Driver, texts: list[str]) -> list[LayerId]:
    """The layers that *texts* name, or all of them when nothing is named."""
    return [layer_id(driver, text) for text in texts] or list(driver.ids())


# --- verbs ----------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        if args.repair:
            _mend(driver, out)
        with out.meter("checking", len(driver.ids()), "layers") as meter:
            findings = driver.check(deep=args.deep, progress=meter)
        if not findings and not out.json:
            out.note(f"nothing to find fault with in {len(driver.ids()):,} layers")
            return EXIT_OK
        out.table(
            ("LAYER", "CODE", "PATH", "REASON", "REPAIR"),
            [
                (Ident(found.layer or ""), found.code, show(found.path), found.reason, found.repair)
                for found in findings
            ],
            [_finding(found) for found in findings],
        )
        return EXIT_DAMAGED if findings else EXIT_OK


def _finding(found: Finding) -> dict[str, Any]:
    return {
        "layer": found.layer,
        "code": found.code,
        "path": os.fsdecode(found.path),
        "reason": found.reason,
        "repair": found.repair,
    }


def _mend(driver: Driver, out: Output) -> None:
    """Repair, and say on standard error what was done."""
    for line in driver.repair():
        out.note(str(line))


def _repair(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        done = [str(line) for line in driver.repair()]
        left = driver.check()
        if out.json:
            out.as_json({"repaired": done, "left": [_finding(found) for found in left]})
        else:
            for line in done:
                write_line(os.fsencode(line))
        for found in left:
            out.note(f"left as it is: {found.reason}")
        return EXIT_DAMAGED if left else EXIT_OK


def _prune(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        with out.meter("removing") as meter:
            gone = driver.prune(dry_run=args.dry_run, unused=args.unused, progress=meter)
        if out.json:
            out.as_json([str(line) for line in gone])
            return EXIT_OK
        for line in gone:
            write_line(os.fsencode(str(line)))
        return EXIT_OK


def _info(args: argparse.Namespace) -> int:
    with session(args) as (driver, out):
        status = driver.status()
        out.pairs(status.pairs(), status.as_json())
        return EXIT_OK


# --- what they take -------------------------------------------------------------------------------


def _fill_check(parser: Parser) -> None:
    parser.add_argument("--deep", action="store_true", help="read the layers and compare digests")
    parser.add_argument("--repair", action="store_true", help="mend first, then check")


def _fill_prune(parser: Parser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="tell, but remove nothing")
    parser.add_argument(
        "--unused",
        action="store_true",
        help="also committed layers that no image, no layer and no mount uses",
    )


def _fill_nothing(_: Parser) -> None:
    pass


VERBS: Final[dict[str, Verb]] = {
    verb.name: verb
    for verb in (
        store_verb("check", "look for damage in the store", _check, _fill_check),
        store_verb("repair", "mend what can be mended, set the rest aside", _repair, _fill_nothing),
        store_verb("prune", "remove what interrupted work left behind", _prune, _fill_prune),
        store_verb(
            "info", "tell what the store is, and what this machine can do", _info, _fill_nothing
        ),
    )
}
