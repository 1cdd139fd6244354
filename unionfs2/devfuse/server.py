"""One mount from INIT to its end: the loop around device, door and signals.

No state lives in this module: several servers may run in threads of one process.
"""

from __future__ import annotations

import errno
import gc
import signal
import sys
import threading
from collections.abc import Callable

from unionfs2 import readahead
from unionfs2 import syscalls as sc
from unionfs2.logger import Log
from unionfs2.options import MountSpec
from unionfs2.stack import oserror
from unionfs2.union import UnionFS

from . import abi, codec
from .attributes import Attributes
from .data import Data
from .device import Device, Ended
from .door import Door, Outcome
from .listing import Listings
from .names import Names
from .session import TRANSFER_MAX, Settings, Wanted, negotiate
from .splicing import DATA_MAX

_log = Log(__name__)

NAME = "devfuse"
#: Free bytes of the upper from which on the kernel may hold writes back.
_ROOM_MIN = 1 << 30
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Server:
    """Serves one connection in the thread that calls run()."""

    def __init__(
        self,
        fs: UnionFS,
        fuse_fd: int,
        *,
        spec: MountSpec,
        ready: Callable[[], None],
        unmount: Callable[[], None] | None,
        debug: bool = False,
        in_main_thread: bool = False,
    ) -> None:
        self._ready = ready
        self._unmount = unmount
        limited = spec.quota_bytes is not None or spec.quota_inodes is not None
        # A limit needs to know what is open, and to refuse a write when it is made.
        self._wanted = Wanted(
            acl=spec.acl,
            writeback=not limited
            and (_has_room(fs) if spec.writeback == "auto" else spec.writeback == "on"),
            stateless=not limited and not spec.passthrough,
            passthrough=spec.passthrough,
        )
        self._device = Device(
            fuse_fd,
            busy_poll_us=spec.busy_poll,
            wakeful=spec.wakeful,
            in_main_thread=in_main_thread,
        )
        self._door = new_door(fs, self._device, debug=debug)
        self._door.handlers[abi.INIT] = self._init
        self.ending = False

    def run(self) -> None:
        """Answer until the mount has gone or somebody calls end()."""
        sc.unshare_fs_state()
        self._door.fs.actor.settle()
        device, door = self._device, self._door
        try:
            while True:
                door.process(device.next(patient=not door.works))
        except Ended:
            _log.debug("the connection has ended")
        finally:
            device.finish()
            door.close()
            device.close()

    def end(self) -> None:
        """Unmount and end; at once when called again. From any thread, or a signal handler.

        The loop goes on answering meanwhile: while unmounting, the kernel writes back what was
        only changed in its cache so far.
        """
        if self.ending or self._unmount is None:
            self._device.end()
            return
        self.ending = True
        threading.Thread(target=self._leave, name="unionfs2-unmount", daemon=True).start()

    def _leave(self) -> None:
        assert self._unmount is not None
        try:
            self._unmount()
        except Exception:  # noqa: BLE001 - the end must not depend on it
            _log.exception("unmounting failed")
        self._device.end()

    def _init(
        self,
        req: codec.Request,
        major: int,
        minor: int,
        readahead_max: int,
        flags: int,
        rest: bytes,
    ) -> Outcome:
        if self._door.settings.minor:
            raise oserror(errno.EINVAL)  # agreed on already
        settings, answer = negotiate(
            req.unique, self._wanted, (major, minor, readahead_max, flags, rest)
        )
        if settings is not None:
            self._settle(settings)
            self._device.answer(answer)
            self._ready()
            return None
        return answer

    @property
    def settings(self) -> Settings:
        """What was agreed on with the kernel."""
        return self._door.settings

    def _settle(self, settings: Settings) -> None:
        self._door.settings = settings
        self._door.passthrough.enabled = settings.has(abi.PASSTHROUGH)
        self._device.widen(TRANSFER_MAX)

    def take_over(self, settings: Settings) -> None:
        """Go on with a connection that another process has served; before run().

        What that one has read and not answered is asked for again, where the kernel can do so.
        """
        self._settle(settings)
        if settings.has(abi.HAS_RESEND):
            self._device.notify(codec.resend())


def _has_room(fs: UnionFS) -> bool:
    """Whether a write that the kernel holds back will find room later, as far as one can tell.

    Where little is free, ENOSPC belongs to the write that does not fit, not to a later close.
    """
    free = fs.statfs()
    return free.f_bavail * free.f_frsize >= _ROOM_MIN


def new_door(fs: UnionFS, device: Device, *, debug: bool = False) -> Door:
    """A door with every handler but that of INIT."""
    door = Door(fs, device, debug=debug)
    for family in (Names(door), Attributes(door), Data(door)):
        door.handlers.update(family.handlers())
        door.quick.update(family.quick())
    door.handlers.update(Listings(door).handlers())
    door.handlers[abi.INTERRUPT] = door.interrupt
    door.handlers[abi.DESTROY] = _destroy
    return door


def _destroy(req: codec.Request) -> Outcome:
    return codec.ok(req.unique)


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

    *ready* is called once the protocol is agreed on. In the main thread the process is taken for a
    server and nothing else: it is tuned for that, and SIGTERM, SIGINT and SIGHUP
    call *unmount* while requests are still answered, and end the loop afterwards; without it
    unmounting is left to the caller.
    """

    def settled() -> None:
        ready()
        readahead.widen(mountpoint, DATA_MAX)  # no more than can be spliced

    in_main_thread = threading.current_thread() is threading.main_thread()
    server = Server(
        fs,
        fuse_fd,
        spec=spec,
        ready=settled,
        unmount=unmount,
        debug=debug,
        in_main_thread=in_main_thread,
    )
    before = {}
    if in_main_thread:
        _tune()
        before = {number: signal.signal(number, _ender(server)) for number in _SIGNALS}
    _log.debug("serving %s", mountpoint)
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tune() -> None:
    """Settings of the whole process, for one that is a server and nothing else."""
    # Nodes live long and free each other by reference count: scanning a million of them for
    # cycles would stop the mount for half a second at a time.
    gc.freeze()
    sc.settle_malloc()
    gc.set_threshold(2000, 10, 1_000_000_000)
    gc.enable()
    # A thread that copies data gives the interpreter back sooner than after the usual 5 ms.
    sys.setswitchinterval(0.001)


def _ender(server: Server) -> Callable[[int, object], None]:
    def handler(number: int, _: object) -> None:
        if not server.ending:  # then it comes from the server itself, to get out of a read
            _log.info("ending on signal %s", signal.Signals(number).name)
        server.end()

    return handler
