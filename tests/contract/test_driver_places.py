"""Stores in places that are not like home: Docker's, without privilege, read-only, shared."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.conftest import Opener, by_fuse
from tests.support import fusedev, places, probe
from tests.support.tree import Tree, Whiteout, build
from unionfs2 import mountcalls
from unionfs2.backends import Choice
from unionfs2.driver import Driver
from unionfs2.errors import StoreError
from unionfs2.storemodel import LayerId

pytestmark = pytest.mark.needs("root")


# --- a store that Docker wrote -------------------------------------------------------------------


@pytest.fixture
def docker_home(home: Path) -> Path:
    """Three layers as Docker's overlay2 lays them out, without anything of this project."""
    (home / "l").mkdir(parents=True)
    home.chmod(0o710)
    (home / "backingFsBlockDev").touch()
    chain: list[str] = []
    trees: list[Tree] = [{"file": "0", "gone": "0"}, {"file": "1", "gone": Whiteout()}, {}]
    for number, tree in enumerate(trees):
        name, short = f"{number}" * 64, chr(ord("A") + number) * 26
        layer = home / (name if number < 2 else f"{name}-init")
        (layer / "diff").mkdir(parents=True)
        build(layer / "diff", tree)
        os.symlink(f"../{layer.name}/diff", home / "l" / short)
        (layer / "link").write_text(short)
        if chain:
            (layer / "lower").write_text(":".join(f"l/{below}" for below in chain))
            (layer / "work").mkdir(mode=0o700)
        if number < 2:
            (layer / "committed").touch()
        chain.insert(0, short)
    return home


def test_a_store_of_docker(docker_home: Path, opener: Opener) -> None:
    driver = opener()
    bottom, mid, top = driver.ids()
    assert top.endswith("-init")
    with driver.mounted(top) as root:
        assert os.listdir(root) == ["file"]
        assert (root / "file").read_text() == "1"
        (root / "new").touch()
    with driver.mounted(mid) as root:
        assert (root / "file").read_text() == "1"
    assert [(found.path, str(found.kind)) for found in driver.changes(mid)] == [
        (b"/file", "C"),
        (b"/gone", "D"),
    ]
    assert driver.is_parent(mid, bottom)
    assert driver.prune(unused=True) == []
    assert driver.ids() == (bottom, mid, top)
    assert {layer.created for layer in driver.layers()} == {None}
    assert driver.check() == []
    assert (docker_home / "backingFsBlockDev").exists()


def test_what_docker_has_mounted_is_in_use(docker_home: Path, opener: Opener) -> None:
    probe.need("overlay")
    driver = opener()
    top = driver.ids()[-1]
    layer = docker_home / top
    (layer / "merged").mkdir()
    chain = b":".join(os.path.join(b"l", short.encode()) for short in driver.store.layer(top).lower)
    here = os.open(".", os.O_RDONLY)
    os.chdir(docker_home)
    try:
        name = os.fsencode(top)
        data = b"lowerdir=%b,upperdir=%b/diff,workdir=%b/work" % (chain, name, name)
        mountcalls.mount(b"overlay", name + b"/merged", b"overlay", 0, data)
    finally:
        os.fchdir(here)
        os.close(here)
    (found,) = [status for status in driver.layers() if status.mounted]
    assert (found.id, found.mounted) == (top, 1)
    assert driver.get(top) == layer / "merged"
    assert driver.put(top)
    assert (layer / "merged").is_mount()
    assert driver.cleanup() == []
    assert driver.put(top)
    assert not (layer / "merged").is_mount()


# --- without privilege ---------------------------------------------------------------------------

_LIFE = """
import os, sys
from unionfs2 import Driver
backend, *options = sys.argv[2:]
with Driver.open(sys.argv[1], backend=backend, options=options) as driver:
    base = driver.create("base")
    root = driver.get(base)
    (root / "file").write_text("x")
    (root / "dir").mkdir()
    (root / "dir" / "inner").write_text("x")
    driver.create("box", base, writable=True)
    with driver.mounted("box") as root:
        assert driver.get_metadata("box")["Backend"] == backend
        (root / "file").unlink()
        (root / "dir" / "inner").unlink()
        (root / "dir").rmdir()
        (root / "dir").mkdir()
    opaque = os.getxattr(driver.store.diff_path("box") + b"/dir", "user.overlay.opaque")
    assert opaque == b"y"
    print([(change.path, str(change.kind)) for change in driver.changes("box")])
    driver.commit("box", "done", keep=True)
    with driver.mounted("done") as root:
        print(os.listdir(root))
    driver.flatten("done", "flat")
    print(driver.changes("flat", "done"))
    for layer in ("box", "flat", "done", "base"):
        assert driver.remove(layer)
    print(driver.ids(), driver.check())
"""
_LIVED = """\
[(b'/dir', 'C'), (b'/dir/inner', 'D'), (b'/file', 'D')]
['dir']
[]
() []
"""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that another user can write to."""
    with places.open_directory() as place:
        place.chmod(0o777)
        yield place


def _live(prefix: list[str], place: Path, backend: Choice, options: list[str]) -> str:
    command = [*prefix, sys.executable, "-c", _LIFE, str(place / "store"), backend, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.needs("userns-overlay")
def test_root_of_a_user_namespace(
    open_place: Path, backend: Choice, store_options: list[str]
) -> None:
    prefix = ["unshare", "--user", "--map-root-user", "--mount"]
    assert _live(prefix, open_place, backend, store_options) == _LIVED


@pytest.mark.needs("private-fuse")
@by_fuse
def test_an_ordinary_user(open_place: Path, store_options: list[str]) -> None:
    prefix = fusedev.as_user([], uid=65534, gid=65534)
    assert _live(prefix, open_place, "fuse", store_options) == _LIVED


# --- a store that cannot be written --------------------------------------------------------------


def test_a_read_only_store_can_be_looked_at(
    opener: Opener, driver: Driver, home: Path, tmp_path: Path
) -> None:
    root = driver.get(driver.create("base"))
    (root / "file").write_text("x")
    driver.create("box", "base")
    driver.close()
    target = str(tmp_path / "bound")
    os.mkdir(target)
    probe.sys_mount(str(home), target, "none", mountcalls.MS_BIND)
    flags = mountcalls.MS_BIND | mountcalls.MS_RDONLY | 32  # MS_REMOUNT
    probe.sys_mount("none", target, "none", flags)
    try:
        with Driver.open(target, backend="auto") as looked:
            assert looked.ids() == ("base", "box")
            assert looked.status().read_only
            assert looked.changes("box") == []
            assert looked.usage()[0].own.bytes == 1
            assert looked.get_metadata("box")["UpperDir"].endswith("/box/diff")
            for action in (
                lambda: looked.create("new"),
                lambda: looked.remove("box"),
                lambda: looked.apply("box", io.BytesIO()),
                looked.repair,
                looked.prune,
            ):
                with pytest.raises(StoreError, match="read-only"):
                    action()
    finally:
        probe.sys_umount(os.fsencode(target))


# --- several processes ---------------------------------------------------------------------------

_WORK = """
import sys
from unionfs2 import Driver
home, backend, me, *options = sys.argv[1:]
with Driver.open(home, backend=backend, options=options) as driver:
    for turn in range(int(sys.stdin.readline())):
        own = driver.create(f"own-{me}-{turn}", "base", writable=True)
        with driver.mounted("shared") as root:
            (root / f"{me}-{turn}").touch()
            with driver.mounted(own) as mine:
                (mine / "x").touch()
        assert driver.remove(own)
"""


def test_processes_that_share_a_store(
    driver: Driver, backend: Choice, store_options: list[str]
) -> None:
    driver.create("base")
    driver.create("shared", "base", writable=True)
    turns = 10 if backend == "native" else 2
    command = [sys.executable, "-c", _WORK, os.fsdecode(driver.store.home), backend]
    workers = [
        subprocess.Popen(
            [*command, str(n), *store_options],
            stdin=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{turns}\n")
        worker.stdin.close()
    assert [worker.wait() for worker in workers] == [0] * 4
    assert driver.ids() == ("base", "shared")
    assert len(os.listdir(driver.store.diff_path(LayerId("shared")))) == 4 * turns
    assert not any(layer.mounted for layer in driver.layers())
    assert driver.check() == []
