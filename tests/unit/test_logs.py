from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unionfs2 import logs
from unionfs2.errors import OptionError, UnavailableError
from unionfs2.options import MountSpec

SetUp = Callable[..., None]


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SetUp]:
    """logs.set_up() in what looks like a fresh process without a journal."""
    root = logging.getLogger()
    level = root.level
    mine: list[logging.Handler] = []
    monkeypatch.setattr(logs, "_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setattr(logs, "_SYSLOG", str(tmp_path / "syslog"))

    def act(spec: MountSpec, *, foreground: bool = False) -> None:
        monkeypatch.setattr(root, "handlers", mine)  # pytest has handlers of its own there
        logs.set_up(spec, foreground=foreground)

    yield act
    for handler in mine:
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    made.settimeout(5)
    return made


def test_a_daemon_without_options_is_silent(
    set_up: SetUp, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(MountSpec())
    logging.getLogger("x").error("lost")
    assert capfd.readouterr() == ("", "")


def test_the_foreground_speaks_on_standard_error(
    set_up: SetUp, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(MountSpec(), foreground=True)
    logging.getLogger("door").warning("heard %s", "this")
    logging.getLogger("door").debug("not this")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith("WARNING door: heard this\n")
    assert err.count("\n") == 1


def test_a_file_is_appended_to(set_up: SetUp, tmp_path: Path) -> None:
    path = tmp_path / "server log"
    path.write_text("before\n")
    set_up(MountSpec(log=os.fsencode(path), debug=True))
    logging.getLogger("door").debug("odd \udcff name")
    first, second = path.read_text().splitlines()
    assert first == "before"
    assert second.endswith("DEBUG door: odd \\udcff name")


def test_a_file_that_cannot_be_opened(set_up: SetUp, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="log="):
        set_up(MountSpec(log=os.fsencode(tmp_path / "no" / "log")))


def test_the_journal(set_up: SetUp, tmp_path: Path) -> None:
    with listener(tmp_path / "journal") as journal:
        set_up(MountSpec(journal=True))
        logging.getLogger("door").warning("one line")
        fields = journal.recv(4096)
        assert fields == (
            b"MESSAGE=one line\nPRIORITY=4\nSYSLOG_IDENTIFIER=unionfs2\nLOGGER=door\n"
        )
        logging.getLogger("door").error("two\nlines")
        text = b"two\nlines"
        assert journal.recv(4096).startswith(
            b"MESSAGE\n" + len(text).to_bytes(8, "little") + text + b"\nPRIORITY=3\n"
        )


def test_syslog_where_there_is_no_journal(set_up: SetUp, tmp_path: Path) -> None:
    with listener(tmp_path / "syslog") as syslog:
        set_up(MountSpec(journal=True))
        logging.getLogger("door").info("hello")
        assert syslog.recv(4096) == f"<30>unionfs2[{os.getpid()}]: hello".encode()


def test_neither_journal_nor_syslog(set_up: SetUp) -> None:
    with pytest.raises(UnavailableError, match="log=FILE"):
        set_up(MountSpec(journal=True))


def test_warnings_of_python_are_logged(set_up: SetUp, tmp_path: Path) -> None:
    path = tmp_path / "log"
    set_up(MountSpec(log=os.fsencode(path)))
    logging.getLogger("py.warnings").warning("deprecated")
    assert "WARNING py.warnings: deprecated" in path.read_text()
