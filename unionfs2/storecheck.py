"""What is wrong with a store: every finding with a code, a place, a reason, and what repair does.

The structure is looked at under the store lock, so nothing that is just being made or removed looks
damaged. What lies in the layers is read afterwards, without any lock, and only as far as asked.
Checking changes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from . import ondisk, storelayout
from . import syscalls as sc
from .errors import StoreError, UnionFSError, sentence, show
from .layers import Layer, LayerStore
from .storefiles import is_dir, is_temp_name, names_in, open_dir, opened_dir
from .storehome import STATE_NAMES, Home
from .storeindex import Index, looks_like_layer, read_link, read_lower, scan
from .storelayout import id_of_name, name_of_id
from .storemodel import Digest, LayerId
from .storeread import read_layer, read_record
from .storerecord import DialectName
from .storestaging import is_abandoned
from .storestructure import wrong_links
from .storetrash import is_forgotten
from .storetrees import tree_size, walk

#: Recomputes the DiffID of a committed layer from its content (the driver knows how).
DigestOf = Callable[[Layer], Digest]

# Objects of a layer that are looked at for marks of the other dialect, unless asked for all.
_GLANCE: Final = 256
# Directories of others that may stand in a HOME.
_FOREIGN: Final = frozenset({b"lost+found"})
_OTHERS: Final = 0o007
# Files on their way to another name live for milliseconds; those of a dead writer stay.
_TEMP_AGE_S: Final = 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. ``repair`` is None where a person has to decide."""

    code: str
    layer: LayerId | None
    path: bytes
    reason: str
    repair: str | None

    def __str__(self) -> str:
        what = "repair: " + self.repair if self.repair else "not for repair to decide"
        return f"{self.code}: {self.reason} ({what})"


def check(
    store: LayerStore,
    *,
    deep: bool = False,
    digest: DigestOf | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Look at everything; with *deep* at every object of every layer, sizes and digests too.

    *digest* recomputes digests; without it those are not compared. *progress* is told the number
    of layers done. Raises OSError of HOME itself only.
    """
    with store.structure.lock.shared():
        index = scan(store.home_fd, store.structure.links_fd)
        looked = StructureCheck(store, index)
        findings = list(looked.findings())
    for count, layer in enumerate(looked.healthy, 1):
        try:
            findings += _check_content(store, layer, deep=deep, digest=digest)
        except OSError as exc:
            if store.exists(layer.id):
                path = store.diff_path(layer.id)
                reason = f"layer {show(layer.id)} cannot be read: {sentence(exc)}"
                findings.append(Finding("content-unreadable", layer.id, path, reason, None))
        if progress is not None:
            progress(count)
    return findings


# --- structure ------------------------------------------------------------------------------------


class StructureCheck:
    """The part that needs the store lock. ``healthy`` are the layers that can be read."""

    def __init__(self, store: LayerStore, index: Index) -> None:
        self._store = store
        self._home: Home = store.structure.home
        self._index = index
        self.healthy: list[Layer] = []

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong with the structure. needs: store lock."""
        yield from self._links()
        for layer in self._index.ids:
            yield from self._layer(layer)
        yield from self._strays()
        yield from self._state()

    def _at(self, *names: bytes) -> bytes:
        return os.path.join(self._home.path, *names)

    def _of(self, layer: LayerId, *names: bytes) -> bytes:
        return self._at(name_of_id(layer), *names)

    # --- the link directory ---

    def _links(self) -> Iterator[Finding]:
        path = self._at(ondisk.LINKS_NAME)
        if self._home.links_reason is not None:
            yield Finding(
                "links-damaged",
                None,
                path,
                f"{show(path)} is not a directory, so no short link works",
                "moves it to the quarantine and makes the links anew from the layers",
            )
            return
        for name in names_in(self._home.links_fd):
            if not storelayout.is_short_name(name):
                yield self._stray_link(name, "has a name that no layer can have")
            elif not stat.S_ISLNK(sc.lstat_at(name, self._home.links_fd).st_mode):
                yield self._stray_link(name, "is not a symbolic link")
        wrong = dict(wrong_links(self._index))
        for short, layer in wrong.items():
            if short in self._index.links:
                code, what = "link-wrong", "leads to no layer"
            else:
                code, what = "link-missing", "is missing"
            yield Finding(
                code,
                layer,
                self._at(ondisk.LINKS_NAME, short.encode()),
                f"the link l/{short} of layer {show(layer)} {what}",
                "makes the link anew",
            )
        yield from self._useless_links(wrong)

    def _useless_links(self, wrong: dict[str, LayerId]) -> Iterator[Finding]:
        index = self._index
        named = {short for lower in index.lowers.values() for short in lower}
        for short, target in sorted(index.links.items()):
            if short in wrong or short in index.claims or short in named:
                continue  # right, or reported with the layers that name it
            path = self._at(ondisk.LINKS_NAME, short.encode())
            if target is None:
                if stat.S_ISLNK(sc.lstat_at(short.encode(), self._home.links_fd).st_mode):
                    yield self._stray_link(short.encode(), "does not lead to a layer")
            elif target in index.own:
                if not self._has_good_link(target):
                    continue  # perhaps the only name it has
                yield Finding(
                    "link-duplicate",
                    target,
                    path,
                    f"l/{short} is a second link to layer {show(target)} that nobody uses",
                    "removes the link",
                )
            else:
                yield Finding(
                    "link-dangling",
                    None,
                    path,
                    f"l/{short} leads to layer {show(target)}, which does not exist",
                    "removes the link",
                )

    def _has_good_link(self, layer: LayerId) -> bool:
        own = self._index.own.get(layer)
        return own is not None and self._index.resolve(own) == layer

    def _stray_link(self, name: bytes, what: str) -> Finding:
        path = self._at(ondisk.LINKS_NAME, name)
        if is_temp_name(name):
            return Finding(
                "temp-file", None, path, f"{show(path)} is a left-over", "removes the file"
            )
        return Finding(
            "link-stray", None, path, f"{show(path)} {what}", "moves it to the quarantine"
        )

    # --- one layer ---

    def _layer(self, layer: LayerId) -> Iterator[Finding]:
        try:
            fd = open_dir(self._home.fd, name_of_id(layer))
        except OSError as exc:
            reason = f"layer {show(layer)} cannot be opened: {sentence(exc)}"
            yield Finding("layer-unreadable", layer, self._of(layer), reason, None)
            return
        try:
            broken = list(self._files(fd, layer))
            yield from broken or self._whole(fd, layer)
            yield from self._temps(fd, layer)
            yield from self._modes(fd, layer)
        finally:
            os.close(fd)

    def _files(self, fd: int, layer: LayerId) -> Iterator[Finding]:
        """The files of a layer, each on its own."""
        own = None
        try:
            own = read_link(fd, layer)
        except StoreError as exc:
            yield Finding(
                "link-damaged",
                layer,
                self._of(layer, ondisk.LINK_NAME),
                str(exc),
                "restores the short name, or gives the layer a new one",
            )
        try:
            lower: tuple[str, ...] | None = read_lower(fd, layer, own)
        except StoreError as exc:
            lower = None
            yield Finding(
                "lower-damaged", layer, self._of(layer, ondisk.LOWER_NAME), str(exc), _LOWER_REPAIR
            )
        yield from self._record(fd, layer, lower)
        if not is_dir(fd, ondisk.DIFF_NAME):
            reason = str(storelayout.damaged(layer, "diff", "is missing or not a directory"))
            yield Finding(
                "diff-missing", layer, self._of(layer, ondisk.DIFF_NAME), reason, _QUARANTINE
            )

    def _record(self, fd: int, layer: LayerId, lower: tuple[str, ...] | None) -> Iterator[Finding]:
        path = self._of(layer, ondisk.RECORD_NAME)
        try:
            record = read_record(fd, layer)
        except StoreError as exc:
            newer = "newer unionfs2" in str(exc)
            repair = None if newer else "moves it to the quarantine and writes one with defaults"
            yield Finding(
                "record-newer" if newer else "record-damaged", layer, path, str(exc), repair
            )
            return
        if lower == () and record.parent_link is not None:
            reason = str(storelayout.damaged(layer, "lower", "is missing"))
            yield Finding(
                "lower-missing", layer, self._of(layer, ondisk.LOWER_NAME), reason, _LOWER_REPAIR
            )

    def _whole(self, fd: int, layer: LayerId) -> Iterator[Finding]:
        """What a layer says together with the others."""
        try:
            found, _ = read_layer(self._home, self._index, layer)
        except StoreError as exc:
            if self._home.links_reason is not None:
                return  # one finding for all
            if not self._has_good_link(layer):
                yield self._bad_link(layer, str(exc))
            else:
                path = self._of(layer, ondisk.LOWER_NAME)
                yield Finding("lower-broken", layer, path, str(exc), _LOWER_REPAIR)
            return
        self.healthy.append(found)
        if layer in self._index.irregular:
            yield Finding(
                "lower-irregular",
                layer,
                self._of(layer, ondisk.LOWER_NAME),
                f"lower of layer {show(layer)} is not its parent's link followed by its parent's"
                " lower: it shows other layers than its parent does",
                None,
            )
        ours = found.record.link is not None
        # Docker makes merged for each mount anew; work is always there.
        for name in (ondisk.WORK_NAME, *((ondisk.MERGED_NAME,) if ours else ())):
            if found.lower and not is_dir(fd, name):
                shown = name.decode()
                yield Finding(
                    f"{shown}-missing",
                    layer,
                    self._of(layer, name),
                    f"layer {show(layer)} has no directory {shown}",
                    "makes the directory",
                )

    def _bad_link(self, layer: LayerId, reason: str) -> Finding:
        """The short name of a layer leads to another one."""
        short = self._index.own[layer] or ""
        if self._index.claims[short] == {layer}:
            path = self._at(ondisk.LINKS_NAME, short.encode())
            return Finding("link-stolen", layer, path, reason, "makes the link anew")
        path = self._of(layer, ondisk.LINK_NAME)
        return Finding("link-taken", layer, path, reason, "gives the layer a new short name")

    def _temps(self, fd: int, layer: LayerId) -> Iterator[Finding]:
        for name, age_s in _with_age(fd):
            if is_temp_name(name) and age_s > _TEMP_AGE_S:
                path = self._of(layer, name)
                reason = f"{show(path)} is a left-over"
                yield Finding("temp-file", layer, path, reason, "removes the file")

    def _modes(self, fd: int, layer: LayerId) -> Iterator[Finding]:
        if os.fstat(self._home.fd).st_mode & _OTHERS and os.fstat(fd).st_mode & _OTHERS:
            yield Finding(
                "mode-open",
                layer,
                self._of(layer),
                f"the directory of layer {show(layer)} lets everybody in, also to its setuid files",
                "takes the rights of others away",
            )

    # --- what is no layer ---

    def _strays(self) -> Iterator[Finding]:
        targets = set(self._index.links.values())
        for name in names_in(self._home.fd):
            layer = id_of_name(name)
            st = sc.lstat_or_none(name, self._home.fd)
            if layer is None or layer in self._index.own or name in _FOREIGN or st is None:
                continue
            path = self._at(name)
            if stat.S_ISDIR(st.st_mode):
                if not self._is_layer(name):
                    reason = f"{show(path)} is a directory but not a layer"
                    yield Finding("directory-stray", None, path, reason, _QUARANTINE)
            elif layer in targets or stat.S_ISLNK(st.st_mode):
                reason = f"{show(path)} stands for a layer but is not a directory"
                yield Finding("layer-stray", layer, path, reason, _QUARANTINE)

    def _is_layer(self, name: bytes) -> bool:
        try:
            with opened_dir(self._home.fd, name) as fd:
                return looks_like_layer(fd)
        except OSError:
            return True  # unreadable is not the same as useless

    # --- private state ---

    def _state(self) -> Iterator[Finding]:
        home = self._home
        if home.state_fd < 0:
            return
        if os.fstat(home.state_fd).st_mode & 0o077:
            path = self._at(ondisk.STORE_NAME)
            reason = f"{show(path)} lets others in"
            yield Finding("mode-open", None, path, reason, "takes the rights of others away")
        for name in names_in(home.staging_fd):
            if is_abandoned(home, name):
                path = self._at(ondisk.STORE_NAME, ondisk.STAGING_NAME, name)
                reason = f"{show(path)} is a layer in the making whose maker is gone"
                yield Finding("staging-abandoned", None, path, reason, "deletes it")
        for name in names_in(home.trash_fd):
            if not is_forgotten(home, name):
                continue
            path = self._at(ondisk.STORE_NAME, ondisk.TRASH_NAME, name)
            reason = f"{show(path)} is a removed layer, not yet deleted"
            yield Finding("trash", None, path, reason, "deletes it")
        yield from self._private_files()

    def _private_files(self) -> Iterator[Finding]:
        for folder in (b".", *STATE_NAMES):
            if folder in {ondisk.STAGING_NAME, ondisk.TRASH_NAME, ondisk.QUARANTINE_NAME}:
                continue
            head = (
                self._at(ondisk.STORE_NAME)
                if folder == b"."
                else self._at(ondisk.STORE_NAME, folder)
            )
            for name, age_s in self._list_private(folder):
                path = os.path.join(head, name)
                if is_temp_name(name) and age_s > _TEMP_AGE_S:
                    reason = f"{show(path)} is a left-over"
                    yield Finding("temp-file", None, path, reason, "removes the file")
                elif folder == ondisk.REFERENCES_NAME and self._is_dead(name):
                    reason = f"{show(path)} speaks of a layer that does not exist"
                    yield Finding("reference-dead", None, path, reason, "removes the file")

    def _list_private(self, folder: bytes) -> Iterator[tuple[bytes, float]]:
        try:
            with opened_dir(self._home.state_fd, folder) as fd:
                yield from _with_age(fd)
        except FileNotFoundError:
            return

    def _is_dead(self, name: bytes) -> bool:
        layer = id_of_name(name.removesuffix(b".json"))
        return name.endswith(b".json") and layer is not None and layer not in self._index.own


def _with_age(fd: int) -> Iterator[tuple[bytes, float]]:
    """Names in a directory, and how many seconds ago each was written."""
    now = time.time()
    for name in names_in(fd):
        st = sc.lstat_or_none(name, fd)
        if st is not None:
            yield name, now - st.st_mtime


_QUARANTINE: Final = "moves it to the quarantine"
_LOWER_REPAIR: Final = "restores it from the record, else moves the layer to the quarantine"


# --- content --------------------------------------------------------------------------------------


def _check_content(
    store: LayerStore, layer: Layer, *, deep: bool, digest: DigestOf | None
) -> Iterator[Finding]:
    """What lies in the layer, against what is recorded of it."""
    path = store.diff_path(layer.id)
    shown = f"layer {show(layer.id)}"
    other: DialectName = "user" if layer.record.dialect == "trusted" else "trusted"
    found = dialects_in(store, layer.id, None if deep else _GLANCE)
    if other in found:
        clear = layer.record.dialect not in found
        yield Finding(
            "dialect-wrong",
            layer.id,
            path,
            f"{shown} is recorded with the dialect {layer.record.dialect}"
            f" {'but' if clear else 'and also'} has marks in the dialect {other}",
            f"records the dialect {other}" if clear else None,
        )
    if not deep or not layer.committed:
        return
    if layer.record.size is not None:
        with (
            opened_dir(store.home_fd, name_of_id(layer.id)) as fd,
            opened_dir(fd, ondisk.DIFF_NAME) as diff_fd,
        ):
            size = tree_size(diff_fd)
        if size != layer.record.size:
            yield Finding(
                "size-wrong",
                layer.id,
                path,
                f"{shown} has {size.bytes} bytes in {size.inodes} inodes,"
                f" not {layer.record.size.bytes} in {layer.record.size.inodes} as recorded",
                None if layer.record.diff_id else "records the size",
            )
    if digest is not None and layer.record.diff_id is not None:
        yield from _check_digest(store, layer, digest)


def _check_digest(store: LayerStore, layer: Layer, digest: DigestOf) -> Iterator[Finding]:
    try:
        actual: str = digest(layer)
    except UnionFSError as exc:
        actual = f"no digest at all ({exc})"
    if actual != layer.record.diff_id:
        yield Finding(
            "digest-wrong",
            layer.id,
            store.diff_path(layer.id),
            f"layer {show(layer.id)} has {actual}, not {layer.record.diff_id} as recorded:"
            " its content was changed",
            None,
        )


def dialects_in(store: LayerStore, layer: LayerId, limit: int | None) -> set[DialectName]:
    """Dialects of the marks on the first *limit* objects of a layer, on all if None."""
    found: set[DialectName] = set()
    with (
        opened_dir(store.home_fd, name_of_id(layer)) as fd,
        opened_dir(fd, ondisk.DIFF_NAME) as diff_fd,
    ):
        _note_dialects(found, b".", diff_fd)
        for item in islice(walk(diff_fd), limit):
            if not stat.S_ISLNK(item.st.st_mode):
                _note_dialects(found, item.name, item.dir_fd)
    return found


_MARKS: Final = (ondisk.SUFFIX_OPAQUE, ondisk.SUFFIX_WHITEOUT, ondisk.SUFFIX_REDIRECT)


def _note_dialects(found: set[DialectName], name: bytes, dir_fd: int) -> None:
    try:
        keys = sc.listxattr_at(name, dir_fd)
    except OSError as exc:
        if exc.errno in {errno.ENOENT, errno.EACCES, errno.EPERM}:
            return
        raise
    for suffix in _MARKS if keys else ():
        if ondisk.TRUSTED_PREFIX + suffix in keys:
            found.add("trusted")
        if ondisk.USER_PREFIX + suffix in keys:
            found.add("user")
