"""Storage options of a store and of one layer."""

from __future__ import annotations

import pytest

from unionfs2.errors import OptionError
from unionfs2.store_options import StoreOptions, parse_layer_options
from unionfs2.storemodel import Quota


def test_every_option_is_read() -> None:
    options = StoreOptions.parse(
        [
            "size=10G",
            "overlay2.inodes=1000",
            "UNIONFS2.Layers_Max=300",
            "overlay.ignore_chown_errors=TRUE",
            "mountopt=nodev,metacopy=on",
            "apply_size_max=1T",
            "apply_entries_max=5",
            "backend=fuse",
        ]
    )
    assert options == StoreOptions(
        size=10 << 30,
        inodes=1000,
        layers_max=300,
        ignore_chown_errors=True,
        mountopt="nodev,metacopy=on",
        apply_size_max=1 << 40,
        apply_entries_max=5,
        backend="fuse",
    )
    assert options.quota == Quota(10 << 30, 1000)
    assert StoreOptions().quota is None


def test_a_later_option_wins() -> None:
    assert StoreOptions.parse(["size=1G", "size=2G"]).size == 2 << 30


@pytest.mark.parametrize("value", ["true", "1", "T", "false", "0"])
def test_the_kernel_check_is_accepted_with_a_warning(value: str) -> None:
    text = f"overlay2.override_kernel_check={value}"
    options = StoreOptions.parse([text, text])
    assert len(options.warnings) == 1
    assert "override_kernel_check has no effect" in options.warnings[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sise=1G", 'unknown storage option "sise" with value "1G": did you mean "size"?'),
        ("frobnicate=3", "known are apply_entries_max"),
        ("size", 'storage option "size" is malformed'),
        ("=1", "is malformed"),
        ("", "is malformed"),
        ("size=ten", '"ten"'),
        ("size=-1", "negative"),
        ("size=0", "leaves no room"),
        ("size=9999999P", "too large"),
        ("inodes=0", "at least 1"),
        ("inodes=1.5", "whole number"),
        ("inodes=²", "whole number"),
        ("layers_max=0", "at least 1"),
        ("layers_max=" + "9" * 5000, "whole number"),
        ("backend=kernel", "write auto, native or fuse"),
        ("ignore_chown_errors=maybe", "write true or false"),
        ("override_kernel_check=maybe", "write true or false"),
        ("mountopt=frobnicate", "mountopt: "),
    ],
)
def test_a_wrong_option_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        StoreOptions.parse([text])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_kernel_has_a_limit_of_its_own() -> None:
    assert StoreOptions.parse(["layers_max=500", "backend=native"]).layers_max == 500
    assert StoreOptions.parse(["layers_max=5000", "backend=fuse"]).layers_max == 5000
    with pytest.raises(OptionError, match="at most 500"):
        StoreOptions.parse(["layers_max=501", "backend=native"])


def test_options_of_one_layer() -> None:
    assert parse_layer_options({"Size": "1G", "overlay2.inodes": "7"}) == Quota(1 << 30, 7)
    assert parse_layer_options(["size=1G"]) == Quota(1 << 30)
    assert parse_layer_options(None) is None
    assert parse_layer_options({}) is None
    with pytest.raises(OptionError, match='"backend" with value "fuse"'):
        parse_layer_options({"backend": "fuse"})
