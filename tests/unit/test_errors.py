from __future__ import annotations

import errno

import pytest

from unionfs2 import errors
from unionfs2.errors import (
    InUseError,
    LayerError,
    MountError,
    OptionError,
    PrivilegeError,
    UnionFSError,
    errno_of,
    exit_code_of,
    from_record,
    is_expected,
    sentence,
    show,
    to_record,
)


def _catalogue() -> list[type[UnionFSError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, UnionFSError)
    ]


@pytest.mark.parametrize(
    ("exc", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (OSError("no number at all"), errno.EIO),
        (LayerError("overlap", errno=errno.ELOOP), errno.ELOOP),
        (InUseError("busy"), errno.EBUSY),
        (MemoryError(), errno.ENOMEM),
        (ValueError("a bug"), errno.EIO),
    ],
)
def test_errno_of(exc: BaseException, number: int) -> None:
    assert errno_of(exc) == number


@pytest.mark.parametrize(
    ("exc", "status"),
    [
        (OptionError("unknown"), errors.EXIT_USAGE),
        (PrivilegeError("no"), errors.EXIT_USAGE),
        (MountError("no"), errors.EXIT_FAIL),
        (MountError("no", exit_code=errors.EXIT_SYSTEM), errors.EXIT_SYSTEM),
        (PermissionError(errno.EPERM, "no"), errors.EXIT_USAGE),
        (OSError(errno.EIO, "no"), errors.EXIT_FAIL),
        (MemoryError(), errors.EXIT_SYSTEM),
        (KeyboardInterrupt(), errors.EXIT_USER),
        (ValueError("a bug"), errors.EXIT_INTERNAL),
    ],
)
def test_exit_code_of(exc: BaseException, status: int) -> None:
    assert exit_code_of(exc) == status


def test_only_foreseen_exceptions_are_expected() -> None:
    assert is_expected(MountError("x"))
    assert is_expected(OSError(errno.EIO, "x"))
    assert not is_expected(OSError("x"))
    assert not is_expected(KeyError("x"))


def test_an_instance_narrows_without_changing_its_class() -> None:
    LayerError("x", errno=errno.ELOOP)
    assert LayerError("x").errno == errno.EINVAL


@pytest.mark.parametrize("cls", _catalogue())
def test_every_class_crosses_a_process_boundary(cls: type[UnionFSError]) -> None:
    sent = cls("what happened, and the way out", errno=errno.EXDEV, exit_code=2)
    received = from_record(to_record(sent))
    assert type(received) is cls
    assert (str(received), received.errno, received.exit_code) == (str(sent), errno.EXDEV, 2)


def test_kinds_are_unique() -> None:
    kinds = [cls.kind for cls in _catalogue()]
    assert len(set(kinds)) == len(kinds)


def test_a_system_call_crosses_as_a_mount_error() -> None:
    received = from_record(to_record(OSError(errno.ENOSPC, "No space left on device", b"/u")))
    assert isinstance(received, MountError)
    assert (str(received), received.errno) == ("/u: No space left on device", errno.ENOSPC)


def test_an_unknown_kind_is_still_an_error() -> None:
    record = to_record(MountError("x")) | {"kind": "from-the-future"}
    assert type(from_record(record)) is UnionFSError


def test_sentences() -> None:
    assert sentence(MountError("said by us")) == "said by us"
    assert sentence(OSError(errno.ENOENT, "No such file or directory")) == (
        "No such file or directory"
    )
    assert sentence(ZeroDivisionError("a bug")) == "ZeroDivisionError: a bug"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"/plain/gr\xc3\xbcn", "/plain/grün"),
        (b"/odd\xff", "/odd\\xff"),
        (b"/new\nline\x1b", "/new\\nline\\x1b"),
        (7, "7"),
    ],
)
def test_names_in_messages_cannot_break_a_line(name: object, shown: str) -> None:
    assert show(name) == shown
