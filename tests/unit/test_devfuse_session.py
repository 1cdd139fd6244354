"""What is agreed on with kernels of every age."""

from __future__ import annotations

import struct
from typing import Any, Final

import pytest

from tests.support.fusewire import parse
from unionfs2.devfuse import abi
from unionfs2.devfuse.codec import ProtocolError
from unionfs2.devfuse.session import TRANSFER_MAX, Settings, Wanted, negotiate

ALL: Final = (1 << 64) - 1
LOW: Final = 0xFFFFFFFF
_OUT = struct.Struct("<IIIIHHIIHHIIHH20x")
_NAMES = [
    "major",
    "minor",
    "max_readahead",
    "flags",
    "max_background",
    "congestion",
    "max_write",
    "time_gran",
    "max_pages",
    "map_alignment",
    "flags2",
    "max_stack_depth",
    "request_timeout",
    "unused",
]


def agree(
    minor: int, flags: int = ALL, *, major: int = 7, readahead: int = 131072, **wanted: bool
) -> tuple[Settings | None, bytes]:
    """As a kernel of this version that offers *flags*; the body of the answer."""
    rest = struct.pack("<I", flags >> 32) + bytes(44) if minor >= 36 else b""
    args = (major, minor, readahead, flags & LOW, rest)
    settings, answer = negotiate(5, Wanted(**wanted), args)
    found = parse(answer)
    assert (found.error, found.unique) == (0, 5)
    return settings, found.body


def fields(body: bytes) -> dict[str, Any]:
    return dict(zip(_NAMES, _OUT.unpack(body), strict=True))


@pytest.mark.parametrize("minor", [*range(12, 46)])
def test_every_minor_is_answered_with_itself(minor: int) -> None:
    settings, body = agree(minor)
    assert settings is not None
    assert settings.minor == minor
    assert struct.unpack_from("<II", body) == (7, minor)
    assert len(body) == (24 if minor < 23 else 64)


@pytest.mark.parametrize("minor", [46, 60, 1000])
def test_a_newer_minor_is_answered_with_ours(minor: int) -> None:
    settings, body = agree(minor)
    assert settings is not None
    assert settings.minor == 45
    assert struct.unpack_from("<II", body) == (7, 45)


def test_a_newer_major_is_asked_to_try_ours() -> None:
    settings, body = agree(0, major=8)
    assert settings is None
    assert struct.unpack_from("<II", body) == (7, 45)


@pytest.mark.parametrize(("major", "minor"), [(7, 11), (7, 0), (6, 99), (0, 0)])
def test_a_protocol_that_is_too_old(major: int, minor: int) -> None:
    with pytest.raises(ProtocolError, match=f"FUSE {major}.{minor}, needed is 7.12") as caught:
        agree(minor, major=major)
    assert caught.value.unique == 5


def test_the_answer_to_a_new_kernel_in_full() -> None:
    settings, body = agree(45)
    assert settings is not None
    found = fields(body)
    assert found.pop("flags") | found.pop("flags2") << 32 == settings.flags
    assert found == {
        "major": 7,
        "minor": 45,
        "max_readahead": 131072,
        "max_background": 64,
        "congestion": 48,
        "max_write": TRANSFER_MAX,
        "time_gran": 1,
        "max_pages": 256,
        "map_alignment": 0,
        "max_stack_depth": 0,
        "request_timeout": 0,
        "unused": 0,
    }


@pytest.mark.parametrize("minor", [12, 22, 23, 35, 36, 45])
@pytest.mark.parametrize("offered", [0, abi.ASYNC_READ | abi.WRITEBACK_CACHE, LOW, ALL])
def test_nothing_is_taken_that_was_not_offered(minor: int, offered: int) -> None:
    settings, body = agree(minor, offered)
    assert settings is not None
    assert settings.flags & ~offered == 0
    assert struct.unpack_from("<I", body, 12) == (settings.flags & LOW,)
    if minor < 36:  # the second word of flags is not there
        assert settings.flags <= LOW


def test_the_second_word_counts_only_where_the_first_says_so() -> None:
    settings, _ = agree(36, ALL & ~abi.INIT_EXT)
    assert settings is not None
    assert settings.flags <= LOW
    settings, body = agree(36, ALL)
    assert settings is not None
    assert settings.has(abi.HAS_RESEND)
    assert fields(body)["flags2"] == settings.flags >> 32


def test_a_message_without_the_second_word() -> None:
    settings, _ = negotiate(5, Wanted(), (7, 45, 0, LOW, b"\xff\xff\xff"))
    assert settings is not None
    assert settings.flags <= LOW


def test_how_much_a_message_may_carry() -> None:
    new, _ = agree(45)
    old, body = agree(45, ALL & ~abi.MAX_PAGES)
    assert new is not None
    assert old is not None
    assert (new.max_write, old.max_write) == (TRANSFER_MAX, 32 * 4096)
    assert fields(body)["max_pages"] == 32


@pytest.mark.parametrize(
    ("offered", "answered"), [(0, TRANSFER_MAX), (4096, 4096), (1 << 30, TRANSFER_MAX)]
)
def test_read_ahead_is_what_the_kernel_has_at_most(offered: int, answered: int) -> None:
    assert fields(agree(45, readahead=offered)[1])["max_readahead"] == answered


def test_what_the_mount_asks_for() -> None:
    def flags(**wanted: bool) -> Settings:
        settings, _ = agree(45, **wanted)
        assert settings is not None
        return settings

    plain = flags()
    assert plain.stateless
    assert plain.stateless_dirs
    assert plain.has(abi.POSIX_ACL)
    assert plain.has(abi.WRITEBACK_CACHE)
    assert not plain.has(abi.PASSTHROUGH)
    assert not flags(acl=False).has(abi.POSIX_ACL)
    assert not flags(writeback=False).has(abi.WRITEBACK_CACHE)
    assert not flags(stateless=False).stateless
    assert flags(stateless=False).stateless_dirs
    through = flags(passthrough=True)
    assert through.has(abi.PASSTHROUGH)
    assert not through.has(abi.WRITEBACK_CACHE)  # the kernel excludes the two
    assert not through.stateless
    assert fields(agree(45, passthrough=True)[1])["max_stack_depth"] == 1


def test_what_is_never_asked_for() -> None:
    """Locks stay with the kernel, and what nobody here knows stays off."""
    settings, _ = agree(45)
    assert settings is not None
    for flag in (
        abi.POSIX_LOCKS,
        abi.FLOCK_LOCKS,
        abi.EXPORT_SUPPORT,
        abi.ATOMIC_O_TRUNC,
        abi.AUTO_INVAL_DATA,
        abi.HANDLE_KILLPRIV,
        abi.OVER_IO_URING,
    ):
        assert not settings.has(flag)
