"""Write and read checkpoint folders: model, tokenizer, model card and tritter.json."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from tritter.checkpoints.card import (
    Card,
    licence_files,
)
from tritter.checkpoints.record import Lineage
from tritter.core.families import Config, Model, ffn_sizes, on_disk
from tritter.core.families.config_file import with_former_keys
from tritter.storage.atomic import atomic_folder, write_text_atomic
from tritter.storage.hashing import file_digest, header_digest, merkle_hash
from tritter.storage.reading import LINEAGE_NAME, read_object, require_file
from tritter.storage.records import record_text
from tritter.storage.writer import TensorStream

# Writes files next to a model into a checkpoint folder that is still being created: tokenizer
# files, training state, appended experts
Artifact = Callable[[Path], None]

# Tokenizer, generation and licence files

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer, generation and licence files, and the kept metadata of the card."""
    for path in small_files(source):
        (folder / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(source))
    Card.read(source).begin(folder, source=source)


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the tokenizer, template and generation files of a checkpoint folder."""
    templates = sorted(path.name for path in folder.glob("additional_chat_templates/*.jinja"))
    names = [name for name in _TOKENIZER_FILES if os.path.lexists(folder / name)]
    return [*names, *(f"additional_chat_templates/{name}" for name in templates)]


def small_files(source: Path) -> list[Path]:
    """Return the tokenizer, generation and licence files of a checkpoint folder, checked."""
    for path in (paths := [source / name for name in tokenizer_files(source)]):
        if path.name in _SETTINGS:
            read_object(path)
        else:
            require_file(path)
    return [*paths, *licence_files(source)]


# Checkpoint folders


def write_checkpoint(
    target: Path,
    *,
    config: Config,
    tensors: TensorStream | Callable[[Path], dict[str, str]],
    lineage: Callable[[], Lineage],
    final_config: Callable[[], Config] | None = None,
    artifacts: Iterable[Artifact | None],
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    before_publish: Callable[[Path, Lineage], Lineage] | None = None,
) -> Lineage:
    """Write a checkpoint folder atomically.

    FFNs narrower than the widest one are padded on disk, so that a stock config.json fits.

    Args:
        target: the checkpoint folder to write.
        config: the model's config.
        tensors: stream of tensors by name on disk, or a function that puts the weight files into
            the folder and returns their digests, such as `Source.link_into`.
        lineage: called after the tensors are written. Its hashes and digests are filled in from
            the written files. A lineage without a base hash starts a chain.
        final_config: called after the tensors are written; returns the config to store.
        artifacts: other files to write next to the model; None entries are skipped.
        max_shard_bytes: maximum size of a safetensors file.
        overwrite: replace an existing folder at `target`.
        check: raises if the existing folder at `target` may not be replaced.
        before_publish: called with the finished folder and its lineage before the old folder is
            replaced. It may rewrite the lineage, returns the final one, and may raise.

    Returns:
        The lineage as written.

    Raises:
        RequestError: `target` exists and `overwrite` is off, `target` may not be replaced, or its
            parent folder is not writable.
        TritterError: a write failed.
    """
    with atomic_folder(target, overwrite=overwrite, check=check) as folder:
        if isinstance(tensors, TensorStream):
            stream = tensors.padded(Model(config).padded_shapes())
            tensor_digests = stream.write(folder, max_shard_bytes=max_shard_bytes)
        else:
            tensor_digests = tensors(folder)
        config = config if final_config is None else final_config()
        write_config(folder, config)
        for artifact in filter(None, artifacts):
            artifact(folder)
        model_hash = merkle_hash(tensor_digests)
        stated = lineage()
        complete = replace(
            stated,
            model_hash=model_hash,
            base_model_hash=stated.base_model_hash or model_hash,
            tensor_digests=tensor_digests,
            ffn_sizes=ffn_sizes(config),
            file_digests=file_digests(folder),
        )
        card = Card.read(folder).for_checkpoint(complete, config)
        (folder / Card.NAME).write_text(card, encoding="utf-8")
        digests = {**complete.file_digests, Card.NAME: file_digest(folder / Card.NAME)}
        complete = replace(complete, file_digests=dict(sorted(digests.items())))
        (folder / LINEAGE_NAME).write_text(record_text(complete), encoding="utf-8")
        if before_publish is not None:
            complete = before_publish(folder, complete)
    return complete


def write_config(folder: Path, config: Config) -> None:
    """Write config.json in the format of the stock classes, which transformers 4 reads too."""
    text = json.dumps(with_former_keys(on_disk(config)), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_lineage(folder: Path, lineage: Lineage, config: Config) -> Lineage:
    """Rewrite a checkpoint's lineage and card, but not its tensors. Return the lineage."""
    card = Card.read(folder).for_checkpoint(lineage, config)
    write_text_atomic(folder / Card.NAME, card)
    digests = {**lineage.file_digests, Card.NAME: file_digest(folder / Card.NAME)}
    written = replace(lineage, file_digests=digests)
    write_text_atomic(folder / LINEAGE_NAME, record_text(written))
    return written


def file_digests(folder: Path) -> dict[str, str]:
    """Return the digests of all files except the lineage, without the model's tensors.

    Of the model's own safetensors files only the header is hashed, under its file name followed by
    `Lineage.HEADER_MARK`.
    """
    digests: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.parent == folder and path.suffix == ".safetensors":
            digests[name + Lineage.HEADER_MARK] = header_digest(path)
        elif name != LINEAGE_NAME:
            digests[name] = file_digest(path)
    return digests
