"""Report files of `evaluate`, `compare` and `report`: allowed paths and safe overwriting."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal, Self

from tritter.checkpoints.location import is_within
from tritter.errors import Problem, RequestError, TritterError
from tritter.storage.atomic import atomic_folder, refuse_existing, write_text_atomic
from tritter.storage.reading import LINEAGE_NAME, RUN_FILE, SUMMARY_FILE, kind_of, read_object

_KEY = "--output"
_PAGE_NAME = "report.html"  # the one report that a run folder may contain
_FILES_OF = {
    "a checkpoint": (LINEAGE_NAME, "adapter_config.json", "adapter_model.safetensors"),  # of PEFT
    "a dataset": ("dataset_info.json", "dataset_dict.json"),  # saved by `datasets`
    "a run": (SUMMARY_FILE,),
}

_Format = Literal["json", "csv", "html"]
_FORMATS: Mapping[str, _Format] = {".html": "html", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True, slots=True)
class ReportFile:
    """The output file of a report, and the folder of its figures.

    Args:
        path: the file.
        format: its format.
        overwrite: replace a file whose ending is that of the format.
        sources: input files and folders, where nothing may be written.
        figures: new folder for the figures as PNG files.
    """

    path: Path
    format: _Format
    _: KW_ONLY
    overwrite: bool
    sources: Sequence[Path] = ()
    figures: Path | None = None

    @classmethod
    def with_ending(cls, path: Path, *, overwrite: bool) -> Self:
        """Return the file of a path whose ending selects the format."""
        if (format := _FORMATS.get(path.suffix)) is None:
            reason = f"the ending selects the format; must be one of {', '.join(_FORMATS)}"
            raise RequestError(Problem(_KEY, str(path), reason=reason))
        return cls(path, format, overwrite=overwrite)

    @classmethod
    def page(
        cls, path: Path | None, folders: Sequence[Path], *, overwrite: bool, figures: Path | None
    ) -> Self:
        """Return the page of a report on folders; without a path, a file in the only folder."""
        usual = (folders[0] if len(folders) == 1 else Path()) / _PAGE_NAME
        return cls(path or usual, "html", overwrite=overwrite, figures=figures)

    def __post_init__(self) -> None:
        _check_path(self.path, key=_KEY, sources=self.sources)
        if os.path.lexists(self.path):
            self._check_old(self.path)
        if self.figures is not None:
            refuse_existing(self.figures, overwrite=False)
            _check_path(self.figures, key="--figures")

    def write(self, text: str, pictures: Mapping[str, bytes] | None = None) -> None:
        """Check the paths again and write the report.

        Args:
            text: the report.
            pictures: file name → figure as PNG.
        """
        self.__post_init__()
        write_text_atomic(self.path, text, check=self._check_old)
        if self.figures is not None:
            with atomic_folder(self.figures) as temporary:
                for name, picture in (pictures or {}).items():
                    (temporary / name).write_bytes(picture)

    def _check_old(self, old: Path) -> None:
        """Check that the existing file may be replaced; `old` is its current path."""
        mode = old.lstat().st_mode
        if kind_of(mode) != "a file":
            raise _refused(_KEY, self.path, f"it is {kind_of(mode)}")
        if not self.overwrite:
            advice = "choose another file, or replace it (--overwrite)"
            raise _refused(_KEY, self.path, "it exists already", advice)
        if _FORMATS.get(self.path.suffix) != self.format:
            advice = f"choose a file whose name ends in .{self.format}"
            raise _refused(_KEY, self.path, "--overwrite replaces no other kind of file", advice)


def _check_path(path: Path, *, key: str, sources: Sequence[Path] = ()) -> None:
    """Check that the path of a report or of its figures is in an allowed folder.

    Args:
        path: the path.
        key: the option that named it.
        sources: input files and folders of the command.
    """
    for source in sources:
        if is_within(path, source):
            raise _refused(key, path, f"it is in {source}, which this command reads")
    folder = Path(os.path.realpath(path.absolute().parent))
    for above in (folder, *folder.parents):
        what = _kind_of_folder(above)
        if what and not (what == "a run" and above == folder and path.name == _PAGE_NAME):
            raise _refused(key, path, f"{above} is {what}, which may not contain reports")
    parent = next((above for above in path.absolute().parents if os.path.lexists(above)), path)
    if not parent.is_dir():
        raise _refused(key, path, f"{parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(key, path, f"{parent} is not writable")


def _refused(
    key: str, path: Path, reason: str, advice: str = "choose another path"
) -> RequestError:
    return RequestError(Problem(key, str(path), reason=reason, advice=advice))


def _kind_of_folder(folder: Path) -> str:
    """Return the kind of a folder that may not contain reports, or an empty string."""
    endings = ("*.safetensors", "*.bin") if os.path.lexists(folder / "config.json") else ()
    if any(any(folder.glob(ending)) for ending in endings):
        return "a checkpoint"
    for what, names in _FILES_OF.items():
        if any(os.path.lexists(folder / name) for name in names):
            return what
    try:
        return "a run" if "fingerprint" in read_object(folder / RUN_FILE) else ""
    except TritterError:
        return ""
