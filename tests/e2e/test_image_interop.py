"""Images through the hands of other tools: what they write we read, what we write they read.

skopeo reads and writes every form there is; umoci unpacks layouts and makes layers of its own.
Neither sees more than files.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import dockerd
from tests.support import images as made
from tests.support.images import THREE
from tests.support.tree import differences, snapshot
from unionfs2 import images
from unionfs2.driver import Driver
from unionfs2.errors import ImageError

pytestmark = pytest.mark.needs("root")

NAME: Final = "example.org/demo/app:1.0"


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    with Driver.open(tmp_path / "store") as opened:
        yield opened


def run(*command: str) -> bytes:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def skopeo_copy(source: str, target: str, *options: str) -> None:
    run("skopeo", "--insecure-policy", "copy", "-q", *options, source, target)


def skopeo_inspect(place: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("skopeo", "inspect", place))
    return found


# --- forms as skopeo calls them -------------------------------------------------------------------


def exported(driver: Driver, out: Path, form: Any, **more: Any) -> tuple[str, images.Exported]:
    """Export the image; how skopeo calls the result."""
    done = images.export_image(driver, NAME, out, form=form, **more)
    if form == "docker-archive":
        return f"docker-archive:{out}", done
    return f"{form}:{out}:{NAME}", done


@pytest.mark.needs("command:skopeo")
@pytest.mark.parametrize("form", images.FORMS)
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_skopeo_reads_what_we_export(
    driver: Driver, tmp_path: Path, form: Any, compression: Any
) -> None:
    image = images.import_image(driver, made.oci(name=NAME).write(tmp_path / "source"))[0]
    place, done = exported(driver, tmp_path / "out", form, compression=compression)
    found = skopeo_inspect(place)
    assert (found["Architecture"], found["Os"]) == ("amd64", "linux")
    assert len(found["Layers"]) == 3
    if form != "docker-archive":
        assert found["Digest"] == done.digest
    # skopeo verifies every digest on its way. A config that crosses from Docker's form to OCI's
    # is written anew by it, so the image id stays within a family only.
    kind = "docker-archive" if form == "docker-archive" else "oci"
    skopeo_copy(place, f"{kind}:{tmp_path / 'copy'}:{NAME}")
    with Driver.open(tmp_path / "other") as other:
        again = images.import_image(other, tmp_path / "copy")[0]
    assert again.id == image.id
    assert again.layers == image.layers
    assert again.names == (NAME,)


SKOPEO_WRITES: Final = {
    "oci": ("oci:{}:" + NAME, ()),
    "oci-archive": ("oci-archive:{}:" + NAME, ()),
    "docker-archive": ("docker-archive:{}:" + NAME, ()),
    "oci zstd": ("oci:{}:" + NAME, ("--dest-compress-format", "zstd")),
    "oci uncompressed": ("oci:{}:" + NAME, ("--dest-oci-accept-uncompressed-layers",)),
    "dir": ("dir:{}", ()),
}


@pytest.mark.needs("command:skopeo")
@pytest.mark.parametrize("form", SKOPEO_WRITES)
def test_we_read_what_skopeo_writes(driver: Driver, tmp_path: Path, form: str) -> None:
    source = made.oci(name=NAME).write(tmp_path / "source")
    pattern, options = SKOPEO_WRITES[form]
    skopeo_copy(f"oci:{source}:{NAME}", pattern.format(tmp_path / "written"), *options)
    if form == "dir":
        with pytest.raises(ImageError):
            images.import_image(driver, tmp_path / "written")
        return
    image = images.import_image(driver, tmp_path / "written")[0]
    assert image.names == (NAME,)
    with Driver.open(tmp_path / "other") as other:
        assert images.import_image(other, source)[0].id == image.id
    for layer, diff in zip(image.layers, THREE, strict=True):
        assert driver.store.layer(layer).record.diff_id == made.sha256(diff)


@pytest.mark.needs("command:skopeo")
@pytest.mark.parametrize("forms", [("oci", "oci-archive") * 2, ("docker-archive",) * 2, None])
def test_there_and_back(driver: Driver, tmp_path: Path, forms: Any) -> None:
    """Ours, skopeo's, ours, skopeo's: layers never change, the id not within one family."""
    image = images.import_image(driver, made.oci(name=NAME).write(tmp_path / "source"))[0]
    steps = forms or ("docker-archive", "oci", "docker-archive", "oci-archive")
    place, _ = exported(driver, tmp_path / "0", steps[0])
    for number, form in enumerate(steps, 1):
        step = tmp_path / str(number)
        skopeo_copy(place, f"{form}:{step}:{NAME}")
        with Driver.open(tmp_path / f"store{number}") as other:
            again = images.import_image(other, step)[0]
            assert again.layers == image.layers
            assert again.id == image.id or forms is None
            place, _ = exported(other, tmp_path / f"{number}-ours", form)


@pytest.mark.needs("command:skopeo")
def test_several_images_of_skopeo_in_one_layout(driver: Driver, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    for name, layers in (("one", THREE), ("two", [made.BASE, made.TOP])):
        source = made.oci(layers, name=name).write(tmp_path / name)
        skopeo_copy(f"oci:{source}:{name}", f"oci:{layout}:{name}")
    found = images.import_image(driver, layout)
    assert sorted(image.names[0] for image in found) == ["one", "two"]
    assert len(driver.ids()) == 4
    images.tag_image(driver, "one", "three")
    images.export_image(driver, "three", layout)
    for name in ("one", "two", "three"):
        assert skopeo_inspect(f"oci:{layout}:{name}")["Layers"]


# --- umoci: another unpacker, another packer ------------------------------------------------------


def rich_layers() -> list[bytes]:
    return [
        made.layer_tar({"etc": None, "etc/a": "a", "etc/b": "b", "old": None, "old/x": "x"}),
        made.layer_tar({"etc/a": "changed", "etc/.wh.b": "", "old": None, "old/.wh..wh..opq": "",
                        "old/y": "y"}),
        made.layer_tar({"new": None, "new/deep": None, "new/deep/file": "z" * 100_000}),
    ]  # fmt: skip


def assert_same(ours: Path, theirs: Path) -> None:
    """Equal trees. umoci writes whole seconds; merged directories count one link."""
    one, other = (
        {
            path: replace(
                entry,
                mtime_ns=entry.mtime_ns // 1_000_000_000,
                nlink=1 if entry.kind == "dir" else entry.nlink,
            )
            for path, entry in snapshot(tree).items()
            if path != b"."  # no layer here says anything about the root
        }
        for tree in (ours, theirs)
    )
    assert differences(one, other) == []


@pytest.mark.needs("command:umoci", "overlay")
def test_umoci_unpacks_what_we_mount(driver: Driver, tmp_path: Path) -> None:
    image = images.import_image(driver, made.oci(rich_layers()).write(tmp_path / "source"))[0]
    images.export_image(driver, "latest", tmp_path / "out")
    run("umoci", "unpack", "--image", f"{tmp_path / 'out'}:latest", str(tmp_path / "bundle"))
    assert image.layer is not None
    with driver.mounted(image.layer, read_only=True) as root:
        assert_same(root, tmp_path / "bundle" / "rootfs")


@pytest.mark.needs("command:umoci", "overlay")
def test_a_layer_that_umoci_made(driver: Driver, tmp_path: Path) -> None:
    images.import_image(driver, made.oci(rich_layers()).write(tmp_path / "source"))
    layout, bundle = tmp_path / "out", tmp_path / "bundle"
    images.export_image(driver, "latest", layout)
    run("umoci", "unpack", "--image", f"{layout}:latest", str(bundle))
    root = bundle / "rootfs"
    (root / "etc" / "a").unlink()
    (root / "etc" / "link").symlink_to("nowhere")
    os.link(root / "new" / "deep" / "file", root / "new" / "same")
    os.setxattr(root / "new", "user.note", b"\0\xff")
    for path in root.rglob("*"):
        # umoci rounds times to seconds, up or down.
        whole = path.lstat().st_mtime_ns // 1_000_000_000
        os.utime(path, (whole, whole), follow_symlinks=False)
    run("umoci", "repack", "--image", f"{layout}:changed", str(bundle))
    image = images.import_image(driver, layout, select=["changed"])[0]
    assert len(image.layers) == 4
    assert len(driver.ids()) == 4  # the lower three were there
    assert image.layer is not None
    with driver.mounted(image.layer, read_only=True) as mounted:
        assert_same(mounted, root)
    # And out again, in its exact bytes.
    done = images.export_image(driver, "changed", tmp_path / "again", compression="none")
    run("umoci", "unpack", "--image", f"{tmp_path / 'again'}:changed", str(tmp_path / "bundle2"))
    assert done.image_id == image.id


@pytest.mark.needs("command:umoci", "overlay")
def test_umoci_takes_an_image_of_our_own(driver: Driver, tmp_path: Path) -> None:
    base = images.import_image(driver, made.oci(rich_layers()).write(tmp_path / "source"))[0]
    box = driver.create(parent=base.layer, writable=True)
    with driver.mounted(box) as root:
        (root / "etc" / "a").write_text("mine")
        (root / "new" / "deep" / "file").unlink()
        (root / "more").mkdir()
        os.link(root / "etc" / "a", root / "more" / "a")
    top = driver.commit(box)
    images.create_image(driver, top, "mine", cmd=["/bin/true"])
    images.export_image(driver, "mine", tmp_path / "out")
    run("umoci", "unpack", "--image", f"{tmp_path / 'out'}:mine", str(tmp_path / "bundle"))
    with driver.mounted(top, read_only=True) as root:
        assert_same(root, tmp_path / "bundle" / "rootfs")


# --- Docker itself --------------------------------------------------------------------------------


@pytest.mark.needs("overlay")
@pytest.mark.skipif(
    not (dockerd.DAEMON.exists() and dockerd.CLIENT.exists()),
    reason="needs dockerd and docker in their Debian places",
)
def test_docker_loads_what_we_export_and_we_import_what_it_saves(
    driver: Driver, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tag = "demo/app:1.0"
    source = made.docker_legacy({tag: [made.BASE, made.MIDDLE, made.BASE]})
    image = images.import_image(driver, source.tar_file(tmp_path / "source"))[0]
    images.export_image(driver, tag, tmp_path / "ours", form="docker-archive")
    # The sockets of its containerd must fit into 108 bytes, so no directory of this test's name.
    with dockerd.running(tmp_path_factory.mktemp("docker")) as docker:
        docker("load", "-i", tmp_path / "ours")
        assert docker("inspect", "--format", "{{.Id}}", tag).strip() == image.id
        docker("save", "-o", tmp_path / "theirs", tag)
    with Driver.open(tmp_path / "other") as other:
        again = images.import_image(other, tmp_path / "theirs")[0]
    assert (again.id, again.names, again.layers) == (image.id, (tag,), image.layers)
