from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs2.errors import OptionError
from unionfs2.sizes import SIZE_MAX, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("10k", 10 << 10),
        ("10K", 10 << 10),
        ("10kb", 10 << 10),
        ("10KiB", 10 << 10),
        ("10 G", 10 << 30),
        ("1.5G", 3 << 29),
        (".5m", 1 << 19),
        ("0.3k", 307),
        ("2T", 2 << 40),
        ("3pib", 3 << 50),
        ("9223372036854775807", SIZE_MAX),
    ],
)
def test_units_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "G",
        ".",
        "1.",
        "1e3",
        "+5",
        " 5",
        "5 ",
        "1  G",
        "10X",
        "0x10",
        "1,5G",
        "\u0663",
        "inf",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="not a size"):
        parse_size(text)


def test_negative_and_too_large_are_told_apart() -> None:
    with pytest.raises(OptionError, match=r'"quota" got "-1G", a size cannot be negative'):
        parse_size("-1G", "quota")
    with pytest.raises(OptionError, match="too large"):
        parse_size("8192P")
    with pytest.raises(OptionError, match=r"9{64}\.\.\.\""):
        parse_size("9" * 100_000)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1, "1"), (1024, "1K"), (3 << 29, "1536M"), (4097, "4097")]
)
def test_the_shortest_exact_text(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, SIZE_MAX) | st.integers(0, 8191).map(lambda n: n << 50))
def test_what_is_written_is_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size
