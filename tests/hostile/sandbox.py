"""The folder in which a case lives: what stands in it before, and what may not have changed after.

A sandbox has an `inside`, where commands run, and an `outside` beside it with a secret that no
command may read into its output, copy or change. Nothing is written anywhere else: `confine` lets
a process write below one folder only, whatever its cases ask for.
"""

import os
import shutil
import stat
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

SECRET = "canary-7f3a9-of-the-hostile-suite"
EXECUTED = "executed-by-a-case"  # the file that code in a hostile input makes

watched: set[Path] = set()  # folders that a case may not list, nor open files in
touched: list[str] = []  # of them, what it did


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A fresh place for one case.

    Args:
        root: its folder.
        templates: what cases start from: `base`, `grown`, `sparse`, `skilled`, `finished`,
            `unfinished`, `texts`; never changed.
    """

    root: Path
    templates: Path

    @classmethod
    def fresh(cls, root: Path, templates: Path) -> "Sandbox":
        """Empty the place, which has to be one of ours, and set it up again."""
        if root.exists():
            assert (root / "outside/secret.txt").is_file() or not any(root.iterdir())
            shutil.rmtree(root)
        (root / "inside").mkdir(parents=True)
        (root / "outside").mkdir()
        (root / "outside/secret.txt").write_text(SECRET)
        (root / "outside/thesis").mkdir()
        (root / "outside/thesis/chapter.txt").write_text(SECRET)
        return cls(root, templates)

    @property
    def inside(self) -> Path:
        return self.root / "inside"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    def take(self, template: str, name: str | None = None) -> Path:
        """Copy a template to `inside` and return where it lies."""
        target = self.inside / (name or template)
        shutil.copytree(self.templates / template, target, symlinks=True)
        return target

    def snapshot(self) -> dict[str, str]:
        """Return path → what stands there, of everything below the sandbox."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = Path(folder, name)
                found[os.fsdecode(os.path.relpath(path, self.root))] = _fingerprint(path)
        return found


def confine(folder: Path) -> None:
    """Refuse this process, for good, every change of a file that does not lie below `folder`.

    A command that asks for it meets a PermissionError, as on a disk that it may not write to.
    """
    home = folder.resolve()

    def check(path: object, dir_fd: object = -1, *, is_followed: bool = False) -> None:
        if isinstance(path, int) or path is None:
            return
        text = Path(os.fsdecode(path))  # type: ignore[arg-type]
        if isinstance(dir_fd, int) and dir_fd >= 0:
            text = Path(f"/proc/self/fd/{dir_fd}").readlink() / text
        try:
            place = text.resolve() if is_followed else text.parent.resolve() / text.name
        except RuntimeError:  # links in a circle, which nothing can be written through
            return
        if not place.is_relative_to(home) and not str(place).startswith(("/dev/null", "/proc/")):
            raise PermissionError(13, "outside of the sandbox", str(text))

    def note(path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = Path(os.fsdecode(path)).resolve()
            # Files below / and those in /etc are everybody's
            if place in watched or any(p in watched for p in list(place.parents)[:-2]):
                touched.append(str(place))

    def hook(event: str, arguments: tuple) -> None:
        if watched and event in ("open", "os.listdir", "os.scandir"):
            note(arguments[0])
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                check(path, is_followed=True)
        elif event in ("os.rename", "os.link"):
            check(arguments[0], arguments[2])
            check(arguments[1], arguments[3])
        elif event == "os.symlink":
            check(arguments[1], arguments[2])
        elif event in ("os.remove", "os.rmdir"):
            check(*arguments[:2])
        elif event in ("os.mkdir", "os.chmod"):
            check(arguments[0], arguments[2])
        elif event in ("os.truncate", "os.chown", "os.utime", "os.setxattr"):
            check(arguments[0], is_followed=True)

    sys.addaudithook(hook)


def special(path: Path, kind: str, *, target: Path | None = None) -> bool:
    """Put a special file at `path`; return False where this system or user cannot make it."""
    try:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "zero":  # a node of our own in the sandbox, never a link to the machine's
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(2**36)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "link":
            path.symlink_to(target if target is not None else "nowhere")
        else:
            raise AssertionError(kind)
    except OSError:
        return False
    return True


def _fingerprint(path: Path) -> str:
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(status.st_mode):
        return f"kind {kind:o}"
    if status.st_size > 2**26:
        return f"{status.st_size} bytes"
    return sha256(path.read_bytes()).hexdigest()
