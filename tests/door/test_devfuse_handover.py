"""One process goes on with the mount of another; who uses it sees nothing but a pause."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import mounts, probe
from tests.support.devfuse_server import ended, in_child, tell
from tests.support.tree import Tree
from tests.support.unions import Union, Unions
from tests.support.unions import home as home
from tests.support.unions import unions as unions
from unionfs2 import attach
from unionfs2.devfuse import handover
from unionfs2.devfuse.server import Server
from unionfs2.devfuse.session import Settings
from unionfs2.nodes import Dir, NodeTable
from unionfs2.union import UnionFS


@pytest.fixture
def userxattr() -> bool:
    return True


def hold(fs: UnionFS, *paths: bytes) -> None:
    """Know each path and what leads to it, as the kernel does."""
    for path in paths:
        node: Any = fs.root
        for part in path.split(b"/"):
            node = fs.stack.require(node, part)[0]
            node.lookups += 1


def table_of(fs: UnionFS) -> dict[int, tuple[Any, ...]]:
    return {item.id: tuple(item) for item in handover.dump(fs.stack.nodes)}


@pytest.mark.needs("user-xattr")
def test_the_table_is_the_same_in_another_core(unions: Unions) -> None:
    union = unions({"d": {"e": {"f": "deep"}}, "l": "low"}, upper={"u": "up", "d": {"x": "y"}})
    hold(union.fs, b"d/e/f", b"d/x", b"l", b"u", b"d/e/f")
    union.fs.link(union.fs.root.children[b"u"], union.fs.root, b"v")
    union.sh.chmod("l", 0o600)
    union.sh.rename("l", "moved")
    hold(union.fs, b"u", b"v")
    before = table_of(union.fs)
    text = pickle.dumps(handover.dump(union.fs.stack.nodes))
    other = union.another(clean_work=False)
    assert handover.restore(other, pickle.loads(text), {}) == []
    assert table_of(other) == before
    assert other.lookup(other.root, b"moved")[0].id == union.fs.root.children[b"moved"].id  # type: ignore[index]
    union.end(other)


@pytest.mark.needs("user-xattr")
def test_parents_come_first_and_ids_go_on_above(unions: Unions) -> None:
    union = unions({"a": {"b": {"c": {"d": "x"}}}}, upper={})
    hold(union.fs, b"a/b/c/d")
    (union.upper / "later").write_text("")
    known = handover.dump(union.fs.stack.nodes)
    seen = {0}
    for item in known:
        assert item.parent in seen
        seen.add(item.id)
    other = union.another(clean_work=False)
    handover.restore(other, known, {})
    assert other.stack.require(other.root, b"later")[0].id > max(seen)
    union.end(other)


@pytest.mark.needs("user-xattr")
def test_what_has_gone_is_lost_and_a_nameless_file_is_not(unions: Unions) -> None:
    union = unions({"gone": "g"}, upper={"open": "content", "other": "o"})
    hold(union.fs, b"gone", b"open", b"other")
    ids = {name: union.fs.root.children[name].id for name in (b"gone", b"open", b"other")}
    union.sh.unlink("open")
    (union.upper / "other").unlink()  # behind everybody's back
    known = handover.dump(union.fs.stack.nodes)
    fds = {node: os.dup(fd) for node, fd in handover.orphans(union.fs.stack.nodes).items()}
    assert list(fds) == [ids[b"open"]]
    other = union.another(clean_work=False)
    assert handover.restore(other, known, fds) == [ids[b"other"]]
    node = other.node(ids[b"open"])
    assert other.getattr(node).st_size == 7
    other.forget(node.id, node.lookups)  # closes the descriptor
    assert ids[b"open"] not in other.stack.nodes.by_id
    union.end(other)


def test_an_empty_table() -> None:
    assert handover.dump(NodeTable()) == []
    assert Dir(1, None, (), whiteouts=False).kind == 0o040000


# --- a mount --------------------------------------------------------------------------------------


def first(union: Union, target: Path, ready: int, line: socket.socket) -> None:
    """Serve until SIGUSR1, then send everything along."""
    with UnionFS.open(union.spec) as fs:
        fd = attach.attach(union.spec, os.fsencode(target))
        server = Server(fs, fd, spec=union.spec, ready=lambda: tell(ready), unmount=None)
        kept = os.dup(fd)
        signal.signal(signal.SIGUSR1, lambda *_: server.end())
        server.run()
        table = fs.stack.nodes
        nameless = handover.orphans(table)
        known = handover.dump(table)
        text = pickle.dumps((tuple(server.settings), known, list(nameless)))
        socket.send_fds(line, [text], [kept, *nameless.values()])


def second(union: Union, ready: int, line: socket.socket) -> None:
    """Take everything, and serve until it is unmounted."""
    text, fds, _, _ = socket.recv_fds(line, 1 << 20, 20)
    settings, known, ids = pickle.loads(text)
    with UnionFS.open(union.spec, clean_work=False) as fs:
        lost = handover.restore(fs, known, dict(zip(ids, fds[1:], strict=True)))
        assert lost == []
        server = Server(fs, fds[0], spec=union.spec, ready=lambda: None, unmount=None)
        server.take_over(Settings(*settings))
        tell(ready)
        server.run()


class Handed:
    """A mount with a server, and a second process that is ready to take it over."""

    def __init__(self, home: Path) -> None:
        lower: Tree = {"d": {"low": "lower content", "deep": {"f": "x"}}}
        self.union = Union(home, (lower,), {"up": "u"}, userxattr=True, writeback="on")
        self.target = home / "mnt"
        self.target.mkdir()
        self._ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ready, said = os.pipe()
        self._ready_again, said_again = os.pipe()
        # Both are made before anything is open on the mount, which they would hold as well.
        self.pids = [
            in_child(lambda: first(self.union, self.target, said, self._ends[0])),
            in_child(lambda: second(self.union, said_again, self._ends[1])),
        ]
        os.close(said)
        os.close(said_again)
        assert os.read(self._ready, 1) == b"x"

    def stop_first(self) -> None:
        os.kill(self.pids[0], signal.SIGUSR1)
        assert ended(self.pids.pop(0)) == 0

    def wait_for_second(self) -> None:
        assert os.read(self._ready_again, 1) == b"x"

    def unmount(self) -> None:
        probe.sys_umount(str(self.target))
        assert ended(self.pids.pop()) == 0

    def close(self) -> None:
        mounts.detach(self.target)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for end in self._ends:
            end.close()
        os.close(self._ready)
        os.close(self._ready_again)
        self.union.close()


@pytest.fixture
def handed(tmp_path: Path) -> Iterator[Handed]:
    made = Handed(tmp_path)
    yield made
    made.close()


@pytest.mark.needs("root", "fuse", "user-xattr")
def test_files_stay_open_on_a_mount_that_outlives_its_server(handed: Handed) -> None:
    target = handed.target
    low = (target / "d/low").open("r+b", buffering=0)
    up = (target / "up").open("r+b", buffering=0)
    gone = (target / "gone").open("w+b", buffering=0)
    gone.write(b"nameless")
    os.fsync(gone.fileno())
    (target / "gone").unlink()
    up.write(b"held back")
    numbers = [os.fstat(item.fileno()).st_ino for item in (low, up, gone)]

    handed.stop_first()
    handed.wait_for_second()

    assert low.read() == b"lower content"
    low.write(b" and more")
    up.write(b" and on")
    up.seek(0)
    assert up.read() == b"held back and on"
    gone.seek(0)
    assert gone.read() == b"nameless"
    gone.write(b" still")
    os.fsync(gone.fileno())
    assert numbers == [os.fstat(item.fileno()).st_ino for item in (low, up, gone)]
    (target / "up").rename(target / "renamed")
    up.write(b"!")
    for item in (low, up, gone):
        item.close()
    assert (target / "d/low").read_bytes() == b"lower content and more"
    assert (target / "renamed").read_bytes() == b"held back and on!"
    handed.unmount()
    assert (handed.union.upper / "d/low").read_bytes() == b"lower content and more"
    assert sorted(os.listdir(handed.union.upper)) == ["d", "renamed"]


@pytest.mark.needs("root", "fuse", "user-xattr")
def test_a_directory_stays_open_and_a_request_waits_for_the_second_server(handed: Handed) -> None:
    target = handed.target
    directory = os.open(target / "d/deep", os.O_RDONLY | os.O_DIRECTORY)
    seen: list[object] = []
    # While nobody serves, or just before or after that: it is answered in any case.
    asker = threading.Thread(target=lambda: seen.append(os.stat(target / "d/deep/f").st_size))
    handed.stop_first()
    asker.start()
    handed.wait_for_second()
    asker.join(20)
    assert seen == [1]
    fd = os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=directory)
    os.write(fd, b"made after")
    os.close(fd)
    assert sorted(os.listdir(directory)) == ["f", "new"]
    os.close(directory)
    handed.unmount()
    assert (handed.union.upper / "d/deep/new").read_bytes() == b"made after"
