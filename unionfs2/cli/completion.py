"""Completion in the shell, by argcomplete.

The script of ``unionfs2 completion SHELL`` makes the shell call the command with a few variables
set; it then answers with words instead of doing anything. Layer ids and image names are read from
the directory of the store: no lock is taken, nothing is made, and a store that cannot be read
completes nothing.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from unionfs2 import ondisk
from unionfs2.cli.settings import Common

if TYPE_CHECKING:
    from unionfs2.cli.parser import Parser

_MANY = 1000  # more words than anybody looks through


def script(shell: str) -> str:
    """What *shell* (bash, zsh or fish) has to evaluate."""
    from argcomplete import shell_integration  # noqa: PLC0415 - this verb only

    text: str = shell_integration.shellcode(["unionfs2"], shell=shell)
    return text


def answer(parser: Parser) -> None:
    """Tell the shell which words may follow, and end the process."""
    import argcomplete  # noqa: PLC0415 - called by a shell only

    argcomplete.autocomplete(parser, always_complete_options=False)


def layers(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Ids of layers that begin with *prefix*."""
    root = Common.of(parsed_args).root
    try:
        with os.scandir(root) as entries:
            found = [
                entry.name
                for entry in entries
                if entry.name.startswith(prefix)
                and not entry.name.startswith(".")
                and os.path.lexists(os.path.join(entry.path, os.fsdecode(ondisk.LINK_NAME)))
            ]
    except OSError:
        return []
    return sorted(found)[:_MANY]


def images(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of images that begin with *prefix*."""
    from unionfs2.images import names_in  # noqa: PLC0415 - for verbs about images

    names = names_in(Common.of(parsed_args).root)
    return [name for name in names if name.startswith(prefix)][:_MANY]
