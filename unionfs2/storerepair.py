"""Mending a store, finding by finding; what cannot be mended is put aside, nothing is thrown away.

The quarantine, ``.unionfs2/quarantine``, holds what repair took out under ``<time>-<name>``, each
with a note beside it, ``<time>-<name>.txt``: where it came from and why it is here.

Everything structural happens under the store lock, so nobody sees a store half mended; layers that
somebody works on are left alone. One repair can uncover the next finding, a layer whose parent had
to go for instance, so it goes on until a look at the store brings nothing new.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from . import ondisk
from . import syscalls as sc
from .errors import LayerInUseError, StoreError, UnionFSError, sentence, show
from .layers import LayerStore
from .storecheck import Finding, StructureCheck, check, dialects_in
from .storefiles import (
    FILE_MODE,
    make_dir,
    open_dir,
    opened_dir,
    random_name,
    write_file_atomic,
    write_synced,
)
from .storeindex import Index, scan
from .storelayout import format_link, format_lower, name_of_id
from .storelock import try_lock
from .storemodel import LayerId
from .storeread import read_record
from .storerecord import Record, format_record
from .storestructure import Structure, refuse_mounted
from .storetrees import delete_tree, tree_size

_ROUNDS_MAX: Final = 16
_QUARANTINE_NAME_MAX: Final = 180  # with the time in front and the suffix behind below NAME_MAX


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done about a finding, or why nothing was."""

    finding: Finding
    done: bool
    what: str

    def __str__(self) -> str:
        head = "mended" if self.done else "not mended"
        return f"{head}: {self.finding.reason}: {self.what}"


def repair(store: LayerStore, *, deep: bool = False) -> list[Repair]:
    """Mend what check() finds; with *deep* also what only a look at every object shows.

    Returns what was done, and last what could not be done. Raises StoreError for a read-only
    store, OSError of HOME itself.
    """
    work = _Work(store)
    done: list[Repair] = []
    failed: list[Repair] = []
    last_resort = False
    for _ in range(_ROUNDS_MAX):
        results = list(work.round(last_resort=last_resort))
        failed = [item for item in results if not item.done]
        done += [item for item in results if item.done]
        stuck = len(failed) == len(results)
        if stuck and last_resort:
            break
        # A layer goes to the quarantine only when all that could help it has been mended.
        last_resort = stuck
    for finding in check(store, deep=deep):
        if finding.code in _CONTENT:
            result = work.content(finding)
            (done if result.done else failed).append(result)
        elif finding.repair is None:
            failed.append(Repair(finding, done=False, what="a person has to decide"))
    return done + failed


_CONTENT: Final = frozenset({"dialect-wrong", "size-wrong", "staging-abandoned", "trash"})


class _Work:
    def __init__(self, store: LayerStore) -> None:
        self._store = store
        self._structure: Structure = store.structure
        self._home = store.structure.home
        self._index = Index()
        self._fixers: dict[str, Callable[[Finding], str]] = {
            "links-damaged": self._fix_links,
            "link-missing": self._point,
            "link-wrong": self._point,
            "link-stolen": self._point,
            "link-stray": self._set_aside,
            "link-duplicate": self._unlink,
            "link-dangling": self._unlink,
            "temp-file": self._delete,
            "link-damaged": self._fix_link,
            "link-taken": self._fix_link,
            "lower-damaged": self._fix_lower,
            "lower-missing": self._fix_lower,
            "lower-broken": self._fix_lower,
            "record-damaged": self._fix_record,
            "diff-missing": self._set_layer_aside,
            "directory-stray": self._set_aside,
            "layer-stray": self._set_aside,
            "work-missing": self._make_missing,
            "merged-missing": self._make_missing,
            "mode-open": self._close_mode,
            "reference-dead": self._unlink,
        }

    def round(self, *, last_resort: bool) -> Iterator[Repair]:
        """One look at the structure and what could be done about it.

        Whole layers are put aside with *last_resort* only.
        """
        with self._structure.lock.exclusive() as held:
            held.begin()
            self._index = scan(self._home.fd, self._structure.links_fd)
            findings = list(StructureCheck(self._store, self._index).findings())
            touched: set[LayerId] = set()
            for finding in findings:
                fixer = self._fixers.get(finding.code)
                if fixer is None or finding.repair is None or finding.layer in touched:
                    continue  # one thing at a time: the next round sees what is left
                if not last_resort and self._needs_last_resort(finding):
                    continue
                if finding.layer is not None:
                    touched.add(finding.layer)
                yield self._try(fixer, finding)
            self._structure.sync()

    def _needs_last_resort(self, finding: Finding) -> bool:
        """Whether nothing is left but to put the layer aside."""
        if finding.code == "diff-missing":
            return True
        if not finding.code.startswith("lower-") or finding.layer is None:
            return False
        with opened_dir(self._home.fd, name_of_id(finding.layer)) as fd:
            lower = self._rebuilt_lower(fd, finding.layer)
        return lower in {None, self._index.lowers.get(finding.layer)}

    @staticmethod
    def _try(fixer: Callable[[Finding], str], finding: Finding) -> Repair:
        try:
            return Repair(finding, done=True, what=fixer(finding))
        except (UnionFSError, OSError) as exc:
            return Repair(finding, done=False, what=sentence(exc))

    # --- simple ones ---

    @contextmanager
    def _folder(self, finding: Finding) -> Iterator[tuple[int, bytes]]:
        """The directory of the path of a finding, below HOME, and the name in it."""
        *folders, name = os.path.relpath(finding.path, self._home.path).split(b"/")
        fd = os.dup(self._home.fd)
        try:
            for folder in folders:
                above, fd = fd, open_dir(fd, folder)
                os.close(above)
            yield fd, name
        finally:
            os.close(fd)

    def _unlink(self, finding: Finding) -> str:
        with self._folder(finding) as (fd, name):
            sc.unlink(name, dir_fd=fd)
        return f"removed {show(finding.path)}"

    def _delete(self, finding: Finding) -> str:
        """A file, or a directory such as an image in the making."""
        with self._folder(finding) as (fd, name):
            left = delete_tree(fd, name)
        if left:
            raise StoreError(f"cannot delete {show(finding.path)}: {os.strerror(left[0].errno)}")
        return f"removed {show(finding.path)}"

    def _point(self, finding: Finding) -> str:
        assert finding.layer is not None
        short = os.path.basename(finding.path).decode("ascii")
        self._structure.point(short, finding.layer)
        return f"made the link l/{short} anew"

    def _make_missing(self, finding: Finding) -> str:
        with self._folder(finding) as (fd, name):
            if sc.lstat_or_none(name, fd) is not None:
                quarantine(self._structure, fd, name, finding)
            make_dir(fd, name, ondisk.PRIVATE_MODE, self._home.owner)
            sc.fsync(fd)
        return f"made {show(finding.path)}"

    def _close_mode(self, finding: Finding) -> str:
        with self._folder(finding) as (fd, name):
            keep = 0o770 if finding.layer is not None else 0o700
            mode = sc.lstat_at(name, fd).st_mode & keep
            sc.chmod(name, fd, mode)
        return f"set the mode of {show(finding.path)} to {mode:04o}"

    def _set_aside(self, finding: Finding) -> str:
        with self._folder(finding) as (fd, name):
            return quarantine(self._structure, fd, name, finding)

    def _fix_links(self, finding: Finding) -> str:
        what = "it was missing"
        if sc.lstat_or_none(ondisk.LINKS_NAME, self._home.fd) is not None:
            what = self._set_aside(finding)
        self._home.open_links()
        if self._home.links_reason is not None:
            raise StoreError(self._home.links_reason)
        return f"made {show(finding.path)} anew: {what}"

    # --- layers ---

    @contextmanager
    def _layer(self, finding: Finding) -> Iterator[tuple[LayerId, int]]:
        """The layer of a finding, locked: never waiting, for the store lock is held already."""
        assert finding.layer is not None
        fd = open_dir(self._home.fd, name_of_id(finding.layer))
        try:
            if not try_lock(fd):
                raise LayerInUseError(f"somebody works on layer {show(finding.layer)}")
            refuse_mounted(self._home, finding.layer)
            yield finding.layer, fd
        finally:
            os.close(fd)

    def _record(self, fd: int, layer: LayerId) -> Record | None:
        """The record of a layer; None where there is none that can be read."""
        if sc.lstat_or_none(ondisk.RECORD_NAME, fd) is None:
            return None
        try:
            return read_record(fd, layer)
        except StoreError:
            return None

    def _fix_link(self, finding: Finding) -> str:
        with self._layer(finding) as (layer, fd):
            record = self._record(fd, layer)
            short = self._choose_short(layer, record)
            st = sc.lstat_or_none(ondisk.LINK_NAME, fd)
            if st is not None and not stat.S_ISREG(st.st_mode):
                self._keep_old(fd, ondisk.LINK_NAME, finding)
            self._write(fd, ondisk.LINK_NAME, format_link(short))
            if record is not None and record.link != short:
                changed = dataclasses.replace(record, link=short)
                self._write(fd, ondisk.RECORD_NAME, format_record(changed))
            self._structure.point(short, layer)
        return f"gave it the short name {short}"

    def _choose_short(self, layer: LayerId, record: Record | None) -> str:
        """The short name that a layer had, as far as that can be told; else a new one."""
        index = self._index
        leading_here = sorted(short for short, to in index.links.items() if to == layer)
        recorded = [record.link] if record is not None and record.link else []
        for short in recorded + leading_here:
            to = index.links.get(short)
            if not index.claims.get(short, set()) - {layer} and (
                to in {None, layer} or to not in index.own
            ):
                return short
        return self._structure.free_short_name()

    def _fix_lower(self, finding: Finding) -> str:
        with self._layer(finding) as (layer, fd):
            lower = self._rebuilt_lower(fd, layer)
            if lower is not None and lower != self._index.lowers.get(layer):
                self._keep_old(fd, ondisk.LOWER_NAME, finding)
                self._write(fd, ondisk.LOWER_NAME, format_lower(lower))
                return "restored lower from the record of the layer"
        return self._set_layer_aside(finding)

    def _rebuilt_lower(self, fd: int, layer: LayerId) -> tuple[str, ...] | None:
        record = self._record(fd, layer)
        if record is None or record.parent_link is None:
            return None
        parent = self._index.resolve(record.parent_link)
        below = None if parent is None else self._index.lowers.get(parent)
        if parent is None or below is None:
            return None
        lower = (record.parent_link, *below)
        layers = [self._index.resolve(short) for short in lower]
        sound = None not in layers and layer not in layers and len(set(layers)) == len(layers)
        return lower if sound else None

    def _fix_record(self, finding: Finding) -> str:
        with self._layer(finding) as (layer, fd):
            self._keep_old(fd, ondisk.RECORD_NAME, finding)
            found = dialects_in(self._store, layer, None)
            lower = self._index.lowers.get(layer)
            committed = sc.lstat_or_none(ondisk.COMMITTED_NAME, fd) is not None
            record = Record(
                writable=not committed,
                dialect="user" if found == {"user"} else "trusted",
                committed_as=layer if committed else None,
                link=self._index.own.get(layer),
                parent_link=lower[0] if lower else None,
            )
            self._write(fd, ondisk.RECORD_NAME, format_record(record))
        return "wrote a record with defaults; the old one is in the quarantine"

    def _set_layer_aside(self, finding: Finding) -> str:
        with self._layer(finding) as (layer, _):
            what = quarantine(self._structure, self._home.fd, name_of_id(layer), finding)
            for short, to in self._index.links.items():
                if to == layer and self._home.links_fd >= 0:
                    sc.unlink(short.encode("ascii"), dir_fd=self._home.links_fd)
        return what

    def _keep_old(self, fd: int, name: bytes, finding: Finding) -> None:
        if sc.lstat_or_none(name, fd) is not None:
            quarantine(self._structure, fd, name, finding)

    def _write(self, fd: int, name: bytes, text: bytes) -> None:
        write_file_atomic(fd, name, text, FILE_MODE, self._home.owner)

    # --- content ---

    def content(self, finding: Finding) -> Repair:
        """Mend what needs no store lock."""
        fixers = {
            "dialect-wrong": self._fix_dialect,
            "size-wrong": self._fix_size,
            "staging-abandoned": self._clear,
            "trash": self._clear,
        }
        if finding.repair is None:
            return Repair(finding, done=False, what="a person has to decide")
        return self._try(fixers[finding.code], finding)

    def _fix_dialect(self, finding: Finding) -> str:
        assert finding.layer is not None
        (dialect,) = dialects_in(self._store, finding.layer, None)
        self._store.update_record(finding.layer, dialect=dialect)
        return f"recorded the dialect {dialect}"

    def _fix_size(self, finding: Finding) -> str:
        assert finding.layer is not None
        with self._store.layer_lock(finding.layer) as lock:
            with opened_dir(lock.fd, ondisk.DIFF_NAME) as diff_fd:
                size = tree_size(diff_fd)
            self._store.update_record(finding.layer, lock=lock, size=size)
        return f"recorded {size.bytes} bytes in {size.inodes} inodes"

    def _clear(self, finding: Finding) -> str:
        self._store.clear_staging()
        left = self._store.empty_trash()
        if left:
            first = show(left[0].path)
            raise StoreError(f"cannot delete {first}: {os.strerror(left[0].errno)}")
        return f"deleted {show(finding.path)}"


def quarantine(structure: Structure, dir_fd: int, name: bytes, finding: Finding) -> str:
    """Move *name* out of the way, with a note; what to tell of it. needs: store lock, exclusive."""
    state_fd = structure.home.state_fd
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()).encode()
    with opened_dir(state_fd, ondisk.QUARANTINE_NAME) as fd:
        target = b"%b-%b" % (stamp, name[:_QUARANTINE_NAME_MAX].lstrip(b"."))
        if sc.lstat_or_none(target, fd) or sc.lstat_or_none(target + ondisk.NOTE_SUFFIX, fd):
            target += b"-" + random_name()
        note = f"{show(finding.path)}\n{finding.code}: {finding.reason}\n"
        write_synced(fd, target + ondisk.NOTE_SUFFIX, note.encode(), 0o600)
        sc.rename(name, dir_fd, target, fd, sc.RENAME_NOREPLACE)
        sc.fsync(fd)
    sc.fsync(dir_fd)
    shown = os.path.join(structure.home.path, ondisk.STORE_NAME, ondisk.QUARANTINE_NAME, target)
    return f"moved it to {show(shown)}"
