"""Hostile words, JSON values and bytes, drawn from a seeded generator."""

import gzip
import io
import json
import random
import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import parquet

ESCAPES = ("\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b31m", "a\u202eb", "\x00", "\x7f")
NUMBERS = (
    *("0", "-1", "1", "2", "3", "64", "1e400", "nan", "inf", "-inf", "1_000", "0x10", "1/0"),
    *("9" * 30, "9" * 5000, str(2**31), str(2**63), str(2**64), str(10**30), "1e6", "6400000"),
    *("1000000", "1000000000", "0.5", "-0.0", "1e-320", "٣", "²", "1.", "+5", " 7 "),
)
WORDS = (
    *("", " ", "none", "null", "true", "~", "~nosuchuser", "~nosuchuser/x", "..", ".", "/", "-"),
    *("--", "a/b", "owner/name", "x" * 300, "y" * 100_000, "a\nb", "[", "]", "{}", "{a:1}"),
    *("[1,[2,[3]]]", "'", '"', "\\", "%s", "{0}", "${now:}", "${oc.env:HOME}", "$HOME", "*", "**"),
    *("\ud800", "é", "ﬀ", "💥", "a,b", "a=b", "@x", "#", "file:///x", "../../..", "null,null"),
    *("{a:{b:{c:1}}}", "!!python/object:os.system", "&a [*a]", "dus,dus", "width,llama-pro"),
)

_SMALL_JSON: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 1e308, -0.0, 0.5),
    *(float("nan"), float("inf"), "", "a", "x" * 300, "\ud800", "../x", "llama", "float32"),
    *([], {}, [None], [1, 2], ["a"], {"a": 1}, [[]], {"": None}, [10**6], {"rope_type": "x"}),
    *ESCAPES,
)


def parquet_bomb(row: Mapping[str, Any], *, rows: int = 1000, size: int = 20 * 2**20) -> bytes:
    """Return a small parquet file of equal rows whose texts, in lists too, have `size` letters."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["a" * size])
        if isinstance(value, list):
            columns[name] = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), text)
        else:
            columns[name] = text if isinstance(value, str) else pa.array([value] * rows)
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, compression="zstd", store_schema=False)
    return file.getvalue()


def word(rng: random.Random) -> str:
    """Return one argument, as a careless or hostile person would type it."""
    pool = rng.choice((NUMBERS, WORDS, WORDS, ESCAPES))
    text = rng.choice(pool)
    return text + rng.choice(pool) if rng.random() < 0.1 else text


def number(rng: random.Random) -> str:
    return rng.choice(NUMBERS)


def json_value(rng: random.Random, *, depth: int = 0) -> Any:
    """Return a value that JSON can hold, up to big and deep ones."""
    kind = rng.random()
    if kind < 0.75 or depth > 2:
        return rng.choice(_SMALL_JSON)
    if kind < 0.8:
        return "y" * 100_000
    if kind < 0.85:
        return list(range(20_000))
    if kind < 0.88:
        return _nested(500)
    if kind < 0.94:
        return [json_value(rng, depth=depth + 1) for _ in range(rng.randint(0, 3))]
    return {
        rng.choice(("a", "type", "num_labels", "\x1b[1m")): json_value(rng, depth=depth + 1)
        for _ in range(rng.randint(0, 3))
    }


def mutated_json(rng: random.Random, plain: Any) -> Any:
    """Change, add or drop one entry somewhere in a JSON tree."""
    holders = list(_holders(plain))
    if not holders or rng.random() < 0.03:
        return json_value(rng)
    holder, key = rng.choice(holders)
    kind = rng.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.25 and isinstance(holder, dict):
        holder[rng.choice(("new", "auto_map", "\x1b[31m", "__class__", "_target_", "k" * 999))] = (
            json_value(rng)
        )
    elif kind < 0.3 and isinstance(holder, dict) and isinstance(key, str):
        holder[key + rng.choice((" ", "\x1b[5m", "\x00", "é"))] = holder.pop(key)
    else:
        holder[key] = json_value(rng)
    return plain


def json_bytes(plain: Any) -> bytes:
    try:
        return json.dumps(plain).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a mutation put a part into itself
        return repr(plain).encode("utf-8", "surrogatepass")


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Damage a file as disks, networks and people do."""
    kind = rng.randrange(12)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1 and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content + rng.randbytes(rng.choice((1, 100)))
    if kind == 3:
        return b""
    if kind == 4:
        return content[:at] + rng.randbytes(8) + content[at:]
    if kind == 5:  # a header that claims to be endless
        return struct.pack("<Q", rng.choice((2**62, 2**40, 10**9, 0))) + content[8:]
    if kind == 6:
        return gzip.compress(content, mtime=0)
    if kind == 7:
        return content.decode("latin-1").encode("utf-16")
    if kind == 8:
        return b"\xef\xbb\xbf" + content
    if kind == 9:
        return rng.choice((b"null", b"[]", b"{}", b"1", b'"a"', b"[" * 100_000, b"\x00" * 64))
    if kind == 10:
        return rng.randbytes(rng.choice((1, 8, 1000)))
    return content.replace(b"0", b"9" * 400, 1)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _holders(plain: Any) -> Any:
    """Yield (container, key) of every entry of a JSON tree."""
    entries = (
        plain.items()
        if isinstance(plain, dict)
        else enumerate(plain)
        if isinstance(plain, list)
        else ()
    )
    for key, value in list(entries):
        yield plain, key
        yield from _holders(value)
