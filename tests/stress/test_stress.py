"""Each kind of stress for a few seconds, on our FUSE mount; and proof that a kind can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import fuse_server, targets
from devtools import stress, stress_fsx, stress_mixed, stress_rig
from tests.support.transports import TRANSPORTS
from unionfs2.devfuse import codec

SHORT = {
    "fsx": "--ops 1500 --ops-per-file 150 --drop-every 100 --remount-every 700",
    "mixed": "--minutes 0.03",
    "rounds": "--ops 300",
    "churn": "--count 2000 --samples 10",
    "walk": "--files 5000",
    "latency": "--mib 256 --limit-ms 100",
}


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("kind", sorted(SHORT))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_short_run_on_fuse(kind: str, transport: str, tmp_path: Path) -> None:
    arguments = ["--transport", transport, "--scratch", os.fspath(tmp_path)]
    assert stress.main([kind, *SHORT[kind].split(), *arguments]) == 0


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_requests_are_answered_during_a_large_write_and_fsync(
    transport: str, tmp_path: Path
) -> None:
    arguments = [
        "--transport",
        transport,
        "--during",
        "fsync",
        "--mib",
        "128",
        "--limit-ms",
        "100",
        "--scratch",
        os.fspath(tmp_path),
    ]
    assert stress.main(["latency", *arguments]) == 0


@pytest.mark.needs("root", "overlay")
@pytest.mark.parametrize("kind", ["fsx", "mixed"])
def test_short_run_on_the_kernel(kind: str, tmp_path: Path) -> None:
    """The tools ask nothing that the kernel's overlay does not give."""
    arguments = ["--target", "kernel", "--scratch", os.fspath(tmp_path)]
    assert stress.main([kind, *SHORT[kind].split(), *arguments]) == 0


def test_directory_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for kind in ("fsx", "mixed"):
        arguments = [kind, *SHORT[kind].split(), "--directory", os.fspath(tmp_path)]
        assert stress.main(arguments) == 0
    assert os.listdir(tmp_path) == ["mine"]


def test_fsx_reports_a_wrong_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = stress_fsx.File.append

    def damaging(file: stress_fsx.File) -> None:
        original(file)
        os.pwrite(file.fd, b"\0damage", 0)

    operations = [(damaging if op is original else op, n) for op, n in stress_fsx.OPERATIONS]
    monkeypatch.setattr(stress_fsx, "OPERATIONS", operations)
    arguments = ["fsx", "--ops", "500", "--target", "plain", "--scratch", os.fspath(tmp_path)]
    assert stress.main([*arguments, "--seed", "7"]) == 1
    said = capsys.readouterr()
    assert "seed 7" in said.err
    assert "1 corruptions" in said.out
    assert "append" in said.out  # the log of what was done


def test_mixed_reports_an_errno_that_no_local_file_system_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(stress_mixed.ALLOWED, "unlink", set())
    arguments = ["--minutes", "0.01", "--target", "plain", "--scratch", os.fspath(tmp_path)]
    assert stress.main(["mixed", *arguments]) == 1
    assert "unlink answered ENOENT" in capsys.readouterr().err


def test_mixed_reports_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress_mixed, "HANG_S", 0.3)
    monkeypatch.setattr(stress_mixed.Worker, "step", lambda _: time.sleep(600))
    arguments = ["--minutes", "0.1", "--target", "plain", "--scratch", os.fspath(tmp_path)]
    started = time.monotonic()
    assert stress.main(["mixed", *arguments]) == 1
    assert time.monotonic() - started < 30


@pytest.mark.needs("root", "overlay")
def test_run_that_is_told_to_end_leaves_no_mount(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "devtools.stress", "mixed", "--target", "kernel"]
    with subprocess.Popen(
        [*command, "--scratch", os.fspath(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "mixed on kernel" in process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


@pytest.mark.needs("root", "overlay")
def test_tree_that_changes_over_a_remount_is_reported(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/f").touch()
    layers = targets.Layers.below(tmp_path, (tmp_path / "lower",))

    class Forgetful(targets.KernelOverlay):
        def unmount(self, layers: targets.Layers) -> None:
            super().unmount(layers)
            (layers.upper / "new").unlink()

    target = Forgetful()
    target.mount(layers)
    try:
        (layers.merged / "new").touch()
        place = stress_rig.Place(layers.merged, "forgetful", layers, target)
        assert [problem.split(" ")[0] for problem in stress_mixed.tree_problems(place)] == ["new"]
    finally:
        targets.clear_away(layers.merged)


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_server_is_found_and_watched(transport: str, tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    layers = targets.Layers.below(tmp_path, (tmp_path / "lower",))
    target = targets.unionfs2_target(f"transport={transport}")
    target.mount(layers)
    try:
        server = fuse_server.find_server(layers.merged)
        assert server is not None
        sample = fuse_server.sample(server)
        assert sample.rss_kib > sample.private_kib > 0
        assert sample.fds > 3
        (layers.merged / "f").touch()
        with (layers.merged / "f").open():
            assert fuse_server.sample(server).fds > sample.fds
    finally:
        targets.clear_away(layers.merged)
    assert not fuse_server.is_mounted(layers.merged)
    with pytest.raises(OSError, match=r"smaps_rollup|No such process"):
        fuse_server.sample(server)


@pytest.mark.needs("user-xattr")
def test_messages_that_no_kernel_sends() -> None:
    assert stress.main(["codec", "--messages", "20000", "--seed", "4711"]) == 0


@pytest.mark.needs("user-xattr")
def test_codec_reports_a_door_that_answers_wrongly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unionfs2.devfuse.codec.ok", lambda unique: codec.failed(unique + 1, 5))
    assert stress.main(["codec", "--messages", "500"]) == 1
    said = capsys.readouterr().out
    assert "nobody asked for" in said
    assert "--seed 1 --messages 500" in said
