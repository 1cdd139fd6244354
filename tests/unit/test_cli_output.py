"""How results look: for people, for pipes, for programs."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable

import pytest

from unionfs2.cli import output
from unionfs2.cli.output import Bytes, Ident, Meter, Moment, Output

ID = "0123456789abcdef" * 4


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make a terminal of what capsys captures, 100 columns wide."""

    def become() -> None:
        monkeypatch.setenv("COLUMNS", "100")
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)

    return become


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (10 << 20, "10.0 MiB"),
        ((1 << 63) - 1, "8.0 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert output.human_size(size) == text


@pytest.mark.parametrize(
    ("cell", "people", "text"),
    [
        (None, True, "-"),
        ("", False, "-"),
        (Bytes(0), False, "0"),
        (Bytes(2048), True, "2.0 KiB"),
        (Bytes(2048), False, "2048"),
        (Moment(0), False, "1970-01-01T00:00:00Z"),
        (Ident(ID), True, ID[:12]),
        (Ident(f"sha256:{ID}"), True, ID[:12]),
        (Ident(ID), False, ID),
        (Ident("debian"), True, "debian"),
        (Ident(ID.replace("a", "g")), True, ID.replace("a", "g")),
        (3, True, "3"),
        ("odd\nname", True, "odd\\nname"),
    ],
)
def test_cells(cell: output.Cell, people: bool, text: str) -> None:
    assert output.render(cell, people=people) == text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"/plain", "/plain"),
        (b"/with space", "/with space"),
        ("/ümlaut".encode(), "/ümlaut"),
        (b"/back\\slash", "/back\\\\slash"),
        (b"/new\nline\t\x1b[31m", "/new\\x0aline\\x09\\x1b[31m"),
        (b"/odd\xff\xc3", "/odd\\xff\\xc3"),
        ("/no\u2028break".encode(), "/no\\xe2\\x80\\xa8break"),
    ],
)
def test_escaped_paths_can_be_read_back(path: bytes, text: str) -> None:
    assert output.escaped(path) == text
    # latin-1 passes bytes through, so that only the escapes change.
    assert text.encode().decode("unicode_escape").encode("latin-1") == path


def rows() -> tuple[tuple[str, ...], list[tuple[output.Cell, ...]], list[dict[str, object]]]:
    return (
        ("ID", "SIZE"),
        [(Ident(ID), Bytes(5000)), (Ident("a [red]b[/red]"), None)],
        [{"id": ID, "size_bytes": 5000}, {"id": "a [red]b[/red]", "size_bytes": None}],
    )


def test_a_table_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(*rows())
    assert capsys.readouterr().out.splitlines() == [
        "ID".ljust(64) + "  SIZE",
        f"{ID}  5000",
        "a [red]b[/red]".ljust(64) + "  -",
    ]


def test_a_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).table(*rows())
    assert json.loads(capsys.readouterr().out) == rows()[2]


def test_a_quiet_table_is_its_first_column(capsys: pytest.CaptureFixture[str]) -> None:
    Output(quiet=True).table(*rows())
    assert capsys.readouterr().out.splitlines() == [ID, "a [red]b[/red]"]


def test_a_table_on_a_terminal(
    terminal: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal()
    Output().table(*rows())
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["ID              SIZE", f"{ID[:12]}    4.9 KiB", "a [red]b[/red]  -"]


def test_an_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("ID", "SIZE"), [], [])
    Output(json=True).table(("ID", "SIZE"), [], [])
    Output(quiet=True).table(("ID", "SIZE"), [], [])
    assert capsys.readouterr().out == "ID  SIZE\n[]\n"


def test_a_result_is_one_word(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    Output().result(b"/odd\xff path", path="/odd")
    Output(json=True).result(b"/odd\xff", path=os.fsdecode(b"/odd\xff"))
    assert capfdbinary.readouterr().out == b'/odd\xff path\n{\n  "path": "/odd\\udcff"\n}\n'


def test_notes_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Output().note("words")
    Output(quiet=True).note("more words")
    assert capsys.readouterr() == ("", "unionfs2: words\n")


# --- progress -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; its one item can be set."""
    now = [100.0]
    monkeypatch.setattr("unionfs2.cli.output.time.monotonic", lambda: now[0])
    return now


def test_a_bar_appears_after_a_second(
    terminal: Callable[[], None],
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal()
    threads = set(threading.enumerate())
    with Output().meter("applying [x]", 4000) as meter:
        meter(1)
        assert capsys.readouterr() == ("", "")
        clock[0] += 1.01
        meter(2000)
        assert set(threading.enumerate()) <= threads
        out, err = capsys.readouterr()
        assert out == ""
        assert "applying [x]" in err
        assert "2.0/3.9 KiB" in err
        meter(2001)
        assert capsys.readouterr().err == ""  # ten times a second are enough
    assert "\x1b[?25h" in capsys.readouterr().err  # the cursor is back


@pytest.mark.parametrize("quiet", [False, True])
def test_no_bar_where_nobody_looks(
    clock: list[float], capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    with Output(quiet=quiet).meter("applying", None) as meter:
        clock[0] += 60
        meter(5)
    assert capsys.readouterr() == ("", "")


def test_streams_tell_a_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(Meter, "__call__", lambda _, done: told.append(done))
    meter = Meter("x", None, "bytes", shown=False)
    reader = output.CountedReader(io.BytesIO(b"12345"), meter)
    assert [reader.read(2), reader.read()] == [b"12", b"345"]
    sink = io.BytesIO()
    output.CountedWriter(sink, meter).write(b"123")
    assert (told, sink.getvalue()) == ([2, 5, 3], b"123")
