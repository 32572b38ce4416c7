"""Licences, languages and the base model on cards, through every command that makes a model."""

import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests import oracle
from tests.cli.conftest import Run
from tests.cli.test_experts import mixture, write_with_experts
from tests.pipeline.tiny import TINY
from tritter.checkpoints.card import Card
from tritter.checkpoints.record import LearnedDomain
from tritter.core.expansions import LlamaPro
from tritter.transform.live import ModelExpander

__all__ = ["mixture"]
METADATA = """---
license: other
license_name: tiny-community
license_link: LICENSE.txt
language: [en, no, ko]
datasets:
- owner/corpus
base_model: elsewhere/before
base_model_relation: adapter
tags: [theirs]
model-index: [{name: theirs}]
---
# Their model
"""
KEPT = {
    "license": "other",
    "license_name": "tiny-community",
    "license_link": "LICENSE.txt",
    "language": ["en", "no", "ko"],
    "datasets": ["owner/corpus"],
}
LICENCES = {"LICENSE.txt", "NOTICE", "USE_POLICY.md"}


@pytest.fixture
def licensed(place: Path) -> Path:
    """Return `base` with a card and licence files."""
    base = place / "base"
    (base / "README.md").write_text(METADATA)
    for name in LICENCES:
        (base / name).write_text(f"the text of {name}\n")
    return base


def check(folder: Path, *, base: str | None, relation: str = "finetune") -> None:
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert {key: data[key] for key in KEPT} == KEPT
    assert data.get("base_model") == base
    assert data.get("base_model_relation") == (relation if base else None)
    assert data["tags"] == ["tritter"] and "model-index" not in data
    for name in LICENCES:
        assert (folder / name).read_text() == f"the text of {name}\n"


def test_a_model_of_the_hub_stays_the_base_of_all_that_is_made_from_it(
    run: Run, place: Path, licensed: Path, hub: Path
) -> None:
    for line in (
        "expand owner/name --method llama-pro --output first",
        "expand first --method width --hidden-size 48 --output second",
        "export second --output plain",
        "expand plain --method dus --output third",
    ):
        result = run(line)
        assert result.code == 0, result.err
    for name in ("first", "second", "plain", "third"):
        check(place / name, base="owner/name")
    assert ", 0 changed" in run("history second --verify").out
    # Replaced like every other file of a checkpoint
    assert run("export second --output plain --overwrite").code == 0
    assert run("expand first --method dus --output second --overwrite").code == 0


def test_of_a_folder_the_base_model_on_its_card_is_kept(
    run: Run, place: Path, licensed: Path
) -> None:
    assert run("expand base --method llama-pro --output grown").code == 0
    check(place / "grown", base="elsewhere/before")
    assert str(place) not in (place / "grown/README.md").read_text()


@pytest.mark.full
def test_a_run_keeps_them(run: Run, place: Path, licensed: Path) -> None:
    words = [word for word in TINY if not word.startswith(("model.", "data.vocab", "pretraining"))]
    line = "train model=hf model.path=base expansion=llama_pro hydra.run.dir=made"
    result = run(line, *words, "control=true")
    assert result.code == 0, result.err
    for name in ("baseline", "checkpoint"):
        check(place / "made" / name, base="elsewhere/before")


def test_exported_adapters_have_the_licence(
    run: Run, place: Path, licensed: Path, mixture: object
) -> None:
    write_with_experts(licensed, place / "licensed", mixture)
    assert run("export licensed --output adapters --format peft").code == 0
    check(place / "adapters/e0", base=None)
    for words in ("--merge", "--merge --overwrite"):
        assert run(f"export licensed --output merged --format peft {words}").code == 0
    check(place / "merged", base=None)


def test_data_sets_of_the_hub_that_were_learned_are_added(place: Path) -> None:
    from tests.oracle import tiny_llama
    from tritter.checkpoints import Lineage

    paths = ("hf:owner/corpus@main/en:train[0:10000]#text", "hf:a/b", "/x/y.txt", "hf:/data/c")
    lineage = Lineage(
        model_hash="", base_model_hash="", tensor_digests={}, file_digests={},
        domains={"new": LearnedDomain(paths=paths)},
    )  # fmt: skip
    card = Card({"datasets": "c/d"}).for_checkpoint(lineage, tiny_llama().config.to_dict())
    assert ModelCard(card).data.datasets == ["c/d", "owner/corpus", "a/b"]


def test_only_a_checkpoint_without_a_parent_starts_its_chain() -> None:
    from tests.oracle import tiny_llama
    from tritter.checkpoints import Lineage

    for parent, starts in ((None, True), ("a" * 64, False)):
        hashes = {"model_hash": "", "base_model_hash": "", "parent_hash": parent}
        lineage = Lineage(**hashes, tensor_digests={}, file_digests={})
        card = Card({}).for_checkpoint(lineage, tiny_llama().config.to_dict())
        assert "\nNot expanded" in card and ("start of its chain" in card) == starts


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\ufeff---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: null\nlanguage: [en, ~, '']\n---\n", {"language": ["en"]}),
        (f"---\nlicense_link: {'a' * 1000}\n---\n", {"license_link": "a" * 1000}),
        (f"---\nlicense: mit\nnote: {'a' * 70_000}\n---\n", {}),
    ],
)
def test_metadata_as_the_hub_reads_it(tmp_path: Path, text: str, kept: dict[str, object]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert Card.read(tmp_path).kept == kept


def test_a_live_model_of_the_hub_keeps_its_licence_and_base(
    place: Path, licensed: Path, hub: Path
) -> None:
    model = oracle.stock(place / "base")
    model.name_or_path = "owner/name"
    ModelExpander([LlamaPro()]).write(model, place / "grown")
    check(place / "grown", base="owner/name")
    assert (place / "grown/tokenizer.json").is_file()
    model.name_or_path = "owner/unknown"
    ModelExpander([LlamaPro()]).write(model, place / "other")
    assert not (place / "other/tokenizer.json").exists()


@pytest.mark.parametrize("base", ["./base", "/models/base", "../base", "C:\\base", "[a/b, ./c]"])
def test_a_path_is_no_base_model(tmp_path: Path, base: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nbase_model: {base}\n---\n")
    assert Card.read(tmp_path).kept == {"license": "mit"}


@pytest.mark.parametrize(
    "content",
    [
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: !!python/object/apply:os.system [echo]\n---\n",
        b"---\n" + b"[" * 3000 + b"\n---\n",
        b"\xff\xfe---\nlicense: mit\n---\n",
        b"---\n- license: mit\n---\n",
        b"---\nlicense: {a: b}\nlanguage: [[en]]\n---\n",
        b"no metadata\n---\nlicense: mit\n---\n",
        b"---\nlicense: mit\n",
    ],
)
def test_metadata_of_other_forms_is_dropped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert Card.read(tmp_path).kept in ({}, {"license": ["echo"]})


def test_metadata_that_cannot_be_read_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with caplog.at_level(logging.WARNING):
        Card.read(tmp_path)
    assert "README.md: its metadata, such as the licence, is not kept" in caplog.text


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    text = "\n".join(["a0: &a0 [en]", *levels, "language: *a8"])
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    assert Card.read(tmp_path).kept == {}
