"""``unionfs2 image``: into the store and out of it, with equal digests."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.shelf import BASE, Shelf, Terminal, shelf_of, tar_of

pytestmark = pytest.mark.needs("root")

NAME = "example.org/debian:12"


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    """A store with an image of two layers."""
    with shelf_of(None) as shelf:
        shelf.ok("layer", "create", "--id", "base")
        shelf.ok("layer", "apply", "base", given=tar_of(BASE))
        shelf.ok("layer", "create", "--id", "top", "--parent", "base")
        shelf.ok("layer", "apply", "top", given=tar_of({"etc/.wh.motd": "", "etc/new": "n"}))
        made = shelf.ok("image", "create", "top", NAME)
        assert re.fullmatch("sha256:[0-9a-f]{64}", made)
        yield shelf


def digests(layout: Path) -> list[str]:
    """Digests of the layers in an OCI image layout."""

    def blob(digest: str) -> Any:
        return json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())

    index = json.loads((layout / "index.json").read_bytes())
    manifest = blob(index["manifests"][0]["digest"])
    return [layer["digest"] for layer in manifest["layers"]]


def test_a_list_of_images(shelf: Shelf) -> None:
    (row,) = shelf.json("image", "ls")
    assert set(row) == {
        *("name", "image_id", "platform", "layers", "size_bytes", "created", "layer"),
    }
    assert (row["name"], row["layers"], row["layer"]) == (NAME, ["base", "top"], "top")
    assert shelf.ok("image", "ls", "-q") == NAME
    header, line = shelf.ok("image", "ls").splitlines()
    assert header.split() == ["NAME", "IMAGE", "PLATFORM", "LAYERS", "SIZE", "CREATED", "LAYER"]
    assert line.split()[:2] == [NAME, row["image_id"]]


@pytest.mark.parametrize("compress", ["none", "gzip", "zstd"])
def test_there_and_back_as_an_oci_layout(shelf: Shelf, compress: str) -> None:
    words = ("-o", "layout", "--compress", compress)
    told = shelf.ok("image", "export", NAME, *words)
    assert re.fullmatch("sha256:[0-9a-f]{64}", told)
    image = shelf.ok("--root", "other", "image", "import", "layout")
    assert [row["image_id"] for row in shelf.json("--root", "other", "image", "ls")] == [image]
    (layer,) = [row["layer"] for row in shelf.json("--root", "other", "image", "ls")]
    lines = shelf.ok("--root", "other", "layer", "changes", layer).splitlines()
    assert {"C /etc", "D /etc/motd", "A /etc/new"} <= set(lines)
    again = shelf.ok("--root", "other", "image", "export", NAME, "-o", "again", *words[2:])
    assert digests(shelf.root / "again") == digests(shelf.root / "layout")
    assert again == told


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
def test_through_a_pipe(shelf: Shelf, form: str) -> None:
    script = (
        f"unionfs2 image export {NAME} --to {form} -o - | "
        "unionfs2 --root other image import - --name mine:1 --name mine:2"
    )
    done = shelf.shell(script)
    assert (done.status, done.err) == (0, "")
    assert shelf.ok("--root", "other", "image", "ls", "-q").splitlines() == ["mine:1", "mine:2"]
    assert len(shelf.json("--root", "other", "layer", "ls")) == 2


def test_docker_load_finds_its_manifest(shelf: Shelf) -> None:
    shelf.ok("image", "export", NAME, "--to", "docker-archive", "-o", "saved.tar")
    with tarfile.open(shelf.root / "saved.tar") as tar:
        member = tar.extractfile("manifest.json")
        assert member is not None
        (entry,) = json.load(member)
    assert entry["RepoTags"] == [NAME]
    assert len(entry["Layers"]) == 2


def test_importing_again_adds_nothing(shelf: Shelf) -> None:
    shelf.ok("image", "export", NAME, "--to", "oci-archive", "-o", "image.tar")
    first = shelf.ok("--root", "other", "image", "import", "image.tar")
    before = shelf.ok("--root", "other", "layer", "ls", "-q")
    assert shelf.ok("--root", "other", "image", "import", "image.tar") == first
    assert shelf.ok("--root", "other", "layer", "ls", "-q") == before


def test_a_layer_that_an_image_is_made_of_stays(shelf: Shelf) -> None:
    (row,) = shelf.json("image", "ls")
    top = row["layer"]
    told = shelf.refused("layer", "rm", top)
    assert f"images are made of it: {NAME}: remove these first" in told
    assert top in shelf.ok("layer", "ls", "-q").splitlines()
    shelf.ok("image", "rm", "--layers", NAME)
    assert shelf.ok("layer", "ls", "-q") == ""


def test_a_configuration_of_ones_own(shelf: Shelf) -> None:
    shelf.ok(
        *("image", "create", "top", "app:1", "--cmd", "serve 'a b'", "--entrypoint", "/init"),
        *("--env", "A=1=2", "--env", "B=", "--label", "k=v", "--workdir", "/srv", "--user", "5:6"),
    )
    shelf.ok("image", "export", "app:1", "-o", "app")
    index = json.loads((shelf.root / "app" / "index.json").read_bytes())
    blobs = shelf.root / "app" / "blobs"
    manifest = blobs / index["manifests"][0]["digest"].replace(":", "/")
    digest = json.loads(manifest.read_bytes())["config"]["digest"]
    config = json.loads((blobs / digest.replace(":", "/")).read_bytes())["config"]
    assert config["Cmd"] == ["serve", "a b"]
    assert config["Entrypoint"] == ["/init"]
    assert set(config["Env"]) >= {"A=1=2", "B="}
    assert (config["Labels"], config["WorkingDir"], config["User"]) == ({"k": "v"}, "/srv", "5:6")
    told = shelf.refused("image", "create", "top", "app:2", "--env", "A")
    assert '--env needs NAME=VALUE, got "A"' in told
    done = shelf.run("image", "create", "top", "app:2", "--cmd", "'")
    assert (done.status, "cannot be split" in done.err) == (1, True)


def test_names(shelf: Shelf) -> None:
    shelf.ok("image", "tag", NAME, "short:1")
    assert shelf.ok("image", "ls", "-q").splitlines() == [NAME, "short:1"]
    shelf.ok("image", "rm", NAME)
    assert shelf.ok("image", "ls", "-q") == "short:1"
    assert "top" not in shelf.ok("prune", "--unused", "--dry-run")
    shelf.ok("image", "rm", "short:1")
    shelf.ok("prune", "--unused")
    assert shelf.ids() == []


def test_refusals(shelf: Shelf) -> None:
    assert NAME in shelf.refused("image", "export", "example.org/debain:12", "-o", "x")
    told = shelf.refused("image", "export", NAME, "-o", "-")
    assert told == "an image layout is a directory: use --to oci-archive to write a stream"
    shelf.refused("image", "import", "-", given=b"no tar at all" * 100)
    assert "no/where" in shelf.refused("image", "import", "no/where")
    assert "there is no layer" in shelf.refused("image", "create", "nope", "a:b")
    done = shelf.run("image", "rm", "nope", NAME)
    assert done.status == 64
    assert shelf.json("image", "ls") == []
    assert shelf.leftovers() == []


def test_an_archive_is_not_for_a_terminal(shelf: Shelf) -> None:
    terminal = Terminal()
    done = shelf.run(
        "image", "export", NAME, "--to", "oci-archive", "-o", "-", stdout=terminal.slave
    )
    assert (done.status, terminal.text()) == (1, "")
    assert done.err == "unionfs2: an archive is not for a terminal: use -o FILE, or a pipe\n"


def test_a_broken_archive_leaves_nothing(shelf: Shelf) -> None:
    shelf.ok(
        "image", "export", NAME, "--to", "oci-archive", "--compress", "none", "-o", "image.tar"
    )
    data = (shelf.root / "image.tar").read_bytes()
    shelf.refused("--root", "other", "image", "import", "-", given=data[: len(data) // 2])
    assert shelf.ok("--root", "other", "image", "ls", "-q") == ""
    position = data.index(b"hello\n")
    bent = io.BytesIO(data)
    bent.seek(position)
    bent.write(b"HELLO")
    told = shelf.refused("--root", "other", "image", "import", "-", given=bent.getvalue())
    assert "sha256:" in told
    assert shelf.ok("--root", "other", "image", "ls", "-q") == ""
