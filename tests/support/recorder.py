"""Power cuts for the store: end a process before its n-th change, and lose what was not synced.

``Recorder`` takes the place of every function in ``syscalls.MUTATORS``, for good: it is meant for a
child process, which ``run_until()`` forks. It keeps account of what a journalling file system may
lose at that moment. Such a file system writes names in the order in which they were changed, so
that a cut leaves a state that was there once; but file content that was never synced can be gone,
and the name be there. The recorder empties such files before it ends the process.

The account is stricter for an operation that has returned: each directory whose names changed must
have been synced itself since then (``left_unsynced``), as file systems without such an order need.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from unionfs2 import syscalls

KILLED: Final = 9

# Which arguments hold directory descriptors of names that change; None: dir_fd keyword, or a path.
_NAMES: Final[dict[str, tuple[int, ...]]] = {
    "mkdir": (), "mknod": (), "symlink": (), "unlink": (), "rmdir": (), "create_at": (),
    "open_truncated": (), "link": (3,), "link_fd": (2,), "rename": (1, 3),
}  # fmt: skip
# Which argument is the descriptor of a file whose content changes.
_DATA: Final = {"pwrite": 0, "ftruncate": 0, "copy_range": 1, "clone_data": 1}

_Key = tuple[int, int]


class Outcome(NamedTuple):
    """What became of a child: killed at its step or not, how many changes, what is not synced."""

    killed: bool
    calls: list[str]
    unsynced: list[str]
    error: str


def _key(st: os.stat_result) -> _Key:
    return st.st_dev, st.st_ino


class Recorder:
    """Counts changes, and ends the process instead of making the *stop_at*-th (0: never)."""

    def __init__(self, stop_at: int, *, power: bool) -> None:
        self.calls: list[str] = []
        self._stop_at = stop_at
        self._power = power
        # Of objects with changes that are not synced: a descriptor of their own.
        self._files: dict[_Key, int] = {}
        self._directories: dict[_Key, int] = {}

    def install(self) -> None:
        """Replace the functions; there is no way back."""
        for name in syscalls.MUTATORS:
            setattr(syscalls, name, self._wrapped(name, getattr(syscalls, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self._stop_at:
                self.cut()
                os._exit(KILLED)
            result = real(*args, **keywords)
            self._note(name, args, keywords)
            return result

        return call

    def cut(self) -> None:
        """Empty every file whose content was not synced."""
        if self._power:
            for fd in self._files.values():
                os.truncate(f"/proc/self/fd/{fd}", 0)

    def _note(self, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if name == "syncfs":
            for fd in (*self._files.values(), *self._directories.values()):
                os.close(fd)
            self._files.clear()
            self._directories.clear()
        elif name in {"fsync", "fdatasync"}:
            key = _key(os.fstat(args[0]))
            for dirty in (self._files, self._directories):
                if key in dirty:
                    os.close(dirty.pop(key))
        elif name in _DATA:
            self._keep(self._files, args[_DATA[name]])
        elif name in _NAMES:
            for position in _NAMES[name]:
                self._keep(self._directories, args[position])
            if not _NAMES[name]:
                self._keep_directory_of(args[1] if name == "symlink" else args[0], keywords)

    def _keep(self, dirty: dict[_Key, int], fd: int) -> None:
        key = _key(os.fstat(fd))
        if key not in dirty:
            dirty[key] = os.open(f"/proc/self/fd/{fd}", os.O_PATH)

    def _keep_directory_of(self, path: bytes, keywords: dict[str, Any]) -> None:
        head = os.path.dirname(path) or b"."
        fd = os.open(head, os.O_PATH | os.O_DIRECTORY, dir_fd=keywords.get("dir_fd"))
        try:
            self._keep(self._directories, fd)
        finally:
            os.close(fd)

    def left_unsynced(self) -> list[str]:
        """Paths of files and directories that still exist and have changes not synced."""
        found = []
        for fd in (*self._files.values(), *self._directories.values()):
            st = os.stat(f"/proc/self/fd/{fd}")
            if st.st_nlink > (1 if stat.S_ISDIR(st.st_mode) else 0):
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
        return sorted(found)


def run_until(stop_at: int, action: Callable[[], object], *, power: bool = False) -> Outcome:
    """Do *action* in a child that ends before its *stop_at*-th change; with *power*, by a cut.

    Without reaching it the child goes on to the end, where with *power* the cut comes then.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(writer, stop_at, action, power=power)
    os.close(writer)
    with open(reader, "rb") as stream:
        text = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == KILLED and not text:
        return Outcome(True, [], [], "")
    return Outcome(False, *json.loads(text))


def _be_the_child(writer: int, stop_at: int, action: Callable[[], object], *, power: bool) -> None:
    try:
        recorder = Recorder(stop_at, power=power)
        recorder.install()
        error = ""
        try:
            action()
        except BaseException:  # noqa: BLE001 - the parent is told
            error = traceback.format_exc()
        unsynced = recorder.left_unsynced()
        recorder.cut()
        text = json.dumps((recorder.calls, unsynced, error)).encode()
        while text:
            text = text[os.write(writer, text) :]
        os._exit(0)
    except BaseException:  # noqa: BLE001 - this process ends here
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)
