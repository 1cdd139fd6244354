"""Start a FUSE server process, wait until its mount answers, say why if it does not.

pyfuse3 keeps its session in module globals, so one process serves one mount. What a server does
is a callable that the command line hands in (Body); this module knows processes only:

* A daemon has a session of its own, /dev/null on 0, 1 and 2, and no other descriptor of its
  parent: whoever waits for the end of a pipe (container engines do) is not kept waiting.
* Until the mount answers, the two talk over a pipe, line by line: warnings as JSON, then the word
  "ready" with pid and transport, or an error as JSON. A server that dies without a word is
  recognised by the end of the pipe and described by its wait status.
* The starter believes nobody: after "ready" it asks the mount itself, from outside.

fork() is used where the process is known to be ours alone (the commands); a library caller, who
may have threads, gets the command as a subprocess.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Final, Protocol

from . import mountcalls, mounts, transports
from .attach import fuse_reason
from .errors import EXIT_FAIL, MountError, UnionFSError, from_record, sentence, show, to_record
from .logger import Log
from .mountcalls import MountEntry
from .mounter import FUSE_TYPE, Mounted, open_target, resolve_target
from .options import (
    Backend,
    MountSpec,
    absolute,
    format_options,
    refuse_unsupported,
    unsupported,
)
from .transports import Transport

_log = Log(__name__)
_READY: Final = b"ready"

#: How long a mount may take from "ready" to its first answer, in seconds.
ANSWER_TIMEOUT_S: Final = 60.0


class Ready(Protocol):
    """To be called once requests are answered, with the transport that does it."""

    def __call__(self, transport: Transport | None = None) -> None: ...


class Body(Protocol):
    """A whole server: open the layers, mount *target*, call *ready*, serve, unmount, return."""

    def __call__(
        self, spec: MountSpec, target: bytes, ready: Ready, warn: Callable[[str], None]
    ) -> None: ...


class FuseMounter:
    """Mounts through FUSE.

    With *body* the server is forked from this process, which must not have threads; without, the
    command ``fuse-unionfs2`` starts it.
    """

    name: Backend = "fuse"

    def __init__(self, body: Body | None = None) -> None:
        self._body = body

    def probe(self, spec: MountSpec) -> str | None:
        reasons = unsupported(spec, "fuse")
        return reasons[0] if reasons else fuse_reason()

    def mount(self, spec: MountSpec, target: bytes) -> Mounted:
        refuse_unsupported(spec, "fuse")
        spec = absolute(spec, os.getcwdb())
        target = resolve_target(target)
        os.close(open_target(target))
        if self._body is not None:
            return _by_fork(spec, target, self._body)
        return mounts.mounted(target, "fuse", tuple(_by_command(spec, target)))

    def unmount(self, target: bytes, *, lazy: bool = False) -> None:
        mounts.unmount(target, lazy=lazy)


# --- the starter ----------------------------------------------------------------------------------


def _by_fork(spec: MountSpec, target: bytes, body: Body) -> Mounted:
    before = mountcalls.find_mount(target)
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _daemon(spec, target, body, write_end)
    os.close(write_end)
    try:
        mounted = _await_ready(read_end, pid, target)
        _await_answer(target)
    except BaseException:
        _end(pid)
        _remove_dead_mount(target, before)
        raise
    finally:
        os.close(read_end)
    return mounted


def _await_ready(read_end: int, pid: int, target: bytes) -> Mounted:
    """Read the server's reports up to "ready". Raises what it reports instead."""
    import threading  # noqa: F401, PLC0415 - for _await_answer(), while the server is busy too

    warnings: list[str] = []
    with os.fdopen(os.dup(read_end), "rb") as reports:
        for line in reports:
            word, *values = line.split()
            if word == _READY:
                server = int(values[0])
                name = values[1].decode()
                transport = transports.chosen(name) if name in transports.NAMES else None
                return Mounted("fuse", target, server, tuple(warnings), transport)
            import json  # noqa: PLC0415 - for what goes wrong only

            report = json.loads(line)
            if "error" in report:
                raise from_record(report["error"])
            warnings.append(str(report["warning"]))
    raise MountError(f"the server process {_how_it_ended(pid)} before the mount answered")


def _how_it_ended(pid: int) -> str:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"was ended by signal {number} ({signal.strsignal(number)})"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


def _await_answer(target: bytes) -> None:
    """Ask the mount from outside, as the next user will."""
    import threading  # noqa: PLC0415 - a mount that hangs must not hang its starter

    failure: list[OSError] = []

    def ask() -> None:
        try:
            os.statvfs(target)
            os.stat(target)
        except OSError as exc:
            failure.append(exc)

    thread = threading.Thread(target=ask, name="ask-mount", daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_S)
    if thread.is_alive():
        raise MountError(
            f"the mount on {show(target)} has not answered for {ANSWER_TIMEOUT_S:.0f} s: "
            "look at the server's log (log=FILE)"
        )
    if failure:
        raise MountError(
            f"the mount on {show(target)} does not answer: {sentence(failure[0])}",
            errno=failure[0].errno,
        ) from failure[0]


def _end(pid: int) -> None:
    """Make sure that the server, and its watcher if it has one, is gone."""
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            for kill in (os.killpg, os.kill):  # it leads a session of its own since its first step
                try:
                    kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def _remove_dead_mount(target: bytes, before: MountEntry | None) -> None:
    """Take away what a server left on *target* that could not do so itself any more."""
    now = mountcalls.find_mount(target)
    if now is None or now.fstype != FUSE_TYPE or (before and before.mount_id == now.mount_id):
        return
    try:
        mounts.detach(target, fuse=True, lazy=True)
    except MountError:
        pass  # the error that brought us here says more


# --- the server's side ----------------------------------------------------------------------------


def _daemon(spec: MountSpec, target: bytes, body: Body, write_end: int) -> None:
    """Be the server, and never return."""
    status = EXIT_FAIL
    ready_sent = False

    def send(line: bytes) -> None:
        try:
            os.write(write_end, line + b"\n")
        except BrokenPipeError:
            pass  # whoever started us has gone; the mount is there all the same

    def report(value: dict[str, object]) -> None:
        import json  # noqa: PLC0415 - for what goes wrong only

        send(json.dumps(value).encode())

    def ready(transport: Transport | None = None) -> None:
        nonlocal ready_sent
        if not ready_sent:
            ready_sent = True
            send(b"%b %d %b" % (_READY, os.getpid(), (transport or "-").encode()))
            os.close(write_end)

    def warn(text: str) -> None:
        report({"warning": text})

    try:
        _leave_parent(write_end)
        if spec.log is not None or spec.journal:
            from . import logs  # noqa: PLC0415 - nobody reads what else is logged

            logs.set_up(spec, foreground=False)
        if spec.auto_unmount:
            _watch(target)
        body(spec, target, ready, warn)
        status = 0
    except BaseException as exc:  # noqa: BLE001 - the last frame of a process
        if ready_sent:
            _log_end(exc)
        else:
            report({"error": to_record(exc)})
        status = exc.exit_code if isinstance(exc, UnionFSError) else EXIT_FAIL
    finally:
        os._exit(status)


def _leave_parent(keep: int) -> None:
    """Become a session of its own that holds nothing of the parent but *keep*."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _close_all_but(keep)
    sys.path[:] = [os.path.abspath(path) for path in sys.path]
    os.chdir("/")
    os.umask(0)


def _close_all_but(*keep: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor of that very listing


def _watch(target: bytes) -> None:
    """Option auto_unmount: stay behind as the watcher, and go on in a child as the server."""
    pid = os.fork()
    if pid == 0:
        return
    _close_all_but()
    passed_on = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    for number in passed_on:
        signal.signal(number, lambda received, _: os.kill(pid, received))
    before = mountcalls.find_mount(target)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        _remove_dead_mount(target, before)
        # End as the server did, for whoever waits for the watcher.
        for number in passed_on:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _log_end(exc: BaseException) -> None:
    _log.critical("server ends: %s", sentence(exc), exc=exc)


# --- for callers with threads ---------------------------------------------------------------------


def _by_command(spec: MountSpec, target: bytes) -> list[str]:
    """Run ``fuse-unionfs2`` and translate its reports back into warnings or an exception."""
    import json  # noqa: PLC0415 - the commands themselves never come here
    import subprocess  # noqa: PLC0415

    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reports:
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "unionfs2.cli.fuse"),
                    *("--report-fd", str(write_end)),
                    *(b"-o", format_options(spec), b"--", target),
                ],
                pass_fds=(write_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            os.close(write_end)
        lines = [json.loads(line) for line in reports]
        _, stderr = process.communicate()
    for report in lines:
        if "error" in report:
            raise from_record(report["error"])
    if process.returncode != 0:
        text = stderr.decode("utf-8", "replace").strip()
        raise MountError(f"the server could not be started: {text or process.returncode}")
    return [str(report["warning"]) for report in lines]
