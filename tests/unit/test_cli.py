from __future__ import annotations

import errno

import pytest

from unionfs2 import errors
from unionfs2.cli import common, fuse, main
from unionfs2.cli.fuse import Arguments, parse
from unionfs2.errors import MountError, UsageError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-o a,b m", Arguments(options=(b"a,b",), positional=("m",))),
        ("-oa m", Arguments(options=(b"a",), positional=("m",))),
        (
            "src m -o a -o b,dev",
            Arguments(
                options=(
                    b"a",
                    b"b,dev",
                ),
                positional=(
                    "src",
                    "m",
                ),
            ),
        ),
        ("-f -d -s m", Arguments(foreground=True, debug=True, positional=("m",))),
        ("--log x --journal m", Arguments(log="x", journal=True, positional=("m",))),
        ("--log=x=y m", Arguments(log="x=y", positional=("m",))),
        ("-o a -- -m", Arguments(options=(b"a",), positional=("-m",))),
        (
            "- m",
            Arguments(
                positional=(
                    "-",
                    "m",
                )
            ),
        ),
        (
            "s m -n -v -t fuse.unionfs2",
            Arguments(
                positional=(
                    "s",
                    "m",
                )
            ),
        ),
        ("--transport=t m --transport u", Arguments(transport="u", positional=("m",))),
        ("--report-fd 7 m", Arguments(report_fd=7, positional=("m",))),
    ],
)
def test_command_line(words: str, expected: Arguments) -> None:
    assert parse(words.split(" ")) == expected


def test_bytes_that_are_no_text_pass_through() -> None:
    assert parse(["-o", "lowerdir=/\udcff"]).options == (b"lowerdir=/\xff",)


@pytest.mark.parametrize("words", ["-o", "--log", "-x m", "--bogus m", "--report-fd x"])
def test_wrong_command_line(words: str) -> None:
    with pytest.raises(UsageError):
        parse(words.split(" "))


@pytest.mark.parametrize(
    ("words", "helper"),
    [
        (["overlay", "/m", "-o", "lowerdir=/a"], True),
        (["/m", "-o", "lowerdir=/a"], True),
        (["mount", "-o", "lowerdir=/a", "/m"], False),
        (["mounts"], False),
        (["--version"], False),
        (["frobnicate"], False),
        ([], False),
    ],
)
def test_unionfs2_knows_when_mount_8_calls(words: list[str], helper: bool) -> None:
    assert main._is_mount_helper(words) is helper


@pytest.mark.parametrize(
    ("exc", "status", "line"),
    [
        (MountError("a sentence"), errors.EXIT_FAIL, "prog: a sentence\n"),
        (OSError(errno.ENOSPC, "No space", b"/w"), errors.EXIT_FAIL, "prog: /w: No space\n"),
        (KeyboardInterrupt(), errors.EXIT_USER, "prog: interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_status(
    exc: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise exc

    assert common.guarded("prog", fail) == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ZeroDivisionError

    assert common.guarded("prog", fail) == errors.EXIT_INTERNAL
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("prog: ZeroDivisionError")


def test_help_fits_a_terminal() -> None:
    text = fuse.USAGE + common.options_help()
    assert max(map(len, text.splitlines())) <= 88
