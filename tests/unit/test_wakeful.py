"""Keeping processors awake: only in a burst, no longer than it lasts, and never at any price."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unionfs2 import wakeful
from unionfs2.wakeful import BURST, Wakeful

NONE = (0).to_bytes(4, "little")
ANY = (2_000_000_000).to_bytes(4, "little")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/cpu_dma_latency: what is asked for, one after the other."""
    path = tmp_path / "latency"
    path.touch()
    monkeypatch.setattr(wakeful, "_DEVICE", os.fspath(path))
    return path


def is_held(one: Wakeful) -> bool:
    return one.held


def burst(one: Wakeful) -> None:
    for _ in range(2 * BURST):  # the first of them begin the clock
        one.request()


def test_a_burst_is_held_and_let_go(device: Path) -> None:
    one = Wakeful("on")
    one.request()
    assert not is_held(one)
    assert one._fd < 0, "opened for a single request"
    burst(one)
    assert is_held(one)
    until(lambda: not is_held(one))
    until(lambda: device.read_bytes() == NONE + ANY)
    burst(one)
    until(lambda: device.read_bytes() == 2 * (NONE + ANY))
    one.close()


def test_it_is_held_while_requests_come(device: Path) -> None:
    one = Wakeful("on")
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        one.request()
    assert is_held(one)
    one.close()
    assert device.read_bytes().startswith(NONE)


def test_requests_with_pauses_are_no_burst(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr("unionfs2.wakeful.time.monotonic_ns", lambda: now[0])
    one = Wakeful("on")
    for _ in range(10 * BURST):
        now[0] += 1_000_000
        one.request()
    assert not is_held(one)
    assert device.read_bytes() == b""


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_not_where_it_is_not_wanted(
    mode: str, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeful, "is_worth_it", lambda: False)
    one = Wakeful(mode)
    burst(one)
    assert not is_held(one)
    assert device.read_bytes() == b""


def test_worth_it_only_in_small_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "driver"
    monkeypatch.setattr(wakeful, "_DRIVER", os.fspath(driver))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert not wakeful.is_worth_it()  # no cpuidle: nothing that could be asked
    driver.write_text("intel_idle\n")
    assert not wakeful.is_worth_it()
    driver.write_text("haltpoll\n")
    assert wakeful.is_worth_it()
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert not wakeful.is_worth_it()


@pytest.mark.parametrize("missing", [True, False])
def test_without_the_device_there_is_none(
    device: Path, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing:
        device.unlink()
    else:
        monkeypatch.setattr(wakeful, "_DEVICE", "/dev/full")
    one = Wakeful("on")
    for _ in range(3):
        burst(one)
    assert not is_held(one)
    one.close()


def test_closing_lets_go_and_ends_the_thread(device: Path) -> None:
    one = Wakeful("on")
    before = set(threading.enumerate())
    burst(one)
    assert is_held(one)
    (thread,) = set(threading.enumerate()) - before
    fd = one._fd
    one.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not is_held(one)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    burst(one)
    assert not is_held(one)
    one.close()
