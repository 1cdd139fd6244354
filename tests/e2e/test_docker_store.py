"""A store written by Docker's overlay2 is opened, shown and extended as it is.

One is recorded (tests/data), the other is written by dockerd on the spot, where that is installed.
What Docker itself said about its containers (``docker export``, ``docker diff``) is the measure.
"""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pytest

from tests.support import dockerd, mounts, probe
from tests.support.dockerd import DockerStore
from tests.support.tree import Snapshot, differences, snapshot
from unionfs2.driver import Driver
from unionfs2.options import Backend
from unionfs2.storemodel import Change, LayerId, Size

pytestmark = pytest.mark.needs("root", "overlay", "fuse", "trusted-xattr", "mknod")

_RECORDED = Path(__file__).parent.parent / "data" / "docker-20.10.json"
_KINDS = ("dir", "file", "symlink", "fifo", "char")
BACKENDS: Final[tuple[Backend, ...]] = ("native", "fuse")


def _installed() -> bool:
    paths = (dockerd.DAEMON, dockerd.CLIENT, dockerd.BUSYBOX)
    return all(path.exists() for path in paths) and bool(probe.is_root())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What dockerd wrote a moment ago, as a record."""
    if not _installed():
        pytest.skip("needs dockerd, docker and a static busybox in their Debian places")
    place = tmp_path_factory.mktemp("dockerd")
    with dockerd.running(place) as daemon:
        containers = dockerd.fill(daemon)
    yield dockerd.record(DockerStore(daemon.home, containers))
    mounts.detach(place)


@pytest.fixture(params=["recorded", "written"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DockerStore:
    """A fresh copy of a store by Docker."""
    if request.param == "recorded":
        record = json.loads(_RECORDED.read_text(encoding="ascii"))
    else:
        record = request.getfixturevalue("written")
    return dockerd.replay(record, tmp_path / "overlay2")


def _as_exported(seen: Snapshot, like: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a mount shows, in the words of ``docker export``; of files only what that can tell."""
    out = {}
    for path, entry in seen.items():
        if path == b".":
            continue
        node: dict[str, Any] = {
            "type": entry.kind, "mode": entry.mode, "uid": entry.uid, "gid": entry.gid,
            "mtime": entry.mtime_ns // 10**9,
        }  # fmt: skip
        name = path.decode()
        if entry.kind == "symlink":
            node["target"] = (entry.target or b"").decode()
        elif entry.kind == "file":
            node["data"] = like.get(name, {}).get("data")  # compared below, as bytes
        out[name] = node
    return out


def _assert_shows(root: Path, exported: dict[str, dict[str, Any]]) -> Snapshot:
    seen = snapshot(root)
    assert {entry.kind for entry in seen.values()} <= set(_KINDS)
    assert _as_exported(seen, exported) == exported
    for path, node in exported.items():
        if node["type"] == "file":
            shown = dockerd.shortened((root / path).read_bytes())
            assert shown == dockerd.to_bytes(node["data"]), path
    return seen


def test_containers_look_as_docker_exported_them(store: DockerStore) -> None:
    with Driver.open(store.home) as driver:
        for container in store.containers.values():
            views = []
            for backend in BACKENDS:
                with driver.mounted(container.layer, backend=backend) as root:
                    views.append(_assert_shows(root, container.export))
            assert differences(*views) == []


def test_attributes_are_there(store: DockerStore) -> None:
    layer = store.containers["busy"].layer
    with Driver.open(store.home) as driver:
        for backend in BACKENDS:
            with driver.mounted(layer, backend=backend) as root:
                seen = snapshot(root)
            assert dict(seen[b"etc/run"].xattrs)["user.origin"] == b"outside"
            assert "security.capability" in dict(seen[b"bin/raw"].xattrs)
            assert "security.capability" in dict(seen[b"bin/capable"].xattrs)
            assert seen[b"data/two"].links == (b"data/three", b"data/two")
            assert not [key for entry in seen.values() for key, _ in entry.xattrs if "over" in key]


def test_changes_are_those_of_docker_diff(store: DockerStore) -> None:
    with Driver.open(store.home) as driver:
        for container in store.containers.values():
            ours = driver.changes(container.layer)
            assert ours == driver.changes(container.layer, LayerId(f"{container.layer}-init"))
            assert sorted(_with_parents(ours)) == sorted(container.changes)


def _with_parents(changes: list[Change]) -> set[str]:
    """As ``docker diff`` words it, which calls every directory above a change changed, too."""
    words = {f"{change.kind} {change.path.decode()}" for change in changes}
    named = {change.path.decode() for change in changes}
    above = {str(parent) for path in named for parent in PurePosixPath(path).parents}
    return words | {f"C {path}" for path in above - named - {"/"}}


def test_nothing_is_wrong_with_it_and_nothing_is_changed_by_opening(store: DockerStore) -> None:
    before = snapshot(store.home)
    with Driver.open(store.home) as driver:
        assert driver.check() == []
        assert driver.repair() == []
        assert len(driver.layers()) == len(driver.ids()) >= 10
        assert not [layer for layer in driver.layers() if layer.reason]
    after = {p: e for p, e in snapshot(store.home).items() if not p.startswith(b".unionfs2")}
    root_before, root_after = before.pop(b"."), after.pop(b".")
    assert differences(before, after) == []
    # Only an entry more: nobody's mode or owner is changed.
    assert (root_before.mode, root_before.uid) == (root_after.mode, root_after.uid) == (0o710, 0)


def test_a_used_layer_is_shown_and_left_alone(store: DockerStore) -> None:
    """Layers below others are mounted read-only, whether Docker marked them or not."""
    init = store.containers["busy"].layer + "-init"
    with Driver.open(store.home) as driver:
        for backend in BACKENDS:
            mounted = driver.mounted(init, backend=backend)
            with mounted as root, pytest.raises(OSError, match="Read-only"):
                (root / "new").touch()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_container_goes_on_here(store: DockerStore, backend: Backend) -> None:
    layer = store.containers["busy"].layer
    with Driver.open(store.home, backend=backend) as driver:
        old = driver.changes(layer)
        with driver.mounted(layer) as root:
            (root / "etc" / "run").unlink()
            (root / "etc" / "more").write_text("more", encoding="ascii")
        new = driver.changes(layer)
        added = {(change.path, str(change.kind)) for change in set(new) - set(old)}
        assert added == {(b"/etc/more", "A")}
        assert {change.path for change in set(old) - set(new)} == {b"/etc/run"}
        child = driver.create(parent=driver.commit(layer))
        with driver.mounted(child) as root:
            assert (root / "etc" / "more").read_text(encoding="ascii") == "more"
        assert driver.check() == []


def test_its_layers_travel(store: DockerStore, tmp_path: Path) -> None:
    """Every layer of a container as a stream, applied in a new store: the same view."""
    layer = store.containers["again"].layer
    with Driver.open(store.home) as docker, Driver.open(tmp_path / "new") as ours:
        record = docker.store.layer(LayerId(layer))
        parent = None
        for one in (*reversed(record.chain), record.id):
            stream = io.BytesIO()
            digest = docker.diff(one, stream)
            stream.seek(0)
            copied = ours.create(one, parent=parent)
            applied = ours.apply(copied, stream, expected=digest)
            assert isinstance(applied.size, Size)
            parent = copied
        with ours.mounted(layer, backend="native") as root:
            seen = _assert_shows(root, store.containers["again"].export)
        with docker.mounted(layer, backend="native") as root:
            assert differences(seen, snapshot(root)) == []


def test_layers_can_be_removed_in_order(store: DockerStore) -> None:
    with Driver.open(store.home) as driver:
        for node in reversed(driver.tree()):
            driver.remove(node.layer.id)
        assert driver.ids() == ()
    left = {path.name for path in store.home.iterdir()}
    assert left == {"l", ".unionfs2"}
    assert stat.S_IMODE((store.home / "l").stat().st_mode) == 0o700
    assert list((store.home / "l").iterdir()) == []
