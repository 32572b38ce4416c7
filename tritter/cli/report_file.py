"""Report files of `evaluate`, `compare` and `report`: where one may be written, and over what."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from tritter.checkpoints.expert_files import ADAPTER_FILES
from tritter.checkpoints.location import is_within
from tritter.errors import Problem, RequestError, TritterError
from tritter.report.compared import CSV_HEADER
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import LINEAGE_NAME, RUN_FILE, kind_of, open_file, read_object

_KEY = "--output"
PAGE_NAME = "report.html"  # the one report that a run folder may contain
MARK = "tritter_report"
_FORMAT_VERSION = 1
_GENERATOR = b'<meta name="generator" content="tritter '
_HEAD_BYTES = 4096  # of a page, in which its generator is named
_MAX_BYTES = 2**26  # of a JSON report
_CHECKPOINT_FILES = (LINEAGE_NAME, *ADAPTER_FILES)
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")  # of a folder saved by `datasets`

Format = Literal["json", "csv", "html"]
FORMATS: Mapping[str, Format] = {".html": "html", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True, slots=True)
class ReportFile:
    """A file that a command writes its report to; it replaces an earlier report of its kind only.

    Nothing is opened but an earlier report.

    Args:
        kind: the command that writes it, as a JSON report states it.
        overwrite: an earlier report may be replaced.
        sources: files and folders that the command reads, in which nothing is written.

    Raises:
        RequestError: as `check_place`; or the file exists, and `overwrite` is off or it is not an
            earlier report of this kind.
    """

    path: Path
    kind: str
    format: Format
    _: KW_ONLY
    overwrite: bool
    sources: Sequence[Path] = ()

    def __post_init__(self) -> None:
        check_place(self.path, key=_KEY, sources=self.sources)
        if os.path.lexists(self.path):
            self._check_old(self.path)

    def write(self, text: str) -> None:
        """Write the report, if the path still permits it.

        Raises:
            RequestError: as when it was made.
            TritterError: the disk refuses.
        """
        self.__post_init__()
        try:
            write_text_atomic(self.path, text, check=self._check_old)
        except OSError as error:
            raise TritterError(f"{self.path} could not be written: {error}.") from error

    def _check_old(self, old: Path) -> None:
        """Refuse to replace a file; `old` is where it is now."""
        mode = old.lstat().st_mode
        if kind_of(mode) != "a file":
            raise _refused(_KEY, self.path, f"it is {kind_of(mode)}")
        if not self.overwrite:
            advice = "choose another file, or replace it (--overwrite)"
            raise _refused(_KEY, self.path, "it exists already", advice)
        try:
            is_report = _is_report(old, self.kind, self.format)
        except TritterError:
            is_report = False
        if not is_report:
            reason = f"{_NO_REPORT[self.format].format(self.kind)}, and --overwrite replaces "
            raise _refused(_KEY, self.path, reason + "nothing else")


_NO_REPORT = {
    "json": "it is not an earlier report of tritter {}",
    "csv": "it is not an earlier CSV report of Tritter",
    "html": "it is not a page that Tritter wrote",
}


def _is_report(path: Path, kind: str, format: Format) -> bool:
    if format == "json":
        found = read_object(path, limit_bytes=_MAX_BYTES).get(MARK)
        return isinstance(found, Mapping) and found.get("kind") == kind
    with open_file(path) as file:
        if format == "html":
            return _GENERATOR in file.read(_HEAD_BYTES).partition(b"<body")[0].lower()
        header = f"{','.join(CSV_HEADER)}\n".encode()
        return file.read(len(header)) == header


def check_place(path: Path, *, key: str, sources: Sequence[Path] = ()) -> None:
    """Refuse a path for a report, or for its figures, because of the folder that it is in.

    Args:
        key: the option that named it.
        sources: files and folders that the command reads.

    Raises:
        RequestError: it is in a source, a checkpoint, a dataset or a run (but for the page of
            the run itself); or its folder can't be written to.
    """
    for source in sources:
        if is_within(path, source):
            raise _refused(key, path, f"it is in {source}, which this command reads")
    folder = Path(os.path.realpath(path.absolute().parent))
    for above in (folder, *folder.parents):
        what = _what_it_is(above)
        if what and not (what == "a run" and above == folder and path.name == PAGE_NAME):
            raise _refused(key, path, f"{above} is {what}, where no report is written")
    parent = next((above for above in path.absolute().parents if os.path.lexists(above)), path)
    if not parent.is_dir():
        raise _refused(key, path, f"{parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(key, path, f"{parent} is not writable")


def _refused(
    key: str, path: Path, reason: str, advice: str = "choose another path"
) -> RequestError:
    return RequestError(Problem(key, str(path), reason=reason, advice=advice))


def mark(kind: str) -> dict[str, Any]:
    """Return the key by which a JSON report of a command is recognised."""
    return {MARK: {"kind": kind, "format_version": _FORMAT_VERSION}}


def _what_it_is(folder: Path) -> str:
    """Return what a folder is if no report may be written in it; empty: nothing known."""
    has_weights = os.path.lexists(folder / "config.json") and any(folder.glob("*.safetensors"))
    if has_weights or any(os.path.lexists(folder / name) for name in _CHECKPOINT_FILES):
        return "a checkpoint"
    if any(os.path.lexists(folder / name) for name in _DATASET_FILES):
        return "a dataset"
    try:
        return "a run" if "fingerprint" in read_object(folder / RUN_FILE) else ""
    except TritterError:
        return ""
