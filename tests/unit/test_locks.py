from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs2 import locks
from unionfs2.errors import InUseError
from unionfs2.options import MountSpec

HOLDER = """
import os, sys, time
from unionfs2 import locks
from unionfs2.options import MountSpec
upper, work, exclusive = sys.argv[1:]
held = locks.acquire(MountSpec(upper=os.fsencode(upper), work=os.fsencode(work),
                               exclusive=exclusive == "exclusive"))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def spec(tmp_path: Path) -> MountSpec:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    paths = {name: os.fsencode(tmp_path / name) for name in ("lower", "upper", "work")}
    return MountSpec(lower=(paths["lower"],), upper=paths["upper"], work=paths["work"])


@pytest.fixture(params=["ordinary", "exclusive"])
def holder(request: pytest.FixtureRequest, spec: MountSpec) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the locks of *spec*."""
    assert spec.upper is not None
    assert spec.work is not None
    words = [os.fsdecode(spec.upper), os.fsdecode(spec.work), str(request.param)]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_free_directories_give_no_warning(spec: MountSpec) -> None:
    held = locks.acquire(spec)
    assert (held.warnings, held.in_use, len(held.fds)) == ([], False, 2)
    held.close()
    assert held.fds == []


def test_descriptors_do_not_leak_into_children(spec: MountSpec) -> None:
    held = locks.acquire(spec)
    assert not any(os.get_inheritable(fd) for fd in held.fds)
    held.close()


def test_without_an_upper_nothing_is_locked() -> None:
    assert locks.acquire(MountSpec(lower=(b"/a", b"/b"))).fds == []


@pytest.mark.parametrize("holder", ["ordinary"], indirect=True)
def test_a_second_mount_is_warned(spec: MountSpec, holder: subprocess.Popen[str]) -> None:
    held = locks.acquire(spec)
    assert len(held.warnings) == 2
    assert held.in_use
    assert "upper directory" in held.warnings[0]
    assert "work directory" in held.warnings[1]
    held.close()


@pytest.mark.parametrize("holder", ["ordinary"], indirect=True)
def test_the_second_one_holds_on_when_the_first_is_gone(
    spec: MountSpec, holder: subprocess.Popen[str]
) -> None:
    held = locks.acquire(spec)
    holder.kill()
    holder.wait()
    with pytest.raises(InUseError):
        locks.acquire(spec._replace(exclusive=True))
    held.close()


def test_exclusive_is_refused_while_anybody_holds(
    spec: MountSpec, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(InUseError, match="in use by another mount"):
        locks.acquire(spec._replace(exclusive=True))


@pytest.mark.parametrize("holder", ["exclusive"], indirect=True)
def test_an_exclusive_holder_keeps_everybody_out(
    spec: MountSpec, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(InUseError, match="with the option exclusive"):
        locks.acquire(spec)


def test_the_lock_dies_with_its_holder(spec: MountSpec, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert locks.check(spec._replace(exclusive=True)) == []


def test_a_failure_keeps_nothing_locked(spec: MountSpec) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        locks.acquire(spec._replace(work=b"/there/is/no/such/directory"))
    assert set(os.listdir("/proc/self/fd")) == before
    assert locks.check(spec._replace(exclusive=True)) == []
