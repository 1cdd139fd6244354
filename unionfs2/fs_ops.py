"""The pyfuse3 door: every request becomes one call of the core.

A handler unpacks, calls, packs. It decides nothing about the union. What it does decide is FUSE's
own business: what the kernel may cache (everything, as long as the mount lives: upper and lower
directories are ours), what it has to be told about (attributes that change behind its back
through copy-up), and that no exception leaves a handler, because one would end the mount.
"""

from __future__ import annotations

import errno
import functools
import gc
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from . import creds, eager, files, longwork, readahead
from . import syscalls as sc
from .errors import UnionFSError
from .fuse_attr import AttrWriter
from .handles import DirHandle
from .model import Caller, Entry, SetAttr
from .nodes import Dir, Node
from .options import MountSpec
from .runner import Runner
from .stack import Found
from .union import UnionFS
from .wakeful import Wakeful

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Ctx = pyfuse3.RequestContext
Token = pyfuse3.ReaddirToken
_CACHE_S = 1e9
_READ_MAX = 1 << 20
_DOTS = 2


def answering(
    method: Callable[Concatenate[Door, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Door, P], Coroutine[Any, Any, R]]:
    """Make a handler answer with an errno whatever happens; the only place that does."""

    async def handler(self: Door, /, *args: P.args, **kwargs: P.kwargs) -> R:
        stack = self.fs.stack
        cache, changed = stack.cache, stack.changed
        if len(cache) > cache.limit:
            cache.trim()
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as exc:
            if self.debug:
                _log.debug("%s%r: %s", method.__name__, args[:2], exc)
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        except UnionFSError as exc:
            _log.warning("%s: %s", method.__name__, exc)
            raise pyfuse3.FUSEError(exc.errno) from None
        except Exception:  # noqa: BLE001 - whatever it is, the mount must live on
            _log.exception("unexpected error in %s", method.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            if changed:
                self.tell(changed)

    functools.update_wrapper(handler, method)
    return handler


class Door(pyfuse3.Operations):
    """Requests of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self, fs: UnionFS, *, acl: bool, ready: Callable[[], None], debug: bool = False
    ) -> None:
        super().__init__()
        self.fs = fs
        self.enable_acl = acl
        self.debug = debug
        self._ready = ready
        self.settled = trio.Event()
        self._runner = Runner(fs)
        self._attrs = AttrWriter(pyfuse3.EntryAttributes, _CACHE_S)
        self._negative = self._attrs.negative()
        self._nodes = fs.stack.nodes.by_id
        self._lookup = fs.stack.lookup
        self._buffer = bytearray(_READ_MAX)

    def init(self) -> None:
        """The kernel and we have agreed on the protocol; requests can come."""
        # The answer is written before any other task runs.
        self.settled.set()
        self._ready()

    def is_busy(self) -> bool:
        """Whether threads work for this mount."""
        return self._runner.is_busy()

    # --- helpers -----------------------------------------------------------------------------

    def _entry(self, node: Node, st: os.stat_result) -> pyfuse3.EntryAttributes:
        nlink = st.st_nlink
        if node.is_dir and node.merged:  # type: ignore[attr-defined]
            nlink = 1
        entry: pyfuse3.EntryAttributes = self._attrs.entry(node.id, node.ino, nlink, st)
        return entry

    def _counted(self, found: Found) -> pyfuse3.EntryAttributes:
        """Pack a node that the kernel will now know."""
        node, st = found
        node.lookups += 1
        return self._entry(node, st)

    def _dir(self, node_id: int) -> Dir:
        return self.fs.directory(node_id)

    def tell(self, changed: list[Node]) -> None:
        """Have the kernel forget attributes that changed behind its back, before it is answered.

        What copy-up changed counts also when the operation failed afterwards.
        """
        self.fs.stack.relisted.clear()  # listings are not cached
        while changed:
            self._stale(changed.pop())

    @staticmethod
    def _stale(node: Node) -> None:
        if node.id and node.lookups:
            try:
                pyfuse3.invalidate_inode(pyfuse3.InodeT(node.id), attr_only=True)
            except OSError as exc:
                # ENOENT: the kernel does not have the inode any more.
                if exc.errno not in (errno.ENOENT, errno.ENOTCONN):
                    _log.warning("cannot refresh attributes of %r: %s", node.name, exc)

    async def _free(self, parent: Dir, name: bytes) -> None:
        """Wait for a copy-up of what *name* stands for."""
        node = parent.children.get(name)
        if node is not None and self._runner.is_copying(node):
            await self._runner.settled(node)

    async def _up(self, node: Node, limit: int | None = None) -> None:
        if not node.in_upper:
            _ = self.fs.stack.w
            await self._runner.bring_up(node, limit)
            if node.handles and node.lookups:
                # Readers from before the copy-up now read the upper file, access time and all.
                await self._runner.thread(_drop_pages, node.id)

    # --- names -------------------------------------------------------------------------------

    @answering
    async def lookup(self, parent: int, name: bytes, ctx: Ctx) -> pyfuse3.EntryAttributes:
        directory = self._nodes.get(parent)
        if directory is None or not directory.is_dir:
            directory = self._dir(parent)
        found = self._lookup(directory, name)  # type: ignore[arg-type]
        if found is None:
            return self._negative  # type: ignore[no-any-return]
        return self._counted(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        try:
            for node_id, count in inode_list:
                self.fs.forget(node_id, count)
        except Exception:  # noqa: BLE001 - see answering()
            _log.exception("unexpected error in forget")

    @answering
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: Ctx
    ) -> pyfuse3.EntryAttributes:
        found = self.fs.mknod(self._dir(parent), name, mode, rdev, _caller(ctx))
        return self._counted(found)

    @answering
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Ctx) -> pyfuse3.EntryAttributes:
        found = self.fs.mkdir(self._dir(parent), name, mode, _caller(ctx))
        return self._counted(found)

    @answering
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: Ctx
    ) -> pyfuse3.EntryAttributes:
        found = self.fs.symlink(self._dir(parent), name, target, _caller(ctx))
        return self._counted(found)

    @answering
    async def link(
        self, inode: int, new_parent: int, new_name: bytes, ctx: Ctx
    ) -> pyfuse3.EntryAttributes:
        node, parent = self.fs.node(inode), self._dir(new_parent)
        self.fs.check_link(node)
        await self._up(node)
        found = self.fs.link(node, parent, new_name)
        return self._counted(found)

    @answering
    async def unlink(self, parent: int, name: bytes, ctx: Ctx) -> None:
        directory = self._dir(parent)
        await self._free(directory, name)
        node = self.fs.unlink(directory, name)
        if node.handles:
            # The kernel counts the link down by itself; a lower file keeps its count.
            self.fs.stack.changed.append(node)

    @answering
    async def rmdir(self, parent: int, name: bytes, ctx: Ctx) -> None:
        self.fs.rmdir(self._dir(parent), name)

    @answering
    async def rename(
        self,
        parent_old: int,
        name_old: bytes,
        parent_new: int,
        name_new: bytes,
        flags: int,
        ctx: Ctx,
    ) -> None:
        old, new = self._dir(parent_old), self._dir(parent_new)
        await self._free(old, name_old)
        await self._free(new, name_new)
        self.fs.check_rename(old, name_old, new, name_new, flags)
        source = old.children.get(name_old)
        if source is not None:
            await self._up(source)
        target = new.children.get(name_new)
        if flags & sc.RENAME_EXCHANGE and target is not None:
            await self._up(target)
        try:
            self.fs.rename(old, name_old, new, name_new, flags)
        except OSError:
            # A backing file system may have touched the directories all the same.
            self.fs.stack.changed += (old, new)
            raise
        if target is not None and target.handles:
            self.fs.stack.changed.append(target)

    @answering
    async def readlink(self, inode: int, ctx: Ctx) -> bytes:
        return self.fs.readlink(self.fs.node(inode))

    # --- attributes --------------------------------------------------------------------------

    @answering
    async def getattr(self, inode: int, ctx: Ctx) -> pyfuse3.EntryAttributes:
        node = self.fs.node(inode)
        return self._entry(node, self.fs.getattr(node))

    @answering
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: Ctx,
    ) -> pyfuse3.EntryAttributes:
        node = self.fs.node(inode)
        new = SetAttr(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        self.fs.check_setattr(node, new)
        await self._up(node, new.size)
        handle = self.fs.files.get(fh) if fh is not None else None
        st = self.fs.setattr(node, new, handle, _caller(ctx))
        return self._entry(node, st)

    @answering
    async def access(self, inode: int, mode: int, ctx: Ctx) -> bool:
        """Asked only where the kernel does not check by itself (default_permissions)."""
        st = self.fs.getattr(self.fs.node(inode))
        return creds.may_access(st, mode, _caller(ctx))

    @answering
    async def statfs(self, ctx: Ctx) -> pyfuse3.StatvfsData:
        real = self.fs.statfs()
        out = pyfuse3.StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        ):
            setattr(out, field, getattr(real, field))
        out.f_namemax = self.fs.name_max
        return out

    # --- extended attributes -----------------------------------------------------------------

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: Ctx) -> bytes:
        return self.fs.getxattr(self.fs.node(inode), name)

    @answering
    async def listxattr(self, inode: int, ctx: Ctx) -> Sequence[bytes]:
        return self.fs.listxattr(self.fs.node(inode), _caller(ctx))

    @answering
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Ctx) -> None:
        # pyfuse3 has checked XATTR_CREATE and XATTR_REPLACE with getxattr() before.
        node = self.fs.node(inode)
        self.fs.check_setxattr(node, name)
        await self._up(node)
        self.fs.setxattr(node, name, value, 0, _caller(ctx))

    @answering
    async def removexattr(self, inode: int, name: bytes, ctx: Ctx) -> None:
        node = self.fs.node(inode)
        if not node.in_upper:
            self.fs.check_removexattr(node, name, _caller(ctx))
            await self._up(node)
        self.fs.removexattr(node, name, _caller(ctx))

    # --- files -------------------------------------------------------------------------------

    @answering
    async def open(self, inode: int, flags: int, ctx: Ctx) -> pyfuse3.FileInfo:
        node = self.fs.node(inode)
        caller = None
        if files.wants_write(flags):
            self.fs.check_open(node, flags)
            await self._up(node, files.copy_limit(flags))
            caller = _caller(ctx)
        handle = self.fs.open_file(node, flags, caller)
        # A read that the page cache answers does not reach us; where it would have to change
        # the access time, the cache goes, and the read comes.
        keep = bool(flags & os.O_NOATIME) or not self.fs.atime_is_due(handle)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle.fd), keep_cache=keep)

    @answering
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Ctx
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        handle, st = self.fs.create(self._dir(parent), name, mode, flags, _caller(ctx))
        info = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle.fd), keep_cache=True)
        return info, self._counted((handle.node, st))

    @answering
    async def read(  # type: ignore[override]  # any buffer is taken, the stub says bytes
        self, fh: int, off: int, size: int
    ) -> bytes | memoryview:
        handle = self.fs.file(fh)
        if size > _READ_MAX:
            return await self._runner.read(longwork.read_whole, handle.fd, off, size)
        try:
            cached = longwork.read_cached(handle.fd, self._buffer, off, size)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            return os.pread(handle.fd, size, off)  # no RWF_NOWAIT: memory file systems
        if cached is not None and (len(cached) == size or not len(cached)):
            return cached
        if cached is not None and off + len(cached) >= os.fstat(handle.fd).st_size:
            return cached
        if self._runner.may_wait(size):
            return longwork.read_whole(handle.fd, off, size)
        return await self._runner.read(longwork.read_whole, handle.fd, off, size)

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self.fs.file(fh)
        if self._runner.write_blocks(len(buf), sync=handle.sync):
            return await self._runner.thread(self.fs.write, handle, off, buf)
        return self.fs.write(handle, off, buf)

    async def flush(self, fh: int) -> None:
        """Nothing is held back, so there is nothing to flush; the kernel asks just once."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self.fs.file(fh)
        work = functools.partial(self.fs.sync, handle, data_only=datasync)
        await self._runner.thread(work)

    @answering
    async def release(self, fh: int) -> None:
        self.fs.release(self.fs.file(fh))

    # --- listings ----------------------------------------------------------------------------

    @answering
    async def opendir(self, inode: int, ctx: Ctx) -> int:
        return self.fs.opendir(self._dir(inode)).id

    @answering
    async def releasedir(self, fh: int) -> None:
        self.fs.releasedir(self.fs.dir_handle(fh))

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        fd = self.fs.open_for_sync(self.fs.dir_handle(fh).node)
        if fd is not None:
            try:
                await self._runner.thread(os.fsync, fd)
            finally:
                os.close(fd)

    @answering
    async def readdir(self, fh: int, start_id: int, token: Token) -> None:
        handle = self.fs.dir_handle(fh)
        if start_id == 0 or handle.entries is None:
            handle.entries = self.fs.listing(handle.node)
        if start_id < _DOTS and not self._reply_dots(handle.node, start_id, token):
            return
        entries = handle.entries
        for position in range(max(0, start_id - _DOTS), len(entries)):
            if not self._reply_name(handle, entries[position], position + _DOTS + 1, token):
                return

    def _reply_dots(self, node: Dir, start: int, token: Token) -> bool:
        parent = node.parent or node
        for position, (name, of) in enumerate(((b".", node), (b"..", parent))):
            if position >= start:
                entry = self._attrs.name_only(of.ino, stat.S_IFDIR)
                if not pyfuse3.readdir_reply(token, name, entry, position + 1):
                    return False
        return True

    def _reply_name(self, handle: DirHandle, found: Entry, next_id: int, token: Token) -> bool:
        node = handle.node
        try:
            hit = self._lookup(node, found.name)
        except OSError:
            # Listed, but not to be looked at (refused redirect, metacopy ...).
            if self.fs.needs_lookup(node, found.name):
                raise
            entry = self._attrs.name_only(found.ino, found.kind)
            return pyfuse3.readdir_reply(token, found.name, entry, next_id)
        if hit is None:
            if not self.fs.listed_although_hidden(node, found.name):
                return True  # removed since the names were taken
            entry = self._attrs.name_only(found.ino, found.kind)
            return pyfuse3.readdir_reply(token, found.name, entry, next_id)
        child, st = hit
        if pyfuse3.readdir_reply(token, found.name, self._entry(child, st), next_id):
            child.lookups += 1
            return True
        self.fs.stack.nodes.reap(child)
        return False


def _caller(ctx: Ctx) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)


def _drop_pages(node_id: int) -> None:
    """Drop cached pages. In a thread: it waits for reads in progress, which we have to answer."""
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(node_id))
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTCONN):
            raise


async def _serve(door: Door, mountpoint: str, unmount: Callable[[], None] | None) -> None:
    async with trio.open_nursery() as nursery:
        # Before the first request: a signal that comes right after "ready" must find its handler.
        await nursery.start(_end_on_signal, unmount)
        nursery.start_soon(_widen_readahead, door, mountpoint)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _widen_readahead(door: Door, mountpoint: str) -> None:
    await door.settled.wait()
    readahead.widen(mountpoint, _READ_MAX)


async def _end_on_signal(
    unmount: Callable[[], None] | None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Unmount on the first signal and end; end without more ado on the second.

    The loop goes on answering meanwhile: while unmounting, the kernel writes back what was only
    changed through a memory map so far.
    """
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            first = True
            async for number in signals:
                _log.info("ending on signal %s", signal.Signals(number).name)
                if not first or unmount is None:
                    pyfuse3.terminate()
                    return
                first = False
                nursery.start_soon(_unmount, unmount)


async def _unmount(unmount: Callable[[], None]) -> None:
    # In a thread, because it is this very loop that answers.
    try:
        await trio.to_thread.run_sync(unmount, abandon_on_cancel=True)
    except Exception:  # noqa: BLE001 - the end must not depend on it
        _log.exception("unmounting failed")
    pyfuse3.terminate()


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out pyfuse3's complaint about answers that nobody waits for any more.

    So it is when an unmount or an interrupt overtakes a request (ENOENT from /dev/fuse).
    """
    gone = isinstance(record.args, tuple) and os.strerror(errno.ENOENT) in record.args
    return not ("fuse_reply_* failed" in str(record.msg) and gone)


def serve(
    fs: UnionFS,
    fuse_fd: int,
    *,
    mountpoint: str,
    spec: MountSpec,
    ready: Callable[[], None],
    unmount: Callable[[], None] | None = None,
    debug: bool = False,
) -> None:
    """Answer requests of the mounted *fuse_fd* until it is unmounted or a signal asks to end.

    *ready* is called once the protocol is agreed on. SIGTERM, SIGINT and SIGHUP call *unmount*,
    in a thread and while requests are still answered, and end the loop afterwards; without it
    unmounting is left to the caller. One call per process: pyfuse3 keeps its session in globals.
    """
    door = Door(fs, acl=spec.acl, ready=ready, debug=debug)
    # Nodes live long and free each other by reference count: scanning a million of them for
    # cycles would stop the mount for half a second at a time.
    gc.freeze()
    sc.settle_malloc()
    gc.set_threshold(2000, 10, 1_000_000_000)
    gc.enable()
    # A thread that copies data gives the interpreter back sooner than after the usual 5 ms.
    sys.setswitchinterval(0.001)
    logging.getLogger("pyfuse3").addFilter(_is_news)
    options = {"default_permissions"}
    if debug:
        options.add("debug")
    pyfuse3.init(door, f"/dev/fd/{fuse_fd}", options)
    wakeful = Wakeful(spec.wakeful)
    waiting = eager.trio_for(fuse_fd, door.is_busy, spec.busy_poll, wakeful)
    pyfuse3.trio = waiting  # type: ignore[attr-defined]
    _log.debug("serving %s", mountpoint)
    try:
        trio.run(_serve, door, mountpoint, unmount)
    finally:
        pyfuse3.close(unmount=False)
        wakeful.close()
