"""A core that does nothing but remember what it was asked, for tests of the door alone."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from unionfs2.fs_ops import Door
from unionfs2.handles import DirHandle, FileHandle
from unionfs2.nodes import Dir, Node

CTX: Any = SimpleNamespace(uid=11, gid=12, pid=0, umask=0o027)


def stat_of(mode: int, **fields: int) -> os.stat_result:
    """A stat result with distinct values; times in ns."""
    times = [fields.pop(name, 0) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")]
    order = ("st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
    head = [fields.pop(name, 0) for name in order]
    floats = [ns / 1e9 for ns in times]
    tail = [fields.pop(name, 0) for name in ("st_blksize", "st_blocks", "st_rdev")]
    assert not fields, fields
    whole = [ns // 10**9 for ns in times]
    return os.stat_result((mode, *head, *whole, *floats, *times, *tail))


class FakeJob:
    """A copy-up whose data is copied when the test says so."""

    def __init__(self, node: Node, size: int = 1 << 30) -> None:
        self.node = node
        self.size = size
        self.may_end = threading.Event()
        self.error: Exception | None = None
        self.done: list[str] = []

    def run(self) -> None:
        assert self.may_end.wait(10)
        self.done.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error

    def publish(self) -> None:
        self.done.append("publish")
        self.node.low = None

    def hand_over(self) -> int:
        return -1  # it has no descriptor

    def close(self) -> None:
        self.done.append("close")


class FakeCore:
    """Every method records (name, arguments) and gives ``answers[name]``, or raises it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {}
        self.files: dict[int, FileHandle] = {}
        self.name_max = 255
        self.trims = 0
        self.root = Dir(100, None, (), whiteouts=False)
        self.root.id = 1
        self.stack = SimpleNamespace(
            nodes=SimpleNamespace(by_id={1: self.root}, reap=lambda node: self._note("reap", node)),
            lookup=self._method("lookup"),
            cache=FakeCache(),
            changed=[],
            relisted=[],
            policy=SimpleNamespace(volatile=False, keeps_atime=True),
            w=None,
        )

    def add(self, kind: int, node_id: int, name: bytes, *, lower: bool = False) -> Any:
        """A node below the root."""
        node: Node
        if kind == stat.S_IFDIR:
            node = Dir(node_id + 100, None, (), whiteouts=False)
        else:
            low = cast("Any", object()) if lower else None
            node = Node(kind, node_id + 100, low)
        node.id, node.parent, node.name = node_id, self.root, name
        self.root.children[name] = node
        self.stack.nodes.by_id[node_id] = node
        return node

    def handle(self, node: Node, fd: int) -> FileHandle:
        handle = FileHandle(fd, node, os.O_RDWR, in_upper=True)
        self.files[fd] = handle
        return handle

    def _note(self, name: str, *args: Any, **keywords: Any) -> None:
        self.calls.append((name, *args, *keywords.items()))

    def _method(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            self._note(name, *args, **keywords)
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer(*args) if callable(answer) else answer

        return call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._method(name)

    def node(self, node_id: int) -> Node:
        node = self.stack.nodes.by_id.get(node_id)
        if node is None:
            raise OSError(116, "stale")
        return cast("Node", node)

    directory = node

    def file(self, number: int) -> FileHandle:
        if number not in self.files:
            raise OSError(9, "no such handle")
        return self.files[number]

    def dir_handle(self, number: int) -> DirHandle:
        handle = self.answers.get("listing handle")
        if handle is None:
            raise OSError(9, "no such handle")
        return cast("DirHandle", handle)


class FakeCache:
    """Says how full it is, and counts how often it was trimmed."""

    limit = 10

    def __init__(self) -> None:
        self.size = 0
        self.trims = 0

    def __len__(self) -> int:
        return self.size

    def trim(self) -> None:
        self.trims += 1


def door_of(core: FakeCore, *, debug: bool = False) -> Door:
    return Door(cast("Any", core), acl=True, ready=lambda: None, debug=debug)
