"""One process builds a cache entry while others wait for it."""

import subprocess
import sys
import time
from pathlib import Path

from tritter.data.cache import entry_lock

MAKE = """
import sys, time
from pathlib import Path
from filelock import FileLock
with FileLock(sys.argv[1] + ".lock"):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1]).write_text("made")
    {end}
"""


def test_others_wait_and_find_it_made(tmp_path: Path) -> None:
    for end in ("time.sleep(0.2)", "import os; os.kill(os.getpid(), 9)"):
        entry = tmp_path / end[:4] / "entry"
        entry.parent.mkdir()
        words = [sys.executable, "-c", MAKE.format(end=end), str(entry)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline() == b"held\n"

            def go(other: "subprocess.Popen[bytes]" = other, entry: Path = entry) -> None:
                assert not entry.exists()
                other.communicate(b"\n")

            begun = time.monotonic()
            with entry_lock(entry, on_wait=go):
                assert entry.read_text() == "made" and time.monotonic() - begun < 30
    with entry_lock(entry, on_wait=lambda: (_ for _ in ()).throw(AssertionError)):
        pass
