"""No exception leaves a handler, and each is answered with the right number."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pyfuse3
import pytest
import trio

from tests.door.fakes import CTX, FakeCore, door_of
from unionfs2.errors import LayerError

# A request that reaches the core at once, for each handler: (arguments, the method that is asked).
HANDLERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "lookup": ((1, b"f", CTX), "lookup"),
    "getattr": ((1, CTX), "getattr"),
    "readlink": ((1, CTX), "readlink"),
    "mknod": ((1, b"f", 0o644, 0, CTX), "mknod"),
    "mkdir": ((1, b"f", 0o755, CTX), "mkdir"),
    "symlink": ((1, b"f", b"t", CTX), "symlink"),
    "unlink": ((1, b"f", CTX), "unlink"),
    "rmdir": ((1, b"f", CTX), "rmdir"),
    "rename": ((1, b"f", 1, b"g", 0, CTX), "check_rename"),
    "statfs": ((CTX,), "statfs"),
    "access": ((1, 4, CTX), "getattr"),
    "getxattr": ((1, b"user.a", CTX), "getxattr"),
    "listxattr": ((1, CTX), "listxattr"),
    "setxattr": ((1, b"user.a", b"", CTX), "check_setxattr"),
    "removexattr": ((1, b"user.a", CTX), "check_removexattr"),
    "open": ((1, 0, CTX), "open_file"),
    "create": ((1, b"f", 0o644, 0, CTX), "create"),
    "opendir": ((1, CTX), "opendir"),
}

each_handler = pytest.mark.parametrize("name", HANDLERS)


async def answer(core: FakeCore, name: str, *, debug: bool = False) -> int:
    door = door_of(core, debug=debug)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(door, name)(*HANDLERS[name][0])
    return int(caught.value.errno)


def failing(name: str, exc: BaseException) -> FakeCore:
    core = FakeCore()
    core.answers[HANDLERS[name][1]] = exc
    return core


@each_handler
@pytest.mark.parametrize("debug", [True, False])
async def test_the_errno_of_the_core(
    name: str, debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    core = failing(name, OSError(errno.ENOSPC, "full"))
    assert await answer(core, name, debug=debug) == errno.ENOSPC
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


@each_handler
async def test_a_refusal_of_ours_has_its_own(name: str) -> None:
    core = failing(name, LayerError("no", errno=errno.EMFILE))
    assert await answer(core, name) == errno.EMFILE


@each_handler
async def test_a_bug_is_answered_and_logged_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    core = failing(name, RuntimeError("a bug"))
    assert await answer(core, name) == errno.EIO
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert name in record.getMessage()
    assert "a bug" in caplog.text


@each_handler
async def test_an_error_of_unknown_number(name: str) -> None:
    assert await answer(failing(name, OSError("no number")), name) == errno.EIO


@each_handler
async def test_an_end_asked_for_from_outside_goes_through(name: str) -> None:
    core = failing(name, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        await getattr(door_of(core), name)(*HANDLERS[name][0])


async def test_forgetting_answers_nobody(caplog: pytest.LogCaptureFixture) -> None:
    core = FakeCore()
    core.answers["forget"] = RuntimeError("a bug")
    await door_of(core).forget([(7, 1)])
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("read", (99, 0, 1)),
        ("write", (99, 0, b"x")),
        ("fsync", (99, False)),
        ("release", (99,)),
        ("readdir", (99, 0, None)),
        ("releasedir", (99,)),
        ("fsyncdir", (99, False)),
    ],
)
async def test_an_unknown_handle(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(door_of(FakeCore()), name)(*arguments)
    assert caught.value.errno == errno.EBADF


async def test_an_unknown_node() -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await door_of(FakeCore()).getattr(99, CTX)
    assert caught.value.errno == errno.ESTALE


async def test_every_operation_has_a_handler() -> None:
    """But stacktrace(), a tool, and poll: by its ENOSYS the kernel knows that we are never late."""
    names = {n for n in vars(pyfuse3.Operations) if not n.startswith("_")} - {"stacktrace", "poll"}
    fields = {"supports_dot_lookup", "enable_writeback_cache", "enable_acl"}
    ours = type(door_of(FakeCore()))
    missing = {
        name for name in names - fields if getattr(ours, name) is getattr(pyfuse3.Operations, name)
    }
    assert missing == set()
    await trio.lowlevel.checkpoint()
