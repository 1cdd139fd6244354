"""The import order of the package, read from its source with ast.

Imports go down only: a module sees the levels named in BELOW and, within its own level, the
modules listed before it. Some libraries belong to few modules. A violation is reported as
``file:line: sentence``. The checker itself is tested with injected violations.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

PACKAGE: Final = "unionfs2"
ROOT: Final = Path(__file__).resolve().parent.parent / PACKAGE

# Level -> modules in import order. A subpackage counts as one module.
LEVELS: Final[dict[str, tuple[str, ...]]] = {
    level: tuple(modules.split())
    for level, modules in {
        "0 vocabulary": (
            "errors logger closing sizes wakeful ondisk model storemodel transports option_names"
            " options store_options"
        ),
        "1 system calls": "syscalls mountcalls privilege quotacalls",
        "2 what is on disk": (
            "branch whiteout origin acl names handles nodes quota walk stack merge workdir"
        ),
        "3 union logic": (
            "protect creds copyup attrs fileattr files nodefiles namespace rename opening union"
        ),
        "4a transports": "longwork readahead fuse_attr eager runner fs_ops devfuse",
        "4b storage": (
            "storelayout storerecord storefiles storetrees archive storecopy storelock storehome"
            " storeindex storestaging storeread storestructure storetrash layers"
            " storecheck storerepair storeprune"
            " treeview treecompare changes layersource rebasing exports which"
        ),
        "5 mounters": (
            "logs layercheck locks mounter mounts attach fuse_mount native_overlay backends"
        ),
        "5b servers": "serving",
        "6 driver": (
            "references probes oci_model imagerecords driver_core driver_mounts driver_layers"
            " driver_diffs driver_trees driver oci_members oci_layout oci_target images driver_trio"
        ),
        "7 command line": "cli __main__",
    }.items()
}

# Level -> levels it may import besides its own.
BELOW: Final[dict[str, str]] = {
    "0 vocabulary": "",
    "1 system calls": "0",
    "2 what is on disk": "0 1",
    "3 union logic": "0 1 2",
    "4a transports": "0 1 2 3",
    "4b storage": "0 1 2 3",
    "5 mounters": "0 1",
    "5b servers": "0 1 2 3 4a 5",
    "6 driver": "0 1 2 3 4b 5",
    "7 command line": "0 1 2 3 4a 4b 5 5b 6",
}

# The public names: seen from outside and from the command line, never from below.
FACADE: Final = "__init__"

# Library -> the modules that may import it.
RESERVED: Final[dict[str, frozenset[str]]] = {
    "pyfuse3": frozenset({"fs_ops"}),
    "trio": frozenset({"fuse_attr", "eager", "runner", "fs_ops", "driver_trio"}),
    # fuse_attr writes into the attribute buffer of pyfuse3; the others call the system.
    "ctypes": frozenset({"syscalls", "mountcalls", "quotacalls", "fuse_attr"}),
}


class Import(NamedTuple):
    """One import: the absolute dotted name, its line, and whether only a type checker sees it."""

    name: str
    line: int
    typing_only: bool


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import in *path*, also in functions, relative names made absolute."""
    package = (root.name, *path.relative_to(root).parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        for name in _names(node, package):
            assert isinstance(node, (ast.stmt, ast.expr))
            yield Import(name, node.lineno, id(node) in typing_only)


def _names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        origin = ".".join((*base, *([node.module] if node.module else [])))
        return [f"{origin}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "__import__",
        "import_module",
        "importlib.import_module",
    ):
        constants = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
        return [value for value in constants if isinstance(value, str)]
    return []


def module_of(path: Path, root: Path) -> str:
    """Name under which *path* stands in LEVELS."""
    first = path.relative_to(root).parts[0]
    return first.removesuffix(".py")


class Place(NamedTuple):
    """Where a module stands in LEVELS."""

    level: str
    position: int


PLACES: Final = {
    module: Place(level, position)
    for level, modules in LEVELS.items()
    for position, module in enumerate(modules)
}


def _order_violation(module: str, item: Import, root: Path) -> str | None:
    """Sentence about *item* imported by *module*, or None."""
    parts = item.name.split(".")
    if parts[0] != root.name:
        return None
    target = parts[1] if len(parts) > 1 else FACADE
    if target not in PLACES and not (root / f"{target}.py").exists():
        target = FACADE  # a public name of the package itself
    if module in (FACADE, target):
        return None
    here = PLACES.get(module)
    there = PLACES.get(target)
    if here is None or (there is None and target != FACADE):
        return None  # reported by _unplaced()
    if there is None:
        return None if here.level.startswith("7") else "the public names are for use from outside"
    if there.level != here.level:
        if there.level.split()[0] in BELOW[here.level].split():
            return None
        return f"{module} (level {here.level}) imports {target} (level {there.level})"
    if item.typing_only or there.position < here.position:
        return None
    return f"{module} imports {target}, which comes later in level {here.level}"


def _reserved_violation(module: str, item: Import) -> str | None:
    library = item.name.split(".")[0]
    owners = RESERVED.get(library)
    if owners is None or module in owners:
        return None
    return f"{module} imports {library}, which belongs to {', '.join(sorted(owners))}"


def violations(root: Path) -> list[str]:
    """All violations below *root*, a package directory, as ``file:line: sentence``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_of(path, root)
        shown = path.relative_to(root.parent)
        if module != FACADE and module not in PLACES:
            found.append(f"{shown}:1: {module} has no place in LEVELS of {Path(__file__).name}")
        for item in imports_of(path, root):
            sentences = (_order_violation(module, item, root), _reserved_violation(module, item))
            found += [f"{shown}:{item.line}: {text}" for text in sentences if text]
    return found


def test_imports_go_down_only() -> None:
    assert violations(ROOT) == []


def test_every_listed_module_exists() -> None:
    missing = [
        module
        for module in PLACES
        if not (ROOT / f"{module}.py").exists() and not (ROOT / module / "__init__.py").exists()
    ]
    assert missing == []


@pytest.mark.parametrize(
    "module",
    [
        "unionfs2",
        "unionfs2.options",
        "unionfs2.union",
        "unionfs2.native_overlay",
        "unionfs2.driver",
    ],
)
def test_importing_what_needs_no_fuse_loads_neither_pyfuse3_nor_trio(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'pyfuse3', 'trio'}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout == "[]\n"


# --- the checker, checked -----------------------------------------------------------------------

INJECTED = {
    "an import upwards": (
        "syscalls.py",
        "import os\nfrom .union import UnionFS\n",
        "syscalls.py:2: syscalls (level 1 system calls) imports union (level 3 union logic)",
    ),
    "an import upwards by absolute name": (
        "options.py",
        "import unionfs2.syscalls\n",
        "options.py:1: options (level 0 vocabulary) imports syscalls (level 1 system calls)",
    ),
    "an import of a module from the package": (
        "union.py",
        "from unionfs2 import fs_ops\n",
        "union.py:1: union (level 3 union logic) imports fs_ops (level 4a transports)",
    ),
    "an import inside a function": (
        "locks.py",
        "def f() -> None:\n    from . import union\n",
        "locks.py:2: locks (level 5 mounters) imports union (level 3 union logic)",
    ),
    "the wrong order within a level": (
        "copyup.py",
        "from .namespace import create\n",
        "copyup.py:1: copyup imports namespace, which comes later in level 3 union logic",
    ),
    "the wrong level for types only": (
        "model.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .union import UnionFS\n",
        "model.py:3: model (level 0 vocabulary) imports union (level 3 union logic)",
    ),
    "a public name used inside": (
        "options.py",
        "from unionfs2 import __version__\n",
        "options.py:1: the public names are for use from outside",
    ),
    "pyfuse3 outside its door": (
        "runner.py",
        "import pyfuse3\n",
        "runner.py:1: runner imports pyfuse3, which belongs to fs_ops",
    ),
    "pyfuse3 by a computed import": (
        "union.py",
        "import importlib\nx = importlib.import_module('pyfuse3')\n",
        "union.py:2: union imports pyfuse3, which belongs to fs_ops",
    ),
    "trio in the core": (
        "copyup.py",
        "from trio import to_thread\n",
        (
            "copyup.py:1: copyup imports trio, which belongs to driver_trio, eager, fs_ops,"
            " fuse_attr, runner"
        ),
    ),
    "ctypes for system calls elsewhere": (
        "cli/mount.py",
        "import ctypes.util\n",
        (
            "cli/mount.py:1: cli imports ctypes, which belongs to "
            "fuse_attr, mountcalls, quotacalls, syscalls"
        ),
    ),
    "a module without a place": (
        "helpers.py",
        "",
        "helpers.py:1: helpers has no place in LEVELS of test_architecture.py",
    ),
}

ALLOWED = {
    "downwards": ("copyup.py", "from . import syscalls as sc\nfrom .branch import Branch\n"),
    "types of a later module": (
        "nodes.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .merge import Found\n",
    ),
    "within a subpackage": ("cli/main.py", "from . import mount\nfrom ..fs_ops import serve\n"),
    "the public names from the command line": ("cli/main.py", "from unionfs2 import __version__\n"),
}


def _package(tmp_path: Path, name: str, source: str) -> Path:
    root = tmp_path / PACKAGE
    (root / "cli").mkdir(parents=True)
    for module in PLACES:
        if module != "cli":
            (root / f"{module}.py").touch()
    (root / name).write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize("case", INJECTED)
def test_a_violation_is_found_and_its_line_named(tmp_path: Path, case: str) -> None:
    name, source, sentence = INJECTED[case]
    assert violations(_package(tmp_path, name, source)) == [f"{PACKAGE}/{sentence}"]


@pytest.mark.parametrize("case", ALLOWED)
def test_a_proper_import_is_accepted(tmp_path: Path, case: str) -> None:
    assert violations(_package(tmp_path, *ALLOWED[case])) == []
