"""``./dev stress codec``: messages that no kernel sends, to a devfuse door over a real core.

Valid messages, valid ones with something wrong in them, and noise. Every message that has a number
and expects an answer must get exactly one, whatever it says; nothing may go wrong unexpectedly, no
layer but the upper may change, nothing outside of the layers, and when all is forgotten nothing is
left. A round is made again by ``--seed SEED --messages N`` of its own line.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import struct
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any, Final

from tests.support import fusewire
from tests.support.fusetalk import STATELESS, WITH_HANDLES, PaperDevice, Talk
from tests.support.tree import snapshot
from tests.support.unions import Union, memory_directory, open_fds
from unionfs2.devfuse import abi, codec

ROUND: Final = 10_000
_FILE_MAX: Final = 128 << 10  # no message may fill the memory
_PENDING_MAX: Final = 32
_REPORT_S: Final = 20.0
_NAMES: Final = (b"f", b"d", b"inner", b"deep", b"big", b"up", b"link", b"new", b"other", b"absent")
_NASTY: Final = (
    b"", b".", b"..", b"/", b"../canary", b"a/b", b"/etc", b"x" * 255, b"x" * 256, b"x" * 4000,
    b"\xff\xfe", b"a\0b", b"..\0..", b"../../../../../../tmp/canary", b"\n", b" ",
)  # fmt: skip
_ATTRIBUTES: Final = (
    b"user.a", b"user.overlay.opaque", b"trusted.overlay.redirect", b"trusted.a", b"security.x",
    b"system.posix_acl_access", b"user.a/b", b"nothing", b"user." + b"n" * 251,
)  # fmt: skip
_NUMBERS: Final = (
    0, 1, 2, 3, 7, 0x7F, 0xFF, 0xFFF, 0x1000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 62) + 1,
)  # fmt: skip
_SILENT: Final = frozenset((abi.FORGET, abi.BATCH_FORGET, abi.INTERRUPT, abi.NOTIFY_REPLY))
_OF_DIRECTORIES: Final = frozenset(
    (abi.OPENDIR, abi.READDIR, abi.READDIRPLUS, abi.FSYNCDIR, abi.TMPFILE, abi.STATFS)
)
_VALID: Final = tuple(1 << bit for bit in range(12))
_COMMANDS: Final = (0x80086601, 0x40086602, 0x801C581F, 0x401C5820, 0x5401)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``./dev stress codec``."""
    parser.add_argument("--messages", type=int, default=1_000_000, help="how many to send")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first round")


def run(arguments: argparse.Namespace) -> int:
    """0 when nothing was wrong."""
    started = shown = time.monotonic()
    totals: Counter[str] = Counter()
    problems: list[str] = []
    left, seed = arguments.messages, arguments.seed
    while left > 0 and len(problems) < 10:
        count = min(left, ROUND)
        result = one_round(seed, count)
        totals += result.counts
        for problem in result.problems:
            problems.append(problem)
            print(f"--seed {seed} --messages {count}: {problem}", flush=True)
        left -= count
        seed += 1
        if time.monotonic() - shown > _REPORT_S:
            shown = time.monotonic()
            print(f"{totals['messages']:,} messages", flush=True)
    taken = time.monotonic() - started
    words = ", ".join(f"{count:,} {what}" for what, count in sorted(totals.items()))
    print(f"{words} in {taken:.0f} s: {len(problems)} problems")
    return 1 if problems else 0


class Result:
    """What one round found."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []


class _Listener(logging.Handler):
    """Takes down what the door says; only what it does not understand is expected here."""

    def __init__(self, result: Result) -> None:
        super().__init__(logging.WARNING)
        self._result = result
        self._format = logging.Formatter("%(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, str) and record.msg.startswith("not understood"):
            self._result.counts["not understood"] += 1
        else:
            self._result.problems.append(self._format.format(record))


class _Device(PaperDevice):
    """Compares answers with what was asked."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result
        self.open: Counter[int] = Counter()  # numbers that are to be answered
        self.silent: Counter[int] = Counter()  # numbers that may be, if not understood
        self.dirs: deque[int] = deque([1, 1], 12)
        self.files: deque[int] = deque([2, 3], 24)
        self._guard = threading.Lock()

    def give_back(self, buffer: mmap) -> None:
        """It is not kept."""

    def take_buffer(self) -> mmap:
        taken = self.buffer
        self.buffer = mmap(-1, len(taken))
        return taken

    def notify(self, message: bytes) -> bool:
        fusewire.parse(message)
        return True

    def answer(self, reply: codec.Reply) -> None:
        text = b"".join(reply) if isinstance(reply, list) else bytes(reply)
        try:
            found = fusewire.parse(text)
        except AssertionError:
            self.result.problems.append(f"a malformed answer: {text[:64].hex()}")
            return
        with self._guard:
            self.result.counts["refused" if found.error else "done"] += 1
            for numbers in (self.open, self.silent):
                if numbers[found.unique]:
                    numbers[found.unique] -= 1
                    break
            else:
                self.result.problems.append(f"nobody asked for {found}")
        if not found.error and len(found.body) in (128, 144):
            node = fusewire.entry(found.body)
            if node.nodeid:
                is_dir = node.attr.mode & 0o170000 == 0o040000
                (self.dirs if is_dir else self.files).append(node.nodeid)


@contextmanager
def _small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_MAX, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _listening(result: Result) -> Iterator[None]:
    logger, listener = logging.getLogger("unionfs2"), _Listener(result)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate


def one_round(seed: int, count: int) -> Result:
    """*count* messages to a union of its own."""
    result = Result()
    rng = random.Random(seed)
    lowers: tuple[Any, ...] = (
        {"f": "lower", "d": {"inner": "x", "deep": {}}, "big": "y" * 100_000, "link": "z"},
        {"d": {"below": "w"}, "only": {"here": "v"}},
    )
    with tempfile.TemporaryDirectory(prefix="unionfs2-codec-", dir=memory_directory()) as name:
        home = Path(name)
        (home / "canary").write_text("alive")
        union = Union(home, lowers, {"up": "upper", "d": {"mine": "u"}}, userxattr=True)
        before = [snapshot(lower) for lower in union.lowers]
        fds = open_fds()
        device = _Device(result)
        flags = (STATELESS, WITH_HANDLES, STATELESS & ~abi.SETXATTR_EXT)[seed % 3]
        talk = Talk(union.fs, flags, device)
        try:
            with _small_files(), _listening(result):
                _send(talk, device, Maker(rng, device, talk.fs.files), count)
                _forget(talk, device)
            result.problems += _left_behind(talk, device)
        finally:
            talk.close()
            union.close()
        if open_fds() != fds:
            result.problems.append(f"{open_fds() - fds} descriptors are left open")
        if before != [snapshot(lower) for lower in union.lowers]:
            result.problems.append("a lower layer was changed")
        if (home / "canary").read_text() != "alive" or set(os.listdir(home)) != {
            "canary", "l1", "l2", "upper", "work",
        }:  # fmt: skip
            result.problems.append(f"outside of the layers: {os.listdir(home)}")
    result.counts["messages"] += count
    return result


def _send(talk: Talk, device: _Device, maker: Maker, count: int) -> None:
    door = talk.door
    for _ in range(count):
        text = maker.message()
        _expect(device, text)
        try:
            _check_names(text)
            door.process(device.put(text))
        except Exception as exc:  # noqa: BLE001 - the point of it all
            device.result.problems.append(f"{exc!r} of {text[:200].hex()}")
            return
        if sum(device.open.values()) > _PENDING_MAX:
            talk.settle()
            device.open = +device.open


def _expect(device: _Device, text: bytes) -> None:
    if len(text) < fusewire.HEADER:
        return
    opcode, unique = struct.unpack_from("<IQ", text, 4)
    if unique:
        (device.silent if opcode in _SILENT else device.open)[unique] += 1


def _check_names(text: bytes) -> None:
    """AssertionError where decode() gives a name that leads somewhere."""
    try:
        req = codec.decode(text, len(text))
    except codec.ProtocolError:
        return
    row = abi.ROWS.get(req.opcode)
    if row is None or not row.names or req.opcode in (abi.GETXATTR, abi.REMOVEXATTR):
        return
    names = [part for part in req.args if isinstance(part, bytes)]
    assert len(names) == row.names
    for name in names[: 1 if req.opcode == abi.SYMLINK else None]:
        assert name not in (b"", b".", b"..")
        assert b"/" not in name
        assert b"\0" not in name


def _forget(talk: Talk, device: _Device) -> None:
    """What a kernel does before it ends: close, and give back every node."""
    talk.settle()
    unique = 1 << 61
    for fh in list(talk.fs.files):
        unique += 2
        device.open[unique] += 1
        text = fusewire.message(abi.RELEASE, struct.pack("<QIIQ", fh, 0, 0, 0), unique=unique)
        talk.door.process(device.put(text))
    for node in sorted(talk.fs.stack.nodes.by_id.values(), key=lambda node: -node.id):
        unique += 2
        body = struct.pack("<Q", node.lookups)
        text = fusewire.message(abi.FORGET, body, nodeid=node.id, unique=unique)
        talk.door.process(device.put(text))
    talk.settle()


def _left_behind(talk: Talk, device: _Device) -> list[str]:
    found = []
    missing = +device.open
    if missing:
        found.append(f"{len(missing)} requests are not answered")
    left = {node.id: node for node in talk.fs.stack.nodes.by_id.values() if node.id != 1}
    if left:
        found.append(f"nodes are left: {[(n.name, n.lookups) for n in left.values()][:5]}")
    door = talk.door
    # Not its files: one of a node that was forgotten while being worked on is kept for a while.
    if door._copying or door._parked or door.lock.locked():  # noqa: SLF001
        found.append(f"the door still waits: {door._copying}, {door._parked}")  # noqa: SLF001
    return found


class Maker:
    """Makes messages about nodes that *device* has seen, and about open *handles*."""

    def __init__(self, rng: random.Random, device: _Device, handles: Iterable[int]) -> None:
        self._rng = rng
        self._device = device
        self._handles = handles
        self._unique = 1000
        handled = [opcode for opcode in abi.ROWS if abi.ROWS[opcode].layout is not None]
        often = [abi.WRITE, abi.READ, abi.SYMLINK, abi.READLINK, abi.UNLINK, abi.SETATTR]
        self._opcodes = [*abi.ROWS, *handled, *handled, *often, *[abi.LOOKUP] * 30]

    def message(self) -> bytes:
        """One more."""
        rng = self._rng
        self._unique += 2
        kind = rng.random()
        if kind < 0.05:
            return self._noise()
        opcode = rng.choice(self._opcodes)
        body = self._body(opcode)
        if kind < 0.35:
            body = self._changed(body)
        elif kind < 0.40:
            body = body[: rng.randrange(len(body) + 1)]
        elif kind < 0.45:
            body += rng.randbytes(rng.randrange(1, 64))
        text = fusewire.message(
            opcode, body, nodeid=self._about(opcode), unique=self._unique,
            uid=rng.choice((0, 0, 1000)), gid=rng.choice((0, 0, 1000)),
        )  # fmt: skip
        if kind < 0.90:
            return text
        return self._changed(text)

    def _node(self) -> int:
        return self._dir() if self._rng.random() < 0.3 else self._file()

    def _dir(self) -> int:
        return 1 if self._rng.random() < 0.5 else self._rng.choice(self._device.dirs)

    def _file(self) -> int:
        return self._rng.choice(self._device.files)

    def _about(self, opcode: int) -> int:
        if self._rng.random() < 0.1:
            return self._node()
        row = abi.ROWS[opcode]
        named = row.names and opcode not in (abi.GETXATTR, abi.REMOVEXATTR)
        return self._dir() if named or opcode in _OF_DIRECTORIES else self._file()

    def _noise(self) -> bytes:
        rng = self._rng
        size = rng.choice((0, 1, 39, 40, 41, 60, 100, 300, 5000))
        text = bytearray(rng.randbytes(size))
        if size >= fusewire.HEADER and rng.random() < 0.8:
            struct.pack_into("<IIQQ", text, 0, size, rng.randrange(60), self._unique, self._node())
            struct.pack_into("<IIIHH", text, 24, 0, 0, 0, 0, 0)
        return bytes(text)

    def _changed(self, text: bytes) -> bytes:
        """One to three things wrong."""
        rng = self._rng
        out = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            if not out:
                break
            way, at = rng.random(), rng.randrange(len(out))
            if way < 0.4:
                out[at] = rng.randrange(256)
            elif way < 0.8 and len(out) >= 8:
                at = min(at & ~3, len(out) - 8)
                number = rng.choice(_NUMBERS)
                if rng.random() < 0.5:
                    struct.pack_into("<Q", out, at, number)
                else:
                    struct.pack_into("<I", out, at, number & 0xFFFFFFFF)
            elif way < 0.9:
                out[at] ^= 1 << rng.randrange(8)
            else:
                out += rng.choice(_NASTY) + b"\0"
        return bytes(out)

    def _name(self) -> bytes:
        rng = self._rng
        return (rng.choice(_NASTY) if rng.random() < 0.05 else rng.choice(_NAMES)) + b"\0"

    def _body(self, opcode: int) -> bytes:
        """What a kernel would send, with numbers that mean something now and then."""
        special = getattr(self, f"_{abi.ROWS[opcode].name.lower()}", None)
        if special is not None:
            return bytes(special())
        row = abi.ROWS[opcode]
        body = bytes(row.layout.size) if row.layout is not None else b""
        return body + b"".join(self._name() for _ in range(row.names))

    def _fh(self) -> int:
        if self._rng.random() < 0.5:
            return 0
        return self._rng.choice([*self._handles, 0, 99])

    def _number(self, *usual: int) -> int:
        rng = self._rng
        return rng.choice(usual) if rng.random() < 0.9 else rng.choice(_NUMBERS)

    def _mknod(self) -> bytes:
        mode = self._rng.choice((0o100644, 0o644, 0o10600, 0o140600, 0o20600, 0o60600, 0o40755))
        return struct.pack("<IIII", mode, 0x103, 0o22, 0) + self._name()

    def _mkdir(self) -> bytes:
        return struct.pack("<II", 0o755, 0o22) + self._name()

    def _create(self) -> bytes:
        return struct.pack("<IIII", self._rng.choice((0, 1, 2, 0o1002)), 0o644, 0, 0) + self._name()

    def _tmpfile(self) -> bytes:
        return struct.pack("<IIII", 2, 0o644, 0, 0) + b"/\0"

    def _open(self) -> bytes:
        return struct.pack("<II", self._rng.choice((0, 1, 2, 0o1001, 0o2002, 0o40000)), 0)

    def _symlink(self) -> bytes:
        return self._name() + self._rng.choice((b"target\0", b"../../etc\0", b"/\0", b"\0"))

    def _link(self) -> bytes:
        return struct.pack("<Q", self._file()) + self._name()

    def _rename(self) -> bytes:
        return struct.pack("<Q", self._dir()) + self._name() + self._name()

    def _rename2(self) -> bytes:
        flags = self._rng.choice((0, 0, 1, 2, 4, 3))
        return struct.pack("<QII", self._dir(), flags, 0) + self._name() + self._name()

    def _forget(self) -> bytes:
        return struct.pack("<Q", self._number(0, 1, 1, 2))

    def _batch_forget(self) -> bytes:
        count = self._rng.randrange(2)
        pairs = b"".join(struct.pack("<QQ", self._node(), 1) for _ in range(count))
        return struct.pack("<II", self._number(count) & 0xFFFFFFFF, 0) + pairs

    def _interrupt(self) -> bytes:
        return struct.pack("<Q", max(0, self._unique - self._rng.randrange(0, 40, 2)))

    def _setattr(self) -> bytes:
        rng = self._rng
        numbers = struct.pack(
            "<IIQQQ", self._number(*_VALID) & 0xFFFFFFFF, 0, self._fh(),
            self._number(0, 1, 5, 4096, 100_000), 0,
        )  # fmt: skip
        times = struct.pack("<QQQIII", *(self._number(0, 10**9) for _ in range(3)), 1, 2, 3)
        ids = (rng.choice((0, 1000, 0xFFFFFFFF)) for _ in range(2))
        return numbers + times + struct.pack("<IIIII", rng.choice((0o644, 0o6755)), 0, *ids, 0)

    def _read(self) -> bytes:
        where, size = self._number(0, 0, 3, 4096), self._number(0, 10, 4096, 131072) & 0xFFFFFFFF
        return struct.pack("<QQIIQII", self._fh(), where, size, 0, 0, 0, 0)

    _readdir = _read
    _readdirplus = _read

    def _write(self) -> bytes:
        rng = self._rng
        data = rng.randbytes(rng.choice((0, 1, 5, 100, 5000)))
        where = self._number(0, 0, 3, 4096)
        flags = rng.choice((0, 0o2000, 0o4010000, 0o10000))
        return (
            struct.pack("<QQIIQII", self._fh(), where, len(data), rng.randrange(8), 0, flags, 0)
            + data
        )

    def _fallocate(self) -> bytes:
        mode = self._rng.choice((0, 1, 3, 0x10, 0x11, 8, 0x20))
        where, length = self._number(0, 100, 4096), self._number(1, 4096, 60_000)
        return struct.pack("<QQQII", self._fh(), where, length, mode, 0)

    def _lseek(self) -> bytes:
        return struct.pack("<QQII", self._fh(), self._number(0, 3), self._number(3, 4) & 0xFF, 0)

    def _copy_file_range(self) -> bytes:
        where = (self._number(0, 3, 4096), self._file(), self._fh(), self._number(0, 3, 4096))
        return struct.pack("<QQQQQQQ", self._fh(), *where, self._number(1, 4096, 70_000), 0)

    _copy_file_range_64 = _copy_file_range

    def _setxattr(self) -> bytes:
        rng = self._rng
        value = rng.randbytes(rng.choice((0, 1, 20, 44)))
        key = rng.choice(_ATTRIBUTES) + b"\0"
        return struct.pack("<IIII", len(value), rng.randrange(3), 0, 0) + key + value

    def _getxattr(self) -> bytes:
        return struct.pack("<II", self._number(0, 64, 65536) & 0xFFFFFFFF, 0) + self._attribute()

    def _attribute(self) -> bytes:
        return self._rng.choice(_ATTRIBUTES) + b"\0"

    _removexattr = _attribute

    def _listxattr(self) -> bytes:
        return struct.pack("<II", self._number(0, 64, 65536) & 0xFFFFFFFF, 0)

    def _ioctl(self) -> bytes:
        rng = self._rng
        data = rng.choice((b"", bytes(4), rng.randbytes(4), bytes(28), rng.randbytes(28)))
        command = rng.choice(_COMMANDS)
        return struct.pack("<QIIQII", 0, 0, command, 0, len(data), rng.choice((0, 4, 28))) + data
