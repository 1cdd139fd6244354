"""``unionfs2 mount``, ``umount`` and ``mounts``."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import (
    MAIN,
    Site,
    eventually,
    foreground,
    is_running,
    refused,
)
from tests.support import probe
from tests.support.transports import NATIVE, TRANSPORTS, backend_words
from tests.support.transports import backend_of as backend_named
from unionfs2 import __version__, mounts

pytestmark = pytest.mark.needs("root")

HOW = [
    *(pytest.param(name, marks=pytest.mark.needs("fuse")) for name in TRANSPORTS),
    pytest.param(NATIVE, marks=pytest.mark.needs("overlay")),
]
by_fuse = pytest.mark.parametrize("way", HOW[:-1])
TYPES = {"fuse": "fuse.unionfs2", "native": "overlay"}


def backend_of(site: Site) -> str:
    kind = site.mount_lines()[-1].partition(" - ")[2].split(" ")[0]
    return {kind: name for name, kind in TYPES.items()}[kind]


@pytest.mark.parametrize("way", HOW)
def test_mount_work_list_unmount(site: Site, way: str) -> None:
    done = site.main("mount", *backend_words(way), "-o", site.options, site.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert backend_of(site) == (backend := backend_named(way))
    (site.mountpoint / "one").unlink()
    (site.mountpoint / "new").write_text("n")

    table = site.main("mounts").stdout.splitlines()
    assert table[0].split() == ["MOUNTPOINT", "BACKEND", "TRANSPORT", "SINCE", "PID"]
    (line,) = [line for line in table if line.startswith(f"{site.mountpoint} ")]
    transport = None if way == NATIVE else way
    assert re.match(
        rf"\S+ +{backend} +{transport or '-'} +\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d +(\d+|-)$", line
    )

    rows = json.loads(site.main("mounts", "--format", "json").stdout)
    (row,) = [row for row in rows if row["target"] == str(site.mountpoint)]
    assert (row["backend"], row["transport"]) == (backend, transport)
    assert (row["pid"] is not None) is (backend == "fuse")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["since"])
    assert f"upperdir={site.root}/u" in row["options"]

    assert site.main("umount", site.mountpoint).returncode == 0
    assert site.mount_lines() == []
    assert site.names("u") == ["new", "one"]
    assert str(site.mountpoint) not in site.main("mounts").stdout


@pytest.mark.needs("overlay", "fuse")
def test_both_backends_take_turns(site: Site) -> None:
    for number, backend in enumerate(["native", "fuse", "native", "fuse"]):
        site.main("mount", "--backend", backend, "-o", site.options, site.mountpoint)
        assert len(site.names()) == 2 + number
        (site.mountpoint / f"new-{number}").touch()
        assert site.main("umount", site.mountpoint).stderr == ""


@pytest.mark.needs("overlay")
def test_auto_takes_the_kernel(site: Site) -> None:
    done = site.main("mount", "-v", "-o", site.options, site.mountpoint)
    assert (done.returncode, backend_of(site)) == (0, "native")
    assert "mounted by the native backend" in done.stderr
    site.main("umount", site.mountpoint)


@pytest.mark.needs("fuse")
@pytest.mark.parametrize("option", ["noacl", "noallow_other"])
def test_auto_takes_fuse_for_what_the_kernel_cannot_do(site: Site, option: str) -> None:
    done = site.main("mount", "-v", "-o", f"{site.options},{option}", site.mountpoint)
    assert (done.returncode, backend_of(site)) == (0, "fuse")
    assert "using fuse: the native backend does not support" in done.stderr
    site.main("umount", site.mountpoint)


@pytest.mark.needs("fuse")
def test_auto_takes_fuse_for_more_layers_than_the_kernel_takes(site: Site) -> None:
    for number in range(501):
        (site.root / "many" / str(number)).mkdir(parents=True)
    lower = ":".join(f"{site.root}/many/{number}" for number in range(501))
    done = site.main("mount", "-v", "-o", f"lowerdir={lower}", site.mountpoint)
    assert (done.returncode, backend_of(site)) == (0, "fuse")
    assert "at most 500" in done.stderr
    site.main("umount", site.mountpoint)


@pytest.mark.needs("fuse")
def test_auto_takes_fuse_when_the_kernel_would_mount_read_only(site: Site) -> None:
    (site.root / "w/work/a/b/c").mkdir(parents=True)
    done = site.main("mount", "-v", "-o", site.options, site.mountpoint)
    assert (done.returncode, backend_of(site)) == (0, "fuse")
    assert "could not clean" in done.stderr
    site.main("umount", site.mountpoint)


@pytest.mark.needs("fuse")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_record_tells_the_transport_that_serves(site: Site, transport: str) -> None:
    words = ("mount", "-v", "--transport", transport, "-o", f"{site.options},transport=auto")
    done = site.main(*words, site.mountpoint)
    assert done.returncode == 0
    assert f"mounted by the fuse backend, {transport}\n" in done.stderr
    rows = json.loads(site.main("mounts", "--format", "json").stdout)
    (row,) = [row for row in rows if row["target"] == str(site.mountpoint)]
    assert row["transport"] == transport
    loaded = Path(f"/proc/{row['pid']}/maps").read_text()
    assert ("pyfuse3" in loaded) is (transport == "pyfuse3")
    assert site.main("umount", site.mountpoint).returncode == 0


@pytest.mark.needs("fuse")
def test_what_a_transport_cannot_do_is_refused(site: Site) -> None:
    for option in ("writeback=1", "passthrough"):
        words = ("mount", "--backend=fuse", "--transport=pyfuse3", "-o")
        done = site.main(*words, f"{site.options},{option}", site.mountpoint)
        assert (done.returncode, site.mount_lines()) == (1, [])
        assert "the transport pyfuse3 does not support" in done.stderr


def test_options_that_no_backend_can_do_together(site: Site) -> None:
    done = site.main("mount", "-o", f"{site.options},noacl,index=on", site.mountpoint)
    refused(done, 1, "noacl", "unionfs2")
    assert "index=on" in done.stderr
    done = site.main("mount", "-o", f"{site.options},squash_to_root", site.mountpoint)
    refused(done, 1, "squash_to_root is not supported", "unionfs2")
    assert done.stderr.count("squash_to_root") == 1


@pytest.mark.needs("overlay")
@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("lowerdir={r}/no:{r}/l2", 32, "does not exist"),
        ("lowerdir={r}/l1:{r}/l1", 32, "twice"),
        ("lowerdir={r}/l1", 1, "nothing to merge"),
        ("lowerdir={r}/l1,frob=1", 1, "unknown option"),
    ],
)
@pytest.mark.parametrize("way", ["auto", *HOW])
def test_bad_input(site: Site, way: str, options: str, status: int, words: str) -> None:
    text = options.format(r=site.root)
    how = ["--backend", "auto"] if way == "auto" else backend_words(way)
    done = site.main("mount", *how, "-o", text, site.mountpoint)
    refused(done, status, words, "unionfs2")
    assert site.mount_lines() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "VERB"),
        (["frobnicate"], "invalid choice"),
        (["mount"], "MOUNTPOINT"),
        (["umount"], "MOUNTPOINT"),
        (["mount", "--backend", "best", "m"], "invalid choice"),
    ],
)
def test_wrong_command_lines(site: Site, words: list[str], message: str) -> None:
    done = site.main(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


def test_version_and_help(site: Site) -> None:
    assert site.main("--version").stdout == f"unionfs2 {__version__}\n"
    assert "upperdir=DIR" in site.main("mount", "--help").stdout


def test_foreground_needs_a_server(site: Site) -> None:
    done = site.main("mount", "-f", "--backend", "native", "-o", site.options, site.mountpoint)
    refused(done, 1, "--backend fuse", "unionfs2")


@pytest.mark.needs("fuse")
def test_foreground(site: Site) -> None:
    words = (*MAIN, "mount", "-f", "-o", site.options, site.mountpoint)
    with foreground(site, *words) as process:
        assert backend_of(site) == "fuse"
        assert site.names() == ["one", "two"]
        assert site.main("umount", site.mountpoint).stderr == ""
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, "")


# --- umount ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", HOW)
def test_a_busy_mount_is_reported_and_goes_lazily(site: Site, way: str) -> None:
    site.main("mount", *backend_words(way), "-o", site.options, site.mountpoint)
    with (site.mountpoint / "one").open("rb") as file:
        refused(site.main("umount", site.mountpoint), 32, "busy", "unionfs2")
        assert site.names() == ["one", "two"]
        assert site.main("umount", "-l", site.mountpoint).stderr == ""
        assert site.mount_lines() == []
        assert file.read() == b"1"


def test_unmounting_several(site: Site) -> None:
    probe.need("fuse")
    site.main("mount", "--backend", "fuse", "-o", site.options, site.mountpoint)
    done = site.main("umount", site.mountpoint, site.root / "l1", site.root / "no")
    assert done.returncode == 64
    assert done.stderr.count("is not a unionfs2 mount") == 2
    assert site.mount_lines() == []
    refused(site.main("umount", site.mountpoint), 32, "not a unionfs2 mount", "unionfs2")


@by_fuse
def test_a_copy_of_the_mount_keeps_the_server(site: Site, way: str) -> None:
    site.main("mount", *backend_words(way), "-o", site.options, site.mountpoint)
    pid = site.server()
    (site.root / "copy").mkdir()
    probe.sys_mount(str(site.mountpoint), str(site.root / "copy"), "", 4096)
    done = site.main("umount", site.mountpoint)
    assert done.returncode == 0
    assert "its server goes on" in done.stderr
    assert site.names("copy") == ["one", "two"]
    probe.sys_umount(str(site.root / "copy"))
    assert eventually(lambda: not is_running(pid))


@by_fuse
def test_umount_waits_for_the_server(site: Site, way: str) -> None:
    for _ in range(3):
        site.main("mount", *backend_words(way), "-o", site.options, site.mountpoint)
        pid = site.server()
        assert site.main("umount", site.mountpoint).returncode == 0
        assert not is_running(pid)


# --- mounts ---------------------------------------------------------------------------------------


@by_fuse
def test_records_of_vanished_mounts_are_removed(site: Site, way: str) -> None:
    site.main("mount", *backend_words(way), "-o", site.options, site.mountpoint)
    pid = site.server()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not is_running(pid))
    assert str(site.mountpoint) in site.main("mounts").stdout  # dead, but still there
    probe.sys_umount(str(site.mountpoint))
    (site.root / "state" / "rubbish.json").write_text("{")
    assert str(site.mountpoint) not in site.main("mounts").stdout
    assert site.names("state") == []


@pytest.mark.needs("overlay")
def test_a_mount_without_a_record_is_listed(site: Site) -> None:
    site.main("mount", "--backend", "native", "-o", site.options, site.mountpoint)
    for record in (site.root / "state").iterdir():
        record.unlink()
    (row,) = [
        row
        for row in json.loads(site.main("mounts", "--format", "json").stdout)
        if row["target"] == str(site.mountpoint)
    ]
    assert (row["backend"], row["since"], row["pid"]) == ("native", None, None)
    assert site.main("umount", site.mountpoint).stderr == ""


@pytest.mark.needs("overlay")
def test_records_of_other_mount_namespaces_stay_while_those_live(site: Site) -> None:
    words = " ".join(MAIN)
    script = f'{words} mount --backend native -o "$0" "$1" && ls "$2" && {words} mounts'
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    done = site.run(*private, site.options, site.mountpoint, site.root / "state")
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if str(site.mountpoint) in line]
    assert line.split()[1] == "native"
    assert len(site.names("state")) == 1  # the namespace ended without anybody unmounting
    assert str(site.mountpoint) not in site.main("mounts").stdout
    # A process that may not be asked could be in that namespace.
    assert len(site.names("state")) == (mounts.live_namespaces() is None)


def test_a_reader_that_goes_away_is_no_error(site: Site) -> None:
    program = " ".join(MAIN)
    done = site.run("sh", "-c", f"{program} mounts --format json | true")
    assert done.stderr == ""
