"""A devfuse door over a real core, spoken to without a mount: the test is the kernel."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from mmap import mmap
from typing import TYPE_CHECKING, Final, cast

from tests.support import fusewire
from tests.support.fusewire import Answer, Entry
from unionfs2.devfuse import abi
from unionfs2.devfuse.server import new_door
from unionfs2.devfuse.session import TRANSFER_MAX, Settings

if TYPE_CHECKING:
    from unionfs2.devfuse.codec import Reply
    from unionfs2.devfuse.device import Device
    from unionfs2.union import UnionFS

WAIT_S: Final = 20.0
#: What the newest kernel and we agree on.
STATELESS: Final = (
    abi.NO_OPEN_SUPPORT
    | abi.NO_OPENDIR_SUPPORT
    | abi.WRITEBACK_CACHE
    | abi.SETXATTR_EXT
    | abi.HANDLE_KILLPRIV_V2
)
WITH_HANDLES: Final = abi.SETXATTR_EXT | abi.HANDLE_KILLPRIV_V2
#: Requests whose answer begins with a node that counts as looked up.
MAKERS: Final = frozenset(
    (abi.LOOKUP, abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.LINK, abi.CREATE, abi.TMPFILE)
)


class PaperDevice:
    """What Device is to a door, with lists in the place of the kernel."""

    def __init__(self) -> None:
        self.buffer = mmap(-1, TRANSFER_MAX + 8192)
        self.taken: list[mmap] = []
        self.given: list[mmap] = []
        self.notices: list[Answer] = []
        self.answers: dict[int, Answer] = {}
        self.arrived = threading.Condition()

    def put(self, text: bytes) -> int:
        """Make *text* the current message."""
        self.buffer[: len(text)] = text
        return len(text)

    def take_buffer(self) -> mmap:
        taken = self.buffer
        self.taken.append(taken)
        self.buffer = mmap(-1, len(taken))
        return taken

    def give_back(self, buffer: mmap) -> None:
        self.given.append(buffer)

    def answer(self, reply: Reply) -> None:
        found = fusewire.parse(b"".join(reply) if isinstance(reply, list) else bytes(reply))
        with self.arrived:
            assert found.unique, "this would be a notification"
            assert found.unique not in self.answers, f"{found.unique} was answered before"
            self.answers[found.unique] = found
            self.arrived.notify_all()

    def splice(self, pipe: int, total: int) -> None:
        text = b""
        while len(text) < total:
            text += os.read(pipe, total - len(text))
        self.answer(text)

    def notify(self, message: bytes) -> bool:
        found = fusewire.parse(message)
        assert not found.unique
        self.notices.append(found)
        return True


class Talk:
    """One connection. Counts what the kernel has looked up, as the kernel does."""

    def __init__(
        self, fs: UnionFS, flags: int = STATELESS, device: PaperDevice | None = None
    ) -> None:
        self.fs = fs
        self.device = device or PaperDevice()
        self.door = new_door(fs, cast("Device", self.device))
        self.door.settings = Settings(45, flags, TRANSFER_MAX)
        self.known: Counter[int] = Counter()
        self._next = 0

    def send(self, opcode: int, *parts: bytes, nodeid: int = 1, uid: int = 0, gid: int = 0) -> int:
        """Have one request worked on; its number."""
        self._next += 2
        text = fusewire.message(opcode, *parts, nodeid=nodeid, unique=self._next, uid=uid, gid=gid)
        self.door.process(self.device.put(text))
        return self._next

    def answered(self, unique: int) -> bool:
        return unique in self.device.answers

    def answer(self, unique: int) -> Answer:
        """The answer to request *unique*, waiting for it."""
        with self.device.arrived:
            came = self.device.arrived.wait_for(lambda: self.answered(unique), WAIT_S)
            assert came, f"request {unique} is not answered"
            return self.device.answers.pop(unique)

    def ask(
        self, opcode: int, *parts: bytes, nodeid: int = 1, uid: int = 0, gid: int = 0
    ) -> Answer:
        """Send, wait, and count."""
        found = self.answer(self.send(opcode, *parts, nodeid=nodeid, uid=uid, gid=gid))
        self.count(opcode, found)
        return found

    def count(self, opcode: int, answer: Answer) -> None:
        """Count the nodes that an answer hands out."""
        if answer.error:
            return
        if opcode in MAKERS:
            self.known[fusewire.entry(answer.body).nodeid] += 1
        elif opcode == abi.READDIRPLUS:
            for item in fusewire.dirents(answer.body, plus=True):
                assert item.entry is not None
                self.known[item.entry.nodeid] += 1
        del self.known[0]

    def lookup(self, name: bytes, parent: int = 1) -> Entry:
        """A node that must exist."""
        found = self.ask(abi.LOOKUP, name + b"\0", nodeid=parent)
        assert found.ok, found
        made = fusewire.entry(found.body)
        assert made.nodeid, name
        return made

    def settle(self) -> None:
        """Wait until nothing is being worked on."""
        door, end = self.door, time.monotonic() + WAIT_S
        while door._writers.busy or door._readers.busy:
            assert time.monotonic() < end, "work that does not end"
            time.sleep(0.0002)

    def close(self) -> None:
        self.settle()
        self.door.close()
