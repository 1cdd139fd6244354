"""The benchmark harness: every workload runs, records hold what they promise, ratios are right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench_main
from bench import compare, run, targets, workloads
from bench.micro import core


@pytest.mark.parametrize("workload", workloads.ALL, ids=lambda workload: workload.name)
def test_workload_does_its_work_on_a_plain_directory(
    workload: workloads.Workload, tmp_path: Path
) -> None:
    small = workload.scaled(100)
    lower = tmp_path / "lower"
    lower.mkdir()
    small.build(lower, small.size)
    before = sorted(lower.rglob("*"))
    phases = run.measure(small, targets.PlainDirectory(), lower, tmp_path)
    assert set(phases) == {"prepare", "mount", "work", "unmount"}
    assert sorted(lower.rglob("*")) == before
    assert os.listdir(tmp_path) == ["lower"]


@pytest.mark.needs("root", "overlay", "fuse")
def test_run_writes_a_line_for_each_measurement_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    chosen = ["--target", "plain", "--target", "kernel", "--target", "unionfs2"]
    work = ["--workload", "stat-cold", "--workload", "create-unlink", "--quick", "--repeat", "1"]
    places = ["--output", os.fspath(output), "--scratch", os.fspath(scratch)]
    assert bench_main.main(["run", *chosen, *work, *places]) == 0
    records = compare.load(output)
    assert [(record["workload"], record["target"]) for record in records] == [
        (workload, target)
        for workload in ("stat-cold", "create-unlink")
        for target in ("plain", "kernel", "unionfs2")
    ]
    for record in records:
        assert record["work_s"] > 0
        assert {"kernel", "cpu", "fs", "commit", "mount_s", "unmount_s"} <= set(record)
    assert os.listdir(scratch) == []
    assert "times of kernel" in capsys.readouterr().out


def test_failed_workload_leaves_no_mount(tmp_path: Path) -> None:
    def fail(root: Path, size: int) -> None:
        raise AssertionError(f"{root} {size}")

    workload = workloads.Workload("fail", "", 10, workloads.build_nothing, fail)
    lower = tmp_path / "lower"
    lower.mkdir()
    target = targets.KernelOverlay()
    on: targets.Target = target if target.unavailable() is None else targets.PlainDirectory()
    with pytest.raises(AssertionError):
        run.measure(workload, on, lower, tmp_path)
    assert os.listdir(tmp_path) == ["lower"]


def _record(workload: str, target: str, turn: int, seconds: float) -> dict[str, Any]:
    return {
        "workload": workload,
        "target": target,
        "turn": turn,
        "work_s": seconds,
        "mount_s": 0.001,
        "unmount_s": 0.002,
        "when": "now",
    }


def test_ratios_are_formed_within_each_turn() -> None:
    records = [
        _record("w", "kernel", 0, 1.0),
        _record("w", "unionfs2", 0, 2.0),
        _record("w", "kernel", 1, 10.0),  # the machine became slow
        _record("w", "unionfs2", 1, 30.0),
        _record("w", "unionfs2", 2, 5.0),  # nothing to compare with
    ]
    assert compare.ratios(records, "w", "unionfs2", "kernel") == [2.0, 3.0]
    report = compare.report(records)
    assert "2.50 (2.00-3.00)" in report
    assert compare.report([]) == "nothing was measured"


def test_two_results_are_compared_by_their_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("before", 4.0), ("after", 1.0)):
        records = [_record("w", "kernel", 0, 2.0), _record("w", "unionfs2", 0, seconds)]
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records))
    files = [os.fspath(tmp_path / name) for name in ("before", "after")]
    assert bench_main.main(["compare", *files]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "0.25"
    assert bench_main.main(["compare", files[0]]) == 0
    assert bench_main.main([]) == 2


def test_target_that_is_asked_for_must_be_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="fuse-overlayfs"):
        run.main(["--target", "fuse-overlayfs"])


def test_layer_paths_that_need_escaping_are_refused() -> None:
    odd = Path("/a:b")
    with pytest.raises(ValueError, match="a:b"):
        targets.Layers((odd,), odd, odd, odd).option_text()


@pytest.mark.needs("root")
def test_micro_benchmark_of_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(core, "FILES", 50)
    monkeypatch.setattr(core, "LAYERS", (1, 3))
    assert core.main(["--scratch", os.fspath(tmp_path)]) == 0
    assert "lookup, missing" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []
