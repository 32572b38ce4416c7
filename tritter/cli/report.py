"""`tritter report`: finished runs and sweeps as one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from tritter.cli.output import print_json
from tritter.cli.report_file import PAGE_NAME, ReportFile, check_place
from tritter.cli.run_folders import find_runs, read_runs
from tritter.report.page import page
from tritter.storage.atomic import atomic_folder, refuse_standing
from tritter.terminal import Console


def run_report(
    folders: Sequence[Path],
    *,
    output: Path | None,
    figures: Path | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Write the page; return 0.

    Args:
        folders: of runs, or of what holds them.
        output: the page; None: `report.html` in the folder, or here if there are several.
        figures: a new folder for its figures as PNG files; None: they stand in the page alone.

    Raises:
        RequestError: no run is found, one is damaged, or the place is taken.
    """
    found = find_runs(folders)
    target = output or (folders[0] if len(folders) == 1 else Path()) / PAGE_NAME
    file = ReportFile(path=target, kind="report", format="html", overwrite=overwrite)
    file.check()
    if figures is not None:
        refuse_standing(figures, overwrite=False)
        check_place(figures, key="--figures")
    runs = read_runs(found.finished)
    notes = [f"Not finished, and left out: {path}" for path in found.unfinished]
    title = f"Runs in {folders[0].resolve().name}" if len(folders) == 1 else "Runs side by side"
    text, pictures = page(runs, title=title, notes=notes)
    file.write(text)
    if figures is not None:
        with atomic_folder(figures) as temporary:
            for name, picture in pictures.items():
                (temporary / name).write_bytes(picture)
    if as_json:
        left_out = [str(path) for path in found.unfinished]
        names = [run.name for run in runs]
        print_json({"output": str(target), "runs": names, "left_out": left_out})
        return 0
    console = Console()
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    number = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    console.print(f"{number}: {target}", soft_wrap=True, markup=False, highlight=False)
    return 0
