"""What developers run in a container: git, pip, gcc, compileall, on projects generated here.

Nothing is fetched: a repository, wheels and a C project are made of text with a fixed seed, and
compileall works on a copy of packages of the standard library.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Final

from bench.workloads.looking import again
from bench.workloads.model import Tree, Workload, command
from bench.workloads.trees import Words

REPOSITORY_FILES: Final = 2000
STATUS_AGAIN: Final = 5
WHEELS: Final = 8
MODULES_PER_WHEEL: Final = 40
INCLUDE_PATH: Final = 10
PACKAGES: Final = ("email", "http", "json", "logging", "unittest", "xml")

# Whoever runs this may have settings, hooks and keys; none of them takes part.
_GIT_ENVIRONMENT: Final = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CEILING_DIRECTORIES": "/",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
}


def _git(directory: Path, *words: str | Path) -> None:
    settings = ("-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0")
    command(["git", "-C", directory, *settings, *words], **_GIT_ENVIRONMENT)


# --- git ------------------------------------------------------------------------------------------


def build_repository(root: Path, size: int) -> None:
    """A work tree of `size` files with one commit.

    It is a copy, as one out of an image is: the index remembers other inode numbers, so that the
    first ``git status`` has to read the files, on every target alike.
    """
    made = root / "made"
    words = Words(8)
    for number in range(size):
        path = made / f"src/part-{number // 30:02}/module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words.text(4000))
    _git(made, "init", "--quiet", "--initial-branch=main")
    _git(made, "add", ".")
    _git(made, "commit", "--quiet", "--message=all")
    command(["cp", "-a", made, root / "repository"])
    shutil.rmtree(made)


def git_status(root: Path, size: int) -> None:
    """Ask for changes."""
    del size
    _git(root / "repository", "status", "--porcelain")


def git_clone(root: Path, size: int) -> None:
    """Clone the repository next to itself, objects copied and files checked out."""
    _git(root, "clone", "--quiet", "--no-hardlinks", root / "repository", root / "clone")
    if sum(len(files) for _, _, files in os.walk(root / "clone/src")) != size:
        raise AssertionError("the clone is not complete")


# --- pip ------------------------------------------------------------------------------------------


def build_wheels(root: Path, size: int) -> None:
    """`size` wheels of pure Python modules."""
    words = Words(9)
    (root / "wheels").mkdir()
    (root / "tmp").mkdir()
    for number in range(size):
        _build_wheel(root / "wheels", f"generated_{number}", words)


def _build_wheel(directory: Path, name: str, words: Words) -> None:
    """A wheel as the binary distribution format wants it: modules, METADATA, WHEEL, RECORD."""
    info = f"{name}-1.0.dist-info"
    members = {
        f"{name}/{module}.py": f"{words.text(3000)}\nvalue = {number}\n"
        for number, module in enumerate(_module_names())
    }
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    members[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{member},,\n" for member in (*members, f"{info}/RECORD"))
    members[f"{info}/RECORD"] = record
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, text in members.items():
            wheel.writestr(member, text)


def _module_names() -> list[str]:
    return ["__init__", *(f"module_{number}" for number in range(MODULES_PER_WHEEL - 1))]


def pip_install(root: Path, size: int) -> None:
    """Install the wheels into a directory beside them, temporary files on the same mount."""
    wheels = sorted((root / "wheels").iterdir())
    words = ["install", "--no-index", "--no-deps", "--no-cache-dir", "--quiet", "--isolated"]
    target = root / "site"
    command(
        [sys.executable, "-m", "pip", *words, "--target", target, *wheels],
        TMPDIR=os.fspath(root / "tmp"),
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    installed = [name for name in os.listdir(target) if not name.endswith(".dist-info")]
    if len(installed) != size:
        raise AssertionError(f"{len(installed)} packages installed instead of {size}")


# --- gcc ------------------------------------------------------------------------------------------


def build_c_project(root: Path, size: int) -> None:
    """`size` C files, a header each in one of ten include directories, and a script."""
    project = root / "project"
    for place in range(INCLUDE_PATH):
        (project / f"include-{place}").mkdir(parents=True)
    for number in range(size):
        header = project / f"include-{number % INCLUDE_PATH}/part_{number}.h"
        header.write_text(f"int part_{number}(int value);\n")
        source = [
            "#include <stdio.h>",
            *(f'#include "part_{other}.h"' for other in range(size)),
            f"int part_{number}(int value) {{ return value + {number}; }}",
        ]
        (project / f"part_{number}.c").write_text("\n".join(source) + "\n")
    (project / "main.c").write_text("int main(void) { return 0; }\n")
    search = " ".join(f"-Iinclude-{place}" for place in range(INCLUDE_PATH))
    (project / "build.sh").write_text(
        "set -e\n"
        "mkdir obj\n"
        f'for c in *.c; do gcc {search} -c "$c" -o "obj/${{c%.c}}.o"; done\n'
        "gcc obj/*.o -o program\n"
    )


def compile_c(root: Path, size: int) -> None:
    """Compile and link the project by its script."""
    del size
    command(["sh", "-c", f"cd '{root}/project' && TMPDIR=$PWD sh build.sh && ./program"])


# --- compileall -----------------------------------------------------------------------------------


def build_packages(root: Path, size: int) -> None:
    """Sources of `size` packages of the standard library."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES[:size]:
        ignore = shutil.ignore_patterns("__pycache__", "test", "tests")
        shutil.copytree(stdlib / name, root / "lib" / name, ignore=ignore)


def compile_packages(root: Path, size: int) -> None:
    """Compile them to bytecode, next to their sources."""
    command([sys.executable, "-m", "compileall", "-q", root / "lib"])
    if len(list((root / "lib").glob("*/__pycache__"))) != size:
        raise AssertionError("not everything was compiled")


_REPOSITORY = Tree("repository", build_repository)
WORKLOADS = [
    Workload(
        "git-status", "2,000 files, after mounting", "projects", _REPOSITORY, REPOSITORY_FILES,
        git_status, changes=True,
    ),
    Workload(
        "git-status-again", "the same again, 5 times", "projects", _REPOSITORY, REPOSITORY_FILES,
        again(git_status, STATUS_AGAIN), git_status, times=STATUS_AGAIN, changes=True,
    ),
    Workload(
        "git-clone", "a repository of 2,000 files", "projects", _REPOSITORY, REPOSITORY_FILES,
        git_clone, changes=True,
    ),
    Workload(
        "pip-install", "8 wheels of 40 modules", "projects", Tree("wheels", build_wheels), WHEELS,
        pip_install, unit="wheel", changes=True,
    ),
    Workload(
        "gcc", "20 C files, one by one, and link", "projects", Tree("c-project", build_c_project),
        20, compile_c, changes=True,
    ),
    Workload(
        "compileall", "6 packages of the standard library", "projects",
        Tree("packages", build_packages), len(PACKAGES), compile_packages, unit="package",
        changes=True,
    ),
]  # fmt: skip
