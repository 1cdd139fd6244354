"""Images: chains of layers with a config, that come into a store and leave it.

What holds here:

* An image is named by the digest of its config. That digest, and with it every DiffID, is the
  same after import and export, always: layers are rebuilt from their recorded streams. The digest
  of the manifest is the same too where compressing again gives the same blobs; export_image() says
  which it was.
* A layer that comes in gets its ChainID as id. Two images with a common base share its layers, and
  what is there already is not unpacked again. Two processes that import the same layer at once
  both unpack it, one of them wins, the other throws its own away.
* Order: layers from the base up, each whole or absent; then the record of the image; then its
  names. A crash leaves at most layers that no image needs, which the next import uses and prune
  removes.
* A layer is never held in memory: import reads it out of its archive by offset, export compresses
  it into a file that has no name yet.

Reading and distrusting what others wrote is in ``oci_model`` and ``oci_layout``, writing in
``oci_target``, the records in ``imagerecords``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Union

from . import oci_model as om
from . import ondisk
from .archive.compress import compressor
from .archive.digest import Readable, Writable, chain_id
from .errors import (
    ArchiveError,
    CommittedError,
    DepthError,
    DigestError,
    HasChildrenError,
    ImageError,
    LayerExistsError,
    LayerInUseError,
    OptionError,
    UnionFSError,
    UnknownLayerError,
    show,
)
from .imagerecords import Damaged, ImageLayer, ImageRecord, ImageStore
from .oci_layout import FoundImage, FoundLayer, Layout
from .oci_members import SourceLimits, open_members
from .oci_target import BlobWriter, Target, open_target
from .storemodel import Digest, LayerId

if TYPE_CHECKING:
    from .driver import Driver

Form = Literal["oci", "oci-archive", "docker-archive"]
Compression = Literal["none", "gzip", "zstd"]

FORMS: Final = ("oci", "oci-archive", "docker-archive")
COMPRESSIONS: Final = ("none", "gzip", "zstd")

#: Called with a label ("layer 2/5 0123456789ab"), bytes done and bytes in all (0: unknown).
Progress = Callable[[str, int, int], None]
Source = Union[str, bytes, "os.PathLike[str]", Readable]
Sink = Union[str, bytes, "os.PathLike[str]", Writable]

# How often an import begins anew because somebody removed a layer under it.
_ATTEMPTS: Final = 3
_ISO: Final = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a store. *size* adds up its layers (bytes), None when one is unknown."""

    id: Digest
    names: tuple[str, ...]
    layers: tuple[LayerId, ...]  # base first
    platform: str
    created: float | None  # seconds since the epoch
    size: int | None
    manifest: Digest | None  # as it was imported

    @property
    def layer(self) -> LayerId | None:
        """The uppermost layer; None for an image without layers."""
        return self.layers[-1] if self.layers else None


class Exported(NamedTuple):
    """What export_image() wrote.

    *digest* is that of the manifest. *exact*: it is the manifest that was imported, byte for byte;
    otherwise *reason* says in a sentence why there had to be a new one.
    """

    image_id: Digest
    digest: Digest
    names: tuple[str, ...]
    exact: bool
    reason: str = ""


class Removed(NamedTuple):
    """What remove_image() took away; *image* is None when only a name went."""

    names: tuple[str, ...]
    image: Digest | None
    layers: tuple[LayerId, ...]


# --- looking --------------------------------------------------------------------------------------


def list_images(driver: Driver) -> tuple[Image, ...]:
    """All images whose records can be read, by name; those without a name last."""
    store = ImageStore(driver.store)
    names = store.names()
    found = [_image(driver, record, names) for record in store.all()[0]]
    return tuple(sorted(found, key=lambda image: (not image.names, image.names, image.id)))


def damaged_images(driver: Driver) -> tuple[Damaged, ...]:
    """Images whose records cannot be read, with reasons."""
    return tuple(ImageStore(driver.store).all()[1])


def get_image(driver: Driver, name: str) -> Image:
    """The image called *name*, or whose id begins so. Raises ImageError (ENOENT, EUCLEAN)."""
    store = ImageStore(driver.store)
    return _image(driver, store.load(store.find(name)), store.names())


def image_config(driver: Driver, name: str) -> dict[str, Any]:
    """The whole config of an image, as image-spec's config.md describes it."""
    store = ImageStore(driver.store)
    record = store.load(store.find(name))
    return om.parse_object(record.config_data, f"config of image {record.id}").raw


def names_in(home: str | bytes | os.PathLike[str]) -> list[str]:
    """Names of images in the store *home*, without opening it; [] when it cannot be read."""
    path = os.path.join(
        os.fsencode(home), ondisk.STORE_NAME, ondisk.IMAGES_NAME, ondisk.IMAGE_NAMES_NAME
    )
    try:
        with open(path, "rb") as file:
            names = json.loads(file.read(om.DOCUMENT_BYTES_MAX)).get("names", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return sorted(names) if isinstance(names, dict) else []


def _image(driver: Driver, record: ImageRecord, names: Mapping[str, Digest]) -> Image:
    config = record.config
    image = record.id
    return Image(
        id=image,
        names=tuple(sorted(name for name, owner in names.items() if owner == image)),
        layers=tuple(layer.id for layer in record.layers),
        platform=str(config.platform or ""),
        created=_seconds(config.created),
        size=_size(driver, record),
        manifest=None if record.manifest is None else om.digest_of(record.manifest),
    )


def _size(driver: Driver, record: ImageRecord) -> int | None:
    total = 0
    for layer in record.layers:
        try:
            size = driver.store.layer(layer.id).record.size
        except UnionFSError:
            return None
        if size is None:
            return None
        total += size.bytes
    return total


def _seconds(text: str) -> float | None:
    """Seconds since the epoch of an RFC 3339 time, None for anything else."""
    match = _ISO.fullmatch(text)
    if match is None:
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    try:
        whole = datetime.fromisoformat(match[1] + zone).timestamp()
    except (ValueError, OverflowError):
        return None
    return whole + float(f"0.{match[2] or 0}")


# --- import ---------------------------------------------------------------------------------------


def import_image(
    driver: Driver,
    source: Source,
    *,
    select: Iterable[str] = (),
    names: Iterable[str] = (),
    platform: str | None = None,
    progress: Progress | None = None,
    limits: SourceLimits | None = None,
) -> tuple[Image, ...]:
    """Take images into the store: all of *source*, or those called *select* there.

    *source* is an OCI image layout (directory, or tar of one) or an archive of ``docker save``,
    as a path or as a stream, compressed or not. *names* is what to call the image, in place of
    the names it brings; that takes exactly one image. *platform* ("os/arch[/variant]") chooses
    among several; by default this machine's.

    Everything is verified: digests and sizes of manifest, config and blobs, and the DiffID of
    each layer. Raises ImageError, DigestError, ArchiveError, LimitError, DepthError, OSError;
    then no image has appeared and no name has changed. Layers that were complete by then stay.
    """
    wanted = None if platform is None else om.Platform.parse(platform)
    called = tuple(om.check_name(name) for name in dict.fromkeys(names))
    store = ImageStore(driver.store)
    path = source if not isinstance(source, (str, os.PathLike)) else os.fsencode(source)
    members = open_members(
        path,
        spool=os.path.join(driver.store.state_path, ondisk.STAGING_NAME),
        limits=limits,
        progress=_labelled(progress, "reading the archive"),
    )
    try:
        layout = Layout(members)
        found = layout.images(tuple(select), wanted)
        if called and len(found) != 1:
            raise ImageError(
                f"{layout.name} holds {len(found)} images ({_name_list(found)}): select one of"
                " them to call it by another name"
            )
        records = [_import_one(driver, store, layout, image, progress) for image in found]
    finally:
        members.close()
    given = {
        name: record.id
        for record, image in zip(records, found, strict=True)
        for name in (called or image.names)
    }
    if given:
        with store.locked():
            store.set_names(given)
    all_names = store.names()
    return tuple(_image(driver, record, all_names) for record in records)


def _name_list(found: Sequence[FoundImage]) -> str:
    names = [image.names[0] if image.names else om.hex_of(image.id)[:12] for image in found]
    return ", ".join(names[:8]) + (", ..." if names[8:] else "")


def _labelled(progress: Progress | None, label: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(label, done, total)


def _import_one(
    driver: Driver,
    store: ImageStore,
    layout: Layout,
    image: FoundImage,
    progress: Progress | None,
) -> ImageRecord:
    depth = driver.store.options.layers_max
    if len(image.layers) - 1 > depth:
        raise DepthError(
            f"{layout.name}: an image with {len(image.layers)} layers, and the store allows"
            f" {depth} below one: raise the limit with the storage option layers_max"
        )
    for attempt in range(_ATTEMPTS):
        try:
            layers = _Chain(driver, store, layout, image, progress).run()
            record = ImageRecord(image.config_data, layers, image.manifest, time.time())
            with store.locked():
                store.save(record)
                return store.load(record.id)
        except (ImageError, UnknownLayerError) as exc:
            # Somebody removed a layer after we had found or made it, before our record named it.
            gone = isinstance(exc, UnknownLayerError) or exc.errno == errno.ESTALE
            if not gone or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


class _Chain:
    """Brings the layers of one image into the store, base first."""

    def __init__(
        self,
        driver: Driver,
        store: ImageStore,
        layout: Layout,
        image: FoundImage,
        progress: Progress | None,
    ) -> None:
        self._driver = driver
        self._layout = layout
        self._image = image
        self._progress = progress
        self._known = _layers_by_chain(store)

    def run(self) -> tuple[ImageLayer, ...]:
        """The layers in the store, each with what the manifest says of it."""
        done: list[ImageLayer] = []
        parent: LayerId | None = None
        count = len(self._image.layers)
        for number, layer in enumerate(self._image.layers, 1):
            chain = chain_id([each.diff_id for each in self._image.layers[:number]])
            label = f"layer {number}/{count} {layer.shown}"
            parent, compression = self._bring(layer, parent, chain, label)
            done.append(
                ImageLayer(parent, layer.diff_id, layer.blob, compression if layer.blob else None)
            )
        return tuple(done)

    def _bring(
        self, layer: FoundLayer, parent: LayerId | None, chain: Digest, label: str
    ) -> tuple[LayerId, str]:
        """Id of the layer in the store, made if need be, and how its blob is compressed."""
        progress = _labelled(self._progress, label)
        there = self._find(layer, parent, chain)
        if there is None:
            made = LayerId(om.hex_of(chain))
            stream = self._layout.open_layer(layer, progress)
            try:
                self._driver.import_layer(
                    made,
                    parent,
                    stream,
                    expected=layer.diff_id,
                    chain_id=chain,
                    created_by="image import",
                )
            except LayerExistsError:
                pass  # another process was faster
            except ArchiveError as exc:
                raise _named_after(exc, stream.what) from exc
            else:
                stream.check_blob()
                return made, stream.compression
            there = self._find(layer, parent, chain)
            if there is None:
                raise UnknownLayerError(f"layer {show(made)} has just been removed")
        if layer.blob is not None and om.is_foreign(layer.blob) and not self._layout.has(layer):
            return there, om.LAYER_TYPES[layer.blob.media_type]
        stream = self._layout.open_layer(layer, progress)
        stream.check_blob()
        return there, stream.compression

    def _find(self, layer: FoundLayer, parent: LayerId | None, chain: Digest) -> LayerId | None:
        """A complete layer of the store with this content on this parent."""
        store = self._driver.store
        known = self._known.get(chain)
        if known is not None and known != om.hex_of(chain) and self._suits(known, layer, parent):
            return known
        made = LayerId(om.hex_of(chain))
        if not store.exists(made):
            return None
        if self._suits(made, layer, parent):
            return made
        raise ImageError(
            f"{self._layout.name}: layer {layer.diff_id} belongs into the store as {made}, but"
            " there is another layer with that id: remove or commit it under another id first"
        )

    def _suits(self, known: LayerId, layer: FoundLayer, parent: LayerId | None) -> bool:
        try:
            there = self._driver.store.layer(known)
        except UnknownLayerError:
            return False
        return there.committed and there.parent == parent and there.record.diff_id == layer.diff_id


def _named_after(exc: ArchiveError, what: str) -> ArchiveError:
    """*exc* with the blob in its sentence, which whoever unpacks a stream does not know."""
    text = str(exc)
    return exc if text.startswith(what) else type(exc)(f"{what}: {text}")


def _layers_by_chain(store: ImageStore) -> dict[Digest, LayerId]:
    """ChainID of every layer of every image; layers committed here have ids of their own."""
    found: dict[Digest, LayerId] = {}
    for record in store.all()[0]:
        diff_ids: list[Digest] = []
        for layer in record.layers:
            diff_ids.append(layer.diff_id)
            found[chain_id(diff_ids)] = layer.id
    return found


# --- export ---------------------------------------------------------------------------------------


def export_image(
    driver: Driver,
    name: str,
    target: Sink,
    *,
    form: Form = "oci",
    compression: Compression | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the image *name* (or id) to *target*: a path, or for archives also a stream.

    *form* is "oci" (a layout directory, new or to be added to), "oci-archive" or "docker-archive"
    (what ``docker load`` of any version takes; it is an OCI layout too). *compression* of the
    layers is by default as they were imported, gzip for layers of our own, and none in a docker
    archive. The same image gives the same bytes every time.

    Raises ImageError, OptionError, DigestError (a layer is not what it was when it was imported),
    DamagedLayerError, OSError; then *target* is as it was, unless it is a stream.
    """
    if form not in FORMS:
        raise OptionError(f"form {show(form)} is unknown: use {', '.join(FORMS)}")
    if compression is not None and compression not in COMPRESSIONS:
        raise OptionError(
            f"compression {show(compression)} is unknown: use {', '.join(COMPRESSIONS)}"
        )
    store = ImageStore(driver.store)
    image = store.find(name)
    names = store.names_of(image)
    chosen = next((each for each in (name, f"{name}:latest") if each in names), None)
    record = store.load(image)
    path = target if not isinstance(target, (str, os.PathLike)) else os.fsencode(target)
    if form == "docker-archive" and compression is None:
        compression = "none"
    out = open_target(
        path,
        directory=form == "oci",
        spool=os.path.join(driver.store.state_path, ondisk.STAGING_NAME),
    )
    try:
        export = _Export(driver, record, out, compression, progress)
        return export.run(names if chosen is None else (chosen,), docker=form == "docker-archive")
    finally:
        out.abandon()


class _Export:
    """Writes one image to one target."""

    def __init__(
        self,
        driver: Driver,
        record: ImageRecord,
        out: Target,
        compression: str | None,
        progress: Progress | None,
    ) -> None:
        self._driver = driver
        self._record = record
        self._out = out
        self._compression = compression
        self._progress = progress

    def run(self, names: Sequence[str], *, docker: bool) -> Exported:
        """Write everything."""
        record = self._record
        blobs = self._layers()
        self._out.add(record.config_data)
        manifest, exact, reason = self._manifest(blobs)
        self._out.add(manifest)
        digest = om.digest_of(manifest)
        pointer = om.Descriptor(
            _media_type(manifest), digest, len(manifest), platform=record.config.platform
        )
        entries = [
            replace(pointer, annotations=_annotations(name, docker=docker)) for name in names
        ]
        extra = {}
        if docker:
            extra[om.DOCKER_MANIFEST_FILE] = _docker_manifest(record, blobs, names)
        self._out.finish(entries or [pointer], extra)
        return Exported(record.id, digest, tuple(names), exact, reason)

    def _layers(self) -> list[om.Descriptor]:
        done: dict[tuple[Digest, str], om.Descriptor] = {}
        blobs = []
        like = om.OCI_MANIFEST
        if self._record.manifest is not None:
            like = _media_type(self._record.manifest)
        count = len(self._record.layers)
        for number, layer in enumerate(self._record.layers, 1):
            kind = self._compression or layer.compression or "gzip"
            if kind not in COMPRESSIONS:
                kind = "gzip"  # it came in a form that image-spec does not know
            key = layer.diff_id, kind
            if key not in done:
                label = f"layer {number}/{count} {om.hex_of(layer.diff_id)[:12]}"
                digest, size = self._layer(layer, kind, label)
                done[key] = om.Descriptor(om.layer_type(kind, like), digest, size)
            blobs.append(done[key])
        return blobs

    def _layer(self, layer: ImageLayer, kind: str, label: str) -> tuple[Digest, int]:
        """Write a layer's blob; digest and size of it."""
        total = 0
        size = self._driver.store.layer(layer.id).record.size
        if size is not None:
            total = size.bytes + 1024 * size.inodes  # headers and padding, roughly
        with self._out.blob() as blob:
            diff_id = self._write(layer.id, blob, kind, label, total)
            if diff_id != layer.diff_id:
                raise DigestError(
                    f"layer {show(layer.id)} gives digest {diff_id}, but the image needs"
                    f" {layer.diff_id}: it was changed behind the store's back"
                )
        return blob.digest, blob.size

    def _write(self, layer: LayerId, blob: BlobWriter, kind: str, label: str, total: int) -> Digest:
        with compressor(kind, blob) as packed:
            counted = _CountedWriter(packed, _labelled(self._progress, label), total)
            return self._driver.diff(layer, counted, exact=True)

    def _manifest(self, blobs: Sequence[om.Descriptor]) -> tuple[bytes, bool, str]:
        """Bytes of the manifest, whether they are the imported ones, and if not, why."""
        record = self._record
        if record.manifest is None:
            config = om.Descriptor(om.OCI_CONFIG, record.id, len(record.config_data))
            return om.make_manifest(config, blobs), False, "the image came without a manifest"
        was = [layer.blob.digest if layer.blob else None for layer in record.layers]
        changed = sum(old != new.digest for old, new in zip(was, blobs, strict=True))
        if not changed:
            return record.manifest, True, ""
        reason = (
            f"{changed} of {len(blobs)} layers are compressed otherwise than when they were"
            " imported"
        )
        return om.replace_layers(record.manifest, blobs), False, reason


def _media_type(manifest: bytes) -> str:
    return om.parse_object(manifest, "manifest").text("mediaType") or om.OCI_MANIFEST


class _CountedWriter:
    """Tells *progress* how much went through."""

    def __init__(
        self, out: Writable, progress: Callable[[int, int], None] | None, total: int
    ) -> None:
        self._out = out
        self._progress = progress
        self._total = total
        self._done = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        self._out.write(data)
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))
        return len(data)


def _split_name(name: str) -> tuple[str, str]:
    """(repository, tag) of a name; a bare one is :latest, as everywhere."""
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "latest")


def _annotations(name: str, *, docker: bool) -> dict[str, str]:
    if not docker:
        return {om.REF_NAME: name}
    repository, tag = _split_name(name)
    return {om.FULL_NAME: f"{repository}:{tag}", om.REF_NAME: tag}


def _docker_manifest(
    record: ImageRecord, blobs: Sequence[om.Descriptor], names: Sequence[str]
) -> bytes:
    tags = [":".join(_split_name(name)) for name in names if "@" not in name]
    entry = {
        "Config": om.blob_path(record.id).decode("ascii"),
        "RepoTags": tags or None,
        "Layers": [om.blob_path(blob.digest).decode("ascii") for blob in blobs],
    }
    return om.dump_json([entry])


# --- images of our own ----------------------------------------------------------------------------


def create_image(
    driver: Driver,
    layer: str,
    name: str | None = None,
    *,
    cmd: Sequence[str] | None = None,
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    working_dir: str | None = None,
    user: str | None = None,
    architecture: str | None = None,
    created: float | None = None,
    created_by: str = "unionfs2 image create",
    author: str = "",
    inherit: bool = True,
    progress: Progress | None = None,
) -> Image:
    """Make an image of the committed *layer* and everything below it.

    With *inherit* it takes over the config and history of the image that provides most of its
    lower layers, as ``docker commit`` does; the other arguments change single values, env and
    labels one by one. *created* (seconds since the epoch) is by default SOURCE_DATE_EPOCH from
    the environment, else now. Raises ImageError, CommittedError (a layer is not committed),
    UnknownLayerError, OSError.
    """
    if name is not None:
        om.check_name(name)
    store = ImageStore(driver.store)
    top = driver.store.layer(LayerId(layer))
    chain = (*reversed(top.chain), top.id)
    base = _base_of(store, chain) if inherit else None
    inherited = 0 if base is None else len(base.layers)
    layers: list[ImageLayer] = [] if base is None else list(base.layers)
    for number, each in enumerate(chain[inherited:], inherited + 1):
        label = f"layer {number}/{len(chain)} {each[:12]}"
        layers.append(ImageLayer(each, _diff_id(driver, each, _labelled(progress, label))))
    config = _new_config(
        base,
        [each.diff_id for each in layers],
        when=_rfc3339(_created(created)),
        created_by=created_by,
        platform=_new_platform(architecture, base),
        author=author,
    )
    config["config"] = _run_config(
        config.get("config"),
        {
            "Cmd": None if cmd is None else list(cmd),
            "Entrypoint": None if entrypoint is None else list(entrypoint),
            "WorkingDir": working_dir,
            "User": user,
        },
        env or {},
        labels or {},
    )
    # What came with a manifest keeps what it says of its blobs; there is none for the whole.
    kept = tuple(replace(each, blob=None, compression=None) for each in layers)
    record = ImageRecord(om.dump_json(config), kept, None, time.time())
    with store.locked():
        store.save(record)
        if name is not None:
            store.set_names({name: record.id})
    return _image(driver, record, store.names())


def _base_of(store: ImageStore, chain: Sequence[LayerId]) -> ImageRecord | None:
    """The image that provides most of the lower layers of *chain*; of several the newest."""
    suitable = [
        record
        for record in store.all()[0]
        if record.layers
        and tuple(layer.id for layer in record.layers) == tuple(chain[: len(record.layers)])
    ]
    return max(suitable, key=lambda record: (len(record.layers), record.added), default=None)


def _diff_id(driver: Driver, layer: LayerId, progress: Callable[[int, int], None] | None) -> Digest:
    """DiffID of a committed layer: as recorded, or computed now and recorded."""
    known = driver.store.layer(layer)
    if not known.committed:
        raise CommittedError(
            f"layer {show(layer)} may still change: commit it before it becomes part of an image"
        )
    if known.record.diff_id is not None:
        return known.record.diff_id
    digest = driver.diff(layer, _CountedWriter(_Nowhere(), progress, 0), exact=True)
    driver.store.update_record(layer, diff_id=digest)
    return digest


class _Nowhere:
    """Takes everything, keeps nothing: what counts is the digest."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        return len(data)


def _created(given: float | None) -> float:
    if given is not None:
        return given
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return time.time()
    if not re.fullmatch(r"[0-9]{1,12}", text, re.ASCII):
        raise OptionError(f"SOURCE_DATE_EPOCH={show(text)} is no number of seconds")
    return float(text)


def _rfc3339(seconds: float) -> str:
    try:
        when = datetime.fromtimestamp(seconds, timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise OptionError(f"{seconds} seconds since 1970 are no date") from None
    return when.strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{when.microsecond:06}Z" if when.microsecond else "Z"
    )


def _new_platform(architecture: str | None, base: ImageRecord | None) -> om.Platform:
    if architecture is not None:
        return om.Platform.parse(f"linux/{architecture}")
    if base is not None and base.config.platform is not None:
        return base.config.platform
    return om.Platform.here()


def _new_config(
    base: ImageRecord | None,
    diff_ids: Sequence[Digest],
    *,
    when: str,
    created_by: str,
    platform: om.Platform,
    author: str,
) -> dict[str, Any]:
    config: dict[str, Any] = {}
    known = 0
    if base is not None:
        config = dict(om.parse_object(base.config_data, f"config of image {base.id}").raw)
        known = len(base.layers)
        for key in ("container", "container_config", "id", "parent", "docker_version"):
            config.pop(key, None)  # of the container that the base was made of, not of ours
    history = config.get("history")
    config["history"] = [
        *(history if isinstance(history, list) else []),
        *({"created": when, "created_by": created_by} for _ in diff_ids[known:]),
    ]
    config["created"] = when
    config["os"] = platform.os
    config["architecture"] = platform.architecture
    config.pop("variant", None)
    if platform.variant:
        config["variant"] = platform.variant
    if author:
        config["author"] = author
    config["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    return config


def _run_config(
    old: object,
    values: Mapping[str, object],
    env: Mapping[str, str],
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """How a container is run: what the base says, with single values changed."""
    found: dict[str, Any] = dict(old) if isinstance(old, dict) else {}
    found.update((key, value) for key, value in values.items() if value is not None)
    if env:
        lines = found.get("Env")
        pairs = dict(line.partition("=")[::2] for line in lines or [] if isinstance(line, str))
        pairs.update(env)
        found["Env"] = [f"{key}={value}" for key, value in pairs.items()]
    if labels:
        there = found.get("Labels")
        found["Labels"] = {**(there if isinstance(there, dict) else {}), **labels}
    return found


# --- names and removal ----------------------------------------------------------------------------


def tag_image(driver: Driver, name: str, new: str) -> Image:
    """Give the image *name* the further name *new*, which is taken from any other image."""
    store = ImageStore(driver.store)
    om.check_name(new)
    with store.locked():
        image = store.find(name)
        store.set_names({new: image})
    return get_image(driver, new)


def remove_image(driver: Driver, name: str, *, layers: bool = False) -> Removed:
    """Remove the image *name*; of an image with several names only that name, unless by id.

    With *layers* also its layers, from the top down to the first one that another image or layer
    needs, or that is mounted. Raises ImageError (ENOENT), OSError.
    """
    store = ImageStore(driver.store)
    with store.locked():
        image = store.find(name)
        names = store.names_of(image)
        for called in (name, f"{name}:latest"):
            if called in names and len(names) > 1:
                store.set_names({called: None})
                return Removed((called,), None, ())
        chain: tuple[LayerId, ...] = ()
        if layers:
            chain = tuple(layer.id for layer in store.load(image).layers)
        store.drop(image)
    return Removed(names, image, _remove_layers(driver, chain))


def _remove_layers(driver: Driver, chain: Sequence[LayerId]) -> tuple[LayerId, ...]:
    """Remove layers of *chain* that nobody needs, the last one first."""
    gone: list[LayerId] = []
    for layer in reversed(chain):
        try:
            if not driver.remove(layer):
                break
        except (HasChildrenError, LayerInUseError):
            break
        except ImageError as exc:
            raise ImageError(
                f"the image is removed, its layers are not: {exc}", errno=exc.errno
            ) from exc
        gone.append(layer)
    return tuple(gone)
