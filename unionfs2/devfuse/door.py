"""The door of ``devfuse``: from a message to the core and back, and what holds while that happens.

Order and locking:

* One thread reads the device and works on each request at once: most take microseconds.
* Invariant: the core is entered under ``lock`` only. A handler has it from beginning to end.
* What takes long goes on in a worker thread without the lock, with descriptors it owns or has
  reserved, and takes the lock again to finish (``Later``).
* A request that needs a file which is being copied up waits for that (``Busy``), and starts again
  from its beginning; nothing that a handler does before it finds out may have an effect.
* The kernel orders what must not overtake (it holds the locks of directories and of written
  ranges while it waits for us); requests that it sends at the same time may be done in any order.
* What copy-up changed behind the kernel's back is invalidated under the lock, before the answer.

Exceptions end here: an OSError or a UnionFSError is an answer, anything else is logged once and is
answered with EIO.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from functools import partial

from unionfs2 import longwork
from unionfs2 import nodes as nd
from unionfs2 import syscalls as sc
from unionfs2.copyup import CopyJob
from unionfs2.errors import UnionFSError
from unionfs2.logger import Log
from unionfs2.model import Caller
from unionfs2.nodefiles import NodeFiles
from unionfs2.nodes import Dir, Node
from unionfs2.stack import Found, oserror
from unionfs2.union import UnionFS

from . import abi, codec
from .codec import Reply, Request
from .device import Device
from .passthrough import Passthrough
from .session import Settings
from .workers import Busy, Later, Workers

_log = Log(__name__)

#: What a handler gives: an answer, work to go on with, or nothing where none is expected.
Outcome = Reply | Later | None
Handler = Callable[..., Outcome]
Quick = Callable[[codec.Buffer, int, int, int], Reply | memoryview | None]
_unpack_header = abi.IN_HEADER.unpack_from
_HEADER_SIZE = abi.IN_HEADER.size

_FILES_MAX = 256


class Door:
    """State of one connection that all handlers share."""

    def __init__(self, fs: UnionFS, device: Device, *, debug: bool = False) -> None:
        self.fs = fs
        self.stack = fs.stack
        self.device = device
        self.debug = debug
        self.lock = threading.Lock()
        self.settings = Settings(0, 0, 0)
        self.files = NodeFiles(fs.stack, min(_FILES_MAX, fs.stack.cache.limit // 4))
        fs.stack.spare_fd = self.files.hand_over
        self.passthrough = Passthrough(device)
        # What has to be closed with the connection.
        self.closing: list[Callable[[], None]] = [self.files.close]
        self.handlers: dict[int, Handler] = {}
        # For the requests that come by the thousand: (buffer, length, unique, node id) -> answer,
        # an empty one when it was sent, None for what has to go the long way. They may not change
        # anything before they know; exceptions lead to the long way, too.
        self.quick: dict[int, Quick] = {}
        self._by_id = fs.stack.nodes.by_id
        self._readers = Workers("reader", sc.unshare_fs_state)
        self._writers = Workers("writer", sc.unshare_fs_state)
        # For each node on its way up those who wait for it.
        self._copying: dict[Node, list[Request]] = {}
        self._parked: dict[int, Node] = {}
        # Nodes whose data the kernel could not write back lately, and the errno of that.
        self.refusing: dict[Node, int] = {}
        # Nodes whose attributes the kernel is to forget again after it was answered: so it asks
        # before each write, and a write that the kernel would only hold back can be refused. It
        # does not ask before reads (fuse_cache_write_iter(), fuse_get_cache_mask()).
        self.watched: list[Node] = []
        # By request, directories of which the kernel has to drop the listing before the answer.
        self._relisted: dict[int, list[Dir]] = {}

    # --- helpers of handlers -----------------------------------------------------------------

    def node(self, node_id: int) -> Node:
        """ESTALE for a node that was forgotten."""
        found = self._by_id.get(node_id)
        return found if found is not None else self.fs.node(node_id)

    def directory(self, node_id: int) -> Dir:
        found = self._by_id.get(node_id)
        if found is not None and found.is_dir:
            return found  # type: ignore[return-value]
        return self.fs.directory(node_id)

    def entry(self, req: Request, found: Found) -> bytes:
        """The answer that hands a node out."""
        node, st = found
        if node.flags & nd.IMMUTABLE:
            self._tell_nothing(node)
            self.watched.append(node)
        node.lookups += 1
        return codec.entry(req.unique, node.id, node.ino, self.fs.nlink_of(node, st), st)

    def attributes(self, req: Request, node: Node) -> bytes:
        st = self.stack.stat(node)
        if node.flags & nd.IMMUTABLE:
            self._tell_nothing(node)
        elif node in self.refusing:
            self.watched.append(node)
        return codec.attr(req.unique, node.ino, self.fs.nlink_of(node, st), st)

    def _tell_nothing(self, node: Node) -> None:
        """Have the kernel not keep the attributes in the answer that follows.

        It does not where it was told of a change since it asked (fuse_change_attributes()). After
        the answer would be too late for a write that comes at once; only for a node that the kernel
        has not known so far there is no other way.
        """
        if node.lookups and self.settings.has(abi.WRITEBACK_CACHE):
            self.device.notify(codec.inval_inode(node.id, -1, 0))

    def check_writer(self, node: Node) -> None:
        """Refuse what is about to be held back by the kernel, and would be refused later.

        EPERM for immutable files, and the errno of the last failure, unless there is room now.
        """
        if node.flags & nd.IMMUTABLE:
            raise oserror(errno.EPERM, node.name)
        number = self.refusing.get(node)
        if number is None:
            return
        if number == errno.ENOSPC and self.fs.statfs().f_bavail == 0:
            raise oserror(number, node.name)
        del self.refusing[node]
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise oserror(number, node.name)

    @property
    def reading_waits(self) -> bool:
        """Whether a read that has to ask the disk would wait behind writers."""
        return bool(self._copying) or self._writers.busy

    @property
    def works(self) -> bool:
        """Whether threads work, which need the interpreter more than one that looks again."""
        return self._writers.busy or self._readers.busy

    @property
    def copies(self) -> bool:
        """Whether anything is being copied up, so that disks are busy."""
        return bool(self._copying)

    def check_free(self, node: Node | None) -> None:
        """Raise Busy while *node* is copied up."""
        if node is not None and node in self._copying:
            raise Busy(node)

    def copied_up(
        self,
        node: Node,
        then: Callable[[], Outcome],
        *,
        limit: int | None = None,
        nameless: bool = False,
    ) -> Outcome:
        """*then* when the data of *node* is in the upper; what needs no data copied is left to it.

        *limit*: bytes wanted at most. *nameless*: also a lower file whose name has gone, since
        somebody has it open for writing.
        """
        self.check_free(node)
        if node.low is None or not node.is_regular:
            return then()
        nameless = nameless and self.settings.stateless
        job = self.fs.begin_copy_up(node, limit, nameless=nameless)
        if job is None:
            return then()
        if longwork.copy_is_short(job.size, volatile=self.stack.policy.volatile):
            try:
                job.run()
                self._publish(job, node)
            finally:
                job.close()
            return then()
        self._copying[node] = []

        def publish(_: object) -> Outcome:
            self._publish(job, node)
            job.close()
            return then()

        def cleanup() -> None:
            job.close()
            self._settled(node)

        return Later(job.run, publish, cleanup=cleanup)

    def _publish(self, job: CopyJob, node: Node) -> None:
        job.publish()
        if self.settings.stateless and node.orphan < 0:
            fd = job.hand_over()
            if fd >= 0:
                self.files.drop(node)  # the lower one
                self.files.adopt(node, fd)

    def written_back(self, node: Node, then: Callable[[object], Outcome]) -> Outcome:
        """*then* when the kernel has written back what it held of the data of *node*.

        In a thread, because the kernel waits there for WRITE requests that we have to answer.
        """
        if not self.settings.has(abi.WRITEBACK_CACHE):
            return then(None)
        message = codec.inval_inode(node.id, 0, 0)
        return Later(partial(self.device.notify, message), then)

    def _settled(self, node: Node) -> None:
        for waiting in self._copying.pop(node, ()):
            if self._parked.pop(waiting.unique, None) is not None:
                self._writers.submit(self._again, waiting)

    # --- requests ----------------------------------------------------------------------------

    def process(self, length: int) -> None:
        """Work on the message that the device has read."""
        if not self._quickly(length):
            self._at_length(length)

    def _quickly(self, length: int) -> bool:
        if length < _HEADER_SIZE or self.debug:
            return False
        buffer = self.device.buffer
        said, opcode, unique, node_id, _, _, _, extensions, _ = _unpack_header(buffer)
        quick = self.quick.get(opcode)
        if quick is None or said != length or extensions or not unique:
            return False
        cache = self.stack.cache
        if len(cache) > cache.limit:
            return False
        try:
            with self.lock:
                reply = quick(buffer, length, unique, node_id)
        except (OSError, OverflowError, UnionFSError, codec.ProtocolError, Busy):
            return False  # the long way meets it again, and says so
        except Exception:  # noqa: BLE001 - a defect of the quick way must not be met twice
            _log.exception("requests %d go the long way from here on", opcode)
            del self.quick[opcode]
            return False
        if reply is None:
            return False
        if reply:
            self.device.answer(reply)
        return True

    def _at_length(self, length: int) -> None:
        try:
            req = codec.decode(self.device.buffer, length)
        except codec.ProtocolError as exc:
            _log.error("not understood: %s", exc)
            if exc.unique:
                self.device.answer(codec.failed(exc.unique, errno.EINVAL))
            return
        if self.debug:
            _log.debug("%r %r", req, req.args[:3])
        handler = self.handlers.get(req.opcode)
        if handler is None:
            self.device.answer(codec.failed(req.unique, errno.ENOSYS))
            return
        outcome = self._handle(req, handler)
        if self._relisted:
            outcome = self._with_listings_dropped(req, outcome)
        if outcome is not None and not isinstance(outcome, Later):
            self.device.answer(outcome)
            if self.watched:
                self._forget_attributes()
            return
        if req.opcode == abi.WRITE:
            req.kept = self.device.take_buffer()
        if outcome is not None:
            req.inline = False
            self._submit(req, outcome)

    def _submit(self, req: Request, later: Later) -> None:
        pool = self._readers if later.reads else self._writers
        pool.submit(self._finish, req, later)

    def _again(self, req: Request) -> None:
        req.inline = False
        self._finish(req, self._handle(req, self.handlers[req.opcode]))

    def _finish(self, req: Request, outcome: Outcome) -> None:
        """Do what is left, step by step, and answer; in a worker thread."""
        while isinstance(outcome, Later):
            try:
                outcome = self._step(req, outcome)
            except Exception as exc:  # noqa: BLE001 - see _failed()
                outcome = self._failed(req, exc)
        if self._relisted:
            self._drop_listings(self._relisted.pop(req.unique, ()))
        if outcome is None:
            return  # it waits again, or nobody is to be answered
        self.device.answer(outcome)
        self._forget_attributes()
        if req.kept is not None:
            self.device.give_back(req.kept)

    def _step(self, req: Request, later: Later) -> Outcome:
        try:
            result = later.work()
        except BaseException:
            self._under_lock(req, later.cleanup)
            raise
        with self.lock:
            try:
                return later.then(result)  # type: ignore[no-any-return]
            except Busy as busy:
                return self._park(req, busy)
            finally:
                if later.cleanup is not None:
                    later.cleanup()
                self._tell(req)

    def _under_lock(self, req: Request, work: Callable[[], None] | None) -> None:
        if work is not None:
            with self.lock:
                work()
                self._tell(req)

    def _handle(self, req: Request, handler: Handler) -> Outcome:
        """Enter the core. Every request comes through here, so this is one function."""
        stack = self.stack
        try:
            with self.lock:
                cache = stack.cache
                if len(cache) > cache.limit:
                    cache.trim()
                try:
                    return handler(req, *req.args)
                except Busy as busy:
                    return self._park(req, busy)
                finally:
                    if stack.changed:
                        self._tell(req)
        except Exception as exc:  # noqa: BLE001 - see _failed()
            return self._failed(req, exc)

    def _park(self, req: Request, busy: Busy) -> Outcome:
        """Have *req* start again from its beginning when that copy-up has ended."""
        self._copying[busy.node].append(req)
        self._parked[req.unique] = busy.node
        return None

    def _failed(self, req: Request, exc: Exception) -> Outcome:
        """The only place where an exception becomes an errno; the mount lives on."""
        if isinstance(exc, OSError):
            if self.debug:
                _log.debug("%r: %s", req, exc)
            number = exc.errno or errno.EIO
        elif isinstance(exc, UnionFSError):
            _log.warning("%r: %s", req, exc)
            number = exc.errno
        elif isinstance(exc, codec.ProtocolError):
            _log.error("not understood: %r: %s", req, exc)
            number = errno.EINVAL
        elif isinstance(exc, OverflowError):
            number = errno.EINVAL  # a number that no system call takes
        else:
            _log.exception("unexpected error in %r", req)
            number = errno.EIO
        row = abi.ROWS.get(req.opcode)
        return codec.failed(req.unique, number) if row is None or row.answered else None

    def _tell(self, req: Request) -> None:
        """Have the kernel ask again for attributes that changed behind its back."""
        changed, relisted = self.stack.changed, self.stack.relisted
        if relisted:
            self._relisted.setdefault(req.unique, []).extend(relisted)
            relisted.clear()
        while changed:
            node = changed.pop()
            if node.id and node.lookups:
                self.device.notify(codec.inval_inode(node.id, -1, 0))

    def _with_listings_dropped(self, req: Request, outcome: Outcome) -> Outcome:
        """*outcome*, after the kernel has dropped listings that *req* has changed.

        In a thread: somebody may hold a page of a listing while it is copied to where only we can
        let it go (fuse_readdir_cached() into a memory map of a file of ours).
        """
        if isinstance(outcome, Later) or req.unique not in self._relisted:
            return outcome
        return Later(
            lambda: self._drop_listings(self._relisted.pop(req.unique, ())), lambda _: outcome
        )

    def _drop_listings(self, dirs: Iterable[Dir]) -> None:
        for node in dirs:
            if node.id and node.lookups:
                self.device.notify(codec.inval_inode(node.id, 0, 0))

    def drop_pages(self, node: Node) -> None:
        """Have the kernel drop what it has of the data of *node*, after a write was refused.

        In a thread: the kernel waits there until that write is answered.
        """
        self._writers.submit(self.device.notify, codec.inval_inode(node.id, 0, 0))

    def _forget_attributes(self) -> None:
        if self.settings.has(abi.WRITEBACK_CACHE):
            while self.watched:
                self.device.notify(codec.inval_inode(self.watched.pop().id, -1, 0))
        else:
            self.watched.clear()

    # --- requests about requests ---------------------------------------------------------------

    def interrupt(self, _: Request, unique: int) -> Outcome:
        """Give up a request that only waits; what is being done is done to its end."""
        node = self._parked.pop(unique, None)
        if node is not None:
            waiting = self._copying.get(node, [])
            waiting[:] = [req for req in waiting if req.unique != unique]
            self.device.answer(codec.failed(unique, errno.EINTR))
        return None

    def close(self) -> None:
        """Nothing is asked any more."""
        with self.lock:
            for close in self.closing:
                close()
        self._readers.close()
        self._writers.close()


def caller_of(req: Request, umask: int = 0) -> Caller:
    """Who has sent *req*; ids in the user namespace of the mount."""
    return Caller(req.uid, req.gid, req.pid, umask)
