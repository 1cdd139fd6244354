"""The documents are true to the code: options and switches are all there, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import LEVELS
from unionfs2.cli import fuse
from unionfs2.option_names import known_names

ROOT = Path(__file__).resolve().parent.parent.parent
MANUALS = ROOT / "docs" / "man"
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")]


def _read(name: str) -> str:
    return (MANUALS / name).read_text(encoding="utf-8")


def test_the_manual_has_every_mount_option() -> None:
    text = _read("unionfs2.1.md")
    written = {name.rstrip("=") for name in re.findall(r"`([\w+-]+=?)[^`]*`", text)}
    assert sorted(set(known_names()) - written) == []


@pytest.mark.parametrize("verb", ["mount", "umount", "mounts"])
def test_the_manual_has_every_switch(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unionfs2", verb, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    switches = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout.split("mount options")[0]))
    missing = [switch for switch in switches if f"{switch}" not in _read("unionfs2.1.md")]
    assert sorted(set(missing) - {"-h", "--help"}) == []


def test_the_manual_of_the_other_command_has_every_switch() -> None:
    text = _read("fuse-unionfs2.1.md")
    switches = re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", fuse.USAGE)
    assert [switch for switch in switches if switch not in text] == []


def test_the_table_of_levels_is_the_one_that_is_checked() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[ab]? [a-z ]+) \| ([a-z0-9_, ]+) \|", text, flags=re.MULTILINE)
    written = {level: tuple(modules.split(", ")) for level, modules in rows}
    assert written == {
        level: tuple(module for module in modules if module != "__main__")
        for level, modules in LEVELS.items()
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_format_has_every_name_that_reaches_a_disk() -> None:
    text = (ROOT / "docs" / "on-disk-format.md").read_text(encoding="utf-8")
    source = (ROOT / "unionfs2" / "ondisk.py").read_text(encoding="utf-8")
    names = re.findall(
        r'^(?:SUFFIX_\w+|\w+_NAME|\w+_SUFFIX): Final = b"(\S+)"', source, re.MULTILINE
    )
    assert len(names) > 30
    assert [
        name for name in names if not re.search(rf"\b{re.escape(name.lstrip('.'))}\b", text)
    ] == []
