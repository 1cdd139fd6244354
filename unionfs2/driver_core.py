"""What all parts of the driver share: the store, the options, and how to choose a way to mount."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from . import ondisk, probes
from .backends import Choice
from .errors import (
    DialectError,
    OptionError,
    StoreError,
    UnavailableError,
    show,
)
from .layers import Layer, LayerStore
from .mounter import Mounter
from .native_overlay import NativeMounter
from .options import Backend, MountSpec, parse_options, unsupported
from .privilege import default_userxattr
from .references import ReferenceStore
from .storefiles import open_dir
from .storerecord import DialectName

_SCRATCH_NAMES: Final = ("backing", "native-trusted", "native-user")
# What the text of the storage option mountopt must not name, because the driver does.
_OURS: Final = ("lower", "upper", "work", "data", "userxattr", "source", "quota_bytes")


#: Hears how much is done, in bytes, as a total.
Progress = Callable[[int], None]


class _Direct(enum.Enum):
    """Type of DIRECT."""

    DIRECT = "the layer's own parent"


#: The parent that a layer is built on, whichever that is.
DIRECT: Final = _Direct.DIRECT
#: What a difference is taken to: the layer's own parent, any layer, or nothing at all.
Parent = Literal[_Direct.DIRECT] | str | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A way to mount and why it was taken."""

    backend: Backend
    why: str


class Core:
    """State of an open driver; the modules ``driver_*`` work on it."""

    def __init__(
        self,
        store: LayerStore,
        *,
        backend: Choice,
        fuse: Mounter,
        warn: Callable[[str], None],
    ) -> None:
        self.store = store
        self.backend: Choice = backend
        self.fuse = fuse
        self.kernel = NativeMounter()
        self.warn = warn
        self.base = _base_spec(store.options.mountopt)
        self._references_fd = -1
        if not store.read_only:
            self._references_fd = open_dir(store.state_fd, ondisk.REFERENCES_NAME)
        self.references = ReferenceStore(self._references_fd)
        self._probes = probes.Probes(store.home_fd, None if store.read_only else store.state_fd)
        self._probing = threading.Lock()
        self._answers: dict[str, probes.Native] = {}
        self._backing: probes.Backing | None = None
        self._user_marks = default_userxattr()
        # By short name, which no other layer will ever have: reading 128 records takes long.
        self._dialects: dict[str, DialectName] = {}
        if backend == "native":
            reason = self.native_reason(self.dialect)
            if reason is not None:
                raise UnavailableError(f"{reason}; backend=native was asked for")

    def close(self) -> None:
        """Give the descriptors back."""
        if self._references_fd >= 0:
            os.close(self._references_fd)
            self._references_fd = -1

    # --- what works here --------------------------------------------------------------------------

    @property
    def dialect(self) -> DialectName:
        """The spelling of marks in new layers: what this process can write."""
        return "user" if self._user_marks else "trusted"

    def backing(self) -> probes.Backing:
        """What the file system of the store can do."""
        with self._probing:
            if self._backing is None:
                with self._scratch("backing") as scratch:
                    self._backing = self._probes.backing(scratch)
            return self._backing

    def native(self, dialect: DialectName) -> probes.Native:
        """Whether the kernel's overlay works on the store's file system."""
        with self._probing:
            if dialect not in self._answers:
                with self._scratch(f"native-{dialect}") as scratch:
                    self._answers[dialect] = self._probes.native(scratch, dialect)
            return self._answers[dialect]

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[bytes | None]:
        if self.store.read_only or not self._probes.needs_scratch(name):
            yield b"" if not self.store.read_only else None
            return
        with self.store.stage() as staging:
            yield staging.path

    def native_reason(self, dialect: DialectName) -> str | None:
        """Why layers of *dialect* cannot be mounted by the kernel here."""
        if not self.backing().d_type:
            return (
                f"the file system of {show(self.store.home)} does not tell types of directory"
                " entries (d_type), which the kernel's overlay needs: on xfs make it with ftype=1,"
                " or use the fuse backend"
            )
        return self.native(dialect).reason

    def choose(self, spec: MountSpec, dialect: DialectName, asked: Choice | None = None) -> Chosen:
        """The backend for *spec*. Raises OptionError or UnavailableError with every reason."""
        choice = asked or self.backend
        native = self._native_refusal(spec, dialect)
        if choice == "native":
            if native is not None:
                raise UnavailableError(native)
            return Chosen("native", "asked for")
        if choice == "auto" and native is None:
            return Chosen("native", "the kernel's overlay works here")
        fuse = next(iter(unsupported(spec, "fuse")), None) or probes.fuse()
        if fuse is None:
            return Chosen("fuse", "asked for" if choice == "fuse" else str(native))
        if choice == "fuse":
            raise UnavailableError(fuse)
        raise UnavailableError(f"no backend can do this; native: {native}; fuse: {fuse}")

    def _native_refusal(self, spec: MountSpec, dialect: DialectName) -> str | None:
        return next(iter(unsupported(spec, "native")), None) or self.native_reason(dialect)

    # --- from layers to what is mounted -----------------------------------------------------------

    def check_dialect(self, layer: Layer) -> DialectName:
        """The one dialect of *layer* and everything below it. Raises DialectError."""
        wanted = layer.record.dialect
        for short, below in zip(layer.lower, layer.chain, strict=True):
            found = self._dialects.get(short)
            if found is None:
                found = self._dialects[short] = self.store.layer(below).record.dialect
            if found != wanted:
                raise DialectError(
                    f"layer {show(below)} has its marks in {found}.overlay.* and layer"
                    f" {show(layer.id)} above it in {wanted}.overlay.*: one mount reads one kind;"
                    f" export layer {show(below)} and apply it anew"
                )
        if wanted == "trusted" and self._user_marks:
            raise DialectError(
                f"layer {show(layer.id)} has its marks in trusted.overlay.*, which only root"
                " (CAP_SYS_ADMIN outside of user namespaces) can read: work as root, or apply the"
                " layer anew in a store of your own"
            )
        return wanted

    def lower_spec(self, layer: Layer) -> MountSpec:
        """What shows *layer* and all below it, read-only."""
        lower = (self.store.diff_path(layer.id), *self.store.lower_links(layer))
        if len(lower) == 1:
            lower = (*lower, self.store.empty_path)
        userxattr = self.check_dialect(layer) == "user"
        return self.base._replace(lower=lower, userxattr=userxattr, read_only=True)

    def upper_spec(self, layer: Layer) -> MountSpec:
        """What shows *layer* on top of all below it, writable."""
        quota = layer.record.quota
        by_server = quota if quota and layer.record.project_id is None else None
        return self.base._replace(
            lower=self.store.lower_links(layer) or (self.store.empty_path,),
            upper=self.store.diff_path(layer.id),
            work=self.store.work_path(layer.id),
            userxattr=self.check_dialect(layer) == "user",
            exclusive=True,
            quota_bytes=by_server.size_bytes if by_server else None,
            quota_inodes=by_server.inodes if by_server else None,
        )

    def refuse_read_only(self) -> None:
        """Raise StoreError where nothing can be changed."""
        if self.store.read_only:
            raise StoreError(
                f"the store {show(self.store.home)} cannot be changed: it is read-only",
                errno=errno.EROFS,
            )


def _base_spec(text: str) -> MountSpec:
    """What the storage option mountopt asks of every mount."""
    spec = parse_options(os.fsencode(text)).spec
    default = MountSpec()
    for field in _OURS:
        if getattr(spec, field) != getattr(default, field):
            raise OptionError(
                f'storage option mountopt "{text}" sets the {field} of a mount, which the store'
                " does itself: leave that out"
            )
    return spec
