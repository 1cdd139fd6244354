"""What is mounted: the kernel's list, joined with small records of our own.

The kernel says what exists; a record adds what only the mounter knew (backend, server, since
when, the options). Records are JSON files in a directory of the machine's run-time state, one per
mount. They are a help and never needed: a mount without one is listed all the same, and a record
without its mount is removed by whoever lists next.

Invariant: a record belongs to exactly one mount, told by mount namespace, mount id and path.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from . import mountcalls, privilege
from .errors import BusyError, MountError, TargetError, UnavailableError, show
from .mountcalls import MountEntry
from .mounter import FUSE_TYPE, Mounted, is_ours
from .options import Backend, MountSpec, format_options
from .transports import Transport

_SYSTEM_STATE: Final = "/run/unionfs2"
_STATE_VARIABLE: Final = "UNIONFS2_STATE"
_VERSION: Final = 1
#: How long unmount() waits for a server to end, in seconds.
SERVER_END_TIMEOUT_S: Final = 10.0


class Record(NamedTuple):
    """What the mounter wrote down about one mount; texts as they go into JSON."""

    target: str  # os.fsdecode()
    backend: str
    namespace: str  # of mounts: the inode that /proc/PID/ns/mnt shows
    mount_id: int
    since: float  # seconds since the epoch
    options: str
    pid: int | None = None  # of the server
    pid_start: int | None = None  # when it started, in ticks since boot: pids are used again
    transport: Transport | None = None  # of the server, written down by the server itself
    version: int = _VERSION


class MountStatus(NamedTuple):
    """One line of ``unionfs2 mounts``. What no record tells is None."""

    target: bytes
    backend: Backend
    since: float | None
    pid: int | None
    options: str
    transport: Transport | None = None  # None: the native backend, or not known


# --- records --------------------------------------------------------------------------------------


def state_directory(*, create: bool = False) -> str | None:
    """Where records live: /run for root, the user's run-time directory otherwise.

    The variable UNIONFS2_STATE names another directory.
    """
    chosen = os.environ.get(_STATE_VARIABLE)
    candidates = [_SYSTEM_STATE] if os.geteuid() == 0 else []
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if chosen:
        candidates = [chosen]
    elif runtime:
        candidates.append(os.path.join(runtime, "unionfs2"))
    for path in candidates:
        try:
            if create:
                os.makedirs(path, mode=0o755, exist_ok=True)
            if os.access(path, os.W_OK | os.X_OK):
                return path
        except OSError:
            continue
    return None


def record(
    target: bytes,
    backend: Backend,
    spec: MountSpec,
    pid: int | None = None,
    transport: Transport | None = None,
) -> str | None:
    """Write down the mount that is at *target* now; the record's path, None if there is none.

    A server gives its *pid*, and the *transport* that is about to serve.
    A state directory that cannot be written is no reason to fail a mount.
    """
    entry = mountcalls.find_mount(target)
    directory = state_directory(create=True)
    if entry is None or directory is None:
        return None
    value = Record(
        target=os.fsdecode(target),
        backend=backend,
        namespace=_namespace("self"),
        mount_id=entry.mount_id,
        since=time.time(),
        options=os.fsdecode(format_options(spec)),
        pid=pid,
        pid_start=None if pid is None else started(pid),
        transport=transport,
    )
    # Mount ids are used again at once: a server that ends late must not take the record of the
    # next one with it.
    name = f"{_prefix(value.namespace, entry.mount_id)}{os.getpid()}.json"
    path = os.path.join(directory, name)
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(_as_json(value))
        os.replace(temporary, path)
    except OSError:
        return None
    return path


def forget(path: str | None) -> None:
    """Remove a record made by record()."""
    if path is not None:
        try:
            os.unlink(path)
        except OSError:
            pass


def _prefix(namespace: str, mount_id: int) -> str:
    """How the names of records begin that are of one mount."""
    slug = "".join(c for c in namespace if c.isdigit()) or "0"
    return f"{slug}-{mount_id}-"


def _as_json(value: Record) -> str:
    texts = (f'"{name}": {_json_of(one)}' for name, one in value._asdict().items())
    return "{" + ", ".join(texts) + "}"


def _json_of(value: str | float | None) -> str:
    """*value* as JSON; where that is simple without its module, as a mount is waited for."""
    if value is None:
        return "null"
    if not isinstance(value, str):
        return repr(value)
    if value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
    import json  # noqa: PLC0415

    return json.dumps(value)


def started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)); None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return None


def _namespace(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")


def _records(prefix: str = "") -> Iterator[tuple[str, Record]]:
    """Records with their paths, all of them or those whose names begin with *prefix*."""
    import json  # noqa: PLC0415 - a server writes its record only

    directory = state_directory()
    if directory is None:
        return
    for name in sorted(os.listdir(directory)):
        if not (name.startswith(prefix) and name.endswith(".json")):
            continue
        path = os.path.join(directory, name)
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                yield (
                    path,
                    Record(**{k: v for k, v in json.load(file).items() if k in Record._fields}),
                )
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, OSError):
            forget(path)  # cut short by a crash, or of another version


def live_namespaces() -> set[str] | None:
    """Mount namespaces that some process is in; None when not all processes may be asked."""
    if not privilege.has_initial_capability(privilege.CAP_SYS_ADMIN):
        return None
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.add(_namespace(name))
            except FileNotFoundError:
                continue
            except OSError:
                return None
    return found


def _tidy_records(entries: dict[int, MountEntry]) -> dict[int, Record]:
    """Records of mounts in *entries*, by mount id; records of mounts that are gone are removed."""
    here = _namespace("self")
    live: set[str] | None = None
    asked = False
    valid: dict[int, Record] = {}
    old: list[tuple[str, Record]] = []
    for path, value in _records():
        if value.namespace != here:
            if not asked:
                live, asked = live_namespaces(), True
            if (live is not None and value.namespace not in live) or _server_is_gone(value):
                forget(path)
            continue
        if _matches(entries.get(value.mount_id), value):
            if not _server_is_gone(value) or value.mount_id not in valid:
                valid[value.mount_id] = value
        else:
            old.append((path, value))
    if old:
        # Somebody may have mounted between the two looks.
        now = {entry.mount_id: entry for entry in mountcalls.read_mountinfo()}
        for path, value in old:
            if not _matches(now.get(value.mount_id), value):
                forget(path)
    return valid


def _server_is_gone(value: Record) -> bool:
    return value.pid is not None and started(value.pid) != value.pid_start


def _matches(entry: MountEntry | None, value: Record) -> bool:
    """Whether *entry* is the mount that *value* was written for, as far as one can tell."""
    return (
        entry is not None
        and entry.target == os.fsencode(value.target)
        and (entry.fstype == FUSE_TYPE) == (value.backend == "fuse")
    )


# --- listing --------------------------------------------------------------------------------------


def list_mounts() -> list[MountStatus]:
    """Every unionfs2 mount that this process can see, in the order they were mounted."""
    entries = {entry.mount_id: entry for entry in mountcalls.read_mountinfo()}
    records = _tidy_records(entries)
    return [
        _status(entry, records.get(entry.mount_id))
        for entry in entries.values()
        if entry.mount_id in records or is_ours(entry)
    ]


def _status(entry: MountEntry, value: Record | None) -> MountStatus:
    backend: Backend = "fuse" if entry.fstype == FUSE_TYPE else "native"
    if value is None:
        shown = entry.super_options.decode("utf-8", "surrogateescape")
        return MountStatus(entry.target, backend, None, None, shown)
    return MountStatus(
        entry.target, backend, value.since, value.pid, value.options, value.transport
    )


def mounted(target: bytes, backend: Backend, warnings: tuple[str, ...] = ()) -> Mounted:
    """Describe the mount that was just made at *target*, server included."""
    value = _record_of(target)
    if value is None:
        return Mounted(backend, target, warnings=warnings)
    return Mounted(backend, target, value.pid, warnings, value.transport)


def _record_of(target: bytes) -> Record | None:
    entry = mountcalls.find_mount(target)
    if entry is None:
        return None
    here = _namespace("self")
    found = [
        value
        for _, value in _records(_prefix(here, entry.mount_id))
        if value.namespace == here and value.mount_id == entry.mount_id
    ]
    return min(found, key=_server_is_gone, default=None)


# --- unmounting -----------------------------------------------------------------------------------


def unmount(target: bytes, *, lazy: bool = False) -> str | None:
    """Take away the unionfs2 mount at *target* and wait for its server to have ended.

    Raises TargetError (nothing of ours there), BusyError or MountError. With *lazy* the mount
    disappears at once and its server ends with the last user; not waited for. Returns a sentence
    when the server goes on although this mount is gone.
    """
    path = os.path.abspath(target)
    entry = mountcalls.find_mount(path)
    if entry is None:
        # Only now: following links asks the server of whatever is mounted, which may hang.
        path = os.path.realpath(path)
        entry = mountcalls.find_mount(path)
    value = _record_of(path) if entry is not None else None
    if entry is None or (value is None and not is_ours(entry)):
        raise TargetError(
            f"{show(target)} is not a unionfs2 mount: see unionfs2 mounts", errno=errno.EINVAL
        )
    server = _server_handle(value)
    notice = None
    try:
        detach(path, fuse=entry.fstype == FUSE_TYPE, lazy=lazy)
        if server is not None and not lazy and not _ends(server, entry.device):
            notice = (
                f"{show(path)} is unmounted but its server goes on: "
                "another copy of the mount exists, here or in another mount namespace"
            )
    finally:
        if server is not None:
            os.close(server)
    _tidy_records({entry.mount_id: entry for entry in mountcalls.read_mountinfo()})
    return notice


def detach(path: bytes, *, fuse: bool, lazy: bool) -> None:
    """Unmount *path* by the means that this process has."""
    try:
        mountcalls.umount(path, mountcalls.UMOUNT_NOFOLLOW | (mountcalls.MNT_DETACH if lazy else 0))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise _busy(path) from exc
        if exc.errno != errno.EPERM:
            raise MountError(
                f"cannot unmount {show(path)}: {os.strerror(exc.errno or 0)}", errno=exc.errno
            ) from exc
        if not fuse:
            raise MountError(
                f"cannot unmount {show(path)}: an overlay mount needs CAP_SYS_ADMIN",
                errno=errno.EPERM,
            ) from exc
        _by_fusermount(path, lazy=lazy)


def _busy(path: bytes) -> BusyError:
    return BusyError(
        f"{show(path)} is busy: leave its directories and close its files, or unmount lazily (-l)"
    )


def _by_fusermount(path: bytes, *, lazy: bool) -> None:
    import subprocess  # noqa: PLC0415 - costs milliseconds, needed without privilege only

    command = [b"fusermount3", b"-u", *([b"-z"] if lazy else []), b"--", path]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, check=False, stdin=subprocess.DEVNULL, env=environment
        )
    except FileNotFoundError as exc:
        raise UnavailableError(
            f"cannot unmount {show(path)} without privilege: fusermount3 is missing, "
            "install the package fuse3"
        ) from exc
    if done.returncode == 0:
        return
    text = done.stderr.decode("utf-8", "replace").strip()
    if "busy" in text:
        raise _busy(path)
    raise MountError(f"cannot unmount {show(path)}: {text or 'fusermount3 failed'}")


def _server_handle(value: Record | None) -> int | None:
    """A descriptor of the server process, so that its end can be waited for."""
    if value is None or value.pid is None:
        return None
    try:
        handle = os.pidfd_open(value.pid)
    except OSError:
        return None
    if started(value.pid) != value.pid_start:
        os.close(handle)
        return None
    return handle


def _ends(server: int, device: int) -> bool:
    """Wait for the server; in vain, so not at all, while its file system is mounted elsewhere."""
    if any(entry.device == device for entry in mountcalls.read_mountinfo()):
        return False
    poll = select.poll()
    poll.register(server, select.POLLIN)
    return bool(poll.poll(SERVER_END_TIMEOUT_S * 1000))
