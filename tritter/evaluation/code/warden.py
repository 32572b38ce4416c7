"""A program that isolates itself, then runs a Python program from stdin in a new interpreter.

It creates namespaces for users, mounts, network, processes and IPC, a root with the read-only
interpreter and an empty folder of bounded size, and resource limits. It uses only the standard
library and imports nothing from Tritter, because its interpreter has no other packages.

The order matters. Root sets up the mounts and then becomes nobody, because the kernel does not
limit the processes of root. Other users need the user namespace before they may mount.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from pathlib import Path

SETUP_FAILED = 113  # exit code: the program was not started
_WORK = "/work"
_NOBODY = 65534

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
_MOUNT_SETATTR = 442  # the same number on all architectures
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_AT_RECURSIVE = 0x8000
_READ_ONLY_NOSUID_NODEV = 1 | 2 | 4
_libc = ctypes.CDLL(None, use_errno=True)


def _isolate(root: str, *, folders: list[str], folder_bytes: int) -> None:
    """Move this process to new namespaces in which only `folders` of the system are visible.

    Args:
        root: an empty folder, the mount point of the new root.
        folders: visible read-only folders; links stay links.
        folder_bytes: total size of files in the working folder.
    """
    user, group = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if user == 0:
        _unshare(flags)
    else:
        _unshare(flags | _NEWUSER)
        # Map the user to itself, and forbid nested user namespaces, which would grant new rights
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
    for folder in folders:
        _bind(folder, root)
    work = Path(root + _WORK)
    work.mkdir()
    work.chmod(0o777)
    os.chdir(root)
    _check_result(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check_result(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir(_WORK)
    if user == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _prctl(_PR_SET_DUMPABLE, 1)
        _unshare(_NEWUSER)
        # Without /proc the user can't be mapped; an unmapped user has no rights
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _limit(limits: dict[str, int]) -> None:
    """Set resource limits: name in `resource` without RLIMIT_ → value."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _bind(folder: str, root: str) -> None:
    source, target = Path(folder), Path(root + folder)
    if os.path.lexists(target):  # part of a folder that is already mounted
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    target.mkdir()
    _mount(folder, str(target), None, _MS_BIND | _MS_REC)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    done = _libc.syscall(
        _MOUNT_SETATTR, -1, str(target).encode(), _AT_RECURSIVE, ctypes.byref(attributes), 32
    )
    _check_result(done, f"mounting {folder} read-only")


def _unshare(flags: int) -> None:
    _check_result(_libc.unshare(flags), "unshare")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    texts = [text.encode() if text else None for text in (source, target, kind, options)]
    done = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check_result(done, f"mount {target}")


def _prctl(option: int, value: int) -> None:
    _check_result(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


def _check_result(done: int, action: str) -> None:
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")


def _exit_like(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _main() -> None:
    """Isolate this process, fork the init process of the namespace, which forks the program.

    When the init process ends, the kernel kills all remaining processes of the program.
    """
    request = json.loads(sys.argv[1])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _isolate(request["root"], folders=request["folders"], folder_bytes=request["folder_bytes"])
    except (OSError, KeyError) as error:
        os.write(2, f"{error}".encode())
        os._exit(SETUP_FAILED)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user resets it
    first = os.fork()
    if first == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        program = os.fork()
        if program == 0:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _limit(request["limits"])
            command = [request["interpreter"], "-I", "-S", "-B", "-X", "utf8", "-"]
            os.execve(request["interpreter"], command, {})
        while True:
            ended, status = os.wait()
            if ended == program:
                _exit_like(status)
    _exit_like(os.waitpid(first, 0)[1])


if __name__ == "__main__":
    _main()
