"""The command line of the store: order of words, common options, mistakes, and what is loaded."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs2.cli import main
from unionfs2.cli.parser import Parser
from unionfs2.cli.settings import Common, default_root

ROOT = Path(__file__).resolve().parent.parent.parent
MANUALS = ROOT / "docs" / "man"


def parse(text: str) -> argparse.Namespace:
    words = text.split(" ")
    args, extra = main.build_parser(words).parse_known_args(words)
    assert extra == []
    assert isinstance(args, argparse.Namespace)
    return args


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "layer apply --digest D --parent P ID FILE",
        "layer apply ID --digest D FILE --parent P",
        "layer apply ID FILE --parent=P --digest=D",
        "layer apply --parent P ID --digest D -- FILE",
    ],
)
def test_options_and_arguments_in_any_order(text: str) -> None:
    args = parse(text)
    assert (args.id, args.file, args.digest, args.parent) == ("ID", "FILE", "D", "P")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("layer rm a -f b", ["a", "b"]),
        ("layer rm -f a b", ["a", "b"]),
        ("layer rm a b -f", ["a", "b"]),
        ("layer rm -qf a b", ["a", "b"]),
        ("layer rm -f -- -a b", ["-a", "b"]),
        ("layer rm -f a -- -b", ["a", "-b"]),
    ],
)
def test_several_ids(text: str, ids: list[str]) -> None:
    args = parse(text)
    assert args.ids == ids
    assert args.force is True


@pytest.mark.parametrize("text", ["layer diff ID -o -", "layer diff -o- ID", "layer diff -qo - ID"])
def test_a_dash_is_a_value(text: str) -> None:
    assert (parse(text).id, parse(text).output) == ("ID", "-")


def test_words_of_verbs_are_arguments_too() -> None:
    args = parse("layer mount layer mount")
    assert (args.id, args.target) == ("layer", "mount")


# --- common options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "--root /r --format json -q layer ls",
        "layer --root /r ls --format json --quiet",
        "layer ls --root /r --format=json -q",
        "--root /x --format table layer ls --root /r --format json -q",
    ],
)
def test_common_options_stand_anywhere_and_the_last_wins(text: str) -> None:
    common = Common.of(parse(text))
    assert (common.root, common.json, common.quiet) == ("/r", True, True)


def test_storage_options_add_up_in_their_order() -> None:
    args = parse("--storage-opt a=1 layer --storage-opt b=2 --storage-opt c=3 ls --storage-opt d=4")
    assert Common.of(args).storage_options == ["a=1", "b=2", "c=3", "d=4"]


def test_what_is_not_given() -> None:
    common = Common.of(parse("check"))
    assert common == Common(root=default_root())
    assert (common.backend, common.json, common.quiet, common.log_level) == (
        None,
        False,
        False,
        "warning",
    )


@pytest.mark.parametrize(
    ("uid", "environment", "root"),
    [
        (0, {}, "/var/lib/unionfs2"),
        (0, {"XDG_DATA_HOME": "/d"}, "/var/lib/unionfs2"),
        (7, {"XDG_DATA_HOME": "/d"}, "/d/unionfs2"),
        (7, {"XDG_DATA_HOME": "d", "HOME": "/h"}, "/h/.local/share/unionfs2"),
        (7, {"HOME": "/h"}, "/h/.local/share/unionfs2"),
        (7, {"UNIONFS2_ROOT": "/u", "XDG_DATA_HOME": "/d"}, "/u"),
    ],
)
def test_where_the_store_is(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str], root: str
) -> None:
    for name in ("UNIONFS2_ROOT", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert default_root() == root


def test_a_mount_verb_takes_its_own_option_from_before_it() -> None:
    assert parse("--backend fuse mount -o lowerdir=a m").backend == "fuse"
    assert parse("--format json mounts").format == "json"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("--root /r mounts", "--root"),
        ("-q mounts", "--quiet"),
        ("--storage-opt a=b mounts", "--storage-opt"),
        ("--format json umount m", "--format"),
        ("--log-level info mount -o lowerdir=a m", "--log-level"),
    ],
)
def test_options_of_the_store_are_refused_by_mount_verbs(
    text: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(text.split(" ")) == 1
    assert f"{option} is for the layer store" in capsys.readouterr().err


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "lyer ls",
            (
                'unionfs2: invalid choice: there is no verb "lyer", did you mean layer? '
                "(see unionfs2 --help)"
            ),
        ),
        (
            "layer moutn x",
            (
                'unionfs2 layer: invalid choice: there is no verb "moutn", did you mean mount? '
                "(see unionfs2 layer --help)"
            ),
        ),
        (
            "image frobnicate",
            (
                'unionfs2 image: invalid choice: there is no verb "frobnicate", known are import, '
                "export, ls, rm, tag, create (see unionfs2 image --help)"
            ),
        ),
        (
            "layer create --wirtable",
            (
                "unionfs2 layer create: unknown option --wirtable: did you mean --writable? "
                "(see unionfs2 layer create --help)"
            ),
        ),
        (
            "check --zzz",
            "unionfs2 check: unknown option --zzz (see unionfs2 check --help)",
        ),
        (
            "layer which a b c",
            (
                'unionfs2 layer which: too many arguments, "c" is one more than there may be '
                "(see unionfs2 layer which --help)"
            ),
        ),
        (
            "layer rm",
            (
                "unionfs2 layer rm: the following arguments are required: ID "
                "(see unionfs2 layer rm --help)"
            ),
        ),
        (
            "layer diff x --comp gzip",  # nothing is abbreviated: --compress may get a sibling
            (
                "unionfs2 layer diff: unknown option --comp: did you mean --compress? "
                "(see unionfs2 layer diff --help)"
            ),
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(text.split(" "))
    assert end.value.code == 1
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize(
    ("text", "helper"),
    [
        ("layer /m -o lowerdir=/a", True),  # fstab: any word may stand for the source
        ("info /m -o lowerdir=/a", True),
        ("layer diff x -o y", False),
        ("--root /r layer diff x -o y", False),
        ("--root=/r layer diff x -o y", False),
        ("-q layer diff x -o y", False),
        ("-f -o lowerdir=/a m", True),
        ("layer dif x -o y", False),
        ("mount /m -o lowerdir=/a", False),
    ],
)
def test_verbs_of_the_store_do_not_get_in_the_way_of_mount_8(text: str, helper: bool) -> None:
    assert main._is_mount_helper(text.split(" ")) is helper


# --- what is loaded -------------------------------------------------------------------------------

STORE = r"unionfs2\.(driver|layers|images|archive|store|changes|treeview|cli\.(layer|store|image))"
HEAVY = r"rich|argcomplete|pyfuse3|trio"


def loaded_by(*words: str) -> set[str]:
    script = (
        "import sys\nfrom unionfs2.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('\\n'.join(['LOADED', *sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split("LOADED")[1].split())


@pytest.mark.parametrize(
    "words",
    [
        ("mounts",),
        ("umount", "/nothing/here"),
        ("mount", "-o", "lowerdir=/nothing/here", "/nothing/there"),
        ("/nothing/there", "-o", "lowerdir=/nothing/here"),
        ("--help",),
    ],
)
def test_verbs_about_mounts_load_nothing_of_the_store(words: tuple[str, ...]) -> None:
    found = loaded_by(*words)
    assert [name for name in found if re.match(f"{STORE}|{HEAVY}", name)] == []


@pytest.mark.parametrize(
    "words",
    [("layer", "ls"), ("layer", "create"), ("image", "ls"), ("info",), ("check",), ("prune",)],
)
def test_verbs_of_the_store_load_no_server_and_draw_nothing(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    made = loaded_by("--root", str(tmp_path / "store"), "layer", "create", "--id", "a")
    found = loaded_by("--root", str(tmp_path / "store"), *words)
    assert "unionfs2.driver" in made & found
    assert [name for name in made | found if re.fullmatch(HEAVY, name)] == []


# --- the manual -----------------------------------------------------------------------------------


def leaves(parser: Parser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """Every verb with its parser."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not found:
        yield path, parser
    for action in found:
        for name, inner in action.choices.items():
            yield from leaves(inner, (*path, name))


VERBS = {" ".join(path): parser for path, parser in leaves(main.build_parser(None))}
COMMON = {"--root", "--storage-opt", "--backend", "--format", "--log-level", "-q", "--quiet"}
PAGES = {"layer": "unionfs2-layer.1.md", "image": "unionfs2-image.1.md"}
STORE_VERBS = [verb for verb in VERBS if verb not in ("mount", "umount", "mounts")]


def section(verb: str) -> str:
    """What the manual says under the heading of *verb*."""
    group, _, name = verb.rpartition(" ")
    text = (MANUALS / PAGES.get(group, "unionfs2-store.7.md")).read_text(encoding="utf-8")
    commands = text.split("\n## COMMANDS\n")[1]
    return re.split(r"\n##+ ", commands.split(f"\n### {name}\n")[1])[0]


def synopsis(verb: str) -> str:
    """The lines of the synopsis about *verb*."""
    group, _, name = verb.rpartition(" ")
    text = (MANUALS / PAGES.get(group, "unionfs2-store.7.md")).read_text(encoding="utf-8")
    block = text.split("\n## SYNOPSIS\n")[1].split("```")[1]
    lines = re.sub(r"\n +", " ", block)
    found = [line for line in lines.splitlines() if f" {name}" in line or f"|{name}" in line]
    assert found, f"{verb} is not in the synopsis"
    return found[0]


def options_of(parser: Parser) -> set[str]:
    names = {name for action in parser._actions for name in action.option_strings}
    return names - COMMON - {"-h", "--help"}


def test_there_are_verbs() -> None:
    assert len(STORE_VERBS) == 15 + 6 + 5


@pytest.mark.parametrize("verb", STORE_VERBS)
def test_the_manual_and_the_parser_name_the_same_options(verb: str) -> None:
    written = set(re.findall(r"(?<![\w-])--?[\w-]+", " ".join(terms(section(verb)))))
    assert written - COMMON == options_of(VERBS[verb])


def terms(text: str) -> list[str]:
    """The terms that a section defines: lines that are followed by one with a colon."""
    lines = text.splitlines()
    return [
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if following.startswith(": ")
    ]


@pytest.mark.parametrize("verb", STORE_VERBS)
def test_the_synopsis_has_every_long_option(verb: str) -> None:
    line = synopsis(verb)
    for action in VERBS[verb]._actions:
        names = set(action.option_strings) & options_of(VERBS[verb])
        if names:
            assert any(re.search(rf"(?<![\w-]){name}\b", line) for name in names), names


def test_the_manual_has_the_common_options() -> None:
    text = (MANUALS / "unionfs2-store.7.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--?[a-z-]+", " ".join(terms(text)))) >= COMMON


@pytest.mark.parametrize("verb", ["", "layer", "image", *VERBS])
def test_help_fits_a_terminal(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main([*verb.split(), "--help"])
    text = capsys.readouterr().out.split("mount options (-o)")[0]
    assert max(map(len, text.splitlines())) <= 88
    for option in options_of(VERBS[verb]) if verb in VERBS else ():
        assert option in text
