"""Many threads and several processes on one store: no deadlock, no layer lost, nothing left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.stores import assert_clean, lid, open_store, quick_place
from unionfs2 import syscalls
from unionfs2.errors import (
    CommittedError,
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    StoreError,
    UnknownLayerError,
)
from unionfs2.layers import LayerStore

_THREADS = 64
_TURNS = 12
#: What the others' doings may make of an operation; anything else is a bug.
FORESEEN = (
    CommittedError,
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    UnknownLayerError,
)

_WORKER = """
import os, random, sys
from pathlib import Path
from tests.unit.test_layers_many import turn
from tests.support.stores import open_store
home, seed, turns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
with open_store(home) as store:
    for _ in range(turns):
        turn(store, chance)
"""


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with quick_place(tmp_path) as path:
        yield path


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "syncfs"):
        monkeypatch.setattr(syscalls, name, lambda fd: None)


def turn(store: LayerStore, chance: random.Random) -> None:
    """One random operation on one of a few layers that everybody uses."""
    layer, other = (lid(str(chance.randrange(12))) for _ in range(2))
    operations: list[Callable[[], object]] = [
        lambda: store.create(layer, other if store.exists(other) else None),
        lambda: store.create(layer, other),
        lambda: store.discard(layer),
        lambda: store.discard(layer),
        lambda: store.commit(layer, other),
        lambda: store.layer(layer),
        lambda: store.children(layer),
        lambda: fill(store, layer),
        lambda: lock_two(store, layer, other),
    ]
    try:
        chance.choice(operations)()
    except FORESEEN:
        pass


def fill(store: LayerStore, layer: str) -> None:
    with store.stage(lid(layer)) as staging:
        fd = os.open("f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=staging.fd)
        os.close(fd)
        store.install_diff(lid(layer), staging)


def lock_two(store: LayerStore, one: str, other: str) -> None:
    with store.layer_locks([lid(one), lid(other)]) as locks:
        for layer, lock in locks.items():
            store.update_record(layer, lock=lock, label="locked")


def in_threads(work: Callable[[int], None], count: int = _THREADS) -> None:
    """Run *work* in that many threads at once; raise what the first of them raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as exc:  # noqa: BLE001 - handed to the main thread
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def test_64_threads_do_everything_at_once(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:

        def work(number: int) -> None:
            chance = random.Random(number)
            for _ in range(_TURNS):
                turn(store, chance)

        in_threads(work)
        store.clear_staging()
        store.empty_trash()
        assert_clean(store)


def test_64_threads_create_and_discard_their_own(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create(lid("base"))

        def work(number: int) -> None:
            for turns in range(4):
                layer = store.create(lid(f"{number}-{turns}"), lid("base")).id
                child = store.create(None, layer).id
                with pytest.raises(HasChildrenError):
                    store.discard(layer)
                kept = store.commit(layer, lid(f"{number}-{turns}-kept")).id
                assert store.layer(child).chain == (kept, "base")
                store.discard(child)
                store.discard(kept)

        in_threads(work)
        assert store.ids() == ("base",)
        assert_clean(store)


def test_one_of_64_threads_makes_a_layer(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        made: list[int] = []

        def work(number: int) -> None:
            try:
                store.create(lid("same"))
            except LayerExistsError:
                return
            made.append(number)

        in_threads(work)
        assert len(made) == 1
        assert_clean(store)


def test_who_waits_for_a_layer_learns_that_it_is_gone(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create(lid("a"))
        lock = store.layer_lock(lid("a"))
        waiting = threading.Event()
        outcome: list[BaseException] = []

        def wait() -> None:
            waiting.set()
            try:
                store.layer_lock(lid("a")).close()
            except StoreError as exc:
                outcome.append(exc)

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait()
        time.sleep(0.05)
        store.discard(lid("a"), lock=lock)
        thread.join(30)
        assert isinstance(outcome[0], UnknownLayerError)


def test_a_lock_is_on_the_layer_that_is_there_now(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create(lid("a"))

        def work(number: int) -> None:
            for _ in range(5):
                with store.stage(lid("a")) as staging, store.layer_lock(lid("a")) as lock:
                    label = store.layer(lid("a")).record.label
                    store.install_diff(lid("a"), staging, lock=lock, label=label + "x")

        in_threads(work, 16)
        assert store.layer(lid("a")).record.label == "x" * 80
        assert_clean(store)


def start_worker(home: Path, seed: int, turns: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _WORKER, str(home), str(seed), str(turns)])


def test_several_processes_share_a_store(tmp_path: Path) -> None:
    workers = [start_worker(tmp_path, seed, 120) for seed in range(4)]
    for worker in workers:
        assert worker.wait(90) == 0
    with open_store(tmp_path) as store:
        assert_clean(store)


def test_processes_killed_at_any_time_leave_a_store_that_mends_itself(tmp_path: Path) -> None:
    chance = random.Random(1)
    for round_ in range(6):
        workers = [start_worker(tmp_path, 10 * round_ + seed, 10_000) for seed in range(2)]
        time.sleep(0.3 + chance.random() / 3)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait(30)
        with open_store(tmp_path) as store:
            assert_clean(store)


def test_a_forked_child_does_not_hang_on_a_lock_of_its_parent(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from tests.support.stores import lid, open_store
with open_store(Path(sys.argv[1])) as store:
    store.create(lid("a"))
    with store.structure.lock.shared():
        pid = os.fork()
        if not pid:
            code = 0 if store.ids() == ("a",) else 1
            os._exit(code)
        _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 0
