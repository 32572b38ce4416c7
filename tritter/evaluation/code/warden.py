"""Run as a program: shuts itself in, then lets a Python of its own run what stands on stdin.

Own namespaces for users, mounts, network, processes and IPC; a root of its own that holds the
interpreter, read-only, and an empty folder of bounded size; limits of the system on top. It uses
the standard library alone and imports nothing of Tritter: its interpreter has no other packages.

The order matters. Root sets up the mounts as itself and then becomes nobody, since the kernel lets
root fork without a limit; anybody else needs the user namespace first to be allowed to mount.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from pathlib import Path

COULD_NOT_SHUT_IN = 113  # exit code: the program was not started
WORK = "/work"
NOBODY = 65534

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_MOUNT_SETATTR = 442  # the same number on all machines
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_AT_RECURSIVE = 0x8000
_READ_ONLY_NOSUID_NODEV = 1 | 2 | 4
_libc = ctypes.CDLL(None, use_errno=True)


def shut_in(root: str, *, places: list[str], folder_bytes: int) -> None:
    """Leave this process in namespaces of its own, with nothing of the system but `places`.

    Args:
        root: an empty folder, over which the new root is mounted.
        places: folders that stay, read-only; links stay links.
        folder_bytes: that files in the working folder may have, together.

    Raises:
        OSError: the system does not give it.
    """
    user, group = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if user == 0:
        _unshare(flags)
    else:
        _unshare(flags | _NEWUSER)
        # In the new user namespace it is who it was outside, and nobody inside gets rights again
        for path, text in (
            ("/proc/self/setgroups", "deny"),
            ("/proc/self/uid_map", f"{user} {user} 1"),
            ("/proc/self/gid_map", f"{group} {group} 1"),
            ("/proc/sys/user/max_user_namespaces", "0"),
        ):
            Path(path).write_text(text, encoding="ascii")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    options = f"size={folder_bytes},nr_inodes=4096,mode=0755"
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    for place in places:
        _keep(place, root)
    work = Path(root + WORK)
    work.mkdir()
    work.chmod(0o777)
    os.chdir(root)
    _checked(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir(WORK)
    if user == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _prctl(_PR_SET_DUMPABLE, 1)
        _unshare(_NEWUSER)
        # Without /proc the user can't be mapped here, and unmapped it has no rights at all
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def limit(limits: dict[str, int]) -> None:
    """Set the limits of the system: name of `resource` without RLIMIT_ → value."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _keep(place: str, root: str) -> None:
    source, target = Path(place), Path(root + place)
    if os.path.lexists(target):  # lies in a place that is kept already
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    target.mkdir()
    _mount(place, str(target), None, _MS_BIND | _MS_REC)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    done = _libc.syscall(
        _MOUNT_SETATTR, -1, str(target).encode(), _AT_RECURSIVE, ctypes.byref(attributes), 32
    )
    _checked(done, f"mounting {place} read-only")


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    words = [word.encode() if word else None for word in (source, target, kind, options)]
    done = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _checked(done, f"mount {target}")


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


def _checked(done: int, what: str) -> None:
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _exit_like(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    """Shut in, then: this process → the first of its namespace → the program.

    When the second one ends, the kernel ends all that the program started and left behind.
    """
    asked = json.loads(sys.argv[1])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        shut_in(asked["root"], places=asked["places"], folder_bytes=asked["folder_bytes"])
    except (OSError, KeyError) as error:
        os.write(2, f"{error}".encode())
        os._exit(COULD_NOT_SHUT_IN)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it is lost with a change of user
    first = os.fork()
    if first == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        program = os.fork()
        if program == 0:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            limit(asked["limits"])
            command = [asked["interpreter"], "-I", "-S", "-B", "-X", "utf8", "-"]
            os.execve(asked["interpreter"], command, {})
        while True:
            ended, status = os.wait()
            if ended == program:
                _exit_like(status)
    _exit_like(os.waitpid(first, 0)[1])


if __name__ == "__main__":
    main()
