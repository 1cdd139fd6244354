"""Images that come in: every shape of source, what is chosen of it, and layers that are shared."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import zstandard

from tests.support import images as made
from tests.support.images import DOCKER, OCI, REF_NAME, THREE, Files
from unionfs2 import images, oci_model
from unionfs2.archive.digest import chain_id
from unionfs2.driver import Driver
from unionfs2.errors import DepthError, DigestError, ImageError
from unionfs2.imagerecords import ImageStore
from unionfs2.images import Image
from unionfs2.storemodel import Digest, LayerId

pytestmark = pytest.mark.needs("root")

SHAPES: Final = ("directory", "archive", "gzip", "zstd", "stream", "gzip stream", "dotted")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    with Driver.open(tmp_path / "store") as opened:
        yield opened


def source_of(files: Files, shape: str, path: Path) -> Any:
    """*files* as something that import_image() takes."""
    if shape == "directory":
        return files.write(path)
    data = files.tar("./" if shape == "dotted" else "")
    if "gzip" in shape:
        data = gzip.compress(data)
    elif shape == "zstd":
        data = zstandard.ZstdCompressor().compress(data)
    if "stream" in shape:
        return io.BytesIO(data)
    path.write_bytes(data)
    return path


def chain_ids(layers: tuple[bytes, ...] | list[bytes]) -> tuple[str, ...]:
    digests = [Digest(made.sha256(layer)) for layer in layers]
    return tuple(chain_id(digests[: end + 1])[7:] for end in range(len(digests)))


def only(found: tuple[Image, ...]) -> Image:
    assert len(found) == 1
    return found[0]


def read(driver: Driver, layer: str, name: str) -> bytes:
    with driver.mounted(layer, read_only=True) as root:
        return (root / name).read_bytes()


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [made.oci, made.docker_legacy, made.docker_hybrid])
def test_every_source_in_every_shape(driver: Driver, tmp_path: Path, make: Any, shape: str) -> None:
    source = source_of(make(), shape, tmp_path / "source")
    image = only(images.import_image(driver, source))
    assert image.layers == chain_ids(THREE)
    assert image.platform == "linux/amd64"
    assert image.created == pytest.approx(1709288430.123456789)
    assert image.size is not None
    assert image.names == (("latest",) if make is made.oci else ("demo/app:1.0",))
    assert images.list_images(driver) == (image,)
    assert images.get_image(driver, image.names[0]) == image
    assert images.get_image(driver, image.id[7:15]) == image
    assert images.image_config(driver, image.id)["config"]["Cmd"] == ["/bin/sh"]
    for layer, diff in zip(image.layers, THREE, strict=True):
        known = driver.store.layer(layer)
        assert known.committed
        assert known.record.diff_id == made.sha256(diff)
        assert known.record.chain_id == f"sha256:{layer}"
    assert driver.check() == []
    assert os.listdir(driver.store.state_path + b"/staging") == []


@pytest.mark.needs("overlay", "fuse")
@pytest.mark.parametrize("backend", ["native", "fuse"])
def test_an_image_is_mounted(tmp_path: Path, backend: Any) -> None:
    with Driver.open(tmp_path / "store", backend=backend) as driver:
        image = only(images.import_image(driver, made.oci().write(tmp_path / "source")))
        assert image.layer is not None
        with driver.mounted(image.layer, read_only=True) as root:
            assert sorted(os.listdir(root / "etc")) == ["more"]
            assert not (root / "keep").exists()
        assert read(driver, image.layers[1], "etc/name") == b"middle"


@pytest.mark.parametrize("media", [OCI, DOCKER])
@pytest.mark.parametrize("kind", ["none", "gzip", "zstd"])
def test_media_types(driver: Driver, tmp_path: Path, media: str, kind: str) -> None:
    files = made.oci(media=media, kinds=kind)
    image = only(images.import_image(driver, files.write(tmp_path / "source")))
    assert image.layers == chain_ids(THREE)


def test_compression_is_found_out_not_believed(driver: Driver, tmp_path: Path) -> None:
    files = made.oci(kinds=["none", "gzip", "zstd"])

    def lie(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            layer["mediaType"] = made.LAYER + "+gzip"

    made.rewrite_manifest(files, lie)
    image = only(images.import_image(driver, files.write(tmp_path / "source")))
    assert image.layers == chain_ids(THREE)


def test_docker_layers_may_be_compressed_too(driver: Driver, tmp_path: Path) -> None:
    files = made.docker_legacy()
    for name in files.document("manifest.json")[0]["Layers"]:
        files[name] = gzip.compress(files.data(name))
    image = only(images.import_image(driver, files.tar_file(tmp_path / "source")))
    assert image.layers == chain_ids(THREE)


@pytest.mark.parametrize("hard", [False, True])
def test_a_layer_that_occurs_twice_is_a_link_in_docker_archives(
    driver: Driver, tmp_path: Path, hard: bool
) -> None:
    layers = [made.BASE, made.MIDDLE, made.BASE]
    files = made.docker_legacy({"a:1": layers, "b:1": [made.BASE, made.TOP]})
    links = {name: item for name, item in files.items() if isinstance(item, made.Link)}
    assert len(links) == 2
    if hard:
        for name, link in links.items():
            files[name] = made.Link(link.target.removeprefix("../"), hard=True)
    found = images.import_image(driver, files.tar_file(tmp_path / "source"))
    assert [image.names for image in found] == [("a:1",), ("b:1",)]
    assert found[0].layers == chain_ids(layers)
    assert found[1].layers == chain_ids([made.BASE, made.TOP])
    assert found[0].layers[0] == found[1].layers[0]


def test_an_image_without_layers(driver: Driver, tmp_path: Path) -> None:
    image = only(images.import_image(driver, made.oci([]).write(tmp_path / "source")))
    assert image.layers == ()
    assert image.layer is None
    assert image.size == 0


def test_a_foreign_layer_that_is_there_comes_in(driver: Driver, tmp_path: Path) -> None:
    files = made.oci()

    def foreign(manifest: dict[str, Any]) -> None:
        kind = OCI + "layer.nondistributable.v1.tar+gzip"
        manifest["layers"][0].update(mediaType=kind, urls=["https://example.invalid/x"])

    made.rewrite_manifest(files, foreign)
    first = only(images.import_image(driver, files.write(tmp_path / "source")))
    # Once the layer is in the store, the source need not have it.
    manifest = files.document(
        made.blob_name(files.document("index.json")["manifests"][0]["digest"])
    )
    (tmp_path / "source" / made.blob_name(manifest["layers"][0]["digest"])).unlink()
    assert images.import_image(driver, tmp_path / "source") == (first,)


# --- names ----------------------------------------------------------------------------------------


def two_images() -> Files:
    files = Files()
    one = made.add_image(files, THREE)
    two = made.add_image(files, [made.BASE, made.TOP])
    made.put_index(
        files, [made.named(one.descriptor, "one"), made.named(two.descriptor, "example.org/two:2")]
    )
    return files


def test_all_images_or_the_selected_one(driver: Driver, tmp_path: Path) -> None:
    source = two_images().write(tmp_path / "source")
    image = only(images.import_image(driver, source, select=["example.org/two:2"]))
    assert image.names == ("example.org/two:2",)
    assert len(images.list_images(driver)) == 1
    both = images.import_image(driver, source)
    assert {name for each in both for name in each.names} == {"one", "example.org/two:2"}
    with pytest.raises(ImageError, match=r"has no image three, it has example.org/two:2, one"):
        images.import_image(driver, source, select=["three"])


def test_an_image_is_called_as_asked(driver: Driver, tmp_path: Path) -> None:
    source = two_images().write(tmp_path / "source")
    with pytest.raises(ImageError, match="holds 2 images"):
        images.import_image(driver, source, names=["mine"])
    assert driver.ids() == ()
    image = only(images.import_image(driver, source, select=["one"], names=["mine:1", "also"]))
    assert image.names == ("also", "mine:1")


def test_one_image_with_several_names(driver: Driver, tmp_path: Path) -> None:
    files = Files()
    one = made.add_image(files)
    made.put_index(files, [made.named(one.descriptor, name) for name in ("a", "b:2", "c")])
    assert only(images.import_image(driver, files.write(tmp_path / "s"))).names == ("a", "b:2", "c")


def test_a_name_moves_to_the_newer_image(driver: Driver, tmp_path: Path) -> None:
    old = only(images.import_image(driver, made.oci([made.BASE]).write(tmp_path / "old")))
    new = only(images.import_image(driver, made.oci(THREE).write(tmp_path / "new")))
    assert images.get_image(driver, "latest").id == new.id
    assert images.get_image(driver, old.id).names == ()


def test_hybrid_archives_know_both_kinds_of_names(driver: Driver, tmp_path: Path) -> None:
    source = made.docker_hybrid().tar_file(tmp_path / "source")
    for select in ("demo/app:1.0", "docker.io/demo/app:1.0", "1.0"):
        assert only(images.import_image(driver, source, select=[select])).names == ("demo/app:1.0",)


# --- platforms ------------------------------------------------------------------------------------

ARM_LAYER: Final = made.layer_tar({"machine": "arm"})


def several_platforms(*, nested: bool) -> tuple[Files, dict[str, str]]:
    files = Files()
    config_of: dict[str, str] = {}
    descriptors = []
    for text in ("linux/amd64", "linux/arm64/v8", "linux/arm/v6", "linux/arm/v7", "windows/amd64"):
        parts = dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))
        layer = made.layer_tar({"platform": text})
        image = made.add_image(files, [layer], config=parts, platform=parts)
        descriptors.append(image.descriptor)
        config_of[text] = image.config_digest
    descriptors.append(
        {
            **descriptors[0],
            "digest": "sha256:" + "1" * 64,
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
            "platform": {"os": "unknown", "architecture": "unknown"},
        }
    )
    if nested:
        data = made.to_json({"schemaVersion": 2, "manifests": descriptors})
        inner = {
            "mediaType": oci_model.OCI_INDEX,
            "digest": files.blob(data),
            "size": len(data),
        }
        descriptors = [made.named(inner, "multi")]
    made.put_index(files, descriptors)
    return files, config_of


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/arm64", "linux/arm64/v8"),
        ("linux/arm64/v8", "linux/arm64/v8"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("linux/arm/v7", "linux/arm/v7"),
        ("linux/arm/v8", "linux/arm/v7"),
        ("linux/arm", "linux/arm/v7"),
        ("windows/amd64", "windows/amd64"),
        (None, None),
    ],
)
def test_a_platform_is_chosen(
    driver: Driver, tmp_path: Path, nested: bool, asked: str | None, found: str | None
) -> None:
    files, config_of = several_platforms(nested=nested)
    here = str(oci_model.Platform.here())
    if asked is None and here not in config_of:
        pytest.skip(f"this machine is {here}")
    image = only(images.import_image(driver, files.write(tmp_path / "source"), platform=asked))
    assert image.id == config_of[found or here]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("asked", ["linux/s390x", "linux/arm/v5"])
def test_a_platform_that_is_missing(
    driver: Driver, tmp_path: Path, nested: bool, asked: str
) -> None:
    files, _ = several_platforms(nested=nested)
    with pytest.raises(ImageError, match=f"no image for {asked}, it has linux/amd64, linux/arm/v6"):
        images.import_image(driver, files.write(tmp_path / "source"), platform=asked)


def test_a_platform_without_choice(driver: Driver, tmp_path: Path) -> None:
    foreign = made.oci(config={"architecture": "s390x"}).write(tmp_path / "source")
    assert only(images.import_image(driver, foreign)).platform == "linux/s390x"
    with pytest.raises(ImageError, match="is for linux/s390x, not for linux/amd64"):
        images.import_image(driver, foreign, platform="linux/amd64")


@pytest.mark.parametrize("text", ["linux", "linux/", "/amd64", "a/b/c/d", "li nux/x", ""])
def test_a_platform_that_is_none(driver: Driver, tmp_path: Path, text: str) -> None:
    with pytest.raises(ImageError, match="is not written as OS/ARCHITECTURE"):
        images.import_image(driver, tmp_path, platform=text)


def test_artifacts_beside_images_are_left_alone(driver: Driver, tmp_path: Path) -> None:
    files = made.oci()
    data = made.to_json(
        {
            "schemaVersion": 2,
            "config": {"mediaType": "application/x-signature", "digest": files.blob(b"{}"),
                       "size": 2},
            "layers": [],
        }
    )  # fmt: skip
    index = files.document("index.json")
    artifact = {"mediaType": OCI + "manifest.v1+json", "digest": files.blob(data),
                "size": len(data), "annotations": {REF_NAME: "signature"}}  # fmt: skip
    index["manifests"].append(artifact)
    files["index.json"] = made.to_json(index)
    source = files.write(tmp_path / "source")
    assert only(images.import_image(driver, source)).names == ("latest",)
    with pytest.raises(ImageError, match="another artifact"):
        images.import_image(driver, source, select=["signature"])


# --- layers that are there ------------------------------------------------------------------------


def inodes(driver: Driver) -> dict[LayerId, int]:
    return {layer: os.stat(driver.store.diff_path(layer)).st_ino for layer in driver.ids()}


def test_layers_are_shared_and_not_unpacked_again(driver: Driver, tmp_path: Path) -> None:
    images.import_image(driver, made.oci().write(tmp_path / "one"))
    before = inodes(driver)
    other = made.oci([made.BASE, made.MIDDLE, ARM_LAYER], kinds="zstd", name="other")
    images.import_image(driver, other.write(tmp_path / "two"))
    after = inodes(driver)
    assert before.items() <= after.items()
    assert len(after) == 4


def test_a_blob_of_a_known_layer_is_verified_all_the_same(driver: Driver, tmp_path: Path) -> None:
    images.import_image(driver, made.oci().write(tmp_path / "one"))
    files = made.oci()
    manifest = files.document(
        made.blob_name(files.document("index.json")["manifests"][0]["digest"])
    )
    name = made.blob_name(manifest["layers"][0]["digest"])
    files[name] = files.data(name)[:-1] + b"?"
    with pytest.raises(DigestError, match="is declared"):
        images.import_image(driver, files.write(tmp_path / "two"))


def test_a_layer_with_the_right_id_and_another_content_is_not_taken(
    driver: Driver, tmp_path: Path
) -> None:
    driver.create(chain_ids(THREE)[0])
    with pytest.raises(ImageError, match="there is another layer with that id"):
        images.import_image(driver, made.oci().write(tmp_path / "source"))


def test_the_limit_of_layers_is_met_before_the_work(tmp_path: Path) -> None:
    layers = [made.layer_tar({f"file{number}": "x"}) for number in range(6)]
    source = made.oci(layers).write(tmp_path / "source")
    with Driver.open(tmp_path / "store", options=["layers_max=4"]) as driver:
        with pytest.raises(DepthError, match="6 layers, and the store allows 4"):
            images.import_image(driver, source)
        assert driver.ids() == ()
    with Driver.open(tmp_path / "store", options=["layers_max=5"]) as driver:
        assert len(only(images.import_image(driver, source)).layers) == 6


def test_many_imports_of_one_image_at_once(tmp_path: Path) -> None:
    layers = [made.layer_tar({f"{n}/{m}": os.urandom(2000) for m in range(40)}) for n in range(6)]
    source = made.oci(layers).tar_file(tmp_path / "source")
    script = (
        "import sys; from unionfs2 import images; from unionfs2.driver import Driver\n"
        "with Driver.open(sys.argv[1]) as driver:\n"
        "    print(images.import_image(driver, sys.argv[2])[0].id)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store"), str(source)]
    with Driver.open(tmp_path / "store") as driver:
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        answers = [process.communicate(timeout=60) for process in running]
        assert [error for _, error in answers] == [""] * 4
        assert len({answer for answer, _ in answers}) == 1
        image = only(images.list_images(driver))
        assert image.layers == chain_ids(layers)
        assert len(driver.ids()) == 6
        assert driver.check() == []
        assert os.listdir(driver.store.state_path + b"/staging") == []


def test_threads_of_one_driver(driver: Driver, tmp_path: Path) -> None:
    source = made.oci().tar_file(tmp_path / "source")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            images.import_image(driver, source)
        except BaseException as exc:  # noqa: BLE001 - shown by the assertion below
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(driver.ids()) == 3


def test_an_image_removed_while_it_is_imported_comes_all_the_same(
    driver: Driver, tmp_path: Path
) -> None:
    """Somebody prunes between the last layer and the record: the import begins anew."""
    source = made.oci().write(tmp_path / "source")
    store_save = ImageStore.save
    calls = []

    def save(self: Any, record: Any) -> None:
        calls.append(record.id)
        if len(calls) == 1:
            driver.remove(record.layers[-1].id)
        store_save(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageStore, "save", save)
        image = only(images.import_image(driver, source))
    assert len(calls) == 2
    assert all(driver.exists(layer) for layer in image.layers)


# --- progress -------------------------------------------------------------------------------------


def test_progress_names_each_layer_and_ends_at_its_total(driver: Driver, tmp_path: Path) -> None:
    files = made.oci()
    seen: list[tuple[str, int, int]] = []
    images.import_image(
        driver,
        io.BytesIO(gzip.compress(files.tar())),
        progress=lambda label, done, total: seen.append((label, done, total)),
    )
    labels = list(dict.fromkeys(label for label, _, _ in seen))
    assert labels[0] == "reading the archive"
    short = [hashlib.sha256(layer).hexdigest()[:12] for layer in THREE]
    assert labels[1:] == [f"layer {number}/3 {name}" for number, name in enumerate(short, 1)]
    for label in labels[1:]:
        done = [(got, total) for name, got, total in seen if name == label]
        assert done[-1][0] == done[-1][1] > 0


def test_memory_stays_small_with_a_large_layer(tmp_path: Path) -> None:
    # 256 MiB that compress to nothing: neither the layer nor its decompressed form is held.
    layer = made.layer_tar({"zeros": bytes(256 << 20)})
    made.oci([layer], kinds="zstd").write(tmp_path / "source")
    del layer
    script = (
        "import resource, sys; from unionfs2 import images; from unionfs2.driver import Driver\n"
        "with Driver.open(sys.argv[1]) as driver:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    images.import_image(driver, sys.argv[2])\n"
        "    images.export_image(driver, 'latest', sys.argv[3])\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    paths = [str(tmp_path / name) for name in ("store", "source", "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 << 10
