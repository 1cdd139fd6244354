"""Who has asked for a layer to be mounted, remembered beyond the life of a process.

One small file per layer, named by its id, in ``.unionfs2/references``. It holds one entry for each
mount namespace in which the layer is mounted, and lives as long as the mounts: it need not survive
a crash of the machine, so it is never synced, and it is written in place under the layer's lock.

The kernel's list of mounts is the truth. An entry counts only while its mount is there:

* In this mount namespace the mount at the entry's target must be the very one, told by its mount
  id. A mount without an entry counts as one reference, because somebody must have made it and a
  single ``put`` has to be able to end it.
* In another mount namespace some process of that namespace must show the target with the same
  device. A namespace that no process is in has no mounts.
* After a reboot nothing counts.

Invariant: whatever is read from such a file is used only after it has been compared with a list of
mounts; a file that is cut short, stale or foreign says nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Final

from . import mountcalls, mounts, storelock
from . import syscalls as sc
from .mountcalls import MountEntry
from .mounter import FUSE_TYPE, OVERLAY_TYPE
from .options import Backend
from .storemodel import LayerId

_VERSION: Final = 1
_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Reference:
    """One mount of a layer and how many have asked for it; texts as they go into JSON."""

    target: str  # os.fsdecode(), absolute and without links
    backend: Backend
    namespace: str  # of mounts: what /proc/PID/ns/mnt shows
    mount_id: int
    device: int  # of the mounted file system
    count: int
    read_only: bool = False
    made_target: bool = False  # the directory was made for this mount and goes with it
    pid: int | None = None  # of the FUSE server
    pid_start: int | None = None  # pids are used again


class ReferenceStore:
    """The files in the directory *dir_fd*. Every method expects the layer's lock to be held.

    In a store that cannot be written to there is no such directory (-1), and nothing is remembered.
    """

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd

    def load(self, layer: LayerId) -> tuple[Reference, ...]:
        """What is written down, not yet compared with any list of mounts."""
        if self._dir_fd < 0:
            return ()
        try:
            fd = sc.open_at(_name(layer), os.O_RDONLY | _SAFELY, dir_fd=self._dir_fd)
        except OSError:
            return ()
        try:
            return _decode(os.read(fd, _BYTES_MAX))
        except OSError:
            return ()
        finally:
            sc.close(fd)

    def save(self, layer: LayerId, references: Iterable[Reference]) -> None:
        """Write down *references*; none removes the file."""
        kept = [asdict(reference) for reference in references if reference.count > 0]
        if not kept:
            self.drop(layer)
            return
        if self._dir_fd < 0:
            return
        value = {"version": _VERSION, "boot_id": boot_id(), "references": kept}
        data = json.dumps(value).encode("ascii")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY
        fd = sc.create_at(_name(layer), flags, _MODE, dir_fd=self._dir_fd)
        try:
            sc.pwrite(fd, data, 0)
        finally:
            sc.close(fd)

    def drop(self, layer: LayerId) -> None:
        """Forget the layer."""
        if self._dir_fd < 0:
            return
        try:
            sc.unlink(_name(layer), dir_fd=self._dir_fd)
        except FileNotFoundError:
            pass

    def layers(self) -> list[LayerId]:
        """Every layer that has a file, sorted; needs no lock."""
        names = os.listdir(self._dir_fd) if self._dir_fd >= 0 else []
        return sorted(LayerId(name) for name in names if not name.startswith("."))


_SAFELY: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_BYTES_MAX: Final = 1 << 20


def _name(layer: LayerId) -> bytes:
    return os.fsencode(layer)


def _decode(data: bytes) -> tuple[Reference, ...]:
    try:
        value = json.loads(data)
        if value["version"] != _VERSION or value["boot_id"] != boot_id():
            return ()
        return tuple(_checked(Reference(**entry)) for entry in value["references"])
    except (ValueError, TypeError, KeyError):
        return ()


def _checked(reference: Reference) -> Reference:
    numbers = (reference.mount_id, reference.device, reference.count)
    texts = (reference.target, reference.namespace, reference.backend)
    if not all(type(n) is int for n in numbers) or not all(type(t) is str for t in texts):
        raise TypeError("a field has the wrong type")
    return reference


# --- compared with the kernel's list --------------------------------------------------------------


@cache
def boot_id() -> str:
    """What tells this boot of the machine from all others."""
    return storelock.boot_id().decode("ascii", "replace")


def namespace() -> str:
    """The mount namespace of this thread."""
    return os.readlink("/proc/thread-self/ns/mnt")


def layer_mount(target: bytes) -> MountEntry | None:
    """The topmost mount at *target* if it can be one of a layer: overlay, or FUSE of ours."""
    entry = mountcalls.find_mount(target)
    if entry is None or entry.fstype not in (OVERLAY_TYPE, FUSE_TYPE):
        return None
    return entry


def backend_of(entry: MountEntry) -> Backend:
    """Which way *entry* was mounted."""
    return "fuse" if entry.fstype == FUSE_TYPE else "native"


def is_here(reference: Reference, entry: MountEntry | None) -> bool:
    """Whether *reference* is about *entry*, a mount in this process's namespace.

    A mount that came here by propagation has another mount id, but the same device.
    """
    if entry is None or os.fsencode(reference.target) != entry.target:
        return False
    if reference.namespace == namespace():
        return reference.mount_id == entry.mount_id
    return reference.device == entry.device


def elsewhere(references: Iterable[Reference]) -> list[Reference]:
    """Those of *references* whose mount is still there in another mount namespace."""
    here = namespace()
    others = [reference for reference in references if reference.namespace != here]
    if not others:
        return []
    members = _members({reference.namespace for reference in others})
    return [reference for reference in others if _shown(reference, members)]


def _members(namespaces: set[str]) -> dict[str, int]:
    """One process for each of *namespaces* that some process is in, as far as may be asked."""
    found: dict[str, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            link = os.readlink(f"/proc/{name}/ns/mnt")
        except OSError:
            continue  # gone, or somebody else's: those do not mount our layers
        if link in namespaces and link not in found:
            found[link] = int(name)
    return found


def _shown(reference: Reference, members: dict[str, int]) -> bool:
    pid = members.get(reference.namespace)
    if pid is None:
        return False
    try:
        entries = mountcalls.read_mountinfo(pid)
    except OSError:
        return False
    return any(
        entry.device == reference.device
        and entry.target == os.fsencode(reference.target)
        and entry.fstype in (OVERLAY_TYPE, FUSE_TYPE)
        for entry in entries
    )


def server_runs(reference: Reference) -> bool:
    """Whether the FUSE server of *reference* is still the process it was."""
    if reference.pid is None:
        return False
    return mounts.started(reference.pid) == reference.pid_start
