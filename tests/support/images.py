"""Image layouts and archives, written by hand from the specifications.

``Files`` is a source as a value: file names to contents (or ``Link`` for a symbolic link). It is
changed freely, also into something wrong, and written as a directory or as a tar archive.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zstandard

OCI: Final = "application/vnd.oci.image."
DOCKER: Final = "application/vnd.docker."
LAYER: Final = OCI + "layer.v1.tar"
REF_NAME: Final = "org.opencontainers.image.ref.name"


@dataclass(frozen=True)
class Link:
    """A symbolic link (or, in an archive, a hard one) to *target*."""

    target: str
    hard: bool = False


Content = bytes | Link


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def to_json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


# --- layers ---------------------------------------------------------------------------------------


def layer_tar(members: Mapping[str, str | bytes | None], *, mtime: int = 1_600_000_000) -> bytes:
    """A tar of *members*: text is a file, None a directory; times and owners are fixed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            info.mode = 0o755 if content is None else 0o644
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                data = content.encode() if isinstance(content, str) else content
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def compress(data: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(data, 9, mtime=1)
    if kind == "zstd":
        return zstandard.ZstdCompressor(level=19).compress(data)
    assert kind == "none"
    return data


BASE: Final = layer_tar({"etc": None, "etc/name": "base", "keep": "kept"})
MIDDLE: Final = layer_tar({"etc/name": "middle", ".wh.keep": ""})
TOP: Final = layer_tar({"etc/more": "top" * 1000, "etc/.wh.name": ""})
THREE: Final = (BASE, MIDDLE, TOP)


# --- sources --------------------------------------------------------------------------------------


class Files(dict[str, Content]):
    """Files of a source by name."""

    def blob(self, data: bytes) -> str:
        """Add a blob; its digest."""
        digest = sha256(data)
        self[blob_name(digest)] = data
        return digest

    def data(self, name: str) -> bytes:
        content = self[name]
        assert isinstance(content, bytes)
        return content

    def document(self, name: str) -> Any:
        return json.loads(self.data(name))

    def write(self, path: Path) -> Path:
        """As a directory."""
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self.items():
            place = path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                place.symlink_to(content.target)
            else:
                place.write_bytes(content)
        return path

    def tar(self, prefix: str = "") -> bytes:
        """As an archive."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for directory in sorted({os.path.dirname(name) for name in self if "/" in name}):
                info = tarfile.TarInfo(prefix + directory)
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            for name, content in self.items():
                info = tarfile.TarInfo(prefix + name)
                if isinstance(content, Link):
                    info.type = tarfile.LNKTYPE if content.hard else tarfile.SYMTYPE
                    info.linkname = content.target
                    archive.addfile(info)
                else:
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return out.getvalue()

    def tar_file(self, path: Path, prefix: str = "") -> Path:
        path.write_bytes(self.tar(prefix))
        return path


@dataclass
class Made:
    """An image added to some files: its documents as values, its digests."""

    config: dict[str, Any]
    manifest: dict[str, Any]
    config_digest: str
    descriptor: dict[str, Any]
    layers: list[bytes] = field(default_factory=list)


def config_of(layers: Iterable[bytes], **more: Any) -> dict[str, Any]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "created": "2024-03-01T10:20:30.123456789Z",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        **more,
    }


def add_image(
    files: Files,
    layers: Sequence[bytes] = THREE,
    *,
    kinds: Sequence[str] | str = "gzip",
    config: Mapping[str, Any] | None = None,
    media: str = OCI,
    annotations: Mapping[str, str] | None = None,
    platform: Mapping[str, str] | None = None,
) -> Made:
    """Add the blobs of an image; the caller puts the descriptor into an index."""
    kinds = [kinds] * len(layers) if isinstance(kinds, str) else kinds
    whole = config_of(layers, **(config or {}))
    config_data = to_json(whole)
    blobs = []
    for layer, kind in zip(layers, kinds, strict=True):
        data = compress(layer, kind)
        blobs.append(
            {"mediaType": _layer_type(media, kind), "digest": files.blob(data), "size": len(data)}
        )
    manifest_type, config_type = {
        OCI: (OCI + "manifest.v1+json", OCI + "config.v1+json"),
        DOCKER: (DOCKER + "distribution.manifest.v2+json", DOCKER + "container.image.v1+json"),
    }[media]
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": {
            "mediaType": config_type,
            "digest": files.blob(config_data),
            "size": len(config_data),
        },
        "layers": blobs,
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    data = to_json(manifest)
    descriptor: dict[str, Any] = {
        "mediaType": manifest["mediaType"],
        "digest": files.blob(data),
        "size": len(data),
    }
    if platform:
        descriptor["platform"] = dict(platform)
    return Made(whole, manifest, sha256(config_data), descriptor, list(layers))


def _layer_type(media: str, kind: str) -> str:
    if media == OCI:
        return LAYER if kind == "none" else f"{LAYER}+{kind}"
    end = "" if kind == "none" else f".{kind}"
    return f"{DOCKER}image.rootfs.diff.tar{end}"


def named(descriptor: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """*descriptor* with a name."""
    return dict(descriptor) if name is None else {**descriptor, "annotations": {REF_NAME: name}}


def put_index(files: Files, descriptors: Iterable[Mapping[str, Any]]) -> None:
    """Write ``index.json`` and ``oci-layout``."""
    files["index.json"] = to_json({"schemaVersion": 2, "manifests": list(descriptors)})
    files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'


def oci(layers: Sequence[bytes] = THREE, *, name: str | None = "latest", **more: Any) -> Files:
    """An OCI layout with one image."""
    files = Files()
    made = add_image(files, layers, **more)
    put_index(files, [named(made.descriptor, name)])
    return files


def manifest_of(files: Files) -> Any:
    """The only manifest of a layout."""
    return files.document(blob_name(files.document("index.json")["manifests"][0]["digest"]))


def rewrite_manifest(files: Files, change: Any) -> None:
    """Let *change* alter the only manifest of a layout (in place), digests following."""
    index = files.document("index.json")
    old = index["manifests"][0]
    manifest = files.document(blob_name(old["digest"]))
    manifest = change(manifest) or manifest
    data = manifest if isinstance(manifest, bytes) else to_json(manifest)
    old["digest"], old["size"] = files.blob(data), len(data)
    files["index.json"] = to_json(index)


def rewrite_config(files: Files, change: Any) -> None:
    """Let *change* alter the only config of a layout (in place), digests following."""

    def into(manifest: dict[str, Any]) -> None:
        config = files.document(blob_name(manifest["config"]["digest"]))
        config = change(config) or config
        data = config if isinstance(config, bytes) else to_json(config)
        manifest["config"].update(digest=files.blob(data), size=len(data))

    rewrite_manifest(files, into)


# --- docker save ----------------------------------------------------------------------------------


def docker_legacy(
    images: Mapping[str, Sequence[bytes]] | None = None, *, config: Mapping[str, Any] | None = None
) -> Files:
    """What ``docker save`` wrote up to version 24: a layer that was there before is a link."""
    files = Files()
    entries = []
    repositories: dict[str, dict[str, str]] = {}
    place: dict[str, str] = {}
    for tag, layers in (images or {"demo/app:1.0": THREE}).items():
        config_data = to_json(config_of(layers, **(config or {})))
        config_name = sha256(config_data)[7:] + ".json"
        files[config_name] = config_data
        names = []
        for number, layer in enumerate(layers):
            legacy = hashlib.sha256(f"{tag} {number}".encode()).hexdigest()
            files[f"{legacy}/VERSION"] = b"1.0"
            files[f"{legacy}/json"] = to_json({"id": legacy})
            first = place.setdefault(sha256(layer), legacy)
            files[f"{legacy}/layer.tar"] = (
                layer if first == legacy else Link(f"../{first}/layer.tar")
            )
            names.append(f"{legacy}/layer.tar")
        entries.append({"Config": config_name, "RepoTags": [tag], "Layers": names})
        repository, _, version = tag.rpartition(":")
        repositories.setdefault(repository, {})[version] = names[-1].split("/")[0]
    files["manifest.json"] = to_json(entries)
    files["repositories"] = to_json(repositories)
    return files


def docker_hybrid(tag: str = "demo/app:1.0", layers: Sequence[bytes] = THREE) -> Files:
    """What newer versions write: an OCI layout, and a manifest.json into the same blobs."""
    files = Files()
    made = add_image(files, layers, kinds="none")
    repository, _, version = tag.rpartition(":")
    full = f"docker.io/{repository}:{version}"
    annotations = {"io.containerd.image.name": full, REF_NAME: version}
    put_index(files, [{**made.descriptor, "annotations": annotations}])
    files["manifest.json"] = to_json(
        [
            {
                "Config": blob_name(made.config_digest),
                "RepoTags": [tag],
                "Layers": [blob_name(sha256(layer)) for layer in layers],
                "LayerSources": {
                    sha256(layer): {"mediaType": LAYER, "size": len(layer), "digest": sha256(layer)}
                    for layer in layers
                },
            }
        ]
    )
    return files
