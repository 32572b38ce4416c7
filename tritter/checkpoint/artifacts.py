"""What stands in a checkpoint folder beside the model: each piece reads and writes itself."""

from pathlib import Path

from tritter.checkpoint.expert_files import ExpertFiles
from tritter.checkpoint.folder import Artifact
from tritter.checkpoint.kept_sequences import KeptSequences
from tritter.checkpoint.state import read_state
from tritter.checkpoint.tokenizer_files import TokenizerFiles
from tritter.stock_routers import AddedExperts


def read_artifacts(folder: Path) -> tuple[Artifact, ...]:
    """Return all that stands beside the model of a folder.

    Raises:
        TritterError: one is damaged, or of a newer format.
    """
    found = (
        TokenizerFiles(folder),
        read_state(folder),
        AddedExperts.read(folder),
        KeptSequences.read(folder),
        ExpertFiles.read(folder),
    )
    return tuple(artifact for artifact in found if artifact is not None)
