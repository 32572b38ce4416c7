"""The files beside a model's tensors that travel along: tokenizer and generation settings."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tritter.storage.links import check_links
from tritter.storage.reading import read_object, require_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Tokenizer and generation files, as they stand beside a model in `source`."""

    source: Path

    def write(self, folder: Path) -> None:
        """Copy them.

        Raises:
            TritterError: what `check_tokenizer_files` refuses.
        """
        for path in check_tokenizer_files(self.source):
            shutil.copyfile(path, folder / path.name)


def check_tokenizer_files(source: Path) -> list[Path]:
    """Return the files that there are to copy.

    Raises:
        TritterError: one is a link that leads out of the folder, or no file, or too large, or
            settings that are no JSON object.
    """
    check_links(source)
    paths = [source / name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    for path in paths:
        if path.name in _SETTINGS:
            read_object(path)
        else:
            require_file(path)
    return paths
