"""Native and naive: the same changes, the same view, the same result when unpacked.

``./dev stress changes`` does the same for thousands of chains.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.semantics.rig import FUSE, Rig
from tests.support import chains
from tests.support.agreement import compare, disagreements
from tests.support.transports import TRANSPORTS
from tests.support.unions import memory_directory
from unionfs2 import changes
from unionfs2.whiteout import Dialect

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


@pytest.mark.needs("overlay", "fuse", "trusted-xattr", "mknod")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_layer_made_on_our_mount(tmp_path: Path, seed: int, transport: str) -> None:
    rng = random.Random(seed)
    # Files without data of their own are refused by this mount.
    chain = chains.make(
        rng, tmp_path, ways={"literal": 1, "kernel": 1, "redirect_dir": 2}, userxattr=False
    )
    with ExitStack() as stack:

        def mounted(layers: list[Path], upper: Path | None) -> Path:
            rig = Rig(FUSE, tmp_path, transport)
            stack.callback(rig.remove)
            rig.lowers, rig.upper = layers, upper
            return rig.mount(read_only=upper is None)

        below = list(chain.layers)
        top = tmp_path / "made-on-fuse"
        top.mkdir()
        with ExitStack() as writing:
            rig = Rig(FUSE, tmp_path, transport)
            writing.callback(rig.remove)
            rig.lowers, rig.upper = below, top
            chains.work(rng, chains.OnMount(os.fsencode(rig.mount())), 20)
        chain.layers.insert(0, top)
        chain.made_by.insert(0, "fuse")
        verdict = compare(chain, tmp_path)
        assert not verdict.wrong, verdict.wrong
        fds = []
        for layers in (below, chain.layers):
            fds.append(os.open(mounted(layers, None), os.O_RDONLY | os.O_DIRECTORY))
            stack.callback(os.close, fds[-1])
        dialect = Dialect(userxattr=False)
        first, *rest = (os.fsencode(layer) for layer in chain.layers)
        assert list(changes.naive(*fds)) == list(changes.native(first, rest, dialect))
