"""Native and naive: the same changes, the same view, the same result when unpacked.

``./dev stress changes`` does the same for thousands of chains.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.support.agreement import disagreements
from tests.support.unions import memory_directory

CHAINS = 240
_PARTS = 4


@pytest.mark.needs("overlay", "trusted-xattr", "mknod")
@pytest.mark.parametrize("part", range(_PARTS))
def test_everything_that_tells_changes_tells_the_same(tmp_path: Path, part: int) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(part, CHAINS, _PARTS):
        with tempfile.TemporaryDirectory(dir=memory_directory() or tmp_path) as home:
            verdict = disagreements(seed, Path(home))
        assert not verdict.wrong, (seed, verdict.chain.made_by, verdict.wrong)
        kinds += verdict.kinds
    assert min(kinds[kind] for kind in "ACD") >= 5, kinds
