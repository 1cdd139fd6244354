"""Sources of images that are wrong on purpose: each is refused in one sentence, and leaves nothing.

Every case is tried as a directory and as an archive where both can exist. Afterwards there is no
image, no name, nothing in staging, no file beside the store, and a good image still comes in.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import images as made
from tests.support.images import Files, Link
from unionfs2 import images, oci_model
from unionfs2.driver import Driver
from unionfs2.errors import ArchiveError, DigestError, ImageError, LimitError, UnionFSError
from unionfs2.oci_members import SourceLimits

pytestmark = pytest.mark.needs("root")

HERE: Final = "linux/amd64"
ZEROS: Final = "sha256:" + "0" * 64


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    with Driver.open(tmp_path / "store") as opened:
        yield opened


# --- cases: change a good layout into a bad one ---------------------------------------------------

Change = Callable[[Files], Any]
CASES: dict[str, tuple[Change, type[UnionFSError], str]] = {}


def case(name: str, error: type[UnionFSError], text: str) -> Callable[[Change], Change]:
    def keep(change: Change) -> Change:
        assert name not in CASES
        CASES[name] = change, error, text
        return change

    return keep


def manifest_case(name: str, error: type[UnionFSError], text: str, **fields: Any) -> None:
    case(name, error, text)(
        lambda files: made.rewrite_manifest(files, lambda manifest: manifest.update(fields))
    )


def config_case(name: str, error: type[UnionFSError], text: str, **fields: Any) -> None:
    case(name, error, text)(
        lambda files: made.rewrite_config(files, lambda config: config.update(fields))
    )


def index_case(name: str, error: type[UnionFSError], text: str, value: Any) -> None:
    def change(files: Files) -> None:
        files["index.json"] = value if isinstance(value, bytes) else made.to_json(value)

    case(name, error, text)(change)


def first_layer(files: Files) -> str:
    index = files.document("index.json")
    manifest = files.document(made.blob_name(index["manifests"][0]["digest"]))
    return made.blob_name(manifest["layers"][0]["digest"])


def with_layer(name: str, error: type[UnionFSError], text: str, **fields: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0].update(fields)

    case(name, error, text)(lambda files: made.rewrite_manifest(files, change))


def with_descriptor(name: str, error: type[UnionFSError], text: str, **fields: Any) -> None:
    def change(files: Files) -> None:
        index = files.document("index.json")
        index["manifests"][0].update(fields)
        files["index.json"] = made.to_json(index)

    case(name, error, text)(change)


# JSON itself.
index_case("index empty", ImageError, "not valid JSON", b"")
index_case("index no JSON", ImageError, "not valid JSON", b"{]")
index_case("index an array", ImageError, "not a JSON object but an array", [])
index_case("index null", ImageError, "not a JSON object but null", None)
index_case("index a number", ImageError, "but a number", 7)
index_case("index UTF-16", ImageError, "not valid JSON", '{"manifests": []}'.encode("utf-16"))
index_case("index Latin-1", ImageError, "not valid JSON", b'{"x": "\xe4"}')
index_case("index nested deeply", ImageError, "JSON|deeply", b'{"a":' * 100_000)
index_case("index arrays nested deeply", ImageError, "JSON|deeply", b"[" * 200_000)
index_case("index NaN", ImageError, "NaN is not a JSON number", b'{"manifests": [], "x": NaN}')
index_case("index long number", ImageError, "not valid JSON", b'{"x": ' + b"9" * 5000 + b"}")
index_case("index key twice", ImageError, "occurs twice", b'{"manifests": [], "manifests": []}')
index_case("index huge", ImageError, "more than", b" " * (oci_model.DOCUMENT_BYTES_MAX + 1))
index_case("index without manifests", ImageError, "manifests is missing", {"schemaVersion": 2})
index_case("index with nothing in it", ImageError, "holds no image", {"manifests": []})
index_case("index manifests a string", ImageError, "must be an array", {"manifests": "all"})
index_case("index manifests numbers", ImageError, "an object is expected", {"manifests": [1]})
index_case("index of schema 3", ImageError, "must be 2", {"schemaVersion": 3, "manifests": []})
index_case(
    "index of a manifest's type",
    ImageError,
    "not expected here",
    {"mediaType": made.OCI + "manifest.v1+json", "manifests": []},
)
index_case("index with too many", ImageError, "more than 4096", {"manifests": [{}] * 5000})

# Descriptors in the index.
with_descriptor("digest a path", ImageError, "is not a digest", digest="sha256:../../../etc/passwd")
with_descriptor("digest absolute", ImageError, "is not a digest", digest="/etc/passwd")
with_descriptor("digest upper case", ImageError, "not a digest", digest="sha256:" + "A" * 64)
with_descriptor("digest too short", ImageError, "is not a digest", digest="sha256:" + "a" * 63)
with_descriptor("digest with newline", ImageError, "not a digest", digest=ZEROS + "\n")
with_descriptor("digest other digits", ImageError, "not a digest", digest="sha256:" + "٣" * 64)
with_descriptor("digest md5", ImageError, "md5 are not supported", digest="md5:" + "0" * 32)
with_descriptor("digest sha512", ImageError, "sha512 are not", digest="sha512:" + "0" * 128)
with_descriptor("digest a number", ImageError, "must be a string", digest=5)
with_descriptor("digest null", ImageError, "digest is missing", digest=None)
with_descriptor("manifest absent", ImageError, "is missing", digest=ZEROS)
with_descriptor("size wrong", DigestError, "are declared", size=3)
with_descriptor("size negative", ImageError, "must be a size", size=-1)
with_descriptor("size huge", ImageError, "must be a size", size=1 << 64)
with_descriptor("size a float", ImageError, "must be an integer", size=1.5)
with_descriptor("size a boolean", ImageError, "must be an integer", size=True)
with_descriptor("size text", ImageError, "must be an integer", size="12")
with_descriptor("size missing", ImageError, "size is missing", size=None)
with_descriptor("annotations a list", ImageError, "must be an object", annotations=["x"])
with_descriptor("annotations numbers", ImageError, "hold strings", annotations={"a": 1})
with_descriptor("platform text", ImageError, "must be an object", platform="linux")
with_descriptor(
    "platform odd", ImageError, "part of a platform", platform={"os": "li/nux", "architecture": "x"}
)
with_descriptor("type unknown", ImageError, "no image manifest", mediaType="text/plain")
with_descriptor("type endless", ImageError, "too long", mediaType="x" * 5000)
with_descriptor("type of an index", ImageError, "not expected", mediaType=oci_model.OCI_INDEX)
for _number, _bad in enumerate(["../x", "/x", "a b", "x\n", "-x", "", "a//../b", "x" * 300, "é"]):
    if _bad:
        with_descriptor(
            f"name {_number}", ImageError, "cannot name an image", annotations={made.REF_NAME: _bad}
        )

# Manifests.
manifest_case("manifest of schema 1", ImageError, "schema 1", fsLayers=[], schemaVersion=1)
manifest_case("manifest of schema 7", ImageError, "must be 2", schemaVersion=7)
manifest_case("manifest and index", ImageError, "at once", manifests=[])
manifest_case("manifest of index type", ImageError, "not expected", mediaType=oci_model.OCI_INDEX)
manifest_case("manifest without config", ImageError, "config is missing", config=None)
manifest_case("manifest config text", ImageError, "must be an object", config="x")
manifest_case("manifest without layers", ImageError, "has 0 layers", layers=None)
manifest_case("manifest layers an object", ImageError, "must be an array", layers={})
manifest_case(
    "manifest of an artifact",
    ImageError,
    "another artifact",
    config={"mediaType": "application/x-chart", "digest": ZEROS, "size": 1},
)
manifest_case(
    "config absent",
    ImageError,
    "config .* is missing",
    config={"mediaType": oci_model.OCI_CONFIG, "digest": ZEROS, "size": 1},
)
case("manifest an array", ImageError, "not a JSON object")(
    lambda files: made.rewrite_manifest(files, lambda _: b"[]")
)

# Layers in manifests.
with_layer("layer digest a path", ImageError, "is not a digest", digest="sha256:../../index.json")
with_layer("layer absent", ImageError, "is not in the archive", digest=ZEROS)
with_layer("layer size wrong", DigestError, "are declared", size=1)
with_layer("layer size negative", ImageError, "must be a size", size=-5)
with_layer("layer encrypted", ImageError, "not supported", mediaType=made.LAYER + "+encrypted")
with_layer("layer without a type", ImageError, "type none", mediaType="")
with_layer(
    "layer not distributed",
    ImageError,
    "as its licence asks",
    mediaType=made.OCI + "layer.nondistributable.v1.tar+gzip",
    digest=ZEROS,
)

# Configs.
config_case("config without rootfs", ImageError, "rootfs is missing", rootfs=None)
config_case("config rootfs text", ImageError, "must be an object", rootfs="/")
config_case("config rootfs type", ImageError, "is unknown", rootfs={"type": "vhd", "diff_ids": []})
config_case("config no layers", ImageError, "names 0", rootfs={"type": "layers", "diff_ids": None})
config_case(
    "config diff_ids numbers",
    ImageError,
    "hold strings",
    rootfs={"type": "layers", "diff_ids": [1]},
)
config_case(
    "config diff_id a path",
    ImageError,
    "is not a digest",
    rootfs={"type": "layers", "diff_ids": ["sha256:../../../x"] * 3},
)
config_case(
    "config other diff_ids",
    DigestError,
    "has digest",
    rootfs={"type": "layers", "diff_ids": [ZEROS] * 3},
)
config_case("config time a bomb", ImageError, "is not a time", created="x" * 5000)
config_case("config time with escape", ImageError, "is not a time", created="\x1b[2J")
config_case("config os a path", ImageError, "part of a platform", os="../..")
config_case("config os a number", ImageError, "must be a string", os=1)
case("config an array", ImageError, "not a JSON object")(
    lambda files: made.rewrite_config(files, lambda _: b"[1]")
)


@case("no oci-layout", ImageError, "no oci-layout")
def _no_layout(files: Files) -> None:
    del files["oci-layout"]


@case("layout of version 2", ImageError, "version 2.0.0 is not supported")
def _layout_version(files: Files) -> None:
    files["oci-layout"] = b'{"imageLayoutVersion": "2.0.0"}'


@case("nothing at all", ImageError, "is no image")
def _nothing(files: Files) -> None:
    files.clear()
    files["README"] = b"hello"


@case("Docker before 1.10", ImageError, "before 1.10")
def _old_docker(files: Files) -> None:
    files.clear()
    files["repositories"] = b"{}"


@case("manifest changed", DigestError, "the content has digest")
def _changed_manifest(files: Files) -> None:
    name = made.blob_name(files.document("index.json")["manifests"][0]["digest"])
    files[name] = files.data(name).replace(b"sha256:", b"sha257:", 1)


@case("config changed", DigestError, "the content has digest")
def _changed_config(files: Files) -> None:
    manifest = files.document(
        made.blob_name(files.document("index.json")["manifests"][0]["digest"])
    )
    name = made.blob_name(manifest["config"]["digest"])
    files[name] = files.data(name).replace(b"/bin/sh", b"/bin/su")


@case("layer changed in the middle", ArchiveError, "layer sha256")
def _changed_layer(files: Files) -> None:
    name = first_layer(files)
    data = bytearray(files.data(name))
    data[len(data) // 2] ^= 0xFF
    files[name] = bytes(data)


@case("layer cut short", DigestError, "are declared")
def _cut_layer(files: Files) -> None:
    name = first_layer(files)
    files[name] = files.data(name)[:-9]


@case("layer with another name's content", DigestError, "declared")
def _other_layer(files: Files) -> None:
    name = first_layer(files)
    files[name] = gzip.compress(made.TOP, mtime=1)[: len(files.data(name))].ljust(
        len(files.data(name)), b"\0"
    )


@case("layer a symbolic link", ImageError, "is a symbolic link to")
def _linked_layer(files: Files) -> None:
    files[first_layer(files)] = Link("/etc/passwd")


@case("layer a link to another blob", ImageError, "only a regular file can be trusted")
def _linked_inside(files: Files) -> None:
    name = first_layer(files)
    files["elsewhere"] = files[name]
    files[name] = Link("../../elsewhere")


@case("index a symbolic link", ImageError, "is a symbolic link to")
def _linked_index(files: Files) -> None:
    files["real.json"] = files["index.json"]
    files["index.json"] = Link("real.json")


@case("index refers to itself", ImageError, "nested more than|declared")
def _circle(files: Files) -> None:
    # No index can name its own digest; eight different ones in a row are refused as well.
    inner = files.document("index.json")["manifests"][0]
    for _ in range(8):
        data = made.to_json({"schemaVersion": 2, "manifests": [inner]})
        inner = {
            "mediaType": oci_model.OCI_INDEX, "digest": files.blob(data), "size": len(data)
        }  # fmt: skip
    made.put_index(files, [inner])


@case("layer no tar", ArchiveError, "layer sha256:.*checksum")
def _no_tar(files: Files) -> None:
    garbage = b"this is no tar archive" * 100
    _replace_layer(files, garbage)


@case("layer an empty stream", ArchiveError, "layer sha256:")
def _empty_layer(files: Files) -> None:
    _replace_layer(files, b"")


@case("layer climbing out", ArchiveError, "layer sha256:.*escaped")
def _climbing(files: Files) -> None:
    _replace_layer(files, made.layer_tar({"../../../../escaped": "x"}))


@case("layer with garbage behind gzip", ArchiveError, "layer sha256:.*damaged")
def _garbage(files: Files) -> None:
    _replace_blob(files, gzip.compress(made.BASE, mtime=1) + b"garbage behind")


@case("layer gzip without its end", UnionFSError, "cut short|damaged")
def _truncated_gzip(files: Files) -> None:
    _replace_blob(files, gzip.compress(made.BASE, mtime=1)[:-8])


def _replace_layer(files: Files, layer: bytes) -> None:
    """A consistent image whose first layer is *layer*."""
    files.clear()
    files.update(made.oci([layer, made.TOP]))


def _replace_blob(files: Files, blob: bytes) -> None:
    """Another blob for the first layer, which keeps its diff_id."""
    digest = files.blob(blob)

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0].update(digest=digest, size=len(blob))

    made.rewrite_manifest(files, change)


# --- the trial ------------------------------------------------------------------------------------


def assert_nothing_left(driver: Driver, tmp_path: Path) -> None:
    state = tmp_path / "store" / ".unionfs2"
    assert images.list_images(driver) == ()
    assert images.damaged_images(driver) == ()
    assert list((state / "staging").iterdir()) == []
    assert list((state / "trash").iterdir()) == []
    assert [name for name in os.listdir(state / "images") if name != "names.json"] == []
    assert images.names_in(tmp_path / "store") == []
    assert driver.check() == []
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "source", "good"}


def refuse(
    driver: Driver, tmp_path: Path, source: Any, error: type[UnionFSError], text: str, **more: Any
) -> None:
    with pytest.raises(error, match=text) as caught:
        images.import_image(driver, source, **more)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.isprintable()
    assert len(sentence) < 600
    assert_nothing_left(driver, tmp_path)
    good = made.oci(name="good").write(tmp_path / "good")
    assert images.import_image(driver, good)[0].names == ("good",)


@pytest.mark.parametrize("shape", ["directory", "archive"])
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_layout_is_refused_in_one_sentence(
    driver: Driver, tmp_path: Path, name: str, shape: str
) -> None:
    change, error, text = CASES[name]
    files = made.oci(name=None)
    change(files)
    source = tmp_path / "source"
    if shape == "directory":
        files.write(source)
    else:
        files.tar_file(source)
    refuse(driver, tmp_path, source, error, text)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 80


# --- docker archives ------------------------------------------------------------------------------

DOCKER_CASES: Final[dict[str, tuple[Callable[[list[Any]], Any], str]]] = {
    "an object": (lambda entries: {"images": entries}, "not a JSON array"),
    "nothing": (lambda _: [], "holds no image"),
    "numbers": (lambda _: [1, 2], "an object is expected"),
    "no Config": (lambda entries: [{**entries[0], "Config": None}], "Config is missing"),
    "Config a number": (lambda entries: [{**entries[0], "Config": 3}], "must be a string"),
    "Config outside": (
        lambda entries: [{**entries[0], "Config": "../../etc/passwd"}],
        "leads out of the archive",
    ),
    "Config absolute": (
        lambda entries: [{**entries[0], "Config": "/etc/passwd"}],
        "leads out of the archive",
    ),
    "Config absent": (lambda entries: [{**entries[0], "Config": "x.json"}], "is missing"),
    "Config surrogates": (lambda entries: [{**entries[0], "Config": "\ud800"}], "not a file name"),
    "Config with NUL": (lambda entries: [{**entries[0], "Config": "a\0b"}], "leads out"),
    "Layers text": (lambda entries: [{**entries[0], "Layers": "x"}], "must be an array"),
    "Layers numbers": (lambda entries: [{**entries[0], "Layers": [1, 2, 3]}], "hold strings"),
    "too few Layers": (lambda entries: [{**entries[0], "Layers": []}], "names 0 layers"),
    "Layers outside": (
        lambda entries: [{**entries[0], "Layers": ["../../x"] * 3}],
        "leads out of the archive",
    ),
    "Layers absent": (lambda entries: [{**entries[0], "Layers": ["a", "b", "c"]}], "is not in"),
    "Layers swapped": (
        lambda entries: [{**entries[0], "Layers": entries[0]["Layers"][::-1]}],
        "has digest",
    ),
    "RepoTags text": (lambda entries: [{**entries[0], "RepoTags": "x"}], "must be an array"),
    "RepoTags odd": (
        lambda entries: [{**entries[0], "RepoTags": ["../../x"]}],
        "cannot name an image",
    ),
}


@pytest.mark.parametrize("shape", ["directory", "archive"])
@pytest.mark.parametrize("name", DOCKER_CASES)
def test_a_hostile_docker_archive_is_refused(
    driver: Driver, tmp_path: Path, name: str, shape: str
) -> None:
    change, text = DOCKER_CASES[name]
    files = made.docker_legacy()
    files["manifest.json"] = made.to_json(change(files.document("manifest.json")))
    source = tmp_path / "source"
    files.write(source) if shape == "directory" else files.tar_file(source)
    refuse(driver, tmp_path, source, UnionFSError, text)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("/etc/passwd", "leads out of it"),
        ("../../../../../etc/passwd", "leads out of it"),
        ("../../store/secret", "leads out of it"),
        ("layer.tar", "too many"),
    ],
)
@pytest.mark.parametrize("shape", ["directory", "archive"])
def test_a_layer_link_stays_inside(
    driver: Driver, tmp_path: Path, target: str, text: str, shape: str
) -> None:
    files = made.docker_legacy()
    name = files.document("manifest.json")[0]["Layers"][0]
    files[name] = Link(target)
    source = tmp_path / "source"
    files.write(source) if shape == "directory" else files.tar_file(source)
    refuse(driver, tmp_path, source, ImageError, text)


def test_a_config_named_by_another_digest_is_refused(driver: Driver, tmp_path: Path) -> None:
    files = made.docker_legacy()
    entries = files.document("manifest.json")
    wrong = "0" * 64 + ".json"
    files[wrong] = files[entries[0]["Config"]]
    entries[0]["Config"] = wrong
    files["manifest.json"] = made.to_json(entries)
    refuse(driver, tmp_path, files.tar_file(tmp_path / "source"), DigestError, "is declared")


# --- directories that hold other things than files ------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket-like device"])
@pytest.mark.parametrize("name", ["index.json", "oci-layout", "blob"])
def test_only_regular_files_are_read(driver: Driver, tmp_path: Path, kind: str, name: str) -> None:
    files = made.oci()
    place = tmp_path / "source" / (first_layer(files) if name == "blob" else name)
    files.write(tmp_path / "source")
    place.unlink()
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    else:
        os.mknod(place, 0o20666, os.makedev(1, 5))
    refuse(driver, tmp_path, tmp_path / "source", ImageError, "not a regular file")


def test_a_linked_directory_in_a_layout_is_refused(driver: Driver, tmp_path: Path) -> None:
    files = made.oci()
    files.write(tmp_path / "source")
    (tmp_path / "source" / "blobs").rename(tmp_path / "source" / "elsewhere")
    (tmp_path / "source" / "blobs").symlink_to("elsewhere")
    refuse(driver, tmp_path, tmp_path / "source", ImageError, "is not a directory itself")


# --- archives that are wrong themselves -----------------------------------------------------------


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _no_end(data: bytes) -> bytes:
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512)


def _bad_header(data: bytes) -> bytes:
    at = data.index(b"ustar", 512)
    return data[: at - 100] + b"\xff" + data[at - 99 :]


def _size_of(data: bytes, name: str, size: bytes) -> bytes:
    """The archive with another size in the header of *name*, its checksum right."""
    at = data.index(name.encode() + b"\0")
    block = bytearray(data[at : at + 512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


ARCHIVES: Final[dict[str, tuple[Callable[[bytes], bytes], str]]] = {
    "empty": (lambda _: b"", "cut short"),
    "no tar": (lambda _: b"no archive at all" * 100, "checksum"),
    "one block": (lambda data: data[:512], "cut short"),
    "cut": (_cut, "cut short|ends before"),
    "no end": (_no_end, "cut short"),
    "bad header": (_bad_header, "checksum"),
    "zip": (lambda _: b"PK\x03\x04" + bytes(2000), "checksum"),
    "gzip cut": (lambda data: gzip.compress(data)[:-20], "cut short|damaged"),
    "gzip of nothing": (lambda _: gzip.compress(b""), "cut short"),
    "gzip changed": (lambda data: gzip.compress(data)[:200] + b"\0" * 500, "damaged|cut"),
    "zstd garbage": (lambda _: b"\x28\xb5\x2f\xfd" + b"\xff" * 1000, "damaged|cut"),
    "size beyond the end": (
        lambda data: _size_of(data, "index.json", b"77777777777\0"),
        "claims",
    ),
    "size negative": (
        lambda data: _size_of(data, "index.json", b"\xff" * 12),
        "claims|size",
    ),
    "size no number": (lambda data: _size_of(data, "index.json", b"lots of it\0\0"), "no octal"),
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("way", ["file", "stream"])
def test_a_damaged_archive_is_refused(driver: Driver, tmp_path: Path, name: str, way: str) -> None:
    change, text = ARCHIVES[name]
    data = change(made.oci().tar())
    source: Any = io.BytesIO(data)
    if way == "file":
        source = tmp_path / "source"
        source.write_bytes(data)
    refuse(driver, tmp_path, source, ArchiveError, text)


def test_sparse_and_overlong_members_are_refused(driver: Driver, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("index.json")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        archive.addfile(info)
    refuse(driver, tmp_path, io.BytesIO(out.getvalue()), ArchiveError, "sparse")


def test_an_endless_extended_header_is_refused(driver: Driver, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("index.json")
        info.pax_headers = {"comment": "x" * (2 << 20)}
        archive.addfile(info)
    refuse(driver, tmp_path, io.BytesIO(out.getvalue()), LimitError, "extended header")


def test_limits_of_the_archive_itself(driver: Driver, tmp_path: Path) -> None:
    data = made.oci().tar()
    for limits, text in (
        (SourceLimits(members_max=3), "more than 3 members"),
        (SourceLimits(spool_bytes_max=5000), "more than 5000 bytes"),
    ):
        with pytest.raises(LimitError, match=text):
            images.import_image(driver, io.BytesIO(gzip.compress(data)), limits=limits)
    assert_nothing_left(driver, tmp_path)


def test_members_outside_of_the_archive_are_no_members(driver: Driver, tmp_path: Path) -> None:
    files = made.oci(name="fine")
    files["../escaped"] = b"x"
    files["/absolute-for-a-test"] = b"x"
    assert images.import_image(driver, io.BytesIO(files.tar()))[0].names == ("fine",)
    assert not (tmp_path / "escaped").exists()
    assert not Path("/absolute-for-a-test").exists()


def test_a_bomb_meets_the_limits_of_the_store(tmp_path: Path) -> None:
    layer = made.layer_tar({"bomb": bytes(8 << 20)})
    files = made.oci([layer], kinds="zstd")
    with Driver.open(tmp_path / "store", options=["apply_size_max=1m"]) as driver:
        source = files.write(tmp_path / "source")
        refuse(driver, tmp_path, source, LimitError, "layer sha256:")


def test_complete_layers_stay_usable_when_a_later_one_is_wrong(
    driver: Driver, tmp_path: Path
) -> None:
    files = made.oci()
    index = files.document("index.json")
    manifest = files.document(made.blob_name(index["manifests"][0]["digest"]))
    last = made.blob_name(manifest["layers"][2]["digest"])
    good = files[last]
    files[last] = files.data(last)[:-1] + b"?"
    with pytest.raises(UnionFSError):
        images.import_image(driver, files.write(tmp_path / "source"))
    assert images.list_images(driver) == ()
    assert len(driver.ids()) == 2
    assert all(driver.store.layer(layer).committed for layer in driver.ids())
    assert driver.check() == []
    files[last] = good
    before = {layer: os.stat(driver.store.diff_path(layer)).st_ino for layer in driver.ids()}
    images.import_image(driver, files.write(tmp_path / "source"))
    after = {layer: os.stat(driver.store.diff_path(layer)).st_ino for layer in driver.ids()}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_json_of_every_kind_in_every_place_never_is_a_bug(driver: Driver, tmp_path: Path) -> None:
    """Each value in the three documents replaced by each kind of JSON: refused or imported."""
    values: list[Any] = [None, True, -1, 1.5, "", "x", [], [[]], {}, {"a": []}, 1 << 70]
    tried = 0
    for document in ("index.json", "manifest", "config"):
        for path in list(_paths(_document(made.oci(), document))):
            for value in values:
                files = made.oci()
                _put(files, document, path, value)
                tried += 1
                try:
                    images.import_image(driver, io.BytesIO(files.tar()), platform=None)
                except UnionFSError as exc:
                    assert "\n" not in str(exc)  # noqa: PT017 - which one it is depends on the case
    assert tried > 400
    assert driver.check() == []


def _document(files: Files, name: str) -> Any:
    index = files.document("index.json")
    if name == "index.json":
        return index
    manifest = files.document(made.blob_name(index["manifests"][0]["digest"]))
    if name == "manifest":
        return manifest
    return files.document(made.blob_name(manifest["config"]["digest"]))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _paths(inner, (*path, number))


def _put(files: Files, document: str, path: tuple[Any, ...], value: Any) -> None:
    def change(whole: Any) -> Any:
        whole = json.loads(json.dumps(whole))
        inner = whole
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return whole

    if document == "index.json":
        files["index.json"] = made.to_json(change(files.document("index.json")))
    elif document == "manifest":
        made.rewrite_manifest(files, change)
    else:
        made.rewrite_config(files, change)
