"""Words completed in bash, as its completion calls the command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.e2e.shelf import Shelf, shelf_of

pytestmark = pytest.mark.needs("command:bash")

# bash splits the line at COMP_WORDBREAKS; these lines have none, so spaces do.
COMPLETE = r"""
eval "$(unionfs2 completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<<"$1"
[[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete unionfs2
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with shelf_of(None) as shelf:
        for name in ("alpha", "beta", "a b", "[x]"):
            (shelf.home / name).mkdir(parents=True)
            (shelf.home / name / "link").touch()
        (shelf.home / "l").mkdir()
        (shelf.home / ".unionfs2").mkdir()
        (shelf.home / "backingFsBlockDev").touch()
        yield shelf


def complete(shelf: Shelf, line: str) -> list[str]:
    done = shelf.shell(COMPLETE, line)
    assert done.err == ""
    return sorted(word.rstrip(" ") for word in done.text.splitlines() if word)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("unionfs2 m", ["mount", "mounts"]),
        ("unionfs2 layer re", ["rebase"]),
        ("unionfs2 layer --root /nowhere re", ["rebase"]),
        ("unionfs2 layer diff --comp", ["--compress"]),
        ("unionfs2 layer diff --compress ", ["gzip", "zstd"]),
        ("unionfs2 image export --to o", ["oci", "oci-archive"]),
        ("unionfs2 completion ", ["bash", "fish", "zsh"]),
        ("unionfs2 mount --backend n", ["native"]),
        ("unionfs2 layer mount al", ["alpha"]),
        ("unionfs2 layer rm alpha b", ["beta"]),
        ("unionfs2 layer create --parent al", ["alpha"]),
        ("unionfs2 layer rebase beta --onto al", ["alpha"]),
        ("unionfs2 layer changes --against=al", ["--against=alpha"]),
        ("unionfs2 layer rm ", ["[x]", "a b", "alpha", "beta"]),
        ("unionfs2 layer --root /nowhere rm ", []),
    ],
)
def test_words(shelf: Shelf, line: str, words: list[str]) -> None:
    found = [word.replace("\\", "") for word in complete(shelf, line)]
    if "=" in line:  # bash takes "=" for the end of a word, or not, by its settings
        words = [word.partition("=")[2] for word in words]
        found = [word.rpartition("=")[2] for word in found]
    assert found == words


def test_completion_makes_and_changes_nothing(shelf: Shelf) -> None:
    shutil.rmtree(shelf.home)
    assert complete(shelf, "unionfs2 layer rm ") == []
    assert not shelf.home.exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shelf: Shelf, shell: str) -> None:
    text = shelf.ok("completion", shell)
    assert "unionfs2" in text
    if shutil.which(shell):
        assert shelf.shell(f"unionfs2 completion {shell} | {shell} -n").status == 0


def test_unknown_shell(shelf: Shelf) -> None:
    done = shelf.run("completion", "tcsh")
    assert (done.status, done.out) == (1, b"")
    assert "invalid choice" in done.err
