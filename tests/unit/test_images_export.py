"""Images that leave the store: the same digests, the same bytes, nothing half done."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import images as made
from tests.support.faults import Crash, inject
from tests.support.images import DOCKER, OCI, REF_NAME, THREE
from unionfs2 import images, syscalls
from unionfs2.driver import Driver
from unionfs2.errors import (
    CommittedError,
    DigestError,
    ImageError,
    OptionError,
    UnionFSError,
    UnknownLayerError,
)
from unionfs2.imagerecords import ImageStore, locked, roots
from unionfs2.images import Exported, Image

pytestmark = pytest.mark.needs("root")

FORMS: Final = images.FORMS


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    with Driver.open(tmp_path / "store") as opened:
        yield opened


def bring(driver: Driver, tmp_path: Path, files: made.Files | None = None) -> Image:
    source = (made.oci() if files is None else files).tar_file(tmp_path / "source.tar")
    return images.import_image(driver, source)[0]


def content(path: Path) -> dict[str, bytes]:
    """Files of a layout, directory or archive, by name."""
    if path.is_dir():
        return {
            str(each.relative_to(path)): each.read_bytes()
            for each in sorted(path.rglob("*"))
            if each.is_file()
        }
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                assert member.name not in found
                found[member.name] = file.read()
    return found


def check_layout(path: Path, exported: Exported) -> dict[str, Any]:
    """Every blob has the digest it is named by; the manifest."""
    files = content(path)
    for name, data in files.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(data).hexdigest() == name.rpartition("/")[2]
    assert files["oci-layout"] == b'{"imageLayoutVersion":"1.0.0"}'
    index = json.loads(files["index.json"])
    assert exported.digest in {item["digest"] for item in index["manifests"]}
    manifest: dict[str, Any] = json.loads(files[made.blob_name(exported.digest)])
    assert manifest["config"]["digest"] == exported.image_id
    assert len(files[made.blob_name(exported.image_id)]) == manifest["config"]["size"]
    for layer in manifest["layers"]:
        assert len(files[made.blob_name(layer["digest"])]) == layer["size"]
    return manifest


# --- digests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compression", [None, "none", "gzip", "zstd"])
@pytest.mark.parametrize("make", [made.oci, made.docker_legacy, made.docker_hybrid])
def test_image_id_and_diff_ids_come_back(
    driver: Driver, tmp_path: Path, make: Any, compression: Any, form: Any
) -> None:
    image = bring(driver, tmp_path, make())
    out = tmp_path / "out"
    exported = images.export_image(driver, image.names[0], out, form=form, compression=compression)
    check_layout(out, exported)
    assert exported.image_id == image.id
    with Driver.open(tmp_path / "other") as other:
        again = images.import_image(other, out)[0]
        assert again.id == image.id
        assert again.layers == image.layers
        # A name without a repository is none for Docker.
        bare = form == "docker-archive" and image.names == ("latest",)
        assert again.names == (("latest:latest",) if bare else image.names)
        assert again.manifest == exported.digest


@pytest.mark.parametrize("form", ["oci", "oci-archive"])
@pytest.mark.parametrize("kind", ["none", "gzip", "zstd"])
def test_what_we_exported_comes_back_with_its_manifest(
    driver: Driver, tmp_path: Path, form: Any, kind: Any
) -> None:
    """Our own compression is deterministic: import and export are inverse, manifest included."""
    image = bring(driver, tmp_path)
    first = images.export_image(driver, "latest", tmp_path / "one", compression=kind)
    with Driver.open(tmp_path / "other") as other:
        assert images.import_image(other, tmp_path / "one")[0].id == image.id
        second = images.export_image(other, "latest", tmp_path / "two", form=form)
    assert second == Exported(image.id, first.digest, ("latest",), exact=True)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_foreign_compression_gives_a_new_manifest_and_says_so(
    driver: Driver, tmp_path: Path
) -> None:
    image = bring(driver, tmp_path, made.oci(annotations={"org.example": "kept"}))
    exported = images.export_image(driver, "latest", tmp_path / "out")
    assert not exported.exact
    assert exported.reason == (
        "3 of 3 layers are compressed otherwise than when they were imported"
    )
    manifest = check_layout(tmp_path / "out", exported)
    assert manifest["annotations"] == {"org.example": "kept"}
    assert exported.image_id == image.id


@pytest.mark.parametrize("media", [OCI, DOCKER])
def test_uncompressed_images_keep_their_manifest(
    driver: Driver, tmp_path: Path, media: str
) -> None:
    files = made.oci(kinds="none", media=media)
    image = bring(driver, tmp_path, files)
    exported = images.export_image(driver, "latest", tmp_path / "out")
    assert exported.exact
    assert exported.digest == image.manifest
    # The manifest's very bytes, which are not spelt as we would spell them.
    name = made.blob_name(exported.digest)
    assert content(tmp_path / "out")[name] == files[name]


def test_docker_manifests_stay_docker_manifests(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path, made.oci(media=DOCKER))
    exported = images.export_image(driver, "latest", tmp_path / "out")
    manifest = check_layout(tmp_path / "out", exported)
    assert manifest["mediaType"] == DOCKER + "distribution.manifest.v2+json"
    assert {each["mediaType"] for each in manifest["layers"]} == {
        DOCKER + "image.rootfs.diff.tar.gzip"
    }


def test_notes_about_compressed_bytes_go_with_them(driver: Driver, tmp_path: Path) -> None:
    files = made.oci()

    def note(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"] = {
            "containerd.io/snapshot/stargz/toc.digest": "sha256:" + "1" * 64,
            "org.example": "kept",
        }

    made.rewrite_manifest(files, note)
    bring(driver, tmp_path, files)
    manifest = check_layout(
        tmp_path / "out", images.export_image(driver, "latest", tmp_path / "out")
    )
    assert manifest["layers"][0]["annotations"] == {"org.example": "kept"}


def test_exact_streams_of_other_tar_writers_survive(driver: Driver, tmp_path: Path) -> None:
    """Orders, paddings and header forms that our own writer never makes."""
    layers = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name in ("z", "a", "./b", "dir/", "dir/" + "n" * 90, "a"):
                info = tarfile.TarInfo(name)
                info.uname, info.mtime = "somebody", 12345
                info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                data = b"" if name.endswith("/") else os.urandom(700)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        layers.append(out.getvalue() + bytes(20 * 512))
    image = bring(driver, tmp_path, made.oci(layers))
    exported = images.export_image(driver, "latest", tmp_path / "out", compression="none")
    files = content(tmp_path / "out")
    assert exported.image_id == image.id
    for layer in layers:
        assert files[made.blob_name(made.sha256(layer))] == layer


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_two_exports_are_the_same_bytes(driver: Driver, tmp_path: Path, form: Any) -> None:
    bring(driver, tmp_path)
    for name in ("one", "two"):
        images.export_image(driver, "latest", tmp_path / name, form=form)
    if form == "oci":
        assert content(tmp_path / "one") == content(tmp_path / "two")
    else:
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        stream = io.BytesIO()
        images.export_image(driver, "latest", stream, form=form)
        assert stream.getvalue() == (tmp_path / "one").read_bytes()


def test_archives_have_nothing_of_this_machine_in_them(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path)
    images.export_image(driver, "latest", tmp_path / "out", form="docker-archive")
    with tarfile.open(tmp_path / "out") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname) == ("", "")
            assert member.mode == (0o755 if member.isdir() else 0o644)


def test_docker_archives_are_both_formats(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path, made.docker_legacy())
    images.export_image(driver, image.id[7:20], tmp_path / "out", form="docker-archive")
    files = content(tmp_path / "out")
    entry = json.loads(files["manifest.json"])
    assert entry == [
        {
            "Config": made.blob_name(image.id),
            "RepoTags": ["demo/app:1.0"],
            "Layers": [made.blob_name(made.sha256(layer)) for layer in THREE],
        }
    ]
    annotations = json.loads(files["index.json"])["manifests"][0]["annotations"]
    assert annotations == {"io.containerd.image.name": "demo/app:1.0", REF_NAME: "1.0"}


def test_a_layer_that_occurs_twice_is_written_once(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path, made.oci([made.BASE, made.MIDDLE, made.BASE]))
    for form in FORMS:
        out = tmp_path / form
        exported = images.export_image(driver, "latest", out, form=form)
        manifest = check_layout(out, exported)
        assert manifest["layers"][0] == manifest["layers"][2]


def test_a_name_or_all_of_them(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path)
    images.tag_image(driver, "latest", "example.org/app:2")
    by_id = images.export_image(driver, image.id, tmp_path / "one")
    assert by_id.names == ("example.org/app:2", "latest")
    by_name = images.export_image(driver, "example.org/app:2", tmp_path / "two")
    assert by_name.names == ("example.org/app:2",)
    images.remove_image(driver, "latest")
    images.remove_image(driver, "example.org/app:2")
    images.import_image(driver, made.oci(name=None).write(tmp_path / "nameless"))
    nameless = images.export_image(driver, image.id, tmp_path / "three")
    assert nameless.names == ()
    index = json.loads((tmp_path / "three" / "index.json").read_bytes())
    assert "annotations" not in index["manifests"][0]
    assert index["manifests"][0]["platform"] == {"os": "linux", "architecture": "amd64"}


def test_a_layout_is_added_to(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path)
    bring(driver, tmp_path, made.oci([made.BASE, made.TOP], name="other"))
    out = tmp_path / "out"
    images.export_image(driver, "latest", out)
    first = content(out)
    images.export_image(driver, "other", out)
    images.export_image(driver, "latest", out)  # in place of the entry of that name
    index = json.loads((out / "index.json").read_bytes())
    assert [item["annotations"][REF_NAME] for item in index["manifests"]] == ["other", "latest"]
    assert {name for name in first if name.startswith("blobs")} < set(content(out))
    with Driver.open(tmp_path / "elsewhere") as elsewhere:
        found = images.import_image(elsewhere, out)
        assert {image.names[0] for image in found} == {"latest", "other"}


def test_an_empty_directory_becomes_a_layout(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path)
    (tmp_path / "out").mkdir()
    check_layout(tmp_path / "out", images.export_image(driver, "latest", tmp_path / "out"))


def test_a_pipe_is_written_to(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    # Open for reading and writing at once, so that nobody has to wait for the other end.
    fd = os.open(tmp_path / "pipe", os.O_RDWR)
    os.set_blocking(fd, False)
    images.export_image(driver, "latest", tmp_path / "pipe", form="oci-archive")
    data = b"".join(iter(lambda: _read_or_nothing(fd), b""))
    os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert "index.json" in archive.getnames()


def _read_or_nothing(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("form", FORMS)
def test_unsuitable_targets_are_refused(driver: Driver, tmp_path: Path, form: Any) -> None:
    bring(driver, tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").write_text("mine")
    if form == "oci":
        with pytest.raises(ImageError, match="has files but is no OCI layout"):
            images.export_image(driver, "latest", tmp_path / "full", form=form)
        with pytest.raises(ImageError, match="is a file"):
            images.export_image(driver, "latest", tmp_path / "file", form=form)
        with pytest.raises(ImageError, match="cannot be written to a stream"):
            images.export_image(driver, "latest", io.BytesIO(), form=form)
        assert (tmp_path / "file").read_text() == "mine"
    else:
        with pytest.raises(ImageError, match="is a directory"):
            images.export_image(driver, "latest", tmp_path / "full", form=form)
    with pytest.raises(ImageError, match="No such file"):
        images.export_image(driver, "latest", tmp_path / "no" / "such", form=form)
    assert os.listdir(tmp_path / "full") == ["file"]


def test_words_that_are_none(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path)
    with pytest.raises(OptionError, match="form tar is unknown"):
        images.export_image(driver, "latest", tmp_path / "out", form="tar")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="compression xz is unknown"):
        images.export_image(driver, "latest", tmp_path / "out", compression="xz")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"no image latets in .*: did you mean latest"):
        images.export_image(driver, "latets", tmp_path / "out")


# --- nothing half done ----------------------------------------------------------------------------


def tampered(driver: Driver, image: Image) -> None:
    """Change a file of the lowest layer behind the store's back."""
    path = Path(os.fsdecode(driver.store.diff_path(image.layers[0]))) / "etc" / "name"
    path.write_text("evil")


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_was_changed_is_not_exported(
    driver: Driver, tmp_path: Path, form: Any
) -> None:
    image = bring(driver, tmp_path)
    tampered(driver, image)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UnionFSError):
        images.export_image(driver, "latest", tmp_path / "out", form=form)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_failed_addition_leaves_the_layout_as_it_was(driver: Driver, tmp_path: Path) -> None:
    bring(driver, tmp_path)
    other = bring(driver, tmp_path, made.oci([made.TOP, made.MIDDLE], name="other"))
    images.export_image(driver, "latest", tmp_path / "out")
    before = content(tmp_path / "out")
    path = Path(os.fsdecode(driver.store.diff_path(other.layers[1]))) / "etc" / "name"
    path.write_text("evil")
    with pytest.raises(UnionFSError):
        images.export_image(driver, "other", tmp_path / "out")
    assert content(tmp_path / "out") == before


def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "syncfs"):
        monkeypatch.setattr(syscalls, name, lambda fd: None)


def every_failure(
    action: Callable[[], object], check: Callable[[bool], object], *, crash: bool = False
) -> int:
    """Run *action* with its n-th change of the disk failing, for every n; how many there are."""
    for number in itertools.count(1):
        done = True
        with inject(fail_at=number, error=errno.ENOSPC, crash=crash) as faults:
            try:
                action()
            except (OSError, UnionFSError, Crash):
                done = False
        check(done)
        if not faults.fired:
            assert done
            return number - 1
    raise AssertionError


@pytest.mark.parametrize("form", FORMS)
def test_an_export_that_fails_anywhere_leaves_nothing(
    driver: Driver, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _quick_disk(monkeypatch)
    bring(driver, tmp_path, made.oci([made.BASE, made.TOP], kinds="none"))
    before = {path.name for path in tmp_path.iterdir()}
    out = tmp_path / "out"
    wanted: list[dict[str, bytes]] = []
    images.export_image(driver, "latest", tmp_path / "good", form=form)
    wanted.append(content(tmp_path / "good"))
    before.add("good")

    def check(done: bool) -> None:
        there = {path.name for path in tmp_path.iterdir()}
        # A failure of the very last sync, or of cleaning up, comes after the whole is in place.
        if out.exists():
            assert content(out) == wanted[0]
        left = there - before - {"out"}
        assert not done or not left
        for name in left:
            assert name.startswith(".out.")
            left_over = tmp_path / name
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        if out.is_dir():
            shutil.rmtree(out)
        elif out.exists():
            out.unlink()

    steps = every_failure(lambda: images.export_image(driver, "latest", out, form=form), check)
    assert steps > 5


@pytest.mark.parametrize("crash", [False, True])
def test_an_import_that_ends_anywhere_leaves_no_half_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: bool
) -> None:
    """Old or new: either there is no image, or it is whole; the next try always succeeds."""
    _quick_disk(monkeypatch)
    source = made.oci([made.BASE, made.TOP]).tar_file(tmp_path / "source")
    number = itertools.count()
    home = [tmp_path / "store"]

    def action() -> None:
        home[0] = tmp_path / f"store{next(number)}"
        with Driver.open(home[0]) as driver:
            images.import_image(driver, source)

    def check(done: bool) -> None:
        with Driver.open(home[0]) as driver:
            listed = images.list_images(driver)
            assert images.damaged_images(driver) == ()
            assert len(listed) == 1 if done else len(listed) <= 1
            for image in listed:
                assert all(driver.exists(layer) for layer in image.layers)
            assert images.import_image(driver, source)[0].names == ("latest",)
            assert os.listdir(driver.store.state_path + b"/staging") == []
            assert max(os.listdir(driver.store.state_path + b"/images")) == b"names.json"
            assert len(os.listdir(driver.store.state_path + b"/images")) == 2
        shutil.rmtree(home[0])

    assert every_failure(action, check, crash=crash) > 30


@pytest.mark.parametrize("crash", [False, True])
def test_names_and_removals_that_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: bool
) -> None:
    _quick_disk(monkeypatch)
    sources = [
        made.oci(layers, name="same").tar_file(tmp_path / f"source{number}")
        for number, layers in enumerate(([made.BASE], [made.BASE, made.TOP]))
    ]
    number = itertools.count()
    home = [tmp_path / "store"]

    def prepare() -> None:
        shutil.rmtree(home[0], ignore_errors=True)
        home[0] = tmp_path / f"store{next(number)}"
        with Driver.open(home[0]) as driver:
            for source in sources:
                images.import_image(driver, source)

    def action() -> None:
        with Driver.open(home[0]) as driver:
            images.tag_image(driver, "same", "other")
            images.remove_image(driver, "same")
            images.remove_image(driver, "other", layers=True)

    def check(done: bool) -> None:
        with Driver.open(home[0]) as driver:
            listed = images.list_images(driver)
            assert images.damaged_images(driver) == ()
            assert (len(listed) == 1) if done else (1 <= len(listed) <= 2)
            owned = [name for image in listed for name in image.names]
            assert len(owned) == len(set(owned))
            assert roots(driver.store) <= set(driver.ids())
            images.import_image(driver, sources[1])
            assert images.get_image(driver, "same").layers[1:]
        prepare()

    prepare()
    assert every_failure(action, check, crash=crash) > 20


# --- records --------------------------------------------------------------------------------------


def record_dir(driver: Driver, image: Image) -> Path:
    return Path(os.fsdecode(driver.store.state_path)) / "images" / image.id[7:]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"{}"),
        ("image.json", b""),
        ("image.json", b"[]"),
        ("image.json", b'{"version": 9}'),
        ("image.json", b'{"version": 1, "layers": []}'),
        ("manifest.json", b"{}"),
        ("image.json", None),
        ("config.json", None),
        ("manifest.json", None),
    ],
)
def test_a_damaged_record_harms_no_other_image(
    driver: Driver, tmp_path: Path, name: str, data: bytes | None
) -> None:
    image = bring(driver, tmp_path)
    good = bring(driver, tmp_path, made.oci([made.BASE], name="good"))
    place = record_dir(driver, image) / name
    place.unlink()
    if data is not None:
        place.write_bytes(data)
    assert [each.id for each in images.list_images(driver)] == [good.id]
    assert [each.id for each in images.damaged_images(driver)] == [image.id]
    with pytest.raises(ImageError, match="remove the image and import it again") as caught:
        images.get_image(driver, "latest")
    assert caught.value.errno == errno.EUCLEAN
    with pytest.raises(ImageError, match="cannot be told"):
        roots(driver.store)
    with pytest.raises(ImageError):
        driver.prune(unused=True)
    assert images.remove_image(driver, "latest").image == image.id
    assert bring(driver, tmp_path) == image
    assert roots(driver.store) == frozenset(image.layers)


def test_damaged_names_leave_the_images(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path)
    names = Path(os.fsdecode(driver.store.state_path)) / "images" / "names.json"
    names.write_bytes(b"{")
    assert images.names_in(tmp_path / "store") == []
    with pytest.raises(ImageError, match="remove the file and name the images again"):
        images.list_images(driver)
    names.unlink()
    assert images.get_image(driver, image.id[7:]).names == ()


def test_names_and_prefixes(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path)
    images.tag_image(driver, "latest", "app:latest")
    assert images.get_image(driver, "app").id == image.id
    assert images.get_image(driver, image.id).id == image.id
    assert images.get_image(driver, image.id[7:11]).id == image.id
    assert images.names_in(str(tmp_path / "store")) == ["app:latest", "latest"]
    with pytest.raises(ImageError, match="there is no image"):
        images.get_image(driver, image.id[7:10])  # three digits are too few
    for bad in ("", "a b", "../x", "x" * 256):
        with pytest.raises(ImageError, match="cannot name an image"):
            images.tag_image(driver, "latest", bad)


def test_names_go_one_by_one_and_layers_when_asked(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path)
    shorter = bring(driver, tmp_path, made.oci([made.BASE], name="shorter"))
    images.tag_image(driver, "latest", "second")
    assert images.remove_image(driver, "second") == (("second",), None, ())
    kept = images.remove_image(driver, "latest")
    assert kept == (("latest",), image.id, ())
    assert set(image.layers) <= set(driver.ids())
    bring(driver, tmp_path)
    gone = images.remove_image(driver, "latest", layers=True)
    assert gone.layers == (image.layers[2], image.layers[1])
    assert driver.ids() == shorter.layers
    with pytest.raises(ImageError, match="there is no image"):
        images.remove_image(driver, "latest")


@pytest.mark.needs("overlay")
def test_layers_in_use_stay(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path)
    box = driver.create(parent=image.layers[1], writable=True)
    with driver.mounted(image.layers[2], read_only=True, backend="native"):
        assert images.remove_image(driver, "latest", layers=True).layers == ()
    bring(driver, tmp_path)
    assert images.remove_image(driver, "latest", layers=True).layers == (image.layers[2],)
    assert driver.is_parent(box, image.layers[1])


def test_prune_keeps_what_images_need(driver: Driver, tmp_path: Path) -> None:
    image = bring(driver, tmp_path)
    bring(driver, tmp_path, made.oci([made.TOP], name="other"))
    driver.prune(unused=True)
    assert len(driver.ids()) == 4
    images.remove_image(driver, "other")
    driver.prune(unused=True)
    assert set(driver.ids()) == set(image.layers)


def test_a_store_without_images(driver: Driver) -> None:
    with locked(driver.store):
        pass
    store = ImageStore(driver.store)
    assert store.ids() == ()
    assert store.names() == {}
    assert roots(driver.store) == frozenset()
    assert images.list_images(driver) == ()


# --- images of our own ----------------------------------------------------------------------------


def committed(driver: Driver, parent: str | None, files: dict[str, str | bytes | None]) -> str:
    layer = driver.create(parent=parent, writable=True)
    driver.apply(layer, io.BytesIO(made.layer_tar(files)))
    return driver.commit(layer)


def test_an_image_of_committed_layers(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    base = committed(driver, None, {"bin": None, "bin/sh": "#!"})
    top = committed(driver, base, {"etc": None, "etc/x": "y"})
    image = images.create_image(
        driver,
        top,
        "own:1",
        cmd=["/bin/sh"],
        entrypoint=["/init"],
        env={"A": "1"},
        labels={"l": "v"},
        working_dir="/w",
        user="7:8",
        architecture="arm64",
        author="somebody",
    )
    assert image.names == ("own:1",)
    assert image.layers == (base, top)
    assert image.platform == "linux/arm64"
    assert image.created == 1700000000
    config = images.image_config(driver, "own:1")
    assert config["config"] == {
        "Cmd": ["/bin/sh"],
        "Entrypoint": ["/init"],
        "WorkingDir": "/w",
        "User": "7:8",
        "Env": ["A=1"],
        "Labels": {"l": "v"},
    }
    assert config["created"] == "2023-11-14T22:13:20Z"
    assert len(config["history"]) == 2
    for form in FORMS:
        exported = images.export_image(driver, "own:1", tmp_path / form, form=form)
        assert exported.reason == "the image came without a manifest"
        check_layout(tmp_path / form, exported)
        with Driver.open(tmp_path / f"store-{form}") as other:
            assert images.import_image(other, tmp_path / form)[0].id == image.id
    # The same chain again, under the ids that it has here.
    assert images.import_image(driver, tmp_path / "oci")[0].layers == (base, top)
    again = images.create_image(driver, top, "own:2", inherit=False, architecture="arm64")
    assert again.id != image.id


def test_a_commit_inherits_from_its_image(driver: Driver, tmp_path: Path) -> None:
    base = bring(driver, tmp_path, made.oci(config={"history": [{"created_by": "x"}] * 3}))
    assert base.layer is not None
    top = committed(driver, base.layer, {"new": "file"})
    image = images.create_image(
        driver, top, "derived", env={"PATH": "/sbin", "B": "2"}, created=5.5
    )
    config = images.image_config(driver, "derived")
    assert config["config"] == {"Cmd": ["/bin/sh"], "Env": ["PATH=/sbin", "B=2"]}
    assert [each["created_by"] for each in config["history"]] == ["x"] * 3 + [
        "unionfs2 image create"
    ]
    assert config["created"] == "1970-01-01T00:00:05.500000Z"
    assert image.layers == (*base.layers, top)
    assert config["rootfs"]["diff_ids"][:3] == [made.sha256(layer) for layer in THREE]
    bare = images.create_image(driver, top, "bare", inherit=False)
    assert "Cmd" not in images.image_config(driver, "bare")["config"]
    assert bare.layers == image.layers


def test_what_cannot_become_an_image(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = driver.create(writable=True)
    with pytest.raises(CommittedError, match="commit it before"):
        images.create_image(driver, layer, "x")
    with pytest.raises(UnknownLayerError):
        images.create_image(driver, "unknown", "x")
    with pytest.raises(ImageError, match="cannot name"):
        images.create_image(driver, layer, "bad name")
    done = driver.commit(layer)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "tomorrow")
    with pytest.raises(OptionError, match="SOURCE_DATE_EPOCH=tomorrow"):
        images.create_image(driver, done, "x")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    with pytest.raises(OptionError, match="are no date"):
        images.create_image(driver, done, "x", created=1e20)
    with pytest.raises(ImageError, match="is not written as"):
        images.create_image(driver, done, "x", architecture="a/b/c")
    assert images.list_images(driver) == ()


def test_a_changed_layer_is_found_when_its_image_is_exported(
    driver: Driver, tmp_path: Path
) -> None:
    layer = driver.create(writable=True)
    path = Path(os.fsdecode(driver.store.diff_path(layer)))
    (path / "file").write_text("one")
    top = driver.commit(layer)
    images.create_image(driver, top, "own")
    (Path(os.fsdecode(driver.store.diff_path(top))) / "file").write_text("two")
    with pytest.raises(DigestError, match="it was changed behind the store's back"):
        images.export_image(driver, "own", tmp_path / "out")
    assert not (tmp_path / "out").exists()
