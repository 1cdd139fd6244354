"""Requests about the data of files, in two ways.

Stateless, where the kernel can: the one ENOSYS to OPEN, RELEASE is never sent, and READ and WRITE
name the node (``nodefiles``). A copy-up then comes with the first change, not with the open.

With handles, where somebody must know when a file is closed: limits (``quota``) and passthrough,
and kernels that have no other way. OPEN copies up, as the kernel's overlay does.
"""

from __future__ import annotations

import errno
import os
import time
from functools import partial
from mmap import mmap
from typing import TYPE_CHECKING, Final

from unionfs2 import files as corefiles
from unionfs2 import longwork
from unionfs2 import syscalls as sc
from unionfs2.handles import write_or_fail, write_whole
from unionfs2.nodefiles import OPEN_FLAGS
from unionfs2.stack import oserror

from . import abi, codec
from .door import caller_of
from .session import TRANSFER_MAX
from .splicing import DATA_MIN, Splicer
from .workers import Later

if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfs2.handles import FileHandle
    from unionfs2.nodefiles import NodeFile
    from unionfs2.nodes import Node

    from .codec import Reply, Request
    from .door import Door, Handler, Outcome, Quick

#: Flags of an open file through which not every read counts as access.
_MAYBE_QUIET: Final = os.O_NOATIME | os.O_ACCMODE
_HEAD_SIZE: Final = abi.OUT_HEADER.size
_READ_AT: Final = abi.IN_HEADER.size
_READ_SIZE: Final = _READ_AT + abi.READ_IN.size
_WRITE_AT: Final = _READ_AT + abi.WRITE_IN.size
_unpack_write = abi.WRITE_IN.unpack_from
_unpack_read = abi.READ_IN.unpack_from
_pack_head_into = abi.OUT_HEADER.pack_into
#: A large write that takes longer has waited for the disk; so many after it go to a thread.
_SLOW_NS: Final = 5_000_000
_SLOW_WRITES: Final = 64
_WHENCE: Final = (os.SEEK_DATA, os.SEEK_HOLE)


class Data:
    """Handlers of one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._fs = door.fs
        self._by_id = door.stack.nodes.by_id
        # A reply to READ: its header, then the data, in one piece.
        self._buffer = mmap(-1, TRANSFER_MAX + abi.OUT_HEADER.size)
        self._reply = memoryview(self._buffer)
        self._view = self._reply[abi.OUT_HEADER.size :]
        self._splicer = Splicer(door.device)
        door.closing.append(self._splicer.close)
        self._slow = 0

    def quick(self) -> dict[int, Quick]:
        return {abi.READ: self.quick_read, abi.WRITE: self.quick_write}

    def handlers(self) -> dict[int, Handler]:
        return {
            abi.OPEN: self.open,
            abi.CREATE: self.create,
            abi.TMPFILE: self.tmpfile,
            abi.RELEASE: self.release,
            abi.READ: self.read,
            abi.WRITE: self.write,
            abi.FLUSH: self.flush,
            abi.FSYNC: self.fsync,
            abi.FALLOCATE: self.fallocate,
            abi.LSEEK: self.lseek,
            abi.COPY_FILE_RANGE: partial(self.copy_file_range, codec.written),
            abi.COPY_FILE_RANGE_64: partial(self.copy_file_range, codec.copied_64),
            abi.SYNCFS: self.syncfs,
        }

    # --- opening -------------------------------------------------------------------------------

    def open(self, req: Request, flags: int, _: int) -> Outcome:
        door, fs = self._door, self._fs
        if door.settings.stateless:
            raise oserror(errno.ENOSYS)  # which the kernel remembers: no more OPEN, no RELEASE
        node = door.node(req.nodeid)
        if not corefiles.wants_write(flags):
            return self._opened(req, node, flags, writing=False)
        fs.check_open(node, flags)
        then = partial(self._opened, req, node, flags, writing=True)
        return door.copied_up(node, then, limit=corefiles.copy_limit(flags))

    def _opened(self, req: Request, node: Node, flags: int, *, writing: bool) -> Outcome:
        fs = self._fs
        handle = fs.open_file(node, flags, caller_of(req) if writing else None)
        # A read that the page cache answers does not reach us; where it would have to change the
        # access time, the cache goes, and the read comes.
        backing = self._pass_on(handle)
        if backing:
            return codec.opened(req.unique, handle.fd, abi.FOPEN_PASSTHROUGH, backing)
        keep = bool(flags & os.O_NOATIME) or not fs.atime_is_due(handle)
        return codec.opened(req.unique, handle.fd, abi.FOPEN_KEEP_CACHE if keep else 0)

    def _pass_on(self, handle: FileHandle) -> int:
        stays = handle.in_upper or self._door.stack.upper is None
        return self._door.passthrough.opened(handle, stays=stays)

    def create(
        self, req: Request, flags: int, mode: int, umask: int, _: int, name: bytes
    ) -> Outcome:
        door = self._door
        if door.settings.stateless:
            raise oserror(errno.ENOSYS)  # the kernel makes it by MKNOD from now on
        parent = door.directory(req.nodeid)
        handle, st = self._fs.create(parent, name, mode, flags, caller_of(req, umask))
        return self._made(req, handle, st)

    def _made(self, req: Request, handle: FileHandle, st: os.stat_result) -> bytes:
        reply = self._door.entry(req, (handle.node, st))
        backing = self._pass_on(handle)
        how = abi.FOPEN_PASSTHROUGH if backing else abi.FOPEN_KEEP_CACHE
        return codec.with_open(reply, req.unique, handle.fd, how, backing)

    def tmpfile(
        self, req: Request, flags: int, mode: int, umask: int, _: int, _name: bytes
    ) -> Outcome:
        door, fs = self._door, self._fs
        parent, caller = door.directory(req.nodeid), caller_of(req, umask)
        if not door.settings.stateless:
            return self._made(req, *fs.create_nameless(parent, mode, flags, caller))
        node, st, fd = fs.make_nameless(parent, mode, OPEN_FLAGS, caller)
        door.files.adopt(node, fd)
        reply = door.entry(req, (node, st))
        return codec.with_open(reply, req.unique, 0, abi.FOPEN_KEEP_CACHE)

    def release(self, req: Request, fh: int, *_: int) -> Outcome:
        if fh:  # 0: made by TMPFILE of a stateless door
            handle = self._fs.file(fh)
            node = handle.node
            self._door.passthrough.released(handle)
            self._fs.release(handle)
            if not node.id:
                self._door.files.drop(node)
        return codec.ok(req.unique)

    # --- reading -------------------------------------------------------------------------------

    def quick_read(
        self, buffer: codec.Buffer, length: int, unique: int, node_id: int
    ) -> Reply | memoryview | None:
        """READ of what is in the page cache; None: the long way."""
        if length != _READ_SIZE:
            return None
        fh, offset, size, _, _, flags = _unpack_read(buffer, _READ_AT)
        node = self._by_id.get(node_id)
        if node is None or fh or size > TRANSFER_MAX or not node.is_regular:
            return None
        if node.low is None and flags & _MAYBE_QUIET:
            return None
        file = self._door.files.reading(node)
        if size >= DATA_MIN and self._splicer.answer(unique, file.fd, offset, size):
            return b""  # sent
        done = os.preadv(file.fd, (self._view[:size],), offset, os.RWF_NOWAIT)
        if done < size and offset + done < os.fstat(file.fd).st_size:
            return None
        total = _HEAD_SIZE + done
        _pack_head_into(self._buffer, 0, total, 0, unique)
        return self._reply[:total]

    def read(
        self, req: Request, fh: int, offset: int, size: int, _read_flags: int, _owner: int,
        flags: int = 0,
    ) -> Outcome:  # fmt: skip
        door = self._door
        size = min(size, TRANSFER_MAX)
        if fh:
            return self._read(req, self._fs.file(fh).fd, offset, size, None)
        node = self._by_id.get(req.nodeid)
        if node is None or not node.is_regular:
            node = self._regular(req)
        if not flags & _MAYBE_QUIET or node.low is not None:
            file = door.files.reading(node)
        elif flags & os.O_ACCMODE == os.O_RDONLY:
            return self._read_quietly(req, node, offset, size)
        else:
            file = self._of_writer(node, flags, size)
        return self._read(req, file.fd, offset, size, file)

    def _of_writer(self, node: Node, flags: int, size: int) -> NodeFile:
        """The file to read from for somebody who has it open for writing.

        Where the kernel holds writes back it reads the page of which a part is written, and does
        not say so. That must not count as access; a page is as much as it asks for then.
        """
        files = self._door.files
        quiet = flags & (os.O_NOATIME | os.O_WRONLY) or (
            size <= abi.PAGE and self._door.settings.has(abi.WRITEBACK_CACHE)
        )
        if not quiet:
            return files.reading(node)
        file = files.writing(node)
        # Nothing is read ahead: pages in memory would make data of what is only allocated.
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def _read_quietly(self, req: Request, node: Node, offset: int, size: int) -> Outcome:
        """A read by somebody who asked to leave the access time alone."""
        fd = self._door.files.open_quietly(node)
        return Later(
            partial(longwork.read_whole, fd, offset, size),
            partial(codec.data, req.unique),
            cleanup=partial(os.close, fd),
            reads=True,
        )

    def _regular(self, req: Request) -> Node:
        node = self._door.node(req.nodeid)
        if not node.is_regular:
            raise oserror(errno.EISDIR if node.is_dir else errno.EINVAL, node.name)
        return node

    def _read(
        self, req: Request, fd: int, offset: int, size: int, file: NodeFile | None
    ) -> Outcome:
        if not req.inline:
            return codec.data(req.unique, longwork.read_whole(fd, offset, size))
        view = self._view[:size]
        try:
            done = os.preadv(fd, (view,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            done = -1
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            done = os.preadv(fd, (view,), offset)  # file systems in memory do not wait
            return codec.data(req.unique, view[:done])
        if done == size or not done:
            return codec.data(req.unique, view[:done])
        if done > 0 and offset + done >= os.fstat(fd).st_size:
            return codec.data(req.unique, view[:done])
        if size <= longwork.INLINE_READ and not self._door.reading_waits:
            return codec.data(req.unique, longwork.read_whole(fd, offset, size))
        return self._read_later(req, fd, offset, size, file)

    def _read_later(
        self, req: Request, fd: int, offset: int, size: int, file: NodeFile | None
    ) -> Later:
        work = partial(longwork.read_whole, fd, offset, size)
        then = partial(codec.data, req.unique)
        return self._reserved(work, then, (file,), reads=True)

    def _reserved(
        self,
        work: Callable[[], object],
        then: Callable[..., Outcome],
        files: tuple[NodeFile | None, ...],
        *,
        reads: bool = False,
    ) -> Later:
        """Work in a thread on descriptors that stay open meanwhile."""
        mine = [self._door.files.use(file) for file in files if file is not None]

        def cleanup() -> None:
            for file in mine:
                self._door.files.done(file)

        return Later(work, then, cleanup=cleanup, reads=reads)

    # --- writing -------------------------------------------------------------------------------

    def quick_write(
        self, buffer: codec.Buffer, length: int, unique: int, node_id: int
    ) -> bytes | None:
        """A small WRITE to a file in the upper; None: the long way, also for what went wrong."""
        fh, offset, size, write_flags, _, flags = _unpack_write(buffer, _READ_AT)
        node = self._by_id.get(node_id)
        if node is None or node.low is not None or not node.is_regular or fh:
            return None
        if length != _WRITE_AT + size or size >= longwork.THREAD_WRITE:
            return None
        if write_flags & abi.WRITE_KILL_SUIDGID or node.flags & corefiles.PROTECTED:
            return None
        if not write_flags & abi.WRITE_CACHE and flags & (os.O_SYNC | os.O_DSYNC):
            return None
        door = self._door
        if door.copies or door.refusing:
            return None
        data = memoryview(buffer)[_WRITE_AT:length]
        if sc.pwrite(door.files.writing(node).fd, data, offset) != size:
            return None
        return codec.written(unique, size)

    def write(
        self, req: Request, fh: int, offset: int, write_flags: int, flags: int, data: memoryview
    ) -> Outcome:
        door = self._door
        if fh:
            return self._write_handle(req, self._fs.file(fh), offset, write_flags, data)
        node = self._by_id.get(req.nodeid)
        if node is None or not node.is_regular:
            node = self._regular(req)
        if node.low is not None or node.flags & corefiles.PROTECTED:
            if write_flags & abi.WRITE_CACHE:
                self._check_write_back(node, offset, data)
            else:
                self._fs.check_write(node, append=bool(flags & os.O_APPEND))
        then = partial(self._write_node, req, node, offset, write_flags, flags, data)
        if node.low is None and not door.copies:
            return then()
        return door.copied_up(node, then, nameless=True)

    def _check_write_back(self, node: Node, offset: int, data: memoryview) -> None:
        """EPERM, and its pages are gone, where a protected file would do more than grow."""
        try:
            self._fs.check_write(node, append=False)
        except PermissionError:
            try:
                self._fs.check_write(node, append=self._appends(node, offset, data))
            except PermissionError:
                self._door.drop_pages(node)
                raise

    def _appends(self, node: Node, offset: int, data: memoryview) -> bool:
        """Whether a write from the kernel's cache, whole pages, leaves alone what is there."""
        fd = self._door.files.open_quietly(node)
        try:
            there = longwork.read_whole(fd, offset, len(data))
        finally:
            os.close(fd)
        return data[: len(there)] == there

    def _write_node(
        self, req: Request, node: Node, offset: int, write_flags: int, flags: int, data: memoryview
    ) -> Outcome:
        door = self._door
        file = door.files.writing(node)
        if write_flags & abi.WRITE_KILL_SUIDGID:
            self._fs.kill_suid_sgid(node, caller_of(req))
        write: Callable[[int, memoryview, int], int] = write_whole
        sync = False
        if write_flags & abi.WRITE_CACHE:
            write = partial(self._write_back, node)
        elif flags & (os.O_SYNC | os.O_DSYNC):
            sync, write = True, self._write_synced
        if req.inline and (sync or self._may_wait(data)):
            work = partial(write, file.fd, data, offset)
            return self._reserved(work, partial(codec.written, req.unique), (file,))
        if len(data) < longwork.THREAD_WRITE:
            return codec.written(req.unique, write(file.fd, data, offset))
        return codec.written(req.unique, self._timed(partial(write, file.fd, data, offset)))

    def _may_wait(self, data: memoryview) -> bool:
        """Whether a write is better made in a thread.

        Into the page cache it is quicker than a change of threads, however large, until the
        kernel makes writers wait for the disk: then the next ones are handed over.
        """
        if self._door.copies:
            return True
        if self._slow and len(data) >= longwork.THREAD_WRITE:
            self._slow -= 1
            return True
        return False

    def _timed(self, write: Callable[[], int]) -> int:
        started = time.perf_counter_ns()
        done = write()
        if time.perf_counter_ns() - started > _SLOW_NS:
            self._slow = _SLOW_WRITES
        return done

    def _write_back(self, node: Node, fd: int, data: memoryview, offset: int) -> int:
        """What the kernel held back; the next writer is to hear of an error at once."""
        try:
            return write_or_fail(fd, data, offset)
        except OSError as exc:
            self._door.refusing[node] = exc.errno or errno.EIO
            self._door.device.notify(codec.inval_inode(node.id, -1, 0))
            raise

    def _write_synced(self, fd: int, data: memoryview, offset: int) -> int:
        """A write of a file opened with O_SYNC or O_DSYNC, whose descriptor here is without."""
        done = write_whole(fd, data, offset)
        if not self._door.stack.policy.volatile:
            sc.fdatasync(fd)
        return done

    def _write_handle(
        self, req: Request, handle: FileHandle, offset: int, write_flags: int, data: memoryview
    ) -> Outcome:
        if write_flags & abi.WRITE_KILL_SUIDGID:
            self._fs.kill_suid_sgid(handle.node, caller_of(req))
        work = partial(self._fs.write, handle, offset, data)
        then = partial(codec.written, req.unique)
        if req.inline and (handle.sync or self._may_wait(data)):
            return Later(work, then)
        return then(work() if len(data) < longwork.THREAD_WRITE else self._timed(work))

    # --- the disk ------------------------------------------------------------------------------

    def flush(self, *_: object) -> Outcome:
        """Nothing is held back, so there is nothing to flush; the kernel asks just once."""
        raise oserror(errno.ENOSYS)

    def fsync(self, req: Request, fh: int, flags: int) -> Outcome:
        data_only = bool(flags & abi.FSYNC_FDATASYNC)
        done = partial(_done, req.unique)
        if fh:
            return Later(partial(self._fs.sync, self._fs.file(fh), data_only=data_only), done)
        node = self._regular(req)
        self._door.check_free(node)
        if node.low is not None or self._door.stack.policy.volatile:
            return codec.ok(req.unique)  # a lower file is clean by definition (ovl_fsync())
        file = self._door.files.writing(node)
        work = partial(sc.fdatasync if data_only else sc.fsync, file.fd)
        return self._reserved(work, done, (file,))

    def syncfs(self, req: Request) -> Outcome:
        fd = self._fs.open_for_sync(self._fs.root)
        if fd is None:
            return codec.ok(req.unique)
        return Later(
            partial(sc.syncfs, fd), partial(_done, req.unique), cleanup=partial(os.close, fd)
        )

    # --- ranges --------------------------------------------------------------------------------

    def fallocate(self, req: Request, fh: int, offset: int, length: int, mode: int) -> Outcome:
        node = self._regular(req)
        self._fs.check_write(node, append=False)
        then = partial(self._allocate, req, node, fh, offset, length, mode)
        return self._door.copied_up(node, then, nameless=True)

    def _allocate(
        self, req: Request, node: Node, fh: int, offset: int, length: int, mode: int
    ) -> Outcome:
        self._fs.drop_privileges(node, caller_of(req))
        done = partial(_done, req.unique)
        if fh:
            work = partial(self._fs.fallocate, self._fs.file(fh), mode, offset, length)
            return Later(work, done)
        file = self._door.files.writing(node)
        return self._reserved(partial(sc.fallocate, file.fd, mode, offset, length), done, (file,))

    def lseek(self, req: Request, fh: int, offset: int, whence: int) -> Outcome:
        node = self._regular(req)
        if whence not in _WHENCE:
            raise oserror(errno.EINVAL)
        if fh:
            return codec.position(req.unique, os.lseek(self._fs.file(fh).fd, offset, whence))
        return self._door.written_back(node, partial(self._seek, req, node, offset, whence))

    def _seek(self, req: Request, node: Node, offset: int, whence: int, _: object) -> Outcome:
        fd = self._door.files.reading(node).fd
        return codec.position(req.unique, os.lseek(fd, offset, whence))

    def copy_file_range(
        self, pack: Callable[[int, int], bytes], req: Request,
        _fh_in: int, off_in: int, out_id: int, fh_out: int, off_out: int, length: int, _flags: int,
    ) -> Outcome:  # fmt: skip
        source = self._regular(req)
        target = self._door.node(out_id)
        if not target.is_regular:
            raise oserror(errno.EINVAL)
        self._fs.check_write(target, append=False)
        then = partial(self._copy, pack, req, source, off_in, target, fh_out, off_out, length)
        return self._door.copied_up(target, then, nameless=True)

    def _copy(
        self, pack: Callable[[int, int], bytes], req: Request, source: Node,
        off_in: int, target: Node, fh_out: int, off_out: int, length: int,
    ) -> Outcome:  # fmt: skip
        self._door.check_free(source)
        self._fs.drop_privileges(target, caller_of(req))
        out_file = None if fh_out else self._door.files.writing(target)
        if out_file is None:
            copy = partial(corefiles.copy_range, self._fs.file(fh_out))
        else:
            copy = partial(_copy_range, out_file.fd)
        # A descriptor of its own: copying is no reading, and leaves the access time alone.
        fd_in = self._door.files.open_quietly(source)
        work = partial(copy, fd_in, min(length, 1 << 30), off_in, off_out)
        later = self._reserved(work, partial(pack, req.unique), (out_file,))
        inner = later.cleanup

        def cleanup() -> None:
            os.close(fd_in)
            if inner is not None:
                inner()

        later.cleanup = cleanup
        return later


def _copy_range(fd_out: int, fd_in: int, length: int, off_in: int, off_out: int) -> int:
    return sc.copy_range(fd_in, fd_out, length, off_in, off_out)


def _done(unique: int, _: object = None) -> bytes:
    return codec.ok(unique)
