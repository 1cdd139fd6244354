"""A real Debian root file system from packages: downloaded by apt, unpacked, registered with dpkg.

Nothing is configured and nothing runs, so no privilege is needed, and a tree of a hundred packages
takes seconds; dpkg, tar or Python work in it all the same. Packages come from the sources that the
machine's own apt is set up for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

# apt as if nothing were installed yet, so that it names complete sets of packages.
_EMPTY_SYSTEM: Final = ("-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false")
# Downloads go to directories that apt's own unprivileged user cannot reach.
_AS_CALLER: Final = ("-o", "APT::Sandbox::User=root")


class RootfsError(Exception):
    """The packages cannot be had; the text says why and what to do."""


def closure(names: Iterable[str]) -> list[str]:
    """Packages needed to install *names* (or apt patterns, as ``~E``) on an empty system."""
    command = ["apt-get", "--simulate", *_EMPTY_SYSTEM, "install", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and os.geteuid() == 0:
        # Images for containers come without package lists.
        subprocess.run(["apt-get", "-q", "update"], check=False)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RootfsError(
            f"apt cannot resolve {' '.join(names)}: {done.stderr.strip()}; "
            "is 'apt-get update' needed?"
        )
    words = (line.split() for line in done.stdout.splitlines())
    return sorted(line[1] for line in words if line[:1] == ["Inst"])


def download(names: Iterable[str], directory: Path) -> dict[str, Path]:
    """Package files of *names* in *directory*, by name; what is there is not loaded again."""
    directory.mkdir(parents=True, exist_ok=True)
    found = _files(directory)
    missing = [name for name in names if name not in found]
    if missing:
        command = ["apt-get", "-q", *_AS_CALLER, "download", *missing]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RootfsError(f"apt-get download failed: {done.stderr.strip()}")
        found = _files(directory)
    return {name: found[name] for name in names}


def _files(directory: Path) -> dict[str, Path]:
    return {path.name.split("_")[0]: path for path in sorted(directory.glob("*.deb"))}


def unpack(
    packages: Iterable[Path],
    root: Path,
    *,
    below: Path | None = None,
    progress: Callable[[str], None],
) -> None:
    """Unpack *packages* into *root* and enter them as installed into its dpkg database.

    With *below*, the root of another tree, *root* becomes a layer on top of that one: its list of
    installed packages holds those of both. *progress* is called with the name of each package.
    """
    database = _Database(root / "var" / "lib" / "dpkg")
    if below is not None:
        shutil.copyfile(below / "var" / "lib" / "dpkg" / "status", database.status)
    for package in packages:
        progress(package.name.split("_")[0])
        listing = _run("dpkg-deb", "--vextract", package, root)
        database.add(package, listing.splitlines())
    database.write_status()
    _add_accounts(root)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RootfsError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _add_accounts(root: Path) -> None:
    # What base-passwd's maintainer script would do.
    for name in ("passwd", "group"):
        master = root / "usr" / "share" / "base-passwd" / f"{name}.master"
        if master.exists():
            shutil.copyfile(master, root / "etc" / name)


class _Database:
    """The files below var/lib/dpkg, as dpkg(1) and deb-control(5) describe them."""

    def __init__(self, directory: Path) -> None:
        self.status = directory / "status"
        self._info = directory / "info"
        for name in ("info", "updates", "triggers", "alternatives"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._added: list[str] = []

    def add(self, package: Path, listing: list[str]) -> None:
        """Enter *package*, of whose content *listing* has one ``./path`` per line."""
        with tempfile.TemporaryDirectory() as scratch:
            _run("dpkg-deb", "--control", package, scratch)
            control = (Path(scratch) / "control").read_text(encoding="utf-8").strip()
            fields = dict(line.split(": ", 1) for line in control.splitlines() if ": " in line[1:])
            stem = fields["Package"]
            if fields.get("Multi-Arch") == "same":
                stem += f":{fields['Architecture']}"
            for item in Path(scratch).iterdir():
                if item.name != "control":
                    shutil.copy(item, self._info / f"{stem}.{item.name}")
        paths = (line[1:].rstrip("/") or "/." for line in listing)
        text = "".join(f"{path}\n" for path in paths)
        (self._info / f"{stem}.list").write_text(text, encoding="utf-8")
        name, _, rest = control.partition("\n")
        self._added.append(f"{name}\nStatus: install ok installed\n{rest}\n")

    def write_status(self) -> None:
        """Append what was added to the status of the packages that were there before."""
        (self._info / "format").write_text("1\n", encoding="ascii")
        with self.status.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{entry}\n" for entry in self._added))
        (self.status.parent / "available").touch()
