"""The documents of container images as values: descriptor, index, manifest, config, platform.

What holds here:

* Pure: bytes in, frozen values out, and back. No file is opened, nothing is looked up.
* The documents come from strangers. Every field that is used is checked for type, range and
  alphabet before it becomes part of a value, and a digest that became a ``Digest`` is fit to be a
  file name. What is not used is carried along unread, because the document's own bytes are its
  identity: they are kept and written again, never re-serialised from these values.
* A refusal is one ImageError that names the document, the field and the value.
* A document says one thing only: repeated keys, numbers that are no integers and text that is not
  UTF-8 are refused, because two readers would understand them differently.

The formats are the OCI image-spec (manifest.md, image-index.md, config.md, descriptor.md), Docker's
image manifest version 2 schema 2, and the archive of ``docker save`` (moby, image/spec).

No library is used for OCI itself. What exists for Python speaks to registries; for an image on a
disk the whole format is a handful of JSON objects, and the work lies in distrusting them, which
such libraries leave to their caller. JSON is read by the standard library, zstd by zstandard.
"""

from __future__ import annotations

import hashlib
import json
import platform as machine
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .errors import ImageError, show
from .storemodel import Digest

# Names inside a layout (image-layout.md) and in an archive of "docker save".
LAYOUT_FILE: Final = b"oci-layout"
INDEX_FILE: Final = b"index.json"
BLOBS: Final = b"blobs"
LAYOUT_VERSION: Final = "1.0.0"
DOCKER_MANIFEST_FILE: Final = b"manifest.json"
DOCKER_REPOSITORIES_FILE: Final = b"repositories"

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"

INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIG_TYPES: Final = frozenset({OCI_CONFIG, DOCKER_CONFIG})

#: Layer media types of manifests -> compression that the type promises.
LAYER_TYPES: Final[Mapping[str, str]] = {
    OCI_LAYER: "none",
    f"{OCI_LAYER}+gzip": "gzip",
    f"{OCI_LAYER}+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}
FOREIGN_MARKS: Final = ("nondistributable", "foreign")

REF_NAME: Final = "org.opencontainers.image.ref.name"
#: The full name, which containerd and newer Docker write beside the bare tag of REF_NAME.
FULL_NAME: Final = "io.containerd.image.name"
_REFERENCE_TYPE: Final = "vnd.docker.reference.type"

#: The largest document that is read into memory. Registries accept manifests of 4 MiB.
DOCUMENT_BYTES_MAX: Final = 8 << 20
#: Nesting of one index in another; real ones have one level.
INDEX_DEPTH_MAX: Final = 4
#: Manifests of one index, images of one archive.
ENTRIES_MAX: Final = 4096
NAME_BYTES_MAX: Final = 255

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_DIGEST_LIKE: Final = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+", re.ASCII)
# image-spec, annotations.md, the grammar of org.opencontainers.image.ref.name. Underscores in any
# number, as Docker allows them ("__"); never two dots or slashes in a row.
_NAME: Final = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@/+]|--|__|:/+)[A-Za-z0-9]+)*", re.ASCII)
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SHOWN_MAX: Final = 80


# --- bytes and JSON -------------------------------------------------------------------------------


def digest_of(data: bytes) -> Digest:
    """Digest of a document."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def hex_of(digest: Digest) -> str:
    """The 64 hex digits of *digest*."""
    return digest.partition(":")[2]


def blob_path(digest: Digest) -> bytes:
    """Where a layout keeps the blob *digest*."""
    return b"blobs/sha256/" + hex_of(digest).encode("ascii")


def dump_json(value: object) -> bytes:
    """The bytes under which *value* is stored: the same value gives the same bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parse_object(data: bytes, what: str) -> Fields:
    """The JSON object in *data*; *what* names the document in errors."""
    value = _parse(data, what)
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not a JSON object but {_kind(value)}")
    return Fields(value, what)


def parse_array(data: bytes, what: str) -> list[Fields]:
    """The JSON array of objects in *data*."""
    value = _parse(data, what)
    if not isinstance(value, list):
        raise ImageError(f"{what} is not a JSON array but {_kind(value)}")
    return list(_each_object(value, what))


def _parse(data: bytes, what: str) -> object:
    if len(data) > DOCUMENT_BYTES_MAX:
        raise ImageError(f"{what} has {len(data)} bytes, more than {DOCUMENT_BYTES_MAX}")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise ImageError(f"{what} is nested too deeply to be read") from None
    except ValueError as exc:  # also UnicodeDecodeError, and integers of thousands of digits
        raise ImageError(f"{what} is not valid JSON: {exc}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_shown(key)} occurs twice in one object")
        found[key] = value
    return found


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"{show(text[:_SHOWN_MAX])}{'...' if len(text) > _SHOWN_MAX else ''}"


def _each_object(values: list[object], what: str) -> Iterator[Fields]:
    if len(values) > ENTRIES_MAX:
        raise ImageError(f"{what} has {len(values)} entries, more than {ENTRIES_MAX}")
    for number, value in enumerate(values):
        where = f"{what}, entry {number}"
        if not isinstance(value, dict):
            raise ImageError(f"{where}: an object is expected, found {_kind(value)}")
        yield Fields(value, where)


class Fields:
    """A JSON object whose fields are asked for by name and type; *what* names it in errors.

    JSON null counts as absent, as it does for the programs in Go that write these documents.
    """

    __slots__ = ("raw", "what")

    def __init__(self, raw: dict[str, Any], what: str) -> None:
        self.raw = raw
        self.what = what

    def _get(self, key: str, kind: type, expected: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ImageError(f"{self.what}: {key} must be {expected}, found {_kind(value)}")
        return value

    def _required(self, key: str, value: Any) -> Any:
        if value is None:
            raise ImageError(f"{self.what}: {key} is missing")
        return value

    def text(self, key: str) -> str:
        """A string, empty when absent."""
        value: str = self._get(key, str, "a string") or ""
        return value

    def number(self, key: str) -> int:
        """A size: an integer from 0 to 2**63-1; required."""
        value: int = self._required(key, self._get(key, int, "an integer"))
        if not 0 <= value < 1 << 63:
            raise ImageError(f"{self.what}: {key} must be a size, found {_shown(value)}")
        return value

    def digest(self, key: str) -> Digest:
        """A digest; required."""
        return check_digest(self._required(key, self._get(key, str, "a string")), self.what)

    def object(self, key: str) -> Fields | None:
        """A nested object."""
        value = self._get(key, dict, "an object")
        return None if value is None else Fields(value, f"{self.what}, {key}")

    def objects(self, key: str) -> list[Fields]:
        """An array of objects, empty when absent."""
        return list(_each_object(self._get(key, list, "an array") or [], f"{self.what}, {key}"))

    def texts(self, key: str) -> list[str]:
        """An array of strings, empty when absent."""
        values = self._get(key, list, "an array") or []
        if len(values) > ENTRIES_MAX:
            raise ImageError(f"{self.what}: {key} has more than {ENTRIES_MAX} entries")
        for value in values:
            if not isinstance(value, str):
                raise ImageError(f"{self.what}: {key} must hold strings, found {_kind(value)}")
        return list(values)

    def annotations(self, key: str = "annotations") -> dict[str, str]:
        """A map of strings to strings."""
        value = self._get(key, dict, "an object") or {}
        for name, text in value.items():
            if not isinstance(text, str):
                raise ImageError(
                    f"{self.what}: {key} must hold strings, {_shown(name)} is {_kind(text)}"
                )
        return dict(value)


def check_digest(text: object, what: str) -> Digest:
    """*text* as a digest; anything but sha256 and 64 lower-case hex digits is refused."""
    if isinstance(text, str):
        if _DIGEST.fullmatch(text):
            return Digest(text)
        if _DIGEST_LIKE.fullmatch(text) and not text.startswith("sha256:"):
            algorithm = text.partition(":")[0]
            raise ImageError(f"{what}: digests by {_shown(algorithm)} are not supported")
    raise ImageError(f"{what}: {_shown(text)} is not a digest (sha256: and 64 hex digits)")


def check_name(name: str, what: str = "image name") -> str:
    """*name* if it may name an image, as image-spec's annotations.md spells references."""
    if 0 < len(name) <= NAME_BYTES_MAX and _NAME.fullmatch(name):
        return name
    raise ImageError(
        f"{what}: {_shown(name)} cannot name an image (letters and digits, between them one of "
        "- . _ : @ / +)"
    )


# --- platforms ------------------------------------------------------------------------------------

_MACHINES: Final[Mapping[str, tuple[str, str]]] = {
    "x86_64": ("amd64", ""),
    "amd64": ("amd64", ""),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", ""),
    "arm64": ("arm64", ""),
    "armv8l": ("arm", "v7"),  # a 32-bit process on a 64-bit machine
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "ppc64le": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
    "loongarch64": ("loong64", ""),
    "mips64": ("mips64le", ""),
}
# What a missing variant means; for the rest a missing one matches a missing one.
_DEFAULT_VARIANT: Final[Mapping[str, str]] = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system, machine and its variant, in Go's words."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """The platform written "os/architecture[/variant]"."""
        parts = text.split("/")
        if len(parts) not in {2, 3} or not all(_WORD.fullmatch(part) for part in parts):
            raise ImageError(f"platform {_shown(text)} is not written as OS/ARCHITECTURE[/VARIANT]")
        return cls(*parts)

    @classmethod
    def here(cls) -> Platform:
        """Of this machine."""
        name = machine.machine()
        return cls("linux", *_MACHINES.get(name, (name, "")))

    @classmethod
    def of(cls, fields: Fields | None) -> Platform | None:
        """The platform in a descriptor or config; None when it names none."""
        if fields is None:
            return None
        parts = [fields.text(key) for key in ("os", "architecture", "variant")]
        if not parts[0] or not parts[1]:
            return None
        for part in parts:
            if part and not _WORD.fullmatch(part):
                raise ImageError(f"{fields.what}: {_shown(part)} cannot be part of a platform")
        return cls(*parts)

    def rank(self, wanted: Platform) -> int | None:
        """How well this suits a machine that is *wanted*: 0 exactly, more is worse, None: not.

        A machine runs the older variants of its architecture too ("v7" runs "v6").
        """
        if (self.os, self.architecture) != (wanted.os, wanted.architecture):
            return None
        mine, theirs = self._level(), wanted._level()
        if mine is None or theirs is None:
            return 0 if self.variant == wanted.variant else None
        return theirs - mine if mine <= theirs else None

    def _level(self) -> int | None:
        variant = self.variant or _DEFAULT_VARIANT.get(self.architecture, "")
        match = re.fullmatch(r"v([0-9]{1,2})", variant, re.ASCII)
        return int(match[1]) if match and self.architecture in _DEFAULT_VARIANT else None


# --- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Points to a blob: what it is, its digest and its size."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that its annotations give an image: the full one alone when there is one."""
        name = self.annotations.get(FULL_NAME) or self.annotations.get(REF_NAME)
        return (name,) if name else ()

    @property
    def aliases(self) -> frozenset[str]:
        """Every name that its annotations give an image."""
        names = (self.annotations.get(FULL_NAME), self.annotations.get(REF_NAME))
        return frozenset(name for name in names if name)

    @property
    def is_attestation(self) -> bool:
        """Whether it describes another image instead of being one (BuildKit writes such)."""
        return _REFERENCE_TYPE in self.annotations or (
            self.platform is not None and self.platform.os == "unknown"
        )


def descriptor(fields: Fields) -> Descriptor:
    """The descriptor in *fields* (descriptor.md)."""
    media_type = fields.text("mediaType")
    if len(media_type) > NAME_BYTES_MAX:
        raise ImageError(f"{fields.what}: mediaType {_shown(media_type)} is too long")
    return Descriptor(
        media_type=media_type,
        digest=fields.digest("digest"),
        size=fields.number("size"),
        annotations=fields.annotations(),
        platform=Platform.of(fields.object("platform")),
        artifact_type=fields.text("artifactType"),
    )


def parse_layout(data: bytes, what: str) -> None:
    """Refuse an ``oci-layout`` file of another version."""
    version = parse_object(data, what).text("imageLayoutVersion")
    if version.split(".")[0] != LAYOUT_VERSION.split(".", maxsplit=1)[0]:
        raise ImageError(f"{what}: layout version {_shown(version) or 'none'} is not supported")


def parse_index(data: bytes, what: str) -> tuple[Descriptor, ...]:
    """Descriptors of an image index, or of Docker's manifest list."""
    fields = parse_object(data, what)
    _check_version(fields)
    _check_type(fields, INDEX_TYPES)
    if "manifests" not in fields.raw:
        raise ImageError(f"{what}: manifests is missing")
    return tuple(descriptor(item) for item in fields.objects("manifests"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image consists of: its config and its layers, base first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = OCI_MANIFEST


def is_image_manifest(data: bytes, what: str) -> bool:
    """Whether a manifest describes a container image, not a signature or some other artifact."""
    fields = parse_object(data, what)
    if "fsLayers" in fields.raw:
        return True  # parse_manifest() says what is wrong with it
    config = fields.object("config")
    return config is None or config.text("mediaType") in CONFIG_TYPES


def parse_manifest(data: bytes, what: str) -> Manifest:
    """An image manifest, OCI's or Docker's schema 2."""
    fields = parse_object(data, what)
    if "fsLayers" in fields.raw:
        raise ImageError(f"{what} is of Docker's schema 1, which is not supported: save it anew")
    _check_version(fields)
    _check_type(fields, MANIFEST_TYPES)
    config = fields.object("config")
    if config is None:
        raise ImageError(f"{what}: config is missing")
    if "manifests" in fields.raw:
        raise ImageError(f"{what} claims to be a manifest and an index at once")
    found = Manifest(
        descriptor(config),
        tuple(descriptor(item) for item in fields.objects("layers")),
        fields.text("mediaType") or OCI_MANIFEST,
    )
    for item in found.layers:
        _check_layer_type(item, what)
    return found


def _check_layer_type(item: Descriptor, what: str) -> None:
    if item.media_type not in LAYER_TYPES:
        kind = _shown(item.media_type) or "none"
        raise ImageError(f"{what}: layer {item.digest} is of type {kind}, which is not supported")


def is_foreign(item: Descriptor) -> bool:
    """Whether a layer may be missing from layouts, to be fetched from its own place."""
    return any(mark in item.media_type for mark in FOREIGN_MARKS)


def _check_version(fields: Fields) -> None:
    if "schemaVersion" in fields.raw and fields.number("schemaVersion") != 2:
        raise ImageError(f"{fields.what}: schemaVersion must be 2")


def _check_type(fields: Fields, expected: frozenset[str]) -> None:
    # image-spec, manifest.md: mediaType may be left out, but must agree when it is there.
    kind = fields.text("mediaType")
    if kind and kind not in expected:
        raise ImageError(f"{fields.what}: mediaType {_shown(kind)} is not expected here")


@dataclass(frozen=True, slots=True)
class Config:
    """What of an image's config matters to a store. The rest stays in the document's bytes."""

    platform: Platform | None
    diff_ids: tuple[Digest, ...]
    created: str


def parse_config(data: bytes, what: str) -> Config:
    """An image config (config.md), also Docker's."""
    fields = parse_object(data, what)
    rootfs = fields.object("rootfs")
    if rootfs is None:
        raise ImageError(f"{what}: rootfs is missing")
    if rootfs.text("type") != "layers":
        raise ImageError(f"{what}: rootfs type {_shown(rootfs.text('type')) or 'none'} is unknown")
    created = fields.text("created")
    if len(created) > _SHOWN_MAX or not created.isprintable():
        raise ImageError(f"{what}: created is not a time")
    diff_ids = tuple(check_digest(text, rootfs.what) for text in rootfs.texts("diff_ids"))
    return Config(Platform.of(fields), diff_ids, created)


@dataclass(frozen=True, slots=True)
class DockerEntry:
    """One image in the manifest.json of "docker save": member names, base layer first."""

    config: bytes
    layers: tuple[bytes, ...]
    names: tuple[str, ...]


def parse_docker_manifest(data: bytes, what: str) -> tuple[DockerEntry, ...]:
    """The manifest.json of a "docker save" archive."""
    found = []
    for fields in parse_array(data, what):
        config = fields.text("Config")
        if not config:
            raise ImageError(f"{fields.what}: Config is missing")
        found.append(
            DockerEntry(
                check_member(config, fields.what),
                tuple(check_member(text, fields.what) for text in fields.texts("Layers")),
                tuple(fields.texts("RepoTags")),
            )
        )
    return tuple(found)


def check_member(text: str, what: str) -> bytes:
    """*text* as the name of an archive member: relative, and no component leads elsewhere."""
    try:
        name = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ImageError(f"{what}: {_shown(text)} is not a file name") from None
    parts = name.split(b"/")
    if len(name) > 4096 or b"\0" in name or any(part in {b"", b".", b".."} for part in parts):
        raise ImageError(f"{what}: {_shown(text)} leads out of the archive, or names nothing in it")
    return name


# --- documents that we write ----------------------------------------------------------------------


def layer_type(compression: str, like: str = OCI_MANIFEST) -> str:
    """Media type of a layer so compressed in a manifest of type *like*."""
    for name, kind in LAYER_TYPES.items():
        docker = name.startswith("application/vnd.docker.")
        if kind == compression and docker == (like == DOCKER_MANIFEST):
            return name
    raise ValueError(compression)


def make_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """A new OCI manifest."""
    return dump_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": pointer(config),
            "layers": [pointer(item) for item in layers],
        }
    )


def replace_layers(manifest: bytes, layers: Sequence[Descriptor]) -> bytes:
    """The manifest with other layer blobs; annotations and whatever else it says stay."""
    raw = parse_object(manifest, "manifest").raw
    kept = raw.get("layers") or []
    raw["layers"] = [
        {**pointer(item), **({"annotations": notes} if (notes := _notes(old)) else {})}
        for item, old in zip(layers, kept, strict=True)
    ]
    return dump_json(raw)


# Annotations that describe the compressed bytes; wrong for any other compression of the layer.
_BLOB_NOTES: Final = (
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
    "containerd.io/snapshot/stargz/",
    "io.containers.estargz.",
)


def _notes(old: Mapping[str, Any]) -> dict[str, str]:
    notes = old.get("annotations") or {}
    return {key: text for key, text in notes.items() if not key.startswith(_BLOB_NOTES)}


def pointer(item: Descriptor) -> dict[str, object]:
    """*item* as JSON."""
    found: dict[str, object] = {
        "mediaType": item.media_type,
        "digest": item.digest,
        "size": item.size,
    }
    if item.annotations:
        found["annotations"] = dict(item.annotations)
    if item.platform is not None:
        platform = {"os": item.platform.os, "architecture": item.platform.architecture}
        if item.platform.variant:
            platform["variant"] = item.platform.variant
        found["platform"] = platform
    return found
