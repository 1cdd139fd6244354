"""``fuse-unionfs2`` as container engines, mount(8) and people call it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import (
    FUSE,
    MAIN,
    Site,
    eventually,
    foreground,
    is_running,
    refused,
)
from tests.support import fusedev, probe
from tests.support.transports import TRANSPORTS
from unionfs2 import __version__

pytestmark = pytest.mark.needs("fuse", "root")

of_pyfuse3 = pytest.mark.parametrize("transport", ["pyfuse3"])


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


def unmount(site: Site) -> None:
    assert site.main("umount", site.mountpoint).stderr == ""
    assert site.mount_lines() == []


# --- shapes of the command line -------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        "-o {options}, {target}",
        "-o {options},,volatile {target}",
        "-o {options},private {target}",
        "overlay {target} -o {options},dev,suid",
        "-o{options} none {target}",
        "-o {layers} -o upperdir={root}/u,workdir={root}/w -- {target}",
        "{target} -o {options} -s",
    ],
)
def test_shapes(site: Site, shape: str) -> None:
    words = shape.format(
        options=site.options, layers=site.layers, target=site.mountpoint, root=site.root
    )
    done = site.fuse(*words.split(" "))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert site.names() == ["one", "two"]
    (site.mountpoint / "new").write_text("n")
    unmount(site)
    assert site.names("u") == ["new"]


@pytest.mark.needs("command:mount.fuse3")
@pytest.mark.parametrize(("name", "command"), [("fuse-unionfs2", FUSE), ("unionfs2", MAIN)])
def test_through_mount_fuse3(site: Site, name: str, command: tuple[str, ...]) -> None:
    site.put_on_path(name, command)
    words = ["-o", site.layers, "-o", f"upperdir={site.root}/u", "-o", f"workdir={site.root}/w"]
    done = site.run("mount.fuse3", "overlay", site.mountpoint, *words, "-t", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert site.names() == ["one", "two"]
    unmount(site)


@pytest.mark.needs("command:mount.fuse3", "command:mount")
@pytest.mark.parametrize(
    ("kind", "command"), [("fuse.fuse-unionfs2", FUSE), ("fuse.unionfs2", MAIN)]
)
def test_through_mount_8_and_umount_8(site: Site, kind: str, command: tuple[str, ...]) -> None:
    # mount.fuse3 looks in the system's directories only: cover one of them, for this test alone.
    site.put_on_path(kind.partition(".")[2], command)
    script = (
        'mount --bind "$1" /usr/local/bin && mount -t "$2" union "$3" -o "$4,noatime" && '
        'ls "$3" && grep "$3 " /proc/self/mounts && umount "$3" && ls "$3"'
    )
    private = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    done = site.run(*private, site.root / "bin", kind, site.mountpoint, site.options)
    assert (done.returncode, done.stderr) == (0, "")
    one, two, line = done.stdout.splitlines()
    assert (one, two) == ("one", "two")
    assert line.startswith(f"unionfs2 {site.mountpoint} fuse.unionfs2 rw,noatime")
    assert eventually(lambda: site.names("state") == [])


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(site: Site, word: str) -> None:
    done = site.fuse(word)
    assert (done.returncode, done.stdout) == (0, f"fuse-unionfs2 {__version__}\n")


def test_help_lists_the_options(site: Site) -> None:
    done = site.fuse("--help")
    assert done.returncode == 0
    for word in ("MOUNTPOINT", "lowerdir=", "exclusive", "static_nlink", "x-*"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "mount point is missing"),
        (["-o"], "-o needs a value"),
        (["--frobnicate", "m"], "unknown argument"),
        (["a", "b", "c"], "too many arguments"),
        (["-o", "lowrdir=/a", "m"], "did you mean lowerdir"),
        (["-o", "ro", "m"], "lowerdir="),
    ],
)
def test_wrong_command_lines(site: Site, words: list[str], message: str) -> None:
    done = site.run(*site.fuse_words, *words, cwd=site.root)
    refused(done, 1, message)


# --- what a container engine relies on ------------------------------------------------------------


def test_the_daemon_holds_nothing_of_its_caller(site: Site) -> None:
    read_end, write_end = os.pipe()
    subprocess.run(
        [*site.fuse_words, "-o", site.options, site.mountpoint],
        env=site.environment,
        pass_fds=(write_end,),
        check=True,
    )
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b""  # would block while anybody has the other end
    pid = site.server()
    fds = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)}
    assert set(fds.values()) == {"/dev/null"}
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    unmount(site)


def test_it_uses_all_descriptors_it_may(site: Site) -> None:
    limited = ["sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh"]
    done = site.run(*limited, *site.fuse_words, "-o", site.options, site.mountpoint)
    assert done.stderr == ""
    text = Path(f"/proc/{site.server()}/limits").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    assert soft == hard
    unmount(site)


def test_the_server_ends_with_a_foreign_unmount(site: Site) -> None:
    assert site.fuse("-o", site.options, site.mountpoint).returncode == 0
    pid = site.server()
    probe.sys_umount(str(site.mountpoint))
    assert eventually(lambda: not is_running(pid))
    assert site.names("state") == []


def test_relative_paths(site: Site) -> None:
    options = "lowerdir=l1:l2,upperdir=u,workdir=w,log=server.log"
    done = site.run(*site.fuse_words, "-o", options, "m", cwd=site.root)
    assert done.stderr == ""
    assert site.names() == ["one", "two"]
    assert "server.log" in site.names(".")
    unmount(site)


def test_mounting_over_a_lower_directory(site: Site) -> None:
    assert site.fuse("-o", site.options, site.root / "l1").returncode == 0
    assert site.names("l1") == ["one", "two"]
    assert site.main("umount", site.root / "l1").returncode == 0
    assert site.names("l1") == ["one"]


def test_a_second_mount_is_warned_and_exclusive_refused(site: Site) -> None:
    (site.root / "m2").mkdir()
    assert site.fuse("-o", site.options, site.mountpoint).stderr == ""
    refused(site.fuse("-o", site.options + ",exclusive", site.root / "m2"), 32, "is in use")
    done = site.fuse("-o", site.options, site.root / "m2")
    assert done.returncode == 0
    assert done.stderr.count("warning: ") == done.stderr.count("in use") == 2
    assert site.names("m2") == ["one", "two"]
    assert site.main("umount", site.root / "m2").returncode == 0
    unmount(site)


# --- the end of a server --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(site: Site, number: signal.Signals) -> None:
    assert site.fuse("-o", site.options, site.mountpoint).returncode == 0
    pid = site.server()
    os.kill(pid, number)
    assert eventually(lambda: not is_running(pid))
    assert site.mount_lines() == []
    assert site.names("state") == []


@pytest.mark.parametrize("busy", [False, True])
def test_what_was_written_through_a_map_survives_a_signal(site: Site, busy: bool) -> None:
    assert site.fuse("-o", site.options, site.mountpoint).returncode == 0
    pid = site.server()
    path = site.mountpoint / "mapped"
    path.write_bytes(bytes(8192))
    program = (
        "import mmap, sys, time\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    mapping = mmap.mmap(file.fileno(), 8192)\n"
        "mapping[:4] = b'kept'\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"written\n"
        if not busy:
            user.kill()
            user.wait()
        os.kill(pid, signal.SIGTERM)
        assert eventually(lambda: not is_running(pid))
        user.kill()
    assert site.mount_lines() == []
    assert (site.root / "u" / "mapped").read_bytes()[:4] == b"kept"


def test_a_signal_ends_a_mount_with_open_files(site: Site) -> None:
    assert site.fuse("-o", site.options, site.mountpoint).returncode == 0
    pid = site.server()
    fd = os.open(site.mountpoint / "one", os.O_RDONLY)
    os.kill(pid, signal.SIGTERM)
    assert eventually(lambda: not is_running(pid))
    assert site.mount_lines() == []
    with contextlib.suppress(OSError):  # the server that should hear of it has gone
        os.close(fd)


@pytest.mark.parametrize("flag", ["-f", "-d"])
def test_foreground(site: Site, flag: str) -> None:
    with foreground(site, *site.fuse_words, flag, "-o", site.options, site.mountpoint) as process:
        assert site.names() == ["one", "two"]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert site.mount_lines() == []
    assert ("DEBUG" in stderr) is (flag == "-d")
    assert "Traceback" not in stderr


def test_a_killed_server_leaves_a_mount_that_can_be_removed(site: Site) -> None:
    assert site.fuse("-o", site.options + ",exclusive", site.mountpoint).returncode == 0
    pid = site.server()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not is_running(pid))
    done = site.fuse("-o", site.options, site.mountpoint)
    refused(done, 32, "unmount it first")
    unmount(site)
    assert site.names("state") == []
    # The lock died with its holder, and what it left in the work directory is cleaned.
    assert site.fuse("-o", site.options + ",exclusive", site.mountpoint).stderr == ""
    unmount(site)


def test_auto_unmount_and_signals(site: Site) -> None:
    assert site.fuse("-o", site.options + ",auto_unmount", site.mountpoint).returncode == 0
    watcher = int(Path(f"/proc/{site.server()}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(watcher, signal.SIGTERM)
    assert eventually(lambda: not is_running(watcher))
    assert site.mount_lines() == []


def test_auto_unmount(site: Site) -> None:
    assert site.fuse("-o", site.options + ",auto_unmount", site.mountpoint).returncode == 0
    assert site.names() == ["one", "two"]
    os.kill(site.server(), signal.SIGKILL)
    assert eventually(lambda: site.mount_lines() == [])


# --- a server that does not come up ---------------------------------------------------------------


@of_pyfuse3
@pytest.mark.parametrize("more", ["", ",auto_unmount"])
@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 32, "signal 9 (Killed)"),
        ("import os; os._exit(7)", 32, "status 7"),
        ("raise ImportError('no pyfuse3 for you')", 4, "no pyfuse3 for you"),
        ("raise MemoryError", 2, "MemoryError"),
        ("raise OSError(28, 'No space left on device')", 32, "No space left on device"),
    ],
)
def test_a_server_that_dies_is_reported(
    site: Site, program: str, status: int, words: str, more: str
) -> None:
    (site.root / "fake").mkdir()
    (site.root / "fake" / "pyfuse3.py").write_text(program)
    path = {"PYTHONPATH": f"{site.root / 'fake'}:{site.environment['PYTHONPATH']}"}
    done = site.fuse("-o", site.options + more, site.mountpoint, environment=path)
    refused(done, status, words)
    assert site.mount_lines() == []


@of_pyfuse3
def test_a_server_that_dies_after_mounting_leaves_no_mount(site: Site) -> None:
    (site.root / "fake").mkdir()
    program = (
        "import os, signal\n"
        "class RequestContext: pass\n"
        "def __getattr__(name):\n"
        "    if name == 'init':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return type(name, (Exception,), {})\n"
    )
    (site.root / "fake" / "pyfuse3.py").write_text(program)
    path = {"PYTHONPATH": f"{site.root / 'fake'}:{site.environment['PYTHONPATH']}"}
    done = site.fuse("-o", site.options, site.mountpoint, environment=path)
    assert done.returncode == 32, done.stderr
    assert site.mount_lines() == []
    assert eventually(lambda: not site.mount_lines())


# --- bad input, as a process ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("lowerdir={r}/no:{r}/l2,upperdir={r}/u,workdir={r}/w", 32, "does not exist"),
        ("lowerdir={r}/l1/one:{r}/l2", 32, "not a directory"),
        ("lowerdir={r}/l1:{r}/l1", 32, "twice"),
        ("lowerdir={r}/l1:{r}", 32, "is inside"),
        ("lowerdir={r}/l1", 1, "nothing to merge"),
        ("lowerdir={r}/l1,upperdir={r}/u", 1, "workdir="),
        ("lowerdir={r}/l1,upperdir={r}/u,workdir={r}/u", 32, "are both"),
        ("lowerdir={r}/l1,upperdir={r}/u,workdir=/dev/shm", 32, "different file systems"),
        ("lowerdir={r}/l1,upperdir=/proc/self,workdir=/proc/self/task", 32, "upper"),
        ("lowerdir={r}/l1:{r}/l2,uidmapping=0:1:2", 1, "uidmapping= is not supported"),
        ("lowerdir={r}/l1:{r}/l2,index=on", 1, "index=on"),
        ("lowerdir={r}/l1:{r}/l2,log=/no/such/dir/log", 1, "log="),
        ("lowerdir=:{r}/l2", 1, "empty layer"),
    ],
)
def test_bad_input(site: Site, options: str, status: int, words: str) -> None:
    done = site.fuse("-o", options.format(r=site.root), site.mountpoint)
    refused(done, status, words)
    assert site.mount_lines() == []


def test_bad_mount_points(site: Site) -> None:
    refused(site.fuse("-o", site.options, site.root / "no"), 32, "does not exist")
    refused(site.fuse("-o", site.options, site.root / "l1/one"), 32, "not a directory")
    assert site.fuse("-o", site.options, site.mountpoint).returncode == 0
    refused(site.fuse("-o", site.layers, site.mountpoint), 32, "busy")
    unmount(site)


def test_no_journal_here(site: Site) -> None:
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && rm -f /dev/log; exec "$@"']
    if os.path.exists("/dev/log"):
        pytest.skip("this machine has /dev/log, which the test must not remove")
    done = site.run(
        *hidden, "sh", *site.fuse_words, "-o", f"{site.options},journal", site.mountpoint
    )
    refused(done, 2, "log=FILE")


@pytest.mark.parametrize(
    ("prepare", "status", "words"),
    [
        ("true", 2, "/dev/fuse does not exist"),
        (
            "mknod -m 0600 /dev/fuse c 10 229; drop='setpriv --reuid 65534 --clear-groups'",
            1,
            "/dev/fuse cannot be opened",
        ),
        ("mknod -m 0666 /dev/fuse c 511 250", 2, "/dev/fuse cannot be opened"),
    ],
)
def test_dev_fuse_missing_or_forbidden(site: Site, prepare: str, status: int, words: str) -> None:
    script = (
        "mount -t tmpfs none /mnt && mknod -m 0666 /mnt/null c 1 3 && mount --bind /mnt /dev"
        f' && umount -l /mnt && {{ {prepare}; }} && exec $drop "$@"'
    )
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    done = site.run(*private, *site.fuse_words, "-o", site.layers, site.mountpoint)
    refused(done, status, words)


def test_fusermount3_missing(site: Site) -> None:
    probe.need("private-fuse")
    command = [
        "env",
        f"PATH={site.root}/bin",
        *site.fuse_words,
        "-o",
        site.layers,
        str(site.mountpoint),
    ]
    done = site.run(*fusedev.as_user(command, uid=65534, gid=65534))
    refused(done, 2, "fusermount3")


# --- the log --------------------------------------------------------------------------------------


def test_log_file(site: Site) -> None:
    log = site.root / "log,file"
    done = site.fuse("--log", log, "-o", site.options, site.mountpoint)
    assert done.stderr == ""
    os.kill(site.server(), signal.SIGTERM)
    assert eventually(lambda: "SIGTERM" in log.read_text())
    assert eventually(lambda: site.mount_lines() == [])


def test_the_log_is_quiet_about_ordinary_work(site: Site) -> None:
    log = site.root / "log"
    assert site.fuse("--log", log, "-o", site.options, site.mountpoint).returncode == 0
    (site.mountpoint / "new").write_text("x")
    with pytest.raises(FileNotFoundError):
        (site.mountpoint / "missing").read_text()
    unmount(site)
    assert "ERROR" not in log.read_text()
    assert "WARNING" not in log.read_text()


def test_python_of_the_tests_is_the_one_that_serves(site: Site) -> None:
    assert site.fuse("-o", site.options, site.mountpoint).returncode == 0
    assert os.path.realpath(f"/proc/{site.server()}/exe") == os.path.realpath(sys.executable)
    unmount(site)
