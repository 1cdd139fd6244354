"""Pieces of ``unionfs2 layer`` that need no store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unionfs2.cli import layer


@pytest.mark.parametrize(
    ("depths", "guides"),
    [
        ([], []),
        ([0, 0], ["", ""]),
        ([0, 1, 2, 3], ["", "`- ", "   `- ", "      `- "]),
        ([0, 1, 1, 0], ["", "|- ", "`- ", ""]),
        ([0, 1, 2, 2, 1, 2], ["", "|- ", "|  |- ", "|  `- ", "`- ", "   `- "]),
        ([0, 1, 2, 0, 1], ["", "`- ", "   `- ", "", "`- "]),
    ],
)
def test_guides_of_a_tree(depths: list[int], guides: list[str]) -> None:
    assert layer._guides(depths) == guides


def test_a_long_chain_needs_no_recursion() -> None:
    assert len(layer._guides(list(range(3000)))) == 3000


def test_storage_options_of_the_layer_and_of_the_store() -> None:
    own, rest = layer._layer_options(["Size=1G", "inodes=5", "overlay2.size=2G", "size", "size=3G"])
    assert own == {"size": "3G", "inodes": "5"}
    assert rest == ["overlay2.size=2G", "size"]


# --- where a stream goes --------------------------------------------------------------------------


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with layer._sink(str(target)) as sink:
        sink.write(b"all")
        assert not target.exists()
    assert target.read_bytes() == b"all"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_completed_never_was(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")

    def write() -> None:
        with layer._sink(str(target)) as sink:
            sink.write(b"half")
            raise failure

    with pytest.raises(failure):
        write()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_the_mode_of_a_new_file_is_as_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with layer._sink(str(tmp_path / "out")) as sink:
            sink.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with layer._sink(str(tmp_path / "link")) as sink:
        sink.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_device_is_written_to(tmp_path: Path) -> None:
    with layer._sink("/dev/null") as sink:
        sink.write(b"x")
    assert Path("/dev/null").is_char_device()


def test_a_failure_while_the_file_is_made_names_the_target(tmp_path: Path) -> None:
    target = str(tmp_path / "no" / "out")
    with pytest.raises(FileNotFoundError) as caught, layer._sink(target):
        pass
    assert caught.value.filename == target
