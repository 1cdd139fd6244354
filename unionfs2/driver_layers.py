"""Making, removing and committing layers, and what is known of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from . import ondisk, probes, quotacalls
from .driver_core import Core
from .driver_mounts import LayerMount, Mounts
from .errors import (
    DamagedLayerError,
    HasChildrenError,
    LayerInUseError,
    QuotaError,
    StoreError,
    UnionFSError,
    sentence,
    show,
)
from .layers import Layer, Staging
from .options import MountSpec, format_lowerdir, format_options
from .store_options import parse_layer_options
from .storefiles import is_dir, opened_dir
from .storemodel import LayerId, Quota, Size
from .storetrees import tree_size


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """One layer in a list. A damaged one has a reason, and whatever could be read."""

    id: LayerId
    parent: LayerId | None = None
    committed: bool = False
    writable: bool = False
    created: float | None = None  # seconds since the epoch
    label: str = ""
    dialect: str = "trusted"
    size: Size | None = None  # when it is known without looking
    quota: Quota | None = None
    mounted: int = 0  # how many have asked for it
    path: str | None = None  # where it is mounted
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a layer and everything below it take on disk.

    *exclusive* would be freed by removing the layer and whatever below it nobody else needs;
    *shared* would stay. A layer with children is needed by them.
    """

    id: LayerId
    own: Size
    exclusive: Size
    shared: Size


@dataclass(frozen=True, slots=True)
class Status:
    """What a store is and what this machine can do with it."""

    version: str
    format_version: int
    home: str
    read_only: bool
    backing_filesystem: str
    d_type: bool
    reflink: bool
    dialect: str
    backend: str | None  # None: no way to mount
    backend_reason: str
    native: str | None  # why the kernel's overlay does not work here; None: it does
    fuse: str | None
    native_diff: bool
    trusted_xattr: str | None
    user_xattr: str | None
    whiteout: str | None
    project_quota: str | None
    kernel: str
    layers: int
    damaged: int
    mounts: int
    layers_max: int
    default_quota: Quota | None

    def pairs(self) -> list[tuple[str, str]]:
        """The same for people, as (name, value)."""
        quota = "project quota of the file system"
        if self.project_quota is not None:
            quota = f"by the FUSE server only ({self.project_quota})"
        return [
            ("Store", show(self.home) + (" (read-only)" if self.read_only else "")),
            ("Format", str(self.format_version)),
            ("Backing Filesystem", self.backing_filesystem),
            ("Supports d_type", _yes(self.d_type)),
            ("Supports reflink", _yes(self.reflink)),
            ("Native Overlay Diff", _yes(self.native_diff)),
            ("Backend", f"{self.backend or 'none'} ({self.backend_reason})"),
            ("Native", self.native or "works"),
            ("FUSE", self.fuse or "works"),
            ("Dialect", f"{self.dialect}.overlay.*"),
            ("userxattr", _yes(self.dialect == "user")),
            ("Quota", quota),
            ("Layers", str(self.layers) + (f", {self.damaged} damaged" if self.damaged else "")),
            ("Mounts", str(self.mounts)),
            ("Most layers in a chain", str(self.layers_max)),
            ("Kernel", self.kernel),
            ("Version", self.version),
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)


def _yes(value: object) -> str:
    return "true" if value else "false"


class Layers:
    """Administration of the layers of one store."""

    def __init__(self, core: Core, mounts: Mounts) -> None:
        self._core = core
        self._store = core.store
        self._mounts = mounts
        # Of layers that never change again, by short name.
        self._sizes: dict[str, Size] = {}

    # --- making -----------------------------------------------------------------------------------

    def create(
        self,
        layer: str | None,
        parent: str | None,
        *,
        writable: bool,
        label: str,
        options: Mapping[str, str] | Iterable[str] | None,
        template: str | None,
    ) -> LayerId:
        """See Driver.create()."""
        quota = parse_layer_options(options)
        if quota is None and writable:
            quota = self._store.options.quota
        new = None if layer is None else LayerId(layer)
        below = None if parent is None else LayerId(parent)
        like = None if template is None else LayerId(template)
        made: dict[str, Any] = {
            "writable": writable,
            "label": label,
            "quota": quota,
            "dialect": self._dialect(below, like),
            "template": like,
        }
        if quota and writable and self._by_project():
            return self._create_limited(new, below, quota, made)
        return self._store.create(new, below, **made).id

    def _dialect(self, parent: LayerId | None, template: LayerId | None) -> str:
        """A layer speaks as the one it is built on, or as its template; else as this process."""
        like = parent if parent is not None else template
        found = self._core.dialect if like is None else self._store.layer(like).record.dialect
        if template is not None:
            other = self._store.layer(template).record.dialect
            if other != found:
                raise StoreError(
                    f"template {show(template)} has its marks in {other}.overlay.* and the layers"
                    f" below in {found}.overlay.*: choose a template with the same"
                )
        return found

    def _by_project(self) -> bool:
        """Whether limits are kept by the file system. Raises QuotaError when nobody can."""
        backend = self._core.backend
        project = self._core.backing().project_quota
        if backend != "fuse" and project is None:
            return True
        fuse = probes.fuse()
        if backend == "native":
            raise QuotaError(
                f"a limit (size=, inodes=) cannot be kept with the native backend here: {project};"
                " use the fuse backend or leave the limit out"
            )
        if fuse is not None:
            raise QuotaError(
                "a limit (size=, inodes=) cannot be kept here; by the file system:"
                f" {project or 'not asked'}; by the FUSE server: {fuse}"
            )
        return False

    def _create_limited(
        self, layer: LayerId | None, parent: LayerId | None, quota: Quota, made: dict[str, Any]
    ) -> LayerId:
        project = self._free_project()
        with self._store.stage(parent) as staging:
            self.limit(staging, project, quota)
            try:
                record = {"project_id": project}
                return self._store.create(layer, parent, staging=staging, record=record, **made).id
            except BaseException:
                quotacalls.clear(self._store.home_fd, project)
                raise

    @staticmethod
    def limit(staging: Staging, project: int, quota: Quota) -> None:
        """Make the empty diff of a layer in the making count as *project*, limited by *quota*.

        The work directory follows when it is used (Mounts).
        """
        quotacalls.set_project(staging.fd, project)
        quotacalls.set_limits(staging.fd, project, quota)

    def _free_project(self) -> int:
        """A project id that no layer of this store has, and nothing else on the file system."""
        used: set[int] = set()
        for layer in self._store.ids():
            try:
                project = self._store.layer(layer).record.project_id
            except UnionFSError:
                continue
            if project is not None:
                used.add(project)
        return quotacalls.free_project(self._store.home_fd, used)

    # --- removing ---------------------------------------------------------------------------------

    def remove(self, layer: str, *, force: bool) -> bool:
        """See Driver.remove()."""
        if not layer:
            raise StoreError("cannot remove a layer without a name: its id is empty")
        self._core.refuse_read_only()
        known = LayerId(layer)
        if not self._store.exists(known):
            return False
        children = self._store.children(known)
        if children:
            raise HasChildrenError(_children_sentence(known, children))
        with self._no_image_of(known, force=force):
            self.remove_unasked(known, force=force)
        return True

    def remove_unasked(self, known: LayerId, *, force: bool) -> None:
        """Remove *known*, whether or not an image needs it."""
        with self._store.layer_lock(known) as lock:
            if force:
                # Before anything is taken away: who has children keeps its mount.
                children = self._store.children(known)
                if children:
                    raise HasChildrenError(_children_sentence(known, children))
                self._mounts.end(known, lock)
            else:
                self._mounts.refuse_mounted(known, "removed")
            project = self._project_of(known)
            left = self._store.discard(known, lock=lock)
        self._core.references.drop(known)
        if project is not None:
            quotacalls.clear(self._store.home_fd, project)
        for rest in left:
            self._core.warn(
                f"layer {show(known)} is removed, but {show(rest.path)} in the trash cannot be"
                f" deleted: {os.strerror(rest.errno)}"
            )

    @contextmanager
    def _no_image_of(self, layer: LayerId, *, force: bool) -> Iterator[None]:
        """See that no image needs *layer*, and that none comes to need it, during the block."""
        # Only a removal asks for images; every other command starts without reading about them.
        from . import imagerecords  # noqa: PLC0415

        images = imagerecords.ImageStore(self._store)
        if force or not images.ids():
            yield
            return
        with images.locked():
            names = images.names_using(layer)
            if names:
                raise LayerInUseError(
                    f"layer {show(layer)} cannot be removed, images are made of it:"
                    f" {', '.join(names)}: remove these first (unionfs2 image rm), or force it"
                )
            yield

    def _project_of(self, layer: LayerId) -> int | None:
        try:
            return self._store.layer(layer).record.project_id
        except UnionFSError:
            return None

    # --- committing -------------------------------------------------------------------------------

    def commit(self, layer: LayerId, new: str | None, *, keep: bool) -> LayerId:
        """See Driver.commit()."""
        with self._store.layer_lock(layer) as lock:
            known = self._store.layer(layer)
            self._mounts.refuse_mounted(layer, "committed")
            size = self._measure(known)
            if keep and new == layer:
                raise StoreError(
                    f"layer {show(layer)} cannot be committed under its own id and kept: give"
                    " another new id"
                )
            done = self._store.commit(
                layer, None if new is None else LayerId(new), lock=lock, size=size
            )
        if keep:
            record = known.record
            self.create(
                layer,
                done.id,
                writable=True,
                label=record.label,
                options=_option_texts(record.quota),
                template=None,
            )
        return done.id

    # --- asking -----------------------------------------------------------------------------------

    def layer_list(self) -> tuple[LayerStatus, ...]:
        """See Driver.layers()."""
        mounted = self._mounts.states()
        return tuple(self._status_of(layer, mounted.get(layer)) for layer in self._store.ids())

    def _status_of(self, layer: LayerId, mount: LayerMount | None) -> LayerStatus:
        where: dict[str, Any] = {}
        if mount is not None:
            where = {"mounted": mount.count, "path": os.fsdecode(mount.target)}
        try:
            known = self._store.layer(layer)
        except (UnionFSError, OSError) as exc:
            return LayerStatus(
                layer, parent=self._store.parents().get(layer), reason=sentence(exc), **where
            )
        record = known.record
        return LayerStatus(
            layer,
            known.parent,
            known.committed,
            record.writable,
            record.created,
            record.label,
            record.dialect,
            record.size,
            record.quota,
            **where,
        )

    def size(self, layer: Layer) -> Size:
        """Bytes and inodes of the layer's own diff."""
        if layer.committed:
            if layer.record.size is not None:
                return layer.record.size
            if layer.link in self._sizes:
                return self._sizes[layer.link]
        found = self._measure(layer)
        if layer.committed and self._mounts.state(layer.id) is None:
            self._sizes[layer.link] = found
        return found

    def _measure(self, layer: Layer) -> Size:
        home_fd, name = self._store.home_fd, os.fsencode(layer.id)
        with opened_dir(home_fd, name) as fd, opened_dir(fd, ondisk.DIFF_NAME) as diff_fd:
            return tree_size(diff_fd)

    def usage(self, layers: Iterable[LayerId] | None) -> tuple[Usage, ...]:
        """See Driver.usage()."""
        asked = tuple(self._store.ids() if layers is None else layers)
        sizes: dict[LayerId, Size] = {}

        def own(layer: LayerId) -> Size:
            if layer not in sizes:
                sizes[layer] = self.size(self._store.layer(layer))
            return sizes[layer]

        children: dict[LayerId, int] = {}
        for parent in self._store.parents().values():
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
        found = []
        for layer in asked:
            try:
                known = self._store.layer(layer)
            except DamagedLayerError as exc:
                if layers is not None:
                    raise
                self._core.warn(sentence(exc))
                continue
            found.append(_usage(known, own, children))
        return tuple(found)

    def metadata(self, layer: LayerId) -> dict[str, str]:
        """See Driver.get_metadata()."""
        known = self._store.layer(layer)
        store = self._store
        found = {"UpperDir": os.fsdecode(store.diff_path(layer))}
        if known.chain:
            found["LowerDir"] = os.fsdecode(format_lowerdir(store.lower_dirs(known)))
        for name, key in ((ondisk.WORK_NAME, "WorkDir"), (ondisk.MERGED_NAME, "MergedDir")):
            with opened_dir(store.home_fd, os.fsencode(layer)) as fd:
                if is_dir(fd, name):
                    found[key] = os.path.join(os.fsdecode(store.layer_path(layer)), name.decode())
        mount = self._mounts.state(layer)
        if mount is not None:
            found["MergedDir"] = os.fsdecode(mount.target)
            found["Backend"] = mount.backend
            found["Count"] = str(mount.count)
        found["Mounted"] = _yes(mount is not None)
        spec = self.spec_by_hand(known)
        if spec is not None:
            options = os.fsdecode(format_options(spec))
            target = found.get("MergedDir", os.fsdecode(store.merged_path(layer)))
            found["Options"] = options
            found["Command"] = shlex.join(["unionfs2", "mount", "-o", options, target])
        return found

    def spec_by_hand(self, layer: Layer) -> MountSpec | None:
        """What somebody would mount by hand to see *layer*, without this store's short links."""
        dirs = self._store.lower_dirs(layer)
        diff = self._store.diff_path(layer.id)
        if layer.committed:
            lower = (diff, *dirs) if dirs else (diff, self._store.empty_path)
            return self._core.lower_spec(layer)._replace(lower=lower)
        if not dirs:
            return None
        return self._core.upper_spec(layer)._replace(lower=dirs, exclusive=False)

    def inspect(self, layer: LayerId) -> dict[str, Any]:
        """See Driver.inspect()."""
        known = self._store.layer(layer)
        record = known.record
        mount = self._mounts.state(layer)
        return {
            "id": layer,
            "parent": known.parent,
            "chain": list(known.chain),
            "children": list(self._store.children(layer)),
            "committed": known.committed,
            "writable": record.writable,
            "dialect": record.dialect,
            "diff_id": record.diff_id,
            "chain_id": record.chain_id,
            "size": None if record.size is None else record.size._asdict(),
            "created": record.created,
            "created_by": record.created_by,
            "label": record.label,
            "quota": None if record.quota is None else asdict(record.quota),
            "project_id": record.project_id,
            "link": known.link,
            "mount": None
            if mount is None
            else {
                "path": os.fsdecode(mount.target),
                "backend": mount.backend,
                "count": mount.count,
                "read_only": mount.read_only,
                "pid": mount.pid,
            },
            "metadata": self.metadata(layer),
        }

    def status(self, version: str) -> Status:
        """See Driver.status()."""
        core = self._core
        backing = core.backing()
        dialect = core.dialect
        native = core.native(dialect)
        backend, why = self._backend(dialect)
        listed = self.layer_list()
        return Status(
            version=version,
            format_version=ondisk.STORE_FORMAT_VERSION,
            home=os.fsdecode(self._store.home),
            read_only=self._store.read_only,
            backing_filesystem=backing.filesystem,
            d_type=backing.d_type,
            reflink=backing.reflink,
            dialect=dialect,
            backend=backend,
            backend_reason=why,
            native=core.native_reason(dialect),
            fuse=probes.fuse(),
            native_diff=not native.opaque_copied_up,
            trusted_xattr=backing.trusted_xattr,
            user_xattr=backing.user_xattr,
            whiteout=backing.whiteout,
            project_quota=backing.project_quota,
            kernel=os.uname().release,
            layers=len(listed),
            damaged=sum(bool(layer.reason) for layer in listed),
            mounts=sum(layer.path is not None for layer in listed),
            layers_max=self._store.options.layers_max,
            default_quota=self._store.options.quota,
        )

    def _backend(self, dialect: str) -> tuple[str | None, str]:
        try:
            chosen = self._core.choose(MountSpec(userxattr=dialect == "user"), self._core.dialect)
        except UnionFSError as exc:
            return None, str(exc)
        return chosen.backend, chosen.why


def _usage(layer: Layer, own: Any, children: Mapping[LayerId, int]) -> Usage:
    line = (layer.id, *layer.chain)
    exclusive = shared = Size()
    alone = True
    for position, each in enumerate(line):
        # The layer itself must have no child, each one below it only the one in this line.
        alone = alone and children.get(each, 0) == (0 if position == 0 else 1)
        size = own(each)
        if alone:
            exclusive = Size(exclusive.bytes + size.bytes, exclusive.inodes + size.inodes)
        else:
            shared = Size(shared.bytes + size.bytes, shared.inodes + size.inodes)
    return Usage(layer.id, own(layer.id), exclusive, shared)


def _option_texts(quota: Quota | None) -> dict[str, str]:
    limits = quota or Quota()
    pairs = (("size", limits.size_bytes), ("inodes", limits.inodes))
    return {name: str(value) for name, value in pairs if value is not None}


def _children_sentence(layer: LayerId, children: tuple[LayerId, ...]) -> str:
    names = ", ".join(show(child) for child in children[:8]) + (", ..." if children[8:] else "")
    return (
        f"layer {show(layer)} cannot be removed: {len(children)} other"
        f" layer{'s are' if len(children) > 1 else ' is'} built on it: {names}"
    )
