"""Images in a source: which there are, what each consists of, and its layers as checked streams.

Three shapes are understood, told apart by the files they have, not by what they are called:

* an OCI image layout (``oci-layout``, ``index.json``, ``blobs/``), as a directory or in a tar;
* the archive of ``docker save`` up to version 24: ``manifest.json`` names a config and layer tars,
  a layer that occurs twice being a link to the first;
* that of newer versions, which is both. Its layout says more and is believed; ``manifest.json``
  adds the names under which Docker knows the images.

Invariants: a config or manifest that leaves this module has the digest and size under which it was
asked for; a layer's stream ends only after the blob's digest and size were compared, and raises
instead of ending when they differ, so whoever reads to the end has read the right bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from . import oci_model as om
from .archive.compress import open_compressed
from .errors import ArchiveError, DigestError, ImageError, show
from .oci_members import CHUNK, Member, Members
from .storemodel import Digest

_LEGACY_CONFIG: Final = re.compile(rb"([0-9a-f]{64})(?:\.json)?", re.ASCII)


class _NotAnImageError(ImageError):
    """Something else that may lie in a layout beside images: a signature, a chart."""


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """A layer of a found image. *blob* is what a manifest says of it, None in docker archives."""

    diff_id: Digest
    member: bytes
    blob: om.Descriptor | None = None

    @property
    def shown(self) -> str:
        """Its name in messages and progress bars."""
        return om.hex_of(self.diff_id)[:12]


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image in a source; *manifest* is None for archives that have none.

    *names* are those it would get, *aliases* others under which it can be asked for.
    """

    names: tuple[str, ...]
    aliases: frozenset[str]
    config_data: bytes
    config: om.Config
    config_type: str
    manifest: bytes | None
    manifest_type: str
    layers: tuple[FoundLayer, ...]

    @property
    def id(self) -> Digest:
        """The image id: the digest of its config."""
        return om.digest_of(self.config_data)


class Layout:
    """The images of one source. Keep *members* open as long as layers are read."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self.name = members.name

    # --- which images -----------------------------------------------------------------------------

    def images(
        self, names: Collection[str] = (), platform: om.Platform | None = None
    ) -> tuple[FoundImage, ...]:
        """Those called *names*, or all; of one for several platforms the one for *platform*.

        None stands for this machine, and for any platform where there is no choice. Raises
        ImageError also when a name is not there, DigestError, ArchiveError, OSError.
        """
        docker = self._docker_entries()
        index = self._document(om.INDEX_FILE)
        if index is None and docker is None:
            raise self._unknown_source()
        if index is not None:
            found = self._from_index(index, names, platform, docker or ())
        else:
            found = [self._from_docker(entry) for entry in self._named(docker or (), names)]
            self._check_platforms(found, platform)
        for image in found:
            for name in image.names:
                om.check_name(name, self.name)
        return tuple(found)

    def _unknown_source(self) -> ImageError:
        if self._members.open(om.DOCKER_REPOSITORIES_FILE) is not None:
            return ImageError(
                f"{self.name} is an archive of Docker before 1.10, without manifest.json: load"
                " and save it with a newer Docker first"
            )
        return ImageError(
            f"{self.name} is no image: it has neither index.json (OCI layout) nor manifest.json"
            " (docker save)"
        )

    def _check_platforms(self, found: Sequence[FoundImage], wanted: om.Platform | None) -> None:
        if wanted is None:
            return
        for image in found:
            if image.config.platform is None or image.config.platform.rank(wanted) is None:
                raise ImageError(
                    f"{self.name}: image {_title(image)} is for"
                    f" {image.config.platform or 'a platform it does not name'}, not for {wanted}"
                )

    # --- documents --------------------------------------------------------------------------------

    def _document(self, name: bytes) -> bytes | None:
        member = self._members.open(name)
        if member is None:
            return None
        return self._read(member, f"{self.name}: {show(name)}")

    @staticmethod
    def _read(member: Member, what: str) -> bytes:
        if member.size > om.DOCUMENT_BYTES_MAX:
            raise ImageError(f"{what} has {member.size} bytes, more than {om.DOCUMENT_BYTES_MAX}")
        return b"".join(iter(lambda: member.stream.read(CHUNK), b""))

    def _blob(self, item: om.Descriptor, what: str) -> bytes:
        """A document by descriptor, checked."""
        what = f"{what} {item.digest}"
        member = self._members.open(om.blob_path(item.digest))
        if member is None:
            raise ImageError(f"{what} is missing")
        _check_size(member, item, what)
        data = self._read(member, what)
        _check_digest(om.digest_of(data), item.digest, what)
        return data

    # --- OCI --------------------------------------------------------------------------------------

    def _from_index(
        self,
        index: bytes,
        names: Collection[str],
        platform: om.Platform | None,
        docker: Sequence[om.DockerEntry],
    ) -> list[FoundImage]:
        version = self._document(om.LAYOUT_FILE)
        if version is None:
            raise ImageError(f"{self.name} has index.json but no oci-layout: no OCI image layout")
        om.parse_layout(version, f"{self.name}: oci-layout")
        entries = om.parse_index(index, f"{self.name}: index.json")
        candidates = [item for item in entries if not item.is_attestation]
        # With names that only manifest.json knows, every image has to be looked at.
        tops = [item for item in candidates if item.aliases & set(names)]
        if not set(names) <= {name for item in tops for name in item.aliases}:
            tops = candidates
        found = self._resolve_all(tops or candidates, platform)
        found = _merge([self._with_docker_names(image, docker) for image in found])
        found = self._select(found, names)
        if not found:
            raise ImageError(f"{self.name} holds no image")
        return found

    def _resolve_all(
        self, tops: Sequence[om.Descriptor], platform: om.Platform | None
    ) -> list[FoundImage]:
        found: list[FoundImage] = []
        refusal: _NotAnImageError | None = None
        for group in _grouped(tops):
            try:
                found += [self._resolve(item, platform) for item in self._best(group, platform)]
            except _NotAnImageError as exc:
                refusal = exc
        if not found and refusal is not None:
            raise refusal
        return found

    def _best(
        self, group: Sequence[om.Descriptor], platform: om.Platform | None
    ) -> Sequence[om.Descriptor]:
        """Of descriptors with one name the suitable one, if they differ by platform."""
        if len({item.digest for item in group}) == 1:
            return group[:1]
        if any(item.platform is None for item in group):
            return group
        return [self._choose(group, platform, "index.json")]

    def _choose(
        self, items: Sequence[om.Descriptor], platform: om.Platform | None, what: str
    ) -> om.Descriptor:
        wanted = platform or om.Platform.here()
        ranked: list[tuple[int, int, om.Descriptor]] = []
        offered = []
        for item in items:
            offer = item.platform or self._platform_of(item)
            if offer is None:
                continue
            offered.append(str(offer))
            rank = offer.rank(wanted)
            if rank is not None:
                ranked.append((rank, len(ranked), item))
        if not ranked:
            there = ", ".join(sorted(set(offered))[:32]) or "nothing with a platform"
            raise ImageError(
                f"{self.name}: {what} has no image for {wanted}, it has {there}: choose one by"
                " platform"
            )
        return min(ranked)[2]

    def _platform_of(self, item: om.Descriptor) -> om.Platform | None:
        if item.media_type not in om.MANIFEST_TYPES:
            return None
        try:
            return self._manifest(item, None).config.platform
        except _NotAnImageError:
            return None

    def _resolve(
        self, item: om.Descriptor, platform: om.Platform | None, depth: int = 0
    ) -> FoundImage:
        """The image that *item* points to, through indexes."""
        if item.media_type not in om.INDEX_TYPES:
            image = self._manifest(item, platform)
            return replace(image, names=item.names, aliases=item.aliases)
        if depth >= om.INDEX_DEPTH_MAX:
            raise ImageError(f"{self.name}: indexes are nested more than {depth} deep")
        what = f"index {item.digest}"
        inner = om.parse_index(self._blob(item, f"{self.name}: index"), f"{self.name}: {what}")
        candidates = [below for below in inner if not below.is_attestation]
        nested = [below for below in candidates if below.media_type in om.INDEX_TYPES]
        if len(candidates) == len(nested) == 1:
            chosen = nested[0]
        else:
            chosen = self._choose(candidates, platform, what)
        image = self._resolve(chosen, platform, depth + 1)
        return replace(image, names=item.names, aliases=item.aliases)

    def _manifest(self, item: om.Descriptor, platform: om.Platform | None) -> FoundImage:
        if item.media_type not in om.MANIFEST_TYPES:
            raise _NotAnImageError(
                f"{self.name}: {item.digest} is of type"
                f" {show(item.media_type) or 'none'}, no image manifest"
            )
        what = f"{self.name}: manifest {item.digest}"
        data = self._blob(item, f"{self.name}: manifest")
        if not om.is_image_manifest(data, what):
            raise _NotAnImageError(f"{what} is no container image but another artifact")
        manifest = om.parse_manifest(data, what)
        config_data = self._blob(manifest.config, f"{self.name}: config")
        config = om.parse_config(config_data, f"{self.name}: config {manifest.config.digest}")
        if len(config.diff_ids) != len(manifest.layers):
            raise ImageError(
                f"{what} has {len(manifest.layers)} layers, but its config names"
                f" {len(config.diff_ids)}"
            )
        image = FoundImage(
            names=(),
            aliases=frozenset(),
            config_data=config_data,
            config=config,
            config_type=manifest.config.media_type,
            manifest=data,
            manifest_type=manifest.media_type,
            layers=tuple(
                FoundLayer(diff_id, om.blob_path(blob.digest), blob)
                for diff_id, blob in zip(config.diff_ids, manifest.layers, strict=True)
            ),
        )
        if platform is not None and config.platform is not None:
            self._check_platforms([image], platform)
        return image

    # --- docker save ------------------------------------------------------------------------------

    def _docker_entries(self) -> tuple[om.DockerEntry, ...] | None:
        data = self._document(om.DOCKER_MANIFEST_FILE)
        if data is None:
            return None
        return om.parse_docker_manifest(data, f"{self.name}: manifest.json")

    def _named(
        self, entries: Sequence[om.DockerEntry], names: Collection[str]
    ) -> Sequence[om.DockerEntry]:
        if not entries:
            raise ImageError(f"{self.name} holds no image")
        if not names:
            return entries
        self._check_names({name for entry in entries for name in entry.names}, names)
        return [entry for entry in entries if set(entry.names) & set(names)]

    def _from_docker(self, entry: om.DockerEntry) -> FoundImage:
        what = f"{self.name}: config {show(entry.config)}"
        member = self._members.open(entry.config, follow=True)
        if member is None:
            raise ImageError(f"{what} is missing")
        data = self._read(member, what)
        named = _LEGACY_CONFIG.fullmatch(entry.config.rpartition(b"/")[2])
        if named:
            _check_digest(om.digest_of(data), Digest(f"sha256:{named[1].decode()}"), what)
        config = om.parse_config(data, what)
        if len(config.diff_ids) != len(entry.layers):
            raise ImageError(
                f"{self.name}: manifest.json names {len(entry.layers)} layers, but config"
                f" {show(entry.config)} names {len(config.diff_ids)}"
            )
        return FoundImage(
            names=entry.names,
            aliases=frozenset(),
            config_data=data,
            config=config,
            config_type=om.OCI_CONFIG,
            manifest=None,
            manifest_type="",
            layers=tuple(
                FoundLayer(diff_id, member)
                for diff_id, member in zip(config.diff_ids, entry.layers, strict=True)
            ),
        )

    def _with_docker_names(self, image: FoundImage, docker: Sequence[om.DockerEntry]) -> FoundImage:
        config = om.hex_of(image.id).encode("ascii")
        names = tuple(
            name
            for entry in docker
            if entry.config.rpartition(b"/")[2].removesuffix(b".json") == config
            for name in entry.names
        )
        if not names:
            return image
        return replace(image, names=names, aliases=image.aliases | set(image.names))

    # --- names ------------------------------------------------------------------------------------

    def _select(self, found: list[FoundImage], names: Collection[str]) -> list[FoundImage]:
        if not names:
            return found
        self._check_names({name for image in found for name in (*image.names, *image.aliases)},
                          names)  # fmt: skip
        return [image for image in found if {*image.names, *image.aliases} & set(names)]

    def _check_names(self, there: set[str], names: Collection[str]) -> None:
        for name in names:
            if name not in there:
                known = ", ".join(show(each) for each in sorted(there)[:32]) or "none with a name"
                raise ImageError(f"{self.name} has no image {show(name)}, it has {known}")

    # --- layers -----------------------------------------------------------------------------------

    def has(self, layer: FoundLayer) -> bool:
        """Whether the layer's blob is in the source."""
        return self._members.open(layer.member, follow=layer.blob is None) is not None

    def open_layer(
        self, layer: FoundLayer, progress: Callable[[int, int], None] | None = None
    ) -> LayerStream:
        """The uncompressed tar of *layer*, checked at its end; one at a time.

        *progress* gets bytes read of the blob and its size.
        """
        what = f"{self.name}: layer {layer.blob.digest if layer.blob else show(layer.member)}"
        member = self._members.open(layer.member, follow=layer.blob is None)
        if member is None:
            hint = ""
            if layer.blob is not None and om.is_foreign(layer.blob):
                hint = ", as its licence asks: fetch it from its own place and add it"
            raise ImageError(f"{what} is not in the archive{hint}")
        if layer.blob is not None:
            _check_size(member, layer.blob, what)
        return LayerStream(member, layer.blob.digest if layer.blob else None, what, progress)


class LayerStream:
    """The uncompressed tar of a layer. Its end is reported only after the blob proved right."""

    def __init__(
        self,
        member: Member,
        digest: Digest | None,
        what: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._blob = _CheckedBlob(member, digest, what, progress)
        #: The blob, for messages.
        self.what = what
        #: How it was compressed: "none", "gzip", "zstd" ...
        self.compression = "none"
        try:
            self._reader, self.compression = open_compressed(self._blob)
        except ArchiveError as exc:
            raise type(exc)(f"{what}: {exc}") from None

    def read(self, size: int = CHUNK, /) -> bytes:
        """At most *size* bytes of the tar. Raises ArchiveError, DigestError, OSError."""
        try:
            data = self._reader.read(size)
        except DigestError:
            raise
        except ArchiveError as exc:
            raise type(exc)(f"{self.what}: {exc}") from None
        if not data and size:
            self._blob.drain()
        return data

    def check_blob(self) -> None:
        """Read and compare the blob without looking into it; for a layer that is there already."""
        self._blob.drain()


class _CheckedBlob:
    """A blob's bytes, hashed on the way and compared at the end."""

    def __init__(
        self,
        member: Member,
        digest: Digest | None,
        what: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._stream = member.stream
        self._size = member.size
        self._expected = digest
        self._what = what
        self._hash = hashlib.sha256()
        self._done = 0
        self._progress = progress

    def read(self, size: int = CHUNK, /) -> bytes:
        data = self._stream.read(CHUNK if size < 0 else size)
        self._hash.update(data)
        self._done += len(data)
        if data and self._progress is not None:
            self._progress(self._done, self._size)
        if not data and size and self._expected is not None:
            found = Digest("sha256:" + self._hash.hexdigest())
            _check_digest(found, self._expected, self._what)
        return data

    def drain(self) -> None:
        """Read what is left, to the comparison."""
        while self.read(CHUNK):
            pass


# --- small pieces ---------------------------------------------------------------------------------


def _title(image: FoundImage) -> str:
    return image.names[0] if image.names else om.hex_of(image.id)[:12]


def _grouped(items: Sequence[om.Descriptor]) -> list[list[om.Descriptor]]:
    groups: dict[tuple[str, ...], list[om.Descriptor]] = {}
    for item in items:
        groups.setdefault(item.names, []).append(item)
    return list(groups.values())


def _merge(found: Sequence[FoundImage]) -> list[FoundImage]:
    """One entry per image, with all its names; the first of several manifests."""
    merged: dict[Digest, FoundImage] = {}
    for image in found:
        known = merged.setdefault(image.id, image)
        if known is not image:
            names = (*known.names, *(name for name in image.names if name not in known.names))
            merged[image.id] = replace(known, names=names, aliases=known.aliases | image.aliases)
    return list(merged.values())


def _check_size(member: Member, item: om.Descriptor, what: str) -> None:
    if member.size != item.size:
        raise DigestError(f"{what} has {member.size} bytes, but {item.size} are declared")


def _check_digest(found: Digest, expected: Digest, what: str) -> None:
    if found != expected:
        raise DigestError(f"{what}: the content has digest {found}, but {expected} is declared")
