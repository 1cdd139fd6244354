"""Malformed messages between the real ones of a mount: its user must not notice."""

from __future__ import annotations

import mmap
import os
import random
import struct
from pathlib import Path

import pytest

from devtools.stress_codec import Maker
from tests.support import fusewire
from tests.support.devfuse_server import serving
from tests.support.fusetalk import PaperDevice
from tests.support.unions import Union
from unionfs2.devfuse import abi, codec
from unionfs2.devfuse.device import Device

MESSAGES = 10_000
_UNKNOWN_NODE = 1 << 40
_UNKNOWN_UNIQUE = 1 << 62


class _Seen(PaperDevice):
    """For the maker: no node that exists."""

    dirs = files = (_UNKNOWN_NODE, _UNKNOWN_NODE + 1)


class Injecting(Device):
    """Puts three messages of its own before each of the kernel's; ``counter`` is shared."""

    counter: mmap.mmap

    def _maker(self) -> Maker:
        return Maker(random.Random(1), _Seen(), ())  # type: ignore[arg-type]

    def next(self, *, patient: bool = True) -> int:
        if not hasattr(self, "maker"):
            self.maker, self.turn, self.unique = self._maker(), 0, _UNKNOWN_UNIQUE
        done = struct.unpack("<Q", self.counter[:8])[0]
        self.turn += 1
        if len(self.buffer) < 1 << 20 or self.turn % 4 == 0 or done >= MESSAGES:
            return super().next(patient=patient)
        self.counter[:8] = struct.pack("<Q", done + 1)
        self.unique += 2
        text = harmless(self.maker, self.unique)
        self.buffer[: len(text)] = text
        return len(text)


def harmless(maker: Maker, unique: int) -> bytes:
    """A message about nothing that exists, with a number that nobody waits for."""
    while True:
        text = bytearray(maker.message())
        if len(text) >= 16:
            struct.pack_into("<Q", text, 8, unique)
        if len(text) >= 24:
            struct.pack_into("<Q", text, 16, _UNKNOWN_NODE)
        try:
            req = codec.decode(text, len(text))
        except codec.ProtocolError:
            return bytes(text)
        if req.opcode not in (abi.BATCH_FORGET, abi.INTERRUPT):  # which name others
            return bytes(text)


def work_on(root: Path, turn: int) -> None:
    """What a client does, compared with what it must see."""
    data = os.urandom(20_000)
    directory = root / f"d{turn % 7}"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_bytes(data)
    (directory / "a").rename(directory / "c")
    with (root / "lower").open("ab") as log:
        log.write(b"%05d\n" % turn)
        os.fsync(log.fileno())
    os.setxattr(directory / "c", "user.turn", b"%d" % turn)
    assert sorted(os.listdir(directory)) == ["b", "c"]
    assert (directory / "c").read_bytes() == data
    assert os.getxattr(directory / "c", "user.turn") == b"%d" % turn
    assert (root / "lower").stat().st_size == 6 * (turn + 1)
    for name in ("b", "c"):
        (directory / name).unlink()
    directory.rmdir()
    assert os.listdir(root) == ["lower"]


@pytest.mark.needs("root", "fuse", "user-xattr")
def test_a_client_does_not_notice_malformed_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    union = Union(tmp_path, ({"lower": ""},), {}, userxattr=True)
    target = tmp_path / "mnt"
    target.mkdir()
    counter = mmap.mmap(-1, 8)

    def change() -> None:
        Injecting.counter = counter
        monkeypatch.setattr("unionfs2.devfuse.server.Device", Injecting)

    with serving(union.spec, target, change):
        turn = 0
        while struct.unpack("<Q", counter[:8])[0] < MESSAGES:
            work_on(target, turn)
            turn += 1
        for _ in range(10):  # and without them
            work_on(target, turn)
            turn += 1
    lines = (union.upper / "lower").read_bytes().splitlines()
    assert lines == [b"%05d" % number for number in range(turn)]
    assert struct.unpack("<Q", counter[:8])[0] == MESSAGES
    union.close()


def test_what_is_injected_is_of_many_kinds() -> None:
    maker = Maker(random.Random(2), _Seen(), ())  # type: ignore[arg-type]
    malformed, opcodes = 0, set()
    for number in range(2000):
        text = harmless(maker, number + 2)
        try:
            opcodes.add(codec.decode(text, len(text)).opcode)
        except codec.ProtocolError:
            malformed += 1
        if len(text) >= fusewire.HEADER:
            assert struct.unpack_from("<QQ", text, 8) == (number + 2, _UNKNOWN_NODE)
    assert malformed > 200
    assert len(opcodes) > 45
