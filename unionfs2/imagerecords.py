"""Records of images: ``.unionfs2/images/<64 hex digits>/`` and ``names.json`` beside them.

An image is a config, named by its digest, and a chain of layers of this store. Its directory holds
``config.json`` and, when the image came with one, ``manifest.json``, both byte for byte as they
came, and ``image.json``, which says which layers of the store the image consists of.

Invariants:

* A directory under its final name is complete and durable: it is made aside and renamed. A changed
  one (the same image came again with another manifest) is exchanged for the old.
* The digest of ``config.json`` is the name of its directory; load() compares.
* A name belongs to one image: ``names.json`` is one file, replaced as a whole. A name whose image
  is gone counts as absent.
* Whoever writes holds the image lock, and so does who removes layers that no image needs: a record
  appears only while all its layers are there.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from . import oci_model as om
from . import ondisk
from . import syscalls as sc
from .errors import ImageError, show
from .layers import LayerStore
from .storefiles import (
    is_temp_name,
    make_dir,
    names_in,
    opened_dir,
    read_file,
    sync_all,
    temp_name,
    write_file,
    write_file_atomic,
)
from .storelock import flock
from .storemodel import Digest, LayerId
from .storetrees import delete_tree

_DIR_NAME: Final = re.compile(rb"[0-9a-f]{64}", re.ASCII)
_ID_PREFIX: Final = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})", re.ASCII)
_RECORD_BYTES_MAX: Final = 16 << 20
#: Digits of an id that a person has to give at least.
PREFIX_MIN: Final = 4


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """A layer of an image: where it is in the store, and how the image came by it.

    *blob* is the descriptor in the image's manifest, *compression* what the blob really was;
    both are None when there was no manifest.
    """

    id: LayerId
    diff_id: Digest
    blob: om.Descriptor | None = None
    compression: str | None = None


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as the store keeps it; layers base first."""

    config_data: bytes
    layers: tuple[ImageLayer, ...]
    manifest: bytes | None = None
    added: float = 0.0  # seconds since the epoch

    @property
    def id(self) -> Digest:
        """The image id."""
        return om.digest_of(self.config_data)

    @property
    def config(self) -> om.Config:
        """What matters of the config."""
        return om.parse_config(self.config_data, f"config of image {self.id}")


class Damaged(NamedTuple):
    """A record that cannot be read, and why."""

    id: Digest
    reason: str


class ImageStore:
    """The image records of an open layer store."""

    def __init__(self, store: LayerStore) -> None:
        self._store = store
        self._where = show(store.home)

    # --- locking ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the image lock; not twice in one thread."""
        self._refuse_read_only()
        with self._opened() as fd:
            flock(fd, fcntl.LOCK_EX)
            yield

    def _refuse_read_only(self) -> None:
        if self._store.read_only:
            raise ImageError(
                f"images of {self._where} cannot be changed: the store is read-only",
                errno=errno.EROFS,
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        with opened_dir(self._store.state_fd, ondisk.IMAGES_NAME) as fd:
            yield fd

    # --- reading ----------------------------------------------------------------------------------

    def ids(self) -> tuple[Digest, ...]:
        """Ids of all images, sorted; of damaged ones too."""
        if self._store.state_fd < 0:
            return ()
        try:
            with self._opened() as fd:
                names = names_in(fd)
        except FileNotFoundError:
            return ()
        found = (name for name in names if _DIR_NAME.fullmatch(name))
        return tuple(Digest(f"sha256:{name.decode('ascii')}") for name in found)

    def load(self, image: Digest) -> ImageRecord:
        """The record of *image*. Raises ImageError when it is absent or damaged, OSError."""
        while True:
            try:
                return self._load(image)
            except FileNotFoundError:
                # A record that is being exchanged vanishes under its reader; a new one is there.
                if not self._is_whole(image):
                    if image in self.ids():
                        raise self._damaged(image, "lacks a file") from None
                    raise ImageError(
                        f"there is no image {image} in {self._where}", errno=errno.ENOENT
                    ) from None

    def _is_whole(self, image: Digest) -> bool:
        try:
            with self._opened() as fd, opened_dir(fd, _dir_name(image)) as inner:
                there = names_in(inner)
        except FileNotFoundError:
            return False
        return {ondisk.IMAGE_CONFIG_NAME, ondisk.IMAGE_RECORD_NAME} <= set(there)

    def _load(self, image: Digest) -> ImageRecord:
        try:
            with self._opened() as fd, opened_dir(fd, _dir_name(image)) as inner:
                record = read_file(inner, ondisk.IMAGE_RECORD_NAME, _RECORD_BYTES_MAX)
                config = read_file(inner, ondisk.IMAGE_CONFIG_NAME, om.DOCUMENT_BYTES_MAX)
                try:
                    manifest = read_file(inner, ondisk.IMAGE_MANIFEST_NAME, om.DOCUMENT_BYTES_MAX)
                except FileNotFoundError:
                    manifest = None
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise self._damaged(image, f"cannot be read ({exc.strerror})") from None
        if om.digest_of(config) != image:
            raise self._damaged(image, "has a config with another digest")
        try:
            return _parse_record(record, config, manifest)
        except (ImageError, ValueError) as exc:
            raise self._damaged(image, f"is malformed ({exc})") from None

    def _damaged(self, image: Digest, what: str) -> ImageError:
        return ImageError(
            f"the record of image {image} in {self._where} {what}: remove the image and import it"
            " again",
            errno=errno.EUCLEAN,
        )

    def all(self) -> tuple[list[ImageRecord], list[Damaged]]:
        """All records that can be read, and the damaged ones."""
        good: list[ImageRecord] = []
        bad: list[Damaged] = []
        for image in self.ids():
            try:
                good.append(self.load(image))
            except ImageError as exc:
                if exc.errno != errno.ENOENT:
                    bad.append(Damaged(image, str(exc)))
        return good, bad

    # --- names ------------------------------------------------------------------------------------

    def names_using(self, layer: LayerId) -> tuple[str, ...]:
        """What to call the images that need *layer*: a name, or the id where there is none.

        Raises ImageError (EUCLEAN) while a damaged record may hide one. needs: image lock.
        """
        good, bad = self.all()
        if bad:
            raise ImageError(
                f"which images need layer {show(layer)} cannot be told: {bad[0].reason}",
                errno=errno.EUCLEAN,
            )
        using = [record.id for record in good if any(each.id == layer for each in record.layers)]
        return tuple((self.names_of(image) or (image,))[0] for image in using)

    def names(self) -> dict[str, Digest]:
        """Names of images that exist."""
        there = set(self.ids())
        return {name: image for name, image in self._all_names().items() if image in there}

    def _all_names(self) -> dict[str, Digest]:
        if self._store.state_fd < 0:
            return {}
        try:
            with self._opened() as fd:
                data = read_file(fd, ondisk.IMAGE_NAMES_NAME, _RECORD_BYTES_MAX)
        except FileNotFoundError:
            return {}
        what = f"{self._where}/.unionfs2/images/names.json"
        try:
            named = om.parse_object(data, what).annotations("names")
            return {
                om.check_name(name): om.check_digest(text, what) for name, text in named.items()
            }
        except ImageError as exc:
            raise ImageError(
                f"{exc}; remove the file and name the images again", errno=errno.EUCLEAN
            ) from None

    def find(self, name: str) -> Digest:
        """Id of the image called *name*, or *name*:latest, or whose id begins with *name*."""
        names = self.names()
        for candidate in (name, f"{name}:latest"):
            if candidate in names:
                return names[candidate]
        prefix = _ID_PREFIX.fullmatch(name)
        found = []
        if prefix:
            found = [image for image in self.ids() if om.hex_of(image).startswith(prefix[1])]
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(om.hex_of(image)[: len(prefix[1]) + 8] for image in found[:8])  # type: ignore[index]
            raise ImageError(f"{show(name)} is the beginning of {len(found)} image ids: {shown}")
        near = difflib.get_close_matches(name, names, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ImageError(
            f"there is no image {show(name)} in {self._where}{hint}", errno=errno.ENOENT
        )

    def names_of(self, image: Digest) -> tuple[str, ...]:
        """Names of *image*, sorted."""
        return tuple(sorted(name for name, owner in self.names().items() if owner == image))

    # --- writing; all of these need: image lock ---------------------------------------------------

    def set_names(self, changes: Mapping[str, Digest | None]) -> None:
        """Give names to images, None takes a name away. needs: image lock."""
        names = self.names()
        for name, image in changes.items():
            if image is None:
                names.pop(name, None)
            else:
                names[om.check_name(name)] = image
        data = om.dump_json({"version": ondisk.IMAGE_RECORD_VERSION, "names": names})
        with self._opened() as fd:
            write_file_atomic(fd, ondisk.IMAGE_NAMES_NAME, data + b"\n")

    def save(self, record: ImageRecord) -> None:
        """Write a record, in place of one of the same image. needs: image lock.

        What is known of the same layers by a manifest is not given up for a record without one.
        Raises ImageError, with nothing changed, when one of its layers is not there any more.
        """
        for layer in record.layers:
            if not self._store.exists(layer.id):
                raise ImageError(
                    f"layer {show(layer.id)} of image {record.id} has just been removed",
                    errno=errno.ESTALE,
                )
        if record.manifest is None and self._knows_more(record):
            return
        files = {
            ondisk.IMAGE_CONFIG_NAME: record.config_data,
            ondisk.IMAGE_RECORD_NAME: _format_record(record),
        }
        if record.manifest is not None:
            files[ondisk.IMAGE_MANIFEST_NAME] = record.manifest
        target = _dir_name(record.id)
        with self._opened() as fd:
            _clear(fd)
            temp = temp_name(target)
            try:
                _write_dir(fd, temp, files)
                _put_in_place(fd, temp, target)
                sc.fsync(fd)
            finally:
                # The old one after an exchange, the new one after a failure, nothing otherwise.
                _discard(fd, temp)

    def _knows_more(self, record: ImageRecord) -> bool:
        try:
            there = self.load(record.id)
        except ImageError:
            return False
        same = [layer.id for layer in there.layers] == [layer.id for layer in record.layers]
        return same and there.manifest is not None

    def drop(self, image: Digest) -> None:
        """Forget *image* and its names. needs: image lock."""
        names = dict.fromkeys(self.names_of(image))
        with self._opened() as fd:
            gone = temp_name(_dir_name(image))
            try:
                sc.rename(_dir_name(image), fd, gone, fd)
            except FileNotFoundError:
                raise ImageError(
                    f"there is no image {image} in {self._where}", errno=errno.ENOENT
                ) from None
            sc.fsync(fd)
            _discard(fd, gone)
        if names:
            self.set_names(names)


def _dir_name(image: Digest) -> bytes:
    return om.hex_of(image).encode("ascii")


def _write_dir(fd: int, name: bytes, files: Mapping[bytes, bytes]) -> None:
    make_dir(fd, name, ondisk.PRIVATE_MODE)
    with opened_dir(fd, name) as inner:
        sync_all([write_file(inner, each, data) for each, data in files.items()])
        sc.fsync(inner)


def _put_in_place(fd: int, temp: bytes, target: bytes) -> None:
    if sc.lstat_or_none(target, fd) is None:
        sc.rename(temp, fd, target, fd)
        return
    try:
        sc.rename(temp, fd, target, fd, sc.RENAME_EXCHANGE)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
        # A file system without the flag: the image is absent for a moment, its layers are not.
        sc.rename(target, fd, temp_name(target), fd)
        sc.rename(temp, fd, target, fd)


def _clear(fd: int) -> None:
    """Remove what a dead process left. needs: image lock, so that nothing is in the making."""
    for name in names_in(fd):
        if is_temp_name(name):
            _discard(fd, name)


def _discard(fd: int, name: bytes) -> None:
    try:
        delete_tree(fd, name)
    except OSError:
        pass  # it is nobody's any more; the next writer tries again


# --- image.json -----------------------------------------------------------------------------------


def _format_record(record: ImageRecord) -> bytes:
    layers: list[dict[str, Any]] = []
    for layer in record.layers:
        entry: dict[str, Any] = {"id": layer.id, "diff_id": layer.diff_id}
        if layer.blob is not None:
            entry["blob"] = om.pointer(layer.blob)
            entry["compression"] = layer.compression
        layers.append(entry)
    value = {
        "version": ondisk.IMAGE_RECORD_VERSION,
        "id": record.id,
        "manifest": om.digest_of(record.manifest) if record.manifest is not None else None,
        "added_ms": int(record.added * 1000),
        "layers": layers,
    }
    return om.dump_json(value) + b"\n"


def _parse_record(data: bytes, config: bytes, manifest: bytes | None) -> ImageRecord:
    fields = om.parse_object(data, "image.json")
    version = fields.number("version")
    if version != ondisk.IMAGE_RECORD_VERSION:
        raise ImageError(f"version {version} is not known to this program")
    declared = fields.text("manifest")
    if declared != (om.digest_of(manifest) if manifest is not None else ""):
        raise ImageError("manifest.json is not the one that belongs to it")
    diff_ids = om.parse_config(config, "config.json").diff_ids
    layers = tuple(_parse_layer(entry) for entry in fields.objects("layers"))
    if tuple(layer.diff_id for layer in layers) != diff_ids:
        raise ImageError("its layers are not those of config.json")
    return ImageRecord(config, layers, manifest, fields.number("added_ms") / 1000)


def _parse_layer(fields: om.Fields) -> ImageLayer:
    blob = fields.object("blob")
    return ImageLayer(
        LayerId(fields.text("id")),
        fields.digest("diff_id"),
        None if blob is None else om.descriptor(blob),
        fields.text("compression") or None,
    )


# --- for those who remove layers -----------------------------------------------------------------


def locked(store: LayerStore) -> contextlib.AbstractContextManager[None]:
    """Hold the image lock of *store*: no image appears or vanishes meanwhile."""
    return ImageStore(store).locked()


def roots(store: LayerStore) -> frozenset[LayerId]:
    """Layers that images of *store* need. Raises ImageError while a damaged record hides some."""
    good, bad = ImageStore(store).all()
    if bad:
        raise ImageError(
            f"which layers images need cannot be told: {bad[0].reason}", errno=errno.EUCLEAN
        )
    return frozenset(layer.id for record in good for layer in record.layers)
