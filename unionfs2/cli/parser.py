"""The command line in words: argparse, with four habits of its own.

* A wrong command line is one sentence with the nearest known word, and the status of mount(8).
* Options and arguments may come in any order, up to "--".
* The common options stand before the verb, between its words, or after it; the last one wins.
* Only the verb that was asked for is built: with thirty of them, the rest would cost more than
  a mount.

Nothing here knows what a verb does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from unionfs2.errors import EXIT_USAGE

_SUPPRESS = argparse.SUPPRESS
_FORMATTER = argparse.RawDescriptionHelpFormatter
LEVELS = ("debug", "info", "warning", "error")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of *known* that was probably meant by *word*."""
    import difflib  # noqa: PLC0415 - for mistakes only

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


class Parser(argparse.ArgumentParser):
    """One level of the command line."""

    def __init__(self, *args: Any, brief: bool = False, **kwargs: Any) -> None:
        # Without the usage text when *brief*: it is longer than a screen has room for.
        self._verbs: argparse._SubParsersAction[Parser] | None = None
        self._brief = brief
        super().__init__(*args, **kwargs)

    def add_verbs(self, verbs: Sequence[Verb], words: Sequence[str] | None) -> None:
        """Let one of *verbs* follow; build those that occur in *words*, or all of them (None)."""
        found = self._verbs = self.add_subparsers(
            dest="verb", required=True, metavar="VERB", parser_class=Parser
        )
        named = [verb for verb in verbs if words and verb.name == words[0]]
        for verb in named or verbs:
            parser = found.add_parser(
                verb.name,
                help=verb.help,
                description=verb.description or verb.help[:1].upper() + verb.help[1:] + ".",
                formatter_class=argparse.HelpFormatter if verb.brief else _FORMATTER,
                allow_abbrev=not verb.brief,
                brief=verb.brief,
            )
            if words is None or verb.name in words:
                verb.fill(parser, words)
                parser.set_defaults(parser=parser)

    def error(self, message: str) -> NoReturn:
        if self._brief:
            self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")

    def refuse_extra(self, words: Sequence[str]) -> NoReturn:
        """What is left of the command line after parsing: say what is wrong with it."""
        for word in words:
            name = word.partition("=")[0]
            if word.startswith("-") and word != "-":
                close = nearest(name, self._options())
                hint = f": did you mean {close}?" if close else ""
                self.error(f"unknown option {name}{hint}")
        self.error(f'too many arguments, "{words[0]}" is one more than there may be')

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's hook for choices: add the word that was probably meant."""
        if action is not self._verbs or value in (action.choices or ()):
            super()._check_value(action, value)
            return
        known = list(action.choices or ())
        close = nearest(value, known)
        hint = f"did you mean {close}?" if close else f"known are {', '.join(known)}"
        raise argparse.ArgumentError(None, f'invalid choice: there is no verb "{value}", {hint}')

    def parse_known_args(  # type: ignore[override]  # the overloads differ in the namespace only
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        if self._verbs is None and "_ARGCOMPLETE" not in os.environ:  # the shell knows the order
            words = self._options_first(words)
        return super().parse_known_args(words, namespace)

    def _options_first(self, words: Sequence[str]) -> list[str]:
        """argparse gives up on "A -x B" once an argument of variable number has had its share."""
        takes_value = self._options()
        options: list[str] = []
        rest: list[str] = []
        following = iter(words)
        for word in following:
            if word == "--":
                rest.extend(following)
            elif word.startswith("-") and word != "-":
                options.append(word)
                if _wants_more(word, takes_value):
                    options.extend(value for value in [next(following, None)] if value is not None)
            else:
                rest.append(word)
        return [*options, "--", *rest] if rest else options

    def _options(self) -> dict[str, bool]:
        """Every option of this level, and whether it takes a value."""
        return {
            name: action.nargs != 0 for action in self._actions for name in action.option_strings
        }


def _wants_more(word: str, takes_value: dict[str, bool]) -> bool:
    """Whether the value of option *word* is the next word: --name, -n, or -xn."""
    if word in takes_value or word.startswith("--"):
        return takes_value.get(word, False)
    for position, letter in enumerate(word[1:], start=1):
        if takes_value.get(f"-{letter}", False):
            return position == len(word) - 1
    return False


Fill = Callable[[Parser, "Sequence[str] | None"], None]
Run = Callable[[argparse.Namespace], int]


class Verb(NamedTuple):
    """One word of the command line: what it takes, and what it does."""

    name: str
    help: str
    fill: Fill
    description: str = ""
    brief: bool = True


def store_verb(
    name: str, words: str, run: Run, fill: Callable[[Parser], None], description: str = ""
) -> Verb:
    """A verb of the layer store: it takes the common options as well."""

    def build(parser: Parser, _: Sequence[str] | None) -> None:
        fill(parser)
        add_common(parser, 2)
        parser.set_defaults(run=run)

    return Verb(name, words, build, description)


def group(name: str, words: str, verbs: Callable[[], Sequence[Verb]]) -> Verb:
    """A verb that has verbs of its own, as "layer" has; *verbs* loads them."""

    def build(parser: Parser, given: Sequence[str] | None) -> None:
        add_common(parser, 1)
        parser.add_verbs(verbs(), None if given is None else given[given.index(name) + 1 :])

    return Verb(name, words, build)


# --- the common options ---------------------------------------------------------------------------

COMMON = ("--root", "--storage-opt", "--backend", "--format", "--log-level", "--quiet", "-q")


def add_common(parser: Parser, depth: int) -> None:
    """The options that every verb of the store takes, as seen at *depth* words of the verb.

    None has a default here: argparse copies what a later word found over what an earlier one
    did, and a default would win over an option that was given. See settings.Common.
    """
    options = parser.add_argument_group("common options")
    options.add_argument("--root", metavar="DIR", default=_SUPPRESS, help="the layer store")
    options.add_argument(
        "--storage-opt",
        metavar="K=V",
        dest=f"storage_opt_{depth}",
        action="append",
        default=_SUPPRESS,
        help="an option of the store; may be repeated",
    )
    options.add_argument(
        "--backend",
        choices=("auto", "native", "fuse"),
        default=_SUPPRESS,
        help="how to mount: through the kernel, through FUSE, or whichever can",
    )
    options.add_argument(
        "--format",
        choices=("table", "json"),
        default=_SUPPRESS,
        help="write results for people or for programs",
    )
    options.add_argument(
        "--log-level",
        choices=LEVELS,
        default=_SUPPRESS,
        help="what else to say on standard error",
    )
    options.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=_SUPPRESS,
        help="no progress bars, no notes; lists are reduced to ids or names",
    )
