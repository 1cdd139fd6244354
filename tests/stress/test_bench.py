"""The benchmark harness: every workload runs, results hold what they promise, ratios are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench_main
from bench import (
    chart,
    compare,
    disk,
    fuse_server,
    measure,
    results,
    row,
    run,
    targets,
    tracing,
    turns,
    workloads,
)
from bench.micro import core
from bench.results import Measurement, Results
from bench.targets import OptionSet
from bench.workloads import layers as many_layers
from bench.workloads.model import Tree, Workload
from bench.workloads.trees import NOTHING, Words

# --- workloads ------------------------------------------------------------------------------------


def _snapshot(tree: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.lstat()) for path in sorted(tree.rglob("*"))]
    return [(os.fspath(path), status.st_size, status.st_mtime_ns) for path, status in found]


@pytest.mark.parametrize(
    "workload",
    [workload for workload in workloads.ALL if workload.tree.layers == 1],
    ids=lambda workload: workload.name,
)
def test_workload_does_its_work_and_leaves_its_tree(workload: Workload, tmp_path: Path) -> None:
    small = workload.scaled(100)
    lower = tmp_path / "lower"
    lower.mkdir()
    small.tree.build(lower, small.size)
    before = _snapshot(lower)
    outcome = measure.measure(small, targets.PlainDirectory(), (lower,), tmp_path)
    assert set(outcome.phases) == {"prepare", "mount", "work", "unmount"}
    assert _snapshot(lower) == before
    assert os.listdir(tmp_path) == ["lower"]


def test_names_and_trees_are_told_apart() -> None:
    assert len(workloads.BY_NAME) == len(workloads.ALL)
    assert set(workloads.HEADLINE) <= set(workloads.BY_NAME)
    assert set(row.COLUMNS) <= set(workloads.BY_NAME)
    builders = {(one.tree.name, one.tree.build, one.tree.layers) for one in workloads.ALL}
    assert len({name for name, _, _ in builders}) == len(builders)


def test_generated_text_is_the_same_each_time() -> None:
    assert Words(1).text(500) == Words(1).text(500) != Words(2).text(500)


def _spread(count: int, size: int = 60) -> Workload:
    tree = Tree("spread", many_layers.build_spread(count), count)
    return Workload("spread", "", "layers", tree, size, many_layers.stat_spread)


@pytest.mark.needs("root", "overlay")
def test_layers_that_do_not_fit_a_page_by_their_paths_are_named_shortly(tmp_path: Path) -> None:
    workload = _spread(300)
    lower = tmp_path / "lower"
    lower.mkdir()
    workload.tree.build(lower, workload.size)
    lowers = workload.tree.lowers(lower)
    here = Path.cwd()
    measure.measure(workload, targets.KernelOverlay(), lowers, tmp_path)
    assert Path.cwd() == here
    with pytest.raises(targets.MountRefusedError, match="no layers"):
        measure.measure(workload, targets.PlainDirectory(), lowers, tmp_path)
    assert os.listdir(tmp_path) == ["lower"]


def test_layer_paths_that_need_escaping_are_refused() -> None:
    odd = Path("/a:b")
    with pytest.raises(ValueError, match="a:b"):
        targets.Layers((odd,), odd, odd, odd).option_text()


# --- measuring ------------------------------------------------------------------------------------


def _able_target() -> targets.Target:
    kernel = targets.KernelOverlay()
    return kernel if kernel.unavailable() is None else targets.PlainDirectory()


def test_failed_workload_leaves_no_mount(tmp_path: Path) -> None:
    def fail(root: Path, size: int) -> None:
        raise AssertionError(f"{root} {size}")

    workload = Workload("fail", "", "looking", NOTHING, 10, fail)
    lower = tmp_path / "lower"
    lower.mkdir()
    with pytest.raises(AssertionError):
        measure.measure(workload, _able_target(), (lower,), tmp_path)
    assert os.listdir(tmp_path) == ["lower"]


def test_program_is_waited_for_and_not_for_ever() -> None:
    targets.run_checked(["true"], timeout_s=60)
    with pytest.raises(RuntimeError, match=r"did not return in 0\.1 s"):
        targets.run_checked(["sleep", "60"], timeout_s=0.1)
    with pytest.raises(RuntimeError, match="exit 3: words"):
        targets.run_checked(["sh", "-c", "echo words; exit 3"], timeout_s=60)


@pytest.mark.needs("root", "fuse")
def test_server_is_watched_and_its_requests_are_counted(tmp_path: Path) -> None:
    workload = workloads.BY_NAME["stat-cold"].scaled(100)
    lower = tmp_path / "lower"
    lower.mkdir()
    workload.tree.build(lower, workload.size)
    with tracing.open_tracer() as tracer:
        target = targets.unionfs2_target()
        outcome = measure.measure(workload, target, (lower,), tmp_path, tracer)
    assert outcome.memory is not None
    assert outcome.memory.rss_kib > outcome.memory.private_kib > 0
    assert outcome.server_cpu_s is not None
    assert 0 < outcome.server_cpu_s < 60
    if tracer is not None:
        assert outcome.requests is not None
        assert outcome.requests["LOOKUP"] >= workload.operations
    assert os.listdir(tmp_path) == ["lower"]


def test_processor_time_of_a_process_that_is_gone() -> None:
    assert fuse_server.cpu_seconds(os.getpid()) > 0
    with pytest.raises(OSError, match="Invalid argument"):
        fuse_server.cpu_seconds(2**22 + 1)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.needs("root", "overlay", "fuse")
def test_run_writes_its_results_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["--quick", "--repeat", "1", "--crowd", "2", "--output", os.fspath(output)]
    for target in ("plain", "kernel", "unionfs2"):
        words += ["--target", target]
    for workload in ("stat-cold", "create-unlink", "lookup-8", "mounting"):
        words += ["--workload", workload]
    assert bench_main.main([*words, "--scratch", os.fspath(scratch)]) == 0
    assert os.listdir(scratch) == []

    found = results.load(output)
    measured = [(m.workload, m.target) for m in found.measurements]
    for target in ("kernel", "unionfs2"):
        assert {name for name, on in measured if on == target} == {
            "stat-cold", "create-unlink", "lookup-8", "mount", "unmount",
        }  # fmt: skip
    assert len(measured) == len(set(measured)) == 2 * 5 + 2
    assert all(m.work_s > 0 for m in found.measurements)
    assert [(one.workload, one.target) for one in found.refusals] == [("lookup-8", "plain")]
    assert {crowd.target: crowd.mounts for crowd in found.crowds} == {"kernel": 2, "unionfs2": 2}
    assert {"kernel", "cpu", "fs", "commit", "load", "load_at_end"} <= set(found.environment)
    assert set(found.environment["transports"]) == {"unionfs2"}
    printed = capsys.readouterr().out
    assert "times of kernel" in printed
    assert os.fspath(output) in printed


@pytest.mark.needs("root", "overlay")
def test_run_that_is_told_to_end_leaves_no_mount_and_no_image(tmp_path: Path) -> None:
    if disk.why_not() is not None:
        pytest.skip(f"no image can be made: {disk.why_not()}")
    words = ["--workload", "stat-cold", "--target", "kernel", "--repeat", "1000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *words, "--output", os.fspath(tmp_path / "results")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
    ) as process:
        assert process.stderr is not None
        while "stat-cold" not in (line := process.stderr.readline()):
            assert line, "it ended before it was told to"
        process.terminate()
        process.stderr.read()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_turns_end_with_the_time_when_there_are_enough(tmp_path: Path) -> None:
    workload = Workload("idle", "", "looking", NOTHING, 1, lambda root, size: None)
    on: list[targets.Target] = [targets.PlainDirectory()]
    plan = turns.Plan([workload], on, {}, repeat=9, minutes=0.0, mounting=False, crowd=0)
    found = turns.Run(plan, tmp_path, tmp_path / "results.json").all()
    assert [m.turn for m in found.measurements] == list(range(turns.LEAST_REPEAT))
    assert results.load(tmp_path / "results.json") == found


def test_sets_are_measured_with_their_families_unless_asked_for() -> None:
    known = list(targets.all_targets().values())
    copy_up, looking = (workloads.BY_NAME[name] for name in ("copyup-chown", "stat-cold"))
    plan = turns.Plan([], known, {}, repeat=1, minutes=1.0, mounting=False, crowd=0)
    assert "unionfs2-volatile" in [target.name for target in plan.on(copy_up)]
    assert "unionfs2-volatile" not in [target.name for target in plan.on(looking)]
    plan.only_asked = True
    assert plan.on(looking) == known


def test_every_set_has_its_stand_in() -> None:
    known = {target.name: target.about for target in targets.all_targets().values()}
    for about in known.values():
        if about.unsynced is not None:
            assert about.synced
            assert not known[about.unsynced].synced


def test_target_that_is_asked_for_must_be_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="fuse-overlayfs"):
        run.main(["--target", "fuse-overlayfs"])


def test_list_tells_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main.main(["run", "--list"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in workloads.BY_NAME if name not in printed] == []
    assert [name for name in targets.all_targets() if name not in printed] == []


# --- what is made of results ----------------------------------------------------------------------

SETS = [
    OptionSet("kernel", unsynced="kernel-volatile"),
    OptionSet("kernel-volatile", synced=False),
    OptionSet("fuse-overlayfs", synced=False),
    OptionSet("unionfs2", unsynced="unionfs2-volatile"),
    OptionSet("unionfs2-volatile", synced=False),
]


def _found(*measured: tuple[str, str, int, float], family: str = "looking") -> Results:
    at = {"when": "2026-01-01", "commit": "c", "kernel": "6.1.0", "cpus": 2, "fs": "ext4"}
    at |= {"python": "3.11.2", "fuse_overlayfs": "fuse-overlayfs: version 1"}
    return Results(
        environment=at,
        sets=SETS,
        measurements=[
            Measurement(workload, family, target, turn, 10, "file", 0.1, 0.1, seconds, 0.1)
            for workload, target, turn, seconds in measured
        ],
    )


def test_ratios_are_formed_within_each_turn() -> None:
    found = _found(
        ("w", "kernel", 0, 1.0),
        ("w", "unionfs2", 0, 2.0),
        ("w", "kernel", 1, 10.0),  # the machine became slow
        ("w", "unionfs2", 1, 30.0),
        ("w", "unionfs2", 2, 5.0),  # nothing to compare with
    )
    ratio = compare.Table(found).ratio("w", "unionfs2", "kernel")
    assert ratio == compare.Ratio(2.5, 2.0, 3.0)
    assert "2.50 (2.00-3.00)" in compare.report(found)
    assert compare.report(Results()) == "nothing was measured"


def test_copy_ups_are_compared_synced_with_synced_and_unsynced_with_unsynced() -> None:
    seconds = {
        "kernel": 8.0,
        "kernel-volatile": 2.0,
        "fuse-overlayfs": 4.0,
        "unionfs2": 32.0,
        "unionfs2-volatile": 6.0,
    }
    measured = [("c", name, 0, value) for name, value in seconds.items()]
    table = compare.Table(_found(*measured, family="copy-up"))

    def median(target: str, baseline: str) -> float | None:
        ratio = table.ratio("c", target, baseline)
        return None if ratio is None else ratio.median

    assert median("unionfs2", "kernel") == 32.0 / 8.0
    assert median("unionfs2-volatile", "kernel") == 6.0 / 2.0
    assert median("fuse-overlayfs", "kernel") == 4.0 / 2.0
    assert median("unionfs2", "fuse-overlayfs") == 6.0 / 4.0
    assert median("unionfs2-volatile", "fuse-overlayfs") == 6.0 / 4.0
    assert median("kernel-volatile", "kernel") is None  # the same twice
    mean = table.mean("unionfs2", "fuse-overlayfs")
    assert mean is not None
    assert mean[1] == 1
    assert mean[0] == pytest.approx(1.5)

    without = compare.Table(_found(*measured[2:4], family="copy-up"))
    assert without.ratio("c", "unionfs2", "fuse-overlayfs") is None

    elsewhere = compare.Table(_found(*measured))
    ratio = elsewhere.ratio("c", "unionfs2", "fuse-overlayfs")
    assert ratio == compare.Ratio(8.0, 8.0, 8.0)


def test_the_report_says_what_was_compared_instead() -> None:
    measured = [("c", one.name, 0, 1.0) for one in SETS]
    assert "measured without syncing on both sides" in compare.report(
        _found(*measured, family="copy-up")
    )
    assert "without syncing" not in compare.report(_found(*measured))


def test_mounting_is_no_part_of_the_mean() -> None:
    found = _found(("mount", "kernel", 0, 1.0), ("mount", "unionfs2", 0, 9.0), family="mounting")
    table = compare.Table(found)
    assert table.ratio("mount", "unionfs2", "kernel") == compare.Ratio(9.0, 9.0, 9.0)
    assert table.mean("unionfs2", "kernel") is None


def test_two_results_are_compared_by_their_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, seconds in (("before", 4.0), ("after", 1.0)):
        path = tmp_path / name
        _found(("w", "kernel", 0, 2.0), ("w", "unionfs2", 0, seconds)).save(path)
        files.append(os.fspath(path))
    assert bench_main.main(["compare", *files]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "0.25"
    assert bench_main.main(["compare", files[0]]) == 0
    assert bench_main.main(["no-such-word"]) == 2


def test_results_have_one_line_for_each_record(tmp_path: Path) -> None:
    found = _found(("w", "kernel", 0, 2.0), ("w", "unionfs2", 0, 3.0))
    found.requests.append(results.Requests("w", "unionfs2", 10, "file", {"LOOKUP": 10}))
    found.save(tmp_path / "results")
    assert os.listdir(tmp_path) == ["results"]
    assert results.load(tmp_path / "results") == found
    lines = (tmp_path / "results").read_text().splitlines()
    records = [json.loads(line.rstrip(",")) for line in lines if line.startswith('{"workload"')]
    assert len(records) == 3


def test_row_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _found(*(("stat-cold", one.name, 0, 1.0 + at) for at, one in enumerate(SETS)))
    found.save(tmp_path / "results")
    assert bench_main.main(["row", "--head", os.fspath(tmp_path / "results")]) == 0
    head, rule, line = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1:3] == ["2026-01-01", "c"]
    assert "4 [3]" in cells  # ours and the peer's, times of the kernel


def test_charts_are_the_same_file_for_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the charts need the extra packages of ./dev bench")
    measured = [
        (name, one.name, turn, 1.0 + at + turn)
        for name in ("stat-cold", "lookup-1", "lookup-8")
        for at, one in enumerate(SETS)
        for turn in (0, 1)
    ]
    found = _found(*measured)
    first, second = (chart.draw(found, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["ratios.svg", "layers.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "stat-cold" in first[0].read_text()
    assert chart.draw(_found(("w", "plain", 0, 1.0)), tmp_path) == []


# --- without a mount ------------------------------------------------------------------------------


@pytest.mark.needs("root")
def test_micro_benchmark_of_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(core, "FILES", 50)
    monkeypatch.setattr(core, "LAYERS", (1, 3))
    assert core.main(["--scratch", os.fspath(tmp_path)]) == 0
    assert "lookup, missing" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []
