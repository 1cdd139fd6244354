"""The names that the package offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import unionfs2


@pytest.mark.parametrize("name", unionfs2.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(unionfs2, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        unionfs2.Nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_alone_loads_none_of_its_modules() -> None:
    script = "import sys, unionfs2; print([m for m in sys.modules if m.startswith('unionfs2.')])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
