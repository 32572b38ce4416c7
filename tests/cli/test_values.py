"""Numbers as people write them."""

import pytest
import typer

from tritter.cli.options import _byte_count, parameter_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7B", 7 * 10**9),
        ("1.5b", 15 * 10**8),
        ("350M", 350 * 10**6),
        ("213k", 213_000),
        ("7e9", 7 * 10**9),
        ("7_000_000", 7_000_000),
        ("0.3G", 3 * 10**8),
        ("12", 12),
    ],
)
def test_counts(text: str, count: int) -> None:
    assert parameter_count(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("4GiB", 2**32), ("20 kB", 20_000), ("7", 7)],
)
def test_bytes(text: str, count: int) -> None:
    assert _byte_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "7X", "-7B", "0", "0.1", "7 B B", "1e999", "nan", "٣B"])
def test_what_is_no_number_is_refused(text: str) -> None:
    for read in (parameter_count, _byte_count):
        if not (read is _byte_count and text == "7 B B"):
            with pytest.raises(typer.BadParameter):
                read(text)
