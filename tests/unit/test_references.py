"""Who has a layer mounted: files that are believed only as far as the kernel agrees."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from unionfs2 import mountcalls, mounts, references
from unionfs2.references import Reference, ReferenceStore
from unionfs2.storemodel import LayerId

LAYER = LayerId("layer")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "references"
    directory.mkdir()
    return directory


@pytest.fixture
def store(place: Path) -> Iterator[ReferenceStore]:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    yield ReferenceStore(fd)
    os.close(fd)


def _reference(**changes: object) -> Reference:
    plain = Reference(
        target="/nowhere/merged",
        backend="native",
        namespace=references.namespace(),
        mount_id=7,
        device=8,
        count=2,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_what_is_saved_is_loaded(store: ReferenceStore) -> None:
    odd = _reference(target=os.fsdecode(b"/o:,\\ \n\xff"), pid=4, pid_start=5, read_only=True)
    store.save(LAYER, [_reference(), odd])
    assert store.load(LAYER) == (_reference(), odd)
    assert store.layers() == [LAYER]


def test_a_shorter_text_leaves_nothing_of_a_longer_one(store: ReferenceStore) -> None:
    store.save(LAYER, [_reference(), _reference(mount_id=9)])
    store.save(LAYER, [_reference()])
    assert store.load(LAYER) == (_reference(),)


def test_the_longest_id_has_a_file(store: ReferenceStore) -> None:
    long = LayerId("x" * 255)
    store.save(long, [_reference()])
    assert store.load(long) == (_reference(),)
    store.drop(long)
    store.drop(long)
    assert store.layers() == []


@pytest.mark.parametrize("references_left", [[], [_reference(count=0)]])
def test_nothing_to_remember_is_no_file(
    store: ReferenceStore, place: Path, references_left: list[Reference]
) -> None:
    store.save(LAYER, [_reference()])
    store.save(LAYER, references_left)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 2, "boot_id": "BOOT", "references": []}',
        '{"version": 1, "boot_id": "BOOT", "references": [{"count": 1}]}',
        '{"version": 1, "boot_id": "BOOT", "references": 3}',
    ],
)
def test_a_damaged_file_says_nothing(store: ReferenceStore, place: Path, text: str) -> None:
    (place / LAYER).write_text(text.replace("BOOT", references.boot_id()))
    assert store.load(LAYER) == ()


def test_a_field_of_another_type_says_nothing(store: ReferenceStore, place: Path) -> None:
    store.save(LAYER, [_reference()])
    value = json.loads((place / LAYER).read_text())
    value["references"][0]["count"] = "2"
    (place / LAYER).write_text(json.dumps(value))
    assert store.load(LAYER) == ()


def test_after_a_reboot_nothing_counts(store: ReferenceStore, place: Path) -> None:
    store.save(LAYER, [_reference()])
    text = (place / LAYER).read_text().replace(references.boot_id(), "another-boot")
    (place / LAYER).write_text(text)
    assert store.load(LAYER) == ()


def test_without_a_directory_nothing_is_remembered() -> None:
    store = ReferenceStore(-1)
    store.save(LAYER, [_reference()])
    store.drop(LAYER)
    assert store.load(LAYER) == ()
    assert store.layers() == []


def test_only_the_very_mount_counts_here() -> None:
    entry = mountcalls.read_mountinfo()[0]
    mine = _reference(target=os.fsdecode(entry.target), mount_id=entry.mount_id)
    assert references.is_here(mine, entry)
    assert not references.is_here(mine, None)
    assert not references.is_here(replace(mine, mount_id=entry.mount_id + 1), entry)
    assert not references.is_here(replace(mine, target="/elsewhere"), entry)


def test_a_mount_that_came_by_propagation_is_known_by_its_device() -> None:
    entry = mountcalls.read_mountinfo()[0]
    theirs = _reference(
        target=os.fsdecode(entry.target), namespace="mnt:[1]", device=entry.device, mount_id=-1
    )
    assert references.is_here(theirs, entry)
    assert not references.is_here(replace(theirs, device=entry.device + 1), entry)


def test_a_namespace_without_a_process_has_no_mounts() -> None:
    assert references.elsewhere([_reference(namespace="mnt:[1]"), _reference()]) == []


@pytest.mark.needs("root", "overlay")
def test_a_mount_in_another_namespace_is_found(tmp_path: Path) -> None:
    for name in ("one", "two", "merged"):
        (tmp_path / name).mkdir()
    script = (
        f"mount -t overlay o -o lowerdir={tmp_path}/one:{tmp_path}/two {tmp_path}/merged"
        " && echo ready && read _"
    )
    other = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == "ready\n"
        assert references.layer_mount(os.fsencode(tmp_path / "merged")) is None
        (entry,) = [
            entry
            for entry in mountcalls.read_mountinfo(other.pid)
            if entry.target == os.fsencode(tmp_path / "merged")
        ]
        theirs = _reference(
            target=str(tmp_path / "merged"),
            namespace=os.readlink(f"/proc/{other.pid}/ns/mnt"),
            device=entry.device,
            mount_id=entry.mount_id,
        )
        assert references.elsewhere([theirs]) == [theirs]
        assert references.elsewhere([replace(theirs, device=1)]) == []
        other.stdin.close()
    assert references.elsewhere([theirs]) == []


def test_other_file_systems_are_no_mounts_of_layers() -> None:
    assert references.layer_mount(b"/proc") is None


def test_a_server_is_known_by_pid_and_start() -> None:
    own = mounts.started(os.getpid())
    assert references.server_runs(_reference(pid=os.getpid(), pid_start=own))
    assert not references.server_runs(_reference(pid=os.getpid(), pid_start=1))
    assert not references.server_runs(_reference())
