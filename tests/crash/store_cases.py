"""A store with everything in it, and each operation that changes one, for the crash tests."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.support.tree import Dir, Entry, File, HardLink, Symlink, Tree, Whiteout, build, snapshot
from unionfs2 import images
from unionfs2.driver import Driver
from unionfs2.storemodel import LayerId

State = dict[str, Any]

_GIVEN_NS_MAX: Final = 1_500_000_000_000_000_000


class Case(NamedTuple):
    """An operation. *atomic*: nothing between before and after; otherwise each layer by itself.

    *moved* is a layer that may be absent in between, because its content has another name already.
    """

    name: str
    act: Callable[[Driver], object]
    atomic: bool = True
    moved: str = ""


class Template(NamedTuple):
    """A store to copy, and an image layout to import."""

    home: Path
    layout: Path


def tar_of(files: dict[str, bytes]) -> io.BytesIO:
    """A stream as other programs write it, with directories before their files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.mtime = 1_000_000_000
            member.mode = 0o755 if name.endswith("/") else 0o644
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out.seek(0)
    return out


BASE: Final = {"a": b"base a", "d/": b"", "d/x": b"x" * 5000, "d/y": b"y"}
MIDDLE: Final = {".wh.a": b"", "d/": b"", "d/.wh..wh..opq": b"", "d/z": b"z"}
NEW: Final = {"n": b"new", "e/": b"", "e/f": b"f" * 9000, ".wh.d": b""}


def make_template(place: Path) -> Template:
    """base <- middle <- box (writable, filled), empty and loose layers, an image of its own."""
    home = place / "store"
    with Driver.open(home) as driver:
        for layer, parent, files in (("base", None, BASE), ("middle", "base", MIDDLE)):
            driver.create(layer, parent)
            driver.apply(layer, tar_of(files))
        driver.create("box", "middle", writable=True, label="boxed")
        tree: Tree = {
            "w": File("written", xattrs={"user.k": b"v"}, mtime_ns=5),
            "h1": "linked", "h2": HardLink("h1"), "to": Symlink("w"),
            "d": Dir({"q": "q"}, opaque=True), "a": Whiteout(),
        }  # fmt: skip
        build(os.fsdecode(driver.store.diff_path(LayerId("box"))), tree)
        driver.create("empty", "base")
        driver.create("loose")
        driver.apply("loose", tar_of({"loose": b"loose"}))
        images.create_image(driver, LayerId("middle"), "kept:1")
        layout = place / "layout"
        driver.create("t1")
        driver.apply("t1", tar_of({"one": b"1", "d/": b""}))
        driver.create("t2", "t1")
        driver.apply("t2", tar_of({"two": b"2", ".wh.one": b""}))
        images.create_image(driver, LayerId("t2"), "made:1")
        images.export_image(driver, "made:1", str(layout), form="oci")
        images.remove_image(driver, "made:1")
        driver.remove("t2")
        driver.remove("t1")
    return Template(home, layout)


def copy_of(template: Template, home: Path) -> None:
    """A store like the template's at *home*."""
    subprocess.run(["cp", "-a", template.home, home], check=True)


def state(driver: Driver) -> State:
    """All that a store promises to keep, as a value."""
    found: State = {}
    for layer in driver.ids():
        known = driver.store.layer(layer)
        path = os.fsdecode(driver.store.diff_path(layer))
        content = {p: _settled(e) for p, e in snapshot(path).items() if p != b"."}
        out = io.BytesIO()
        driver.diff(layer, out, exact=True)
        record = known.record
        found[layer] = (
            known.parent, known.frozen, record.writable, record.label, record.diff_id,
            content, out.getvalue() if record.diff_id else None,
        )  # fmt: skip
    for image in images.list_images(driver):
        # An image is there before its name is, and an image without name is one, too.
        found[f"image {image.id}"] = image.layers
        found.update({f"name {name}": image.id for name in image.names})
    return found


def _settled(entry: Entry) -> Entry:
    # Whiteouts and what has no time in a stream have that of the run.
    return replace(entry, mtime_ns=0) if entry.mtime_ns > _GIVEN_NS_MAX else entry


def leave_rubbish(home: Path) -> None:
    """What dead processes leave: a staged layer, trash, a link to nothing, an unused layer."""
    own = home / ".unionfs2"
    build(own / "staging" / "0123456789abcdef", {"diff": {"half": "half"}})
    build(own / "trash" / "fedcba9876543210", {"diff": {"d": {"old": "old"}}, "link": "X" * 26})
    (home / "l" / ("Z" * 26)).symlink_to("../nobody/diff")


def damage(home: Path) -> None:
    """What repair can mend: a link that is missing, one to the wrong layer, a stray directory."""
    leave_rubbish(home)
    (home / "l" / (home / "box" / "link").read_text()).unlink()
    (home / "stray").mkdir()
    (home / "stray" / "file").write_text("whose?")
    (home / "base" / "lower").write_text("l/" + "Q" * 26)


def _apply(driver: Driver) -> object:
    return driver.apply("empty", tar_of(NEW))


def _import_image(layout: Path) -> Callable[[Driver], object]:
    return lambda driver: images.import_image(driver, str(layout), names=("came:1",))


def _create_image(driver: Driver) -> object:
    return images.create_image(driver, LayerId("loose"), "own:1", created=1e9)


def cases(template: Template) -> dict[str, Case]:
    """All operations, by name."""
    found = (
        Case("create", lambda d: d.create("new", "middle")),
        Case("create base", lambda d: d.create("new")),
        Case("create writable", lambda d: d.create_read_write("new", "middle", label="l")),
        Case("create from template", lambda d: d.create("new", "middle", template="box")),
        Case("apply", _apply),
        Case("apply writable", lambda d: d.apply("box", tar_of(NEW))),
        Case("import layer", lambda d: d.import_layer("new", "middle", tar_of(NEW))),
        Case("commit", lambda d: d.commit("box", "new")),
        Case("commit in place", lambda d: d.commit("box", "box")),
        Case("commit and keep", lambda d: d.commit("box", "new", keep=True), False, moved="box"),
        Case("remove", lambda d: d.remove("box")),
        Case("remove loose", lambda d: d.remove("loose")),
        Case("prune", lambda d: d.prune()),
        Case("prune unused", lambda d: d.prune(unused=True), atomic=False),
        Case("repair", lambda d: d.repair(), atomic=False),
        Case("flatten", lambda d: d.flatten("middle", "new")),
        Case("rebase", lambda d: d.rebase("box", "base", "new")),
        Case("image import", _import_image(template.layout), atomic=False),
        Case("image create", _create_image, atomic=False),
        Case("image rm", lambda d: images.remove_image(d, "kept:1")),
        Case("open", lambda d: None),
    )
    return {case.name: case for case in found}


NAMES: Final = tuple(cases(Template(Path(), Path())))
