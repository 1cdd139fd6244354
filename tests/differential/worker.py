"""The process that makes the calls on one side: ``python -m tests.differential.worker``.

One process per side and run; it serves many mounts. It reads pickled requests from standard input
and answers on standard output (courier.py is the other end). It owns what a process owns: table of
open descriptors ("slots"), working directory, umask, and the identity it acts under, which is
switched between the callers of script.CALLERS by setresuid(2) with root kept as the saved id, so
that descriptors outlive a change of caller as they do when a real process hands them on.

Every answer is ``(errno, value, touched)``: errno 0 or that of the call, a comparable value, and
the stat of every path and slot the call named (and of the parents), taken right after it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pickle
import signal
import stat
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from tests.differential import rawcalls
from tests.differential.looks import Look, digest, listing, look, view
from tests.differential.script import CALLERS, Op

#: Room for one name of 255 bytes, so that listing takes many calls.
_SMALL: Final = 288

#: FS_*_FL bits that operations set: S, i, a, d, A.
_SETTABLE_FLAGS: Final = 0x08 | 0x10 | 0x20 | 0x40 | 0x80

_SETTLED_NS: Final = 1_234_567_890_000_000_000

Touched = tuple[tuple[bytes, Look | int], ...]
Answer = tuple[int, Any, Touched]

#: What setxattr(2) answers when the file system of the upper has refused it.
_AFTER_COPY_UP: Final = frozenset(
    {
        errno.ENODATA,
        errno.EEXIST,
        errno.EOPNOTSUPP,
        errno.EINVAL,
        errno.ERANGE,
        errno.ENOSPC,
        errno.E2BIG,
    }
)

#: Which arguments of a call are paths; "slot" calls have the slot as their first argument.
PATHS: Final[dict[str, tuple[int, ...]]] = {
    "open": (1,),
    "mkdir": (0,),
    "mknod": (0,),
    "symlink": (1,),
    "link": (0, 1),
    "link_fd": (1,),
    "tmpfile": (1,),
    "unlink": (0,),
    "rmdir": (0,),
    "rename": (0, 1),
    "truncate": (0,),
    "chmod": (0,),
    "chown": (0,),
    "lchown": (0,),
    "utimens": (0,),
    "setxattr": (0,),
    "getxattr": (0,),
    "listxattr": (0,),
    "removexattr": (0,),
    "readlink": (0,),
    "stat": (0,),
    "lstat": (0,),
    "access": (0,),
    "statfs": (0,),
    "readdir": (0,),
    "readdir_seek": (0,),
    "readdir_unlink": (0,),
    "rmtree": (0,),
    "cat": (0,),
    "open_close": (0,),
    "overwrite": (0,),
    "chdir": (0,),
    "exec": (0,),
    "spawn": (0,),
}
SLOTS: Final = {
    "open": (0,),
    "close": (),
    "read": (0,),
    "pread": (0,),
    "write": (0,),
    "pwrite": (0,),
    "lseek": (0,),
    "ftruncate": (0,),
    "fstat": (0,),
    "fchmod": (0,),
    "fchown": (0,),
    "futimens": (0,),
    "fsetxattr": (0,),
    "fgetxattr": (0,),
    "flistxattr": (0,),
    "fremovexattr": (0,),
    "fsync": (0,),
    "fdatasync": (0,),
    "mmap_write": (0,),
    "mmap_read": (0,),
    "fallocate": (0,),
    "copy_range": (0, 1),
    "flock": (0,),
    "ofd_lock": (0,),
    "link_fd": (0,),
    "tmpfile": (0,),
    "getflags": (0,),
    "setflags": (0,),
    "freaddir": (0,),
}


class Worker:
    """State of the process, and one method per call."""

    def __init__(self) -> None:
        self.root_fd = -1
        self.mount = b""
        self.lower_inos: frozenset[int] = frozenset()
        self.known: frozenset[str] = frozenset()
        self.slots: dict[int, int] = {}
        self.caller = "root"
        self.children: list[int] = []
        with open("/proc/self/uid_map", encoding="ascii") as ids:
            self.in_namespace = ids.read().split() != ["0", "0", "4294967295"]

    # --- life of a mount ------------------------------------------------------------------------

    def begin(self, mount: bytes, lower_inos: frozenset[int], known: frozenset[str]) -> None:
        """Start on a fresh mount. *known* are ids of the differences that the two sides have."""
        self.mount = mount
        self.lower_inos = lower_inos
        self.known = known
        self.root_fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.umask(0o022)

    def settle(self) -> None:
        """Close what the operations left open; the mount stays in use."""
        self.become("root")
        os.chdir(b"/")
        for slot in list(self.slots):
            self.forget_slot(slot)
        self.reap()

    def end(self) -> None:
        """Leave the mount, so that it can be unmounted."""
        self.settle()
        if self.root_fd >= 0:
            os.close(self.root_fd)
        self.root_fd = -1

    def reap(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.children.clear()

    def forget_slot(self, slot: int) -> None:
        fd = self.slots.pop(slot, -1)
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                pass  # the answer of flush belongs to call_close() alone

    def become(self, caller: str) -> None:
        """Take the ids of *caller*; root stays the saved id."""
        if caller == self.caller:
            return
        os.setresuid(0, 0, 0)
        uid, gid, groups = CALLERS[caller]
        os.setgroups(groups)
        os.setresgid(gid, gid, 0)
        os.setresuid(uid, uid, 0)
        self.caller = caller

    # --- running --------------------------------------------------------------------------------

    def run(self, op: Op) -> Answer:
        """Make one call and look at what it touched."""
        self.become(op.caller)
        call: Callable[..., Any] = getattr(self, "call_" + op.name)
        number = 0
        value: Any = None
        try:
            value = call(*op.args)
        except OSError as exc:
            number = exc.errno or -1
        return number, value, self.touched(op)

    def touched(self, op: Op) -> Touched:
        """stat of what the call named, and of the parents; as root, so that it shows."""
        found: dict[bytes, Look | int] = {}
        self.become("root")
        for index in PATHS.get(op.name, ()):
            path = op.args[index]
            assert isinstance(path, bytes)
            found[path] = self.peek(path)
            parent = _parent(path)
            if parent is not None:
                found[parent] = self.peek(parent)
        for index in SLOTS.get(op.name, ()):
            slot = op.args[index]
            assert isinstance(slot, int)
            found[b"@%d" % slot] = self.peek_slot(slot)
        return tuple(found.items())

    def peek(self, path: bytes) -> Look | int:
        try:
            dir_fd, name = self.at(path)
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as exc:
            return exc.errno or -1
        return look(st, self.lower_inos)

    def peek_slot(self, slot: int) -> Look | int:
        try:
            return look(os.fstat(self.fd(slot)), self.lower_inos)
        except OSError as exc:
            return exc.errno or -1

    # --- where things are -----------------------------------------------------------------------

    def fd(self, slot: int) -> int:
        try:
            return self.slots[slot]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def at(self, path: bytes) -> tuple[int | None, bytes]:
        """Directory descriptor (None: working directory) and name for an *at call."""
        if path.startswith(b"@"):
            slot, _, rest = path[1:].partition(b"/")
            return self.fd(int(slot)), rest or b"."
        if path.startswith(b"./"):
            return None, path[2:] or b"."
        return self.root_fd, path or b"."

    def raw_at(self, path: bytes) -> tuple[int, bytes]:
        dir_fd, name = self.at(path)
        return (rawcalls.AT_FDCWD if dir_fd is None else dir_fd), name

    def full(self, path: bytes) -> bytes:
        """One path, for calls which have no *at form."""
        if path.startswith(b"@"):
            slot, slash, rest = path[1:].partition(b"/")
            return b"/proc/self/fd/%d%b%b" % (self.fd(int(slot)), slash, rest)
        if path.startswith(b"./"):
            return path
        return self.mount + b"/" + path if path else self.mount

    # --- descriptors ----------------------------------------------------------------------------

    def keep(self, slot: int, fd: int) -> None:
        self.forget_slot(slot)
        self.slots[slot] = fd

    def call_open(self, slot: int, path: bytes, flags: int, mode: int = 0o644) -> None:
        dir_fd, name = self.at(path)
        # Without O_NONBLOCK a fifo would stop the worker for good.
        flags |= os.O_NONBLOCK | os.O_CLOEXEC
        self.keep(slot, os.open(name, flags, mode, dir_fd=dir_fd))
        self.copy_up_opened(self.slots[slot], flags)

    def copy_up_opened(self, fd: int, flags: int) -> None:
        """Have a file that was opened for writing copied up, if the open did not do it.

        Known difference "copy-up-at-first-write". Later calls tell a copied-up file from one that
        is not (link counts, what a lower file of several names is), so both sides go on with one.
        """
        if "copy-up-at-first-write" not in self.known or flags & os.O_PATH:
            return
        if flags & os.O_ACCMODE == os.O_RDONLY or not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        self.bring_up(b"/proc/self/fd/%d" % fd, follow=True)

    def call_unaided(self, ident: str) -> None:
        """From here on, leave the known difference *ident* as it is."""
        self.known -= {ident}

    def call_open_close(self, path: bytes, flags: int) -> None:
        """Whether the file can be opened so."""
        dir_fd, name = self.at(path)
        os.close(os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd))

    def call_overwrite(self, path: bytes, flags: int, data: tuple[bytes, int]) -> int:
        """Open, write, close; the errno is that of whichever is refused first."""
        dir_fd, name = self.at(path)
        fd = os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            return os.write(fd, data[0] * data[1])
        finally:
            os.close(fd)

    def call_tmpfile(self, slot: int, path: bytes, flags: int, mode: int) -> None:
        self.call_open(slot, path, flags | os.O_TMPFILE, mode)

    def call_close(self, slot: int) -> None:
        os.close(self.slots.pop(slot) if slot in self.slots else self.fd(slot))

    def call_read(self, slot: int, count: int) -> bytes:
        return digest(os.read(self.fd(slot), count))

    def call_pread(self, slot: int, count: int, offset: int) -> bytes:
        return digest(os.pread(self.fd(slot), count, offset))

    def call_write(self, slot: int, data: tuple[bytes, int]) -> int:
        done = os.write(self.fd(slot), data[0] * data[1])
        self.drop_lone_setgid(slot)
        return done

    def drop_lone_setgid(self, slot: int) -> None:
        """After a write by an ordinary caller: no set-group-id without group execute.

        Known difference "setgid-on-write": the kernel clears it for a caller outside the group, a
        FUSE server does not learn who writes. Both sides go on without it.
        """
        if "setgid-on-write" not in self.known:
            return
        fd = self.fd(slot)
        try:
            mode = os.fstat(fd).st_mode
            if self.caller != "root" and mode & stat.S_ISGID and not mode & stat.S_IXGRP:
                self.become("root")
                os.fchmod(fd, stat.S_IMODE(mode) & ~stat.S_ISGID)
        except OSError:
            pass  # unlinked: the mode cannot be changed, and nobody will see it

    def call_pwrite(self, slot: int, data: tuple[bytes, int], offset: int) -> int:
        done = os.pwrite(self.fd(slot), data[0] * data[1], offset)
        self.drop_lone_setgid(slot)
        return done

    def call_lseek(self, slot: int, offset: int, whence: int) -> int:
        return os.lseek(self.fd(slot), offset, whence)

    def call_ftruncate(self, slot: int, size: int) -> None:
        fd = self.fd(slot)
        os.ftruncate(fd, size)
        self.drop_setid(b"/proc/self/fd/%d" % fd)

    def drop_setid(self, where: bytes) -> None:
        """In a user namespace, after truncating: neither set-user-id nor set-group-id.

        Known difference "suid-on-truncate-userns": the kernel lets root of the namespace keep
        them. Both sides go on without.
        """
        if not self.in_namespace or "suid-on-truncate-userns" not in self.known:
            return
        self.become("root")
        try:
            mode = stat.S_IMODE(os.stat(where).st_mode)
            if mode & 0o6000:
                os.chmod(where, mode & ~0o6000)
        except OSError:
            pass  # unlinked: nobody will see the mode

    def call_fstat(self, slot: int) -> Look:
        return look(os.fstat(self.fd(slot)), self.lower_inos)

    def call_fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.fd(slot), mode)

    def call_fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self.fd(slot), uid, gid)

    def call_futimens(self, slot: int, atime: int | str, mtime: int | str) -> None:
        rawcalls.futimens(self.fd(slot), atime, mtime)

    def call_fsetxattr(self, slot: int, key: bytes, data: tuple[bytes, int], flags: int) -> None:
        fd = self.fd(slot)
        try:
            os.setxattr(fd, key, data[0] * data[1], flags)
        except OSError as exc:
            if self.may_have_copied_up(exc.errno, key):
                self.bring_up(b"/proc/self/fd/%d" % fd, follow=True)
            raise

    def may_have_copied_up(self, number: int | None, key: bytes) -> bool:
        """Whether a setxattr that failed with *number* has copied up on one side only.

        Known difference "setxattr-fails": the kernel copies up before it knows that the call will
        fail. Both sides go on from the same state then.
        """
        if "setxattr-fails" not in self.known:
            return False
        if number == errno.EPERM:
            return key.startswith(b"security.")
        return number in _AFTER_COPY_UP

    def bring_up(self, where: bytes, *, follow: bool) -> None:
        """Have the object copied up, if it is not: set the times it has."""
        self.become("root")
        try:
            st = os.stat(where, follow_symlinks=follow)
            times = (st.st_atime_ns, st.st_mtime_ns)
            rawcalls.utimens(rawcalls.AT_FDCWD, where, *times, follow=follow)
        except OSError:
            pass  # unlinked, or not there: then there is nothing to bring up

    def call_fgetxattr(self, slot: int, key: bytes) -> bytes:
        return digest(os.getxattr(self.fd(slot), key))

    def call_flistxattr(self, slot: int) -> list[bytes]:
        return sorted(os.fsencode(key) for key in os.listxattr(self.fd(slot)))

    def call_fremovexattr(self, slot: int, key: bytes) -> None:
        os.removexattr(self.fd(slot), key)

    def call_fsync(self, slot: int) -> None:
        os.fsync(self.fd(slot))

    def call_fdatasync(self, slot: int) -> None:
        os.fdatasync(self.fd(slot))

    def call_mmap_write(self, slot: int, data: tuple[bytes, int], offset: int) -> str | None:
        fd = self.fd(slot)
        size = os.fstat(fd).st_size
        new = (data[0] * data[1])[: max(0, size - offset)]
        if not new:
            return "nothing mapped"
        if "mmap-write-clears" in self.known and _has_capability(fd):
            return "left alone"  # known difference "mmap-write-clears"
        with mmap.mmap(fd, size, mmap.MAP_SHARED) as window:
            window[offset : offset + len(new)] = new
            window.flush()
        return None

    def call_mmap_read(self, slot: int) -> bytes:
        fd = self.fd(slot)
        size = os.fstat(fd).st_size
        if not size:
            return b""
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as window:
            return digest(window[:])

    def call_fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        fd = self.fd(slot)
        try:
            rawcalls.fallocate(fd, mode, offset, length)
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP and "fallocate-ranges" in self.known:
                # mtime is new on one side by then. Both sides go on with a new one.
                self.become("root")
                rawcalls.futimens(fd, "omit", "now")
            raise

    def call_copy_range(self, src: int, dst: int, count: int, src_at: int, dst_at: int) -> int:
        done = os.copy_file_range(self.fd(src), self.fd(dst), count, src_at, dst_at)
        self.drop_lone_setgid(dst)
        return done

    def call_flock(self, slot: int, how: int) -> None:
        fcntl.flock(self.fd(slot), how | fcntl.LOCK_NB)

    def call_ofd_lock(self, slot: int, kind: int, start: int, length: int) -> None:
        record = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
        fcntl.fcntl(self.fd(slot), fcntl.F_OFD_SETLK, record)

    def call_getflags(self, slot: int) -> int:
        buffer = bytearray(8)
        fcntl.ioctl(self.fd(slot), rawcalls.FS_IOC_GETFLAGS, buffer)
        return int.from_bytes(buffer[:4], sys.byteorder)

    def call_setflags(self, slot: int, flags: int) -> None:
        # As chattr(1): others stay, for instance that an ext4 file has extents.
        others = self.call_getflags(slot) & ~_SETTABLE_FLAGS
        fcntl.ioctl(self.fd(slot), rawcalls.FS_IOC_SETFLAGS, struct.pack("=Q", others | flags))

    def call_freaddir(self, slot: int) -> object:
        fd = self.fd(slot)
        os.lseek(fd, 0, os.SEEK_SET)
        return listing(fd)

    # --- names ----------------------------------------------------------------------------------

    def call_mkdir(self, path: bytes, mode: int) -> None:
        dir_fd, name = self.at(path)
        os.mkdir(name, mode, dir_fd=dir_fd)

    def call_mknod(self, path: bytes, mode: int, major: int = 0, minor: int = 0) -> None:
        dir_fd, name = self.at(path)
        os.mknod(name, mode, os.makedev(major, minor), dir_fd=dir_fd)

    def call_symlink(self, target: bytes, path: bytes) -> None:
        dir_fd, name = self.at(path)
        os.symlink(target, name, dir_fd=dir_fd)

    def call_link(self, src: bytes, dst: bytes, flags: int = 0) -> None:
        rawcalls.linkat(*self.raw_at(src), *self.raw_at(dst), flags)

    def call_link_fd(self, slot: int, dst: bytes) -> None:
        source = b"/proc/self/fd/%d" % self.fd(slot)
        flags = rawcalls.AT_SYMLINK_FOLLOW
        rawcalls.linkat(rawcalls.AT_FDCWD, source, *self.raw_at(dst), flags)

    def call_unlink(self, path: bytes) -> None:
        dir_fd, name = self.at(path)
        os.unlink(name, dir_fd=dir_fd)

    def call_rmdir(self, path: bytes) -> None:
        dir_fd, name = self.at(path)
        os.rmdir(name, dir_fd=dir_fd)

    def call_rename(self, src: bytes, dst: bytes, flags: int = 0) -> None:
        source = self.raw_at(src)
        try:
            rawcalls.rename(*source, *self.raw_at(dst), flags)
        except OSError as exc:
            if exc.errno == errno.ENOTEMPTY and "rename-not-empty" in self.known:
                self.set_parent_time(*source)
            raise

    def set_parent_time(self, dir_fd: int, name: bytes) -> None:
        """Give the directory of an entry a fixed mtime.

        Known difference "rename-not-empty": ext4 has already changed the parent of the source when
        it finds that the target is not empty, if it was asked for a whiteout too.
        """
        self.become("root")
        head, slash, _name = name.rpartition(b"/")
        try:
            rawcalls.utimens(dir_fd, head if slash else b".", "omit", _SETTLED_NS, follow=True)
        except OSError:
            pass  # the directory has been removed

    def call_rmtree(self, path: bytes) -> list[str]:
        """rm -rf: answers with what could not be removed."""
        dir_fd, name = self.at(path)
        return sorted(_remove(dir_fd, name, b""))

    # --- attributes by path ---------------------------------------------------------------------

    def call_truncate(self, path: bytes, size: int) -> None:
        where = self.full(path)
        stays = os.stat(where).st_size == size
        os.truncate(where, size)
        self.drop_setid(where)
        if stays and "truncate-same-size" in self.known:
            # Known difference: mtime is what it was on one side, on the other not on every file
            # system. Both sides go on with a new one.
            self.become("root")
            rawcalls.utimens(rawcalls.AT_FDCWD, where, "omit", "now", follow=True)

    def call_chmod(self, path: bytes, mode: int) -> None:
        dir_fd, name = self.at(path)
        os.chmod(name, mode, dir_fd=dir_fd)

    def call_chown(self, path: bytes, uid: int, gid: int) -> None:
        dir_fd, name = self.at(path)
        os.chown(name, uid, gid, dir_fd=dir_fd)

    def call_lchown(self, path: bytes, uid: int, gid: int) -> None:
        dir_fd, name = self.at(path)
        os.chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=False)

    def call_utimens(
        self, path: bytes, atime: int | str, mtime: int | str, follow: int = 1
    ) -> None:
        rawcalls.utimens(*self.raw_at(path), atime, mtime, follow=bool(follow))

    def call_setxattr(
        self, path: bytes, key: bytes, data: tuple[bytes, int], flags: int = 0, follow: int = 1
    ) -> None:
        where = self.full(path)
        try:
            os.setxattr(where, key, data[0] * data[1], flags, follow_symlinks=bool(follow))
        except OSError as exc:
            if self.may_have_copied_up(exc.errno, key):
                self.bring_up(where, follow=bool(follow))
            raise

    def call_getxattr(self, path: bytes, key: bytes, follow: int = 1) -> bytes:
        return digest(os.getxattr(self.full(path), key, follow_symlinks=bool(follow)))

    def call_listxattr(self, path: bytes, follow: int = 1) -> list[bytes]:
        names = os.listxattr(self.full(path), follow_symlinks=bool(follow))
        return sorted(os.fsencode(key) for key in names)

    def call_removexattr(self, path: bytes, key: bytes, follow: int = 1) -> None:
        os.removexattr(self.full(path), key, follow_symlinks=bool(follow))

    def call_readlink(self, path: bytes) -> bytes:
        dir_fd, name = self.at(path)
        return os.readlink(name, dir_fd=dir_fd)

    def call_stat(self, path: bytes) -> Look:
        dir_fd, name = self.at(path)
        return look(os.stat(name, dir_fd=dir_fd), self.lower_inos)

    def call_lstat(self, path: bytes) -> Look:
        dir_fd, name = self.at(path)
        return look(os.stat(name, dir_fd=dir_fd, follow_symlinks=False), self.lower_inos)

    def call_access(self, path: bytes, mode: int, effective: int = 1) -> None:
        flags = rawcalls.AT_EACCESS if effective else 0
        rawcalls.faccessat(*self.raw_at(path), mode, flags)

    def call_statfs(self, path: bytes) -> tuple[int, ...]:
        st = os.statvfs(self.full(path))
        return st.f_bsize, st.f_frsize, st.f_blocks, st.f_files, st.f_namemax

    def call_cat(self, path: bytes) -> bytes:
        """Open, read all, close."""
        dir_fd, name = self.at(path)
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            return digest(os.read(fd, 1 << 22))
        finally:
            os.close(fd)

    # --- directories ----------------------------------------------------------------------------

    def open_dir(self, path: bytes) -> int:
        dir_fd, name = self.at(path)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)

    def call_readdir(self, path: bytes) -> object:
        fd = self.open_dir(path)
        try:
            return listing(fd)
        finally:
            os.close(fd)

    def call_readdir_seek(self, path: bytes) -> object:
        """telldir/seekdir: from a cookie the rest comes again, from 0 everything."""
        fd = self.open_dir(path)
        try:
            head = rawcalls.getdents(fd, _SMALL)
            rest = rawcalls.getdents_all(fd)
            again = []
            if head:
                os.lseek(fd, head[-1].offset, os.SEEK_SET)
                again = rawcalls.getdents_all(fd)
            os.lseek(fd, 0, os.SEEK_SET)
            whole = rawcalls.getdents_all(fd)
            names = sorted(entry.name for entry in whole)
            return names, again == rest, whole == head + rest
        finally:
            os.close(fd)

    def call_readdir_unlink(self, path: bytes) -> object:
        """List in small pieces and unlink what was listed: every name comes once."""
        fd = self.open_dir(path)
        seen: list[tuple[bytes, int]] = []
        try:
            while chunk := rawcalls.getdents(fd, _SMALL):
                seen += [(entry.name, _unlink_errno(fd, entry)) for entry in chunk]
            os.lseek(fd, 0, os.SEEK_SET)
            left = sorted(entry.name for entry in rawcalls.getdents_all(fd))
            return sorted(seen), left
        finally:
            os.close(fd)

    # --- process --------------------------------------------------------------------------------

    def call_umask(self, mask: int) -> None:
        os.umask(mask)

    def call_chdir(self, path: bytes) -> None:
        os.chdir(self.full(path))

    def call_exec(self, path: bytes) -> int:
        """Run a program to its end."""
        full = self.full(path)
        pid = os.posix_spawn(full, [full], {})
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def call_spawn(self, path: bytes) -> None:
        """Start a program (a copy of sleep) that runs until call_reap()."""
        full = self.full(path)
        self.children.append(os.posix_spawn(full, [full, b"1000"], {}))

    def call_reap(self) -> None:
        self.become("root")
        self.reap()


def _has_capability(fd: int) -> bool:
    try:
        return bool(os.getxattr(fd, b"security.capability"))
    except OSError:
        return False


def _parent(path: bytes) -> bytes | None:
    """What the last name of *path* is in, None when it names no entry."""
    if path in {b"", b"./"}:
        return None
    head, slash, _name = path.rpartition(b"/")
    if not slash:
        return None if path.startswith(b"@") else b""
    return b"./" if head == b"." else head


def _unlink_errno(fd: int, entry: rawcalls.DirEntry) -> int:
    if entry.name in {b".", b".."}:
        return 0
    try:
        os.unlink(entry.name, dir_fd=fd)
    except OSError as exc:
        return exc.errno or -1
    return 0


def _remove(dir_fd: int | None, name: bytes, path: bytes) -> list[str]:
    try:
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if not stat.S_ISDIR(st.st_mode):
            os.unlink(name, dir_fd=dir_fd)
            return []
        failed = _remove_below(dir_fd, name, path)
        os.rmdir(name, dir_fd=dir_fd)
    except OSError as exc:
        return [f"{path!r}: {errno.errorcode.get(exc.errno or 0, exc.errno)}"]
    return failed


def _remove_below(dir_fd: int | None, name: bytes, path: bytes) -> list[str]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=dir_fd)
    failed = []
    try:
        for entry in rawcalls.getdents_all(fd):
            if entry.name not in {b".", b".."}:
                failed += _remove(fd, entry.name, path + b"/" + entry.name)
    finally:
        os.close(fd)
    return failed


CALLS: Final = tuple(sorted(name[5:] for name in vars(Worker) if name.startswith("call_")))


def _serve(source: BinaryIO, sink: BinaryIO, progress: mmap.mmap) -> None:
    worker = Worker()
    while True:
        try:
            verb, *args = pickle.load(source)
        except EOFError:
            return
        answer: Any = None
        if verb == "run":
            answer = []
            for index, op in enumerate(args[0]):
                progress[:4] = index.to_bytes(4, "little")
                answer.append(worker.run(Op(*op)))
        elif verb == "view":
            answer = view(worker.root_fd, worker.lower_inos)
        else:
            getattr(worker, verb)(*args)
        pickle.dump(answer, sink, pickle.HIGHEST_PROTOCOL)
        sink.flush()


def main() -> None:
    """Serve requests until standard input ends; the first argument is the progress descriptor."""
    progress = mmap.mmap(int(sys.argv[1]), 4)
    _serve(sys.stdin.buffer, sys.stdout.buffer, progress)


if __name__ == "__main__":
    main()
