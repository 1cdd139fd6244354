"""Every change of a store, stopped or failed at every single step: the old or the new state.

A *stop* is a kill: that call and all later ones do not happen. Opening the store again mends what
it left. An *error* is answered by the disk; the operation fails, and what it promised holds.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import Crash, inject
from tests.support.stores import assert_clean, content_of, fill, lid, open_store, quick_place
from unionfs2 import storestructure, syscalls
from unionfs2.errors import StoreError
from unionfs2.layers import LayerStore
from unionfs2.storemodel import Digest, Size
from unionfs2.storerepair import repair

_STEPS_MAX = 200
DIGEST = Digest("sha256:" + "5" * 64)

State = dict[str, Any]
Action = Callable[[LayerStore], object]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with quick_place(tmp_path) as path:
        yield path


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs are still steps, but nobody waits for the disk: a kill loses nothing in memory."""
    for name in ("fsync", "syncfs"):
        monkeypatch.setattr(syscalls, name, lambda fd: None)


def state(store: LayerStore) -> State:
    """Everything that an operation can change, as a value."""
    found = {}
    for layer in store.ids():
        value = store.layer(layer)
        tar_split = Path(os.fsdecode(store.layer_path(layer))) / "tar-split"
        found[str(layer)] = (
            value.parent,
            value.frozen,
            value.record.diff_id,
            value.record.size,
            content_of(store, layer),
            tar_split.exists() and tar_split.read_text(),
        )
    return found


def prepare(home: Path) -> None:
    """A base layer that is frozen, a layer on it with content, an empty one on that one."""
    with open_store(home) as store:
        store.create(lid("base"))
        fill(store, lid("base"), {"f": "base"})
        store.freeze(lid("base"))
        store.create(lid("box"), lid("base"), writable=True)
        fill(store, lid("box"), {"f": "box"})
        store.create(lid("top"), lid("box"))


def create(store: LayerStore) -> object:
    return store.create(lid("new"), lid("base"), writable=True)


def create_base(store: LayerStore) -> object:
    return store.create(lid("new"))


def create_copy(store: LayerStore) -> object:
    return store.create(lid("new"), lid("base"), template=lid("box"))


def write_staged(fd: int, name: str, text: bytes) -> None:
    file = os.open(name, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd)
    os.write(file, text)
    os.close(file)


def create_filled(store: LayerStore) -> object:
    with store.stage(lid("base")) as staging:
        write_staged(staging.fd, "g", b"new")
        write_staged(staging.base_fd, "tar-split", b"split")
        return store.create(
            lid("new"), lid("base"), staging=staging, commit=True, record={"diff_id": DIGEST}
        )


def install(store: LayerStore) -> object:
    with store.stage(lid("top")) as staging:
        write_staged(staging.fd, "g", b"new")
        write_staged(staging.base_fd, "tar-split", b"split")
        return store.install_diff(lid("top"), staging, commit=True, diff_id=DIGEST, size=Size(3, 1))


def rebase(store: LayerStore) -> object:
    with store.stage(lid("top")) as staging:
        return store.install_diff(lid("top"), staging, parent=lid("base"))


def commit(store: LayerStore) -> object:
    return store.commit(lid("top"), lid("new"), size=Size(0, 0))


def commit_parent(store: LayerStore) -> object:
    return store.commit(lid("box"), lid("new"))


def freeze(store: LayerStore) -> object:
    return store.freeze(lid("top"), size=Size(0, 0))


def discard(store: LayerStore) -> object:
    return store.discard(lid("top"))


def update(store: LayerStore) -> object:
    return store.update_record(lid("base"), size=Size(4, 1))


ACTIONS = [
    create,
    create_base,
    create_copy,
    create_filled,
    install,
    rebase,
    commit,
    commit_parent,
    freeze,
    discard,
    update,
]


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    real = syscalls.rename

    def rename(old: bytes, old_fd: int, new: bytes, new_fd: int, flags: int = 0) -> None:
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), old)
        real(old, old_fd, new, new_fd)

    monkeypatch.setattr(syscalls, "rename", rename)


@pytest.fixture(params=["flags", "no-flags"])
def _renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With renameat2(2) as Linux has it, and on a file system that takes none of its flags."""
    if request.param == "no-flags":
        without_exchange(monkeypatch)


def run(home: Path, action: Action, fail_at: int, *, crash: bool) -> tuple[bool, bool]:
    """Do it with a fault: (whether the fault came, whether the operation said it succeeded)."""
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(home)
    try:
        with inject(fail_at=fail_at, error=errno.ENOSPC, crash=crash) as faults:
            try:
                action(store)
                done = True
            except (Crash, OSError, StoreError):
                done = False
    finally:
        store.close()
    assert len(os.listdir("/proc/self/fd")) == before, f"step {fail_at} left a descriptor open"
    return faults.fired, done


@pytest.mark.usefixtures("_renames")
@pytest.mark.parametrize("crash", [True, False], ids=["stop", "error"])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_old_or_new_at_every_step(tmp_path: Path, action: Action, crash: bool) -> None:
    prepare(tmp_path / "new")
    with open_store(tmp_path / "new") as store:
        old = state(store)
        action(store)
        new = state(store)
    assert old != new
    for n in itertools.count(1):
        home = tmp_path / str(n)
        prepare(home)
        fired, done = run(home, action, n, crash=crash)
        with open_store(home) as store:
            seen = state(store)
            assert seen in (old, new), f"step {n}"
            if done:
                assert seen == new, f"step {n}: success was reported"
            assert_clean(store)
        if not fired:
            assert done
            assert n > 3
            break
        assert n < _STEPS_MAX


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_the_next_use_by_a_process_that_had_the_store_open_sees_it_mended(
    tmp_path: Path, action: Action
) -> None:
    for n in itertools.count(1):
        home = tmp_path / str(n)
        prepare(home)
        with open_store(home) as other:
            other.ids()
            fired, _ = run(home, action, n, crash=True)
            state(other)
            other.create(lid("later"), lid("base"))
            other.discard(lid("later"))
            other.clear_staging()
            other.empty_trash()
            assert_clean(other)
        if not fired:
            break


def test_opening_a_new_store_stopped_at_every_step(tmp_path: Path) -> None:
    for n in itertools.count(1):
        home = tmp_path / str(n)
        with inject(fail_at=n, crash=True) as faults:
            try:
                open_store(home).close()
            except Crash:
                pass
        with open_store(home) as store:
            assert_clean(store)
            store.create(lid("a"))
        if not faults.fired:
            break


def test_mending_stopped_at_every_step_is_mended_the_next_time(tmp_path: Path) -> None:
    for n in itertools.count(1):
        home = tmp_path / str(n)
        prepare(home)
        for link in (home / "l").iterdir():
            link.unlink()
        (home / "l" / ("X" * 26)).symlink_to("../gone/diff")
        (home / ".unionfs2" / "lock").unlink()
        with inject(fail_at=n, crash=True) as faults:
            try:
                open_store(home).close()
            except Crash:
                pass
        with open_store(home) as store:
            assert_clean(store)
        if not faults.fired:
            break


def test_repair_stopped_at_every_step_goes_on_the_next_time(tmp_path: Path) -> None:
    for n in itertools.count(1):
        home = tmp_path / str(n)
        prepare(home)
        (home / "top" / "lower").write_text("")
        (home / "box" / "link").write_text("garbage")
        (home / "base" / "layer.json").write_text("{")
        (home / "stray").mkdir()
        store = open_store(home)
        with inject(fail_at=n, crash=True) as faults:
            try:
                repair(store)
            except Crash:
                pass
        store.close()
        with open_store(home) as again:
            repair(again)
            assert_clean(again)
            assert again.ids() == ("base", "box", "top")
            assert content_of(again, lid("box")) == {"f": "box"}
        if not faults.fired:
            break


def test_a_full_disk_keeps_nobody_from_removing_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    for link in (tmp_path / "l").iterdir():
        link.unlink()
    (tmp_path / ".unionfs2" / "lock").write_text("")

    def full(*args: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "symlink", full)
        with open_store(tmp_path) as store:
            store.discard(lid("top"))
            assert store.ids() == ("base", "box")
    with open_store(tmp_path) as store:
        assert_clean(store)


def test_a_sync_that_fails_takes_the_new_layer_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)

    def broken(self: storestructure.Structure) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_store(tmp_path) as store:
        monkeypatch.setattr(storestructure.Structure, "sync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            create(store)
        assert not store.exists(lid("new"))
        assert store.children(lid("base")) == ("box",)
        monkeypatch.undo()
        assert_clean(store)
