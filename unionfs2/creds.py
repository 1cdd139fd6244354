"""Acting for a caller: whose ids a new object gets, and what the caller may keep.

The kernel's overlay creates with the mounter's rights and the caller's fsuid, fsgid and umask
(ovl_override_creds(), ovl_setup_cred_for_create()). The same is done here with setfsuid(2) on
the serving thread, capabilities kept by SECBIT_NO_SETUID_FIXUP.

Invariant: between two operations the thread has the server's own ids and umask 0.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType

from . import syscalls as sc
from .model import Caller

_CAP_FSETID = 4
_CAP_SYS_ADMIN = 21


class Actor:
    """Switches ids for the duration of a ``with`` block; one per server, used by one thread."""

    __slots__ = ("_switched", "gid", "may_switch", "uid")

    def __init__(self) -> None:
        self.uid = os.geteuid()
        self.gid = os.getegid()
        self._switched = False
        self.settle()

    def settle(self) -> None:
        """From now on the calling thread is the one that acts."""
        self.may_switch = sc.keep_capabilities()
        os.umask(0)

    def acting(self, caller: Caller, gid: int | None = None, *, umask: bool = True) -> _Acting:
        """Create as *caller*; *gid* replaces the group where a setgid parent decides it.

        Raises EPERM when the server may not take these ids.
        """
        return _Acting(self, caller.uid, caller.gid if gid is None else gid, caller.umask * umask)

    def enter(self, uid: int, gid: int) -> None:
        if uid == self.uid and gid == self.gid:
            return
        self._switched = True
        try:
            sc.set_fs_ids(uid, gid)
        except OSError:
            # A server without privilege serves its own user; a group of that user is given to
            # the new object afterwards (see Created.chgrp in namespace).
            self.leave()
            if uid != self.uid:
                raise

    def leave(self) -> None:
        if self._switched:
            sc.clear_fs_ids(self.uid, self.gid)
            self._switched = False


class _Acting:
    __slots__ = ("_actor", "_gid", "_uid", "_umask")

    def __init__(self, actor: Actor, uid: int, gid: int, umask: int) -> None:
        self._actor = actor
        self._uid = uid
        self._gid = gid
        self._umask = umask

    def __enter__(self) -> None:
        self._actor.enter(self._uid, self._gid)
        if self._umask:
            os.umask(self._umask)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._umask:
            os.umask(0)
        self._actor.leave()


def _status_of(pid: int) -> dict[bytes, bytes]:
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            lines = status.read().splitlines()
    except OSError:
        return {}
    return dict(line.split(b":", 1) for line in lines if b":" in line)


def _is_initial(pid: int) -> bool:
    """Whether *pid* lives in the initial user namespace; capable() of the kernel asks there."""
    try:
        with open(f"/proc/{pid}/uid_map", "rb") as uid_map:
            return uid_map.read().split() == [b"0", b"0", b"4294967295"]
    except OSError:
        return False


def _has_capability(caller: Caller, number: int) -> bool:
    """In the caller's own user namespace."""
    fields = _status_of(caller.pid) if caller.pid else {}
    effective = fields.get(b"CapEff")
    if effective is None:
        return caller.uid == 0
    return bool(int(effective, 16) >> number & 1)


def keeps_suid(caller: Caller) -> bool:
    """CAP_FSETID towards the whole machine: writing leaves suid alone (should_remove_suid()).

    Costs reads of /proc; for rare paths.
    """
    return _has_capability(caller, _CAP_FSETID) and (not caller.pid or _is_initial(caller.pid))


def keeps_sgid(caller: Caller) -> bool:
    """CAP_FSETID in the caller's namespace: sgid stays (in_group_or_capable())."""
    return _has_capability(caller, _CAP_FSETID)


def sees_trusted(caller: Caller) -> bool:
    """CAP_SYS_ADMIN towards the whole machine: trusted.* attributes are listed."""
    return _has_capability(caller, _CAP_SYS_ADMIN) and (not caller.pid or _is_initial(caller.pid))


def may_access(st: os.stat_result, mask: int, caller: Caller) -> bool:
    """access(2) by the mode bits, for doors that the kernel asks."""
    if caller.uid == 0:
        runnable = stat.S_ISDIR(st.st_mode) or bool(st.st_mode & 0o111)
        return not mask & os.X_OK or runnable
    bits = st.st_mode
    if caller.uid == st.st_uid:
        bits >>= 6
    elif st.st_gid in groups_of(caller):
        bits >>= 3
    return mask & ~bits & 7 == 0


def groups_of(caller: Caller) -> frozenset[int]:
    """All groups of the calling process; only the primary one when it cannot be read."""
    fields = _status_of(caller.pid) if caller.pid else {}
    more = fields.get(b"Groups", b"").split()
    return frozenset({caller.gid, *(int(g) for g in more)})
