"""Keeping idle processors awake while requests follow each other closely.

A client waits for each answer, so its processor has nothing to do for some microseconds and is sent
to sleep. In a virtual machine that is an exit to the host, and coming back from there takes longer
than the request. PM QoS can prevent it: as long as somebody holds ``/dev/cpu_dma_latency`` with a
latency of 0, cpuidle lets idle processors poll (kernel, Documentation/power/pm_qos_interface.rst;
drivers/cpuidle/governors/haltpoll.c). Only root may.

Invariant: nothing is held longer than two periods after the last request, nor by a dead process:
the kernel drops what was asked for with the descriptor.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from unionfs2.logger import Log

_DEVICE: Final = "/dev/cpu_dma_latency"
_DRIVER: Final = "/sys/devices/system/cpu/cpuidle/current_driver"
#: The cpuidle driver of virtual machines. Others know how deep a sleep is worth its while.
_GUEST: Final = "haltpoll"
#: More processors than these are not kept awake for one client, unless told to.
_PROCESSORS_MAX: Final = 8
#: So many requests within so many nanoseconds are a burst.
BURST: Final = 16
_BURST_NS: Final = 8_000_000
#: How often to see whether it goes on.
_PERIOD_S: Final = 0.004
_NONE: Final = (0).to_bytes(4, "little")
#: PM_QOS_CPU_LATENCY_DEFAULT_VALUE
_ANY: Final = (2_000_000_000).to_bytes(4, "little")

_log = Log(__name__)


def is_worth_it() -> bool:
    """Whether sleeping is dear here, and few processors are kept from it."""
    try:
        with open(_DRIVER, encoding="ascii") as file:
            driver = file.read().strip()
    except OSError:
        return False
    return driver == _GUEST and (os.cpu_count() or 1) <= _PROCESSORS_MAX


class Wakeful:
    """Told of each request by the one thread that reads them; ``held`` while processors poll.

    *mode*: ``auto``, ``on`` or ``off``. Nothing is opened or started before the first burst.
    """

    __slots__ = ("_count", "_fd", "_goes_on", "_lock", "_mode", "_since", "held")

    def __init__(self, mode: str = "auto") -> None:
        self.held = False
        self._mode = mode
        self._count = 0
        self._since = 0
        self._fd = -1
        self._lock = threading.Lock()
        self._goes_on: threading.Semaphore | None = None

    def request(self) -> None:
        """One more has come."""
        self._count += 1
        if not self._count % BURST:
            now = time.monotonic_ns()
            if not self.held and now - self._since < _BURST_NS and self._mode != "off":
                self._hold()
            self._since = now

    def _hold(self) -> None:
        with self._lock:
            try:
                self._ask()
            except OSError as exc:
                _log.debug("processors sleep while clients wait: %s", exc)
                self._mode = "off"

    def _ask(self) -> None:
        if self._fd < 0:
            if self._mode == "auto" and not is_worth_it():
                self._mode = "off"
                return
            self._fd = os.open(_DEVICE, os.O_WRONLY | os.O_CLOEXEC)
        os.write(self._fd, _NONE)
        self.held = True
        if self._goes_on is None:
            self._goes_on = threading.Semaphore(0)
            threading.Thread(target=self._watch, name="unionfs2-wakeful", daemon=True).start()
        self._goes_on.release()

    def _watch(self) -> None:
        """Let go when a period passes without a request."""
        goes_on = self._goes_on
        assert goes_on is not None
        while True:
            goes_on.acquire()
            seen = -1
            while seen != self._count and self._fd >= 0:
                seen = self._count
                time.sleep(_PERIOD_S)
            with self._lock:
                self.held = False
                if self._fd < 0:
                    return
                _let_go(self._fd)

    def close(self) -> None:
        """Let go, and end the thread."""
        with self._lock:
            self._mode = "off"
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
            if self._goes_on is not None:
                self._goes_on.release()


def _let_go(fd: int) -> None:
    try:
        os.write(fd, _ANY)
    except OSError as exc:
        _log.warning("processors are kept awake until the server ends: %s", exc)
