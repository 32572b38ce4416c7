"""One process at a time in a folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tritter.errors import RequestError
from tritter.storage.lock import FolderLock

HOLD = """
import sys
from pathlib import Path
from tritter.storage.lock import FolderLock
with FolderLock(Path(sys.argv[1])).held(key="dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_is_killed(tmp_path: Path) -> None:
    FolderLock(tmp_path).check(key="dir")
    assert not any(tmp_path.iterdir())
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for _ in range(2):  # asking does not free it
            with pytest.raises(RequestError, match=rf"^dir = .*: process {holder.pid} on .* is"):
                FolderLock(tmp_path).check(key="dir")
        with pytest.raises(RequestError, match="is using it"), FolderLock(tmp_path).held(key="dir"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with FolderLock(tmp_path).held(key="dir"):
        assert (tmp_path / FolderLock.NAME).exists()
    assert not any(tmp_path.iterdir())


def test_without_locks_nobody_is_held_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with FolderLock(tmp_path).held(key="dir"):
        FolderLock(tmp_path).check(key="dir")


def test_a_lock_that_can_not_be_opened_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / FolderLock.NAME).symlink_to("/etc/passwd")
    with FolderLock(tmp_path).held(key="dir"):
        FolderLock(tmp_path).check(key="dir")
