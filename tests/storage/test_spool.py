import errno
import io
import tempfile

import numpy as np
import pytest

from tritter.errors import TritterError
from tritter.storage import spool
from tritter.storage.spool import Spool


@pytest.mark.parametrize("most", [0, 5, 2**20], ids=["file", "becomes a file", "memory"])
def test_what_was_appended_is_read_at_any_place(most, monkeypatch):
    monkeypatch.setattr(spool.Spool, "IN_MEMORY_BYTES", most)
    spooled, whole = Spool(), b""
    for number in range(6):
        piece = np.full(number, number, dtype=np.int32).tobytes()
        spooled.append(piece)
        whole += piece
        assert spooled.read(0, len(spooled)) == whole
        assert spooled.array("<i4").tobytes() == whole
    assert spooled.read(4, 12) == whole[4:12]


def test_an_array_stays_when_more_is_appended_and_the_spool_is_gone(monkeypatch):
    monkeypatch.setattr(spool.Spool, "IN_MEMORY_BYTES", 0)
    spooled = Spool()
    spooled.append(b"\x01\x02")
    array = spooled.array("u1")
    spooled.append(b"\x03")
    del spooled
    assert array.tolist() == [1, 2]


def test_it_leaves_no_file_behind_and_lies_where_tmpdir_says(monkeypatch, tmp_path):
    monkeypatch.setattr(spool.Spool, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spooled = Spool()
    spooled.append(b"text")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(TritterError, match=r"none cannot be written .* Set TMPDIR"):
        Spool().append(b"text")


def test_a_full_disk_is_told_with_what_helps(monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool.Spool, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(TritterError, match=r"No space left on device.* Set TMPDIR"):
        Spool().append(b"text")
