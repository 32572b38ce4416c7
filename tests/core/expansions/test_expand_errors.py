"""Invalid sources and destinations: `expand` names the problem; nothing is written or lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.oracle.growth import masks_of
from tests.storage.test_tensors import file_size_limit
from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Width, build_steps
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.errors import RequestError, TritterError
from tritter.transform import expand


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.saved(oracle.tiny_llama(), tmp_path_factory.mktemp("sound") / "source")


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "source"))


def _snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _weights(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _bytes(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def _half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NAN = torch.full((24,), 1.0)
NAN[3] = float("nan")
DAMAGED: dict[str, tuple[Callable[[Path], object], type[TritterError], list[str]]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        TritterError,
        ["holds no config.json"],
    ),
    "config is no JSON": (
        _bytes("config.json", b"{"),
        TritterError,
        ["config.json", "cannot be read"],
    ),
    "unknown family": (
        _configured(model_type="t5"),
        RequestError,
        ["'t5' is not supported", "no causal language model of this type"],
    ),
    "family that nobody knows": (
        _configured(model_type="lamma"),
        RequestError,
        ["'lamma' is not supported", "no causal language model of this type"],
    ),
    "config lacks the hidden size": (
        _configured(hidden_size=..., head_dim=...),
        TritterError,
        ["model.embed_tokens.weight has shape (97, 24)", "config.json requires (97, 4096)"],
    ),
    "config asks for another FFN": (
        _configured(intermediate_size=44),
        TritterError,
        ["gate_proj.weight has shape (40, 24)", "requires (44, 24)"],
    ),
    "config asks for more layers": (
        _configured(num_hidden_layers=4),
        TritterError,
        ["9 tensors are missing: model.layers.3."],
    ),
    "config asks for fewer layers": (
        _configured(num_hidden_layers=2),
        TritterError,
        ["9 tensors that llama does not have: model.layers.2."],
    ),
    "config of a wrong type": (
        _configured(hidden_size="large"),
        TritterError,
        ["config.json", "hidden_size", "large"],
    ),
    "negative size": (_configured(hidden_size=-24), TritterError, ["hidden_size = -24"]),
    "no heads": (
        _configured(num_attention_heads=0, head_dim=...),
        TritterError,
        ["config.json is not a usable config"],
    ),
    "leftover tensor": (
        _weights(**{"model.layers.0.mystery": torch.ones(2)}),
        TritterError,
        ["does not have: model.layers.0.mystery"],
    ),
    "missing tensor": (
        _weights(**{"model.norm.weight": None}),
        TritterError,
        ["missing: model.norm.weight"],
    ),
    "not a number": (
        _weights(**{"model.norm.weight": NAN}),
        RequestError,
        ["model.norm.weight would contain values that are not finite"],
    ),
    "truncated": (_half, TritterError, ["model.safetensors cannot be read"]),
    "garbage": (
        _bytes("model.safetensors", b"\x80\x04pickle?"),
        TritterError,
        ["model.safetensors cannot be read"],
    ),
    "empty": (_bytes("model.safetensors", b""), TritterError, ["cannot be read"]),
    "pickles only": (_pickled, TritterError, ["pytorch_model.bin", "never read"]),
    "lineage is no JSON": (_bytes("tritter.json", b"{"), TritterError, ["tritter.json"]),
    "lineage from the future": (
        _bytes("tritter.json", b'{"format": "lineage", "format_version": 99}'),
        TritterError,
        ["format_version 99", "reads 1"],
    ),
    "lineage of a development version": (
        _bytes("tritter.json", b'{"format_version": 4}'),
        TritterError,
        ["development version", "--ignore-lineage"],
    ),
}


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize(("damage", "kind", "phrases"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_bad_source_is_refused_and_nothing_is_written(
    source: Path, damage: Callable[[Path], object], kind: type[TritterError], phrases: list[str]
) -> None:
    damage(source)
    before = _snapshot(source.parent)
    with pytest.raises(TritterError) as error:
        expand(source, source.parent / "result", [Width()])
    assert type(error.value) is kind
    for phrase in phrases:
        assert phrase in str(error.value)
    assert _snapshot(source.parent) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_the_sound_source_expands(source: Path) -> None:
    """Control for the cases above: without damage the same call works."""
    expand(source, source.parent / "result", [Width()])


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [Width(hidden_size=25)],
        [Dus(target_layers=99)],
        [LlamaPro(positions=(3,))],
        [
            Width(),
            Width(hidden_size=24),
        ],  # valid for the source, not for the result of the first expansion
    ],
    ids=str,
)
def test_an_impossible_request_writes_nothing(source: Path, specs: list[ExpansionSpec]) -> None:
    with pytest.raises(RequestError):
        expand(source, source.parent / "result", specs)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_an_existing_destination_is_refused_and_untouched(source: Path) -> None:
    result = source.parent / "result"
    result.mkdir()
    (result / "mine.txt").write_text("mine")
    before = _snapshot(source.parent)
    with pytest.raises(RequestError, match="result already exists"):
        expand(source, result, [Width()])
    assert _snapshot(source.parent) == before


def test_the_source_is_never_its_own_destination_by_accident(source: Path) -> None:
    before = _snapshot(source)
    with pytest.raises(RequestError, match="already exists"):
        expand(source, source, [Width()])
    assert _snapshot(source) == before


def test_overwrite_replaces_and_a_failing_overwrite_keeps(source: Path) -> None:
    result = source.parent / "result"
    expand(source, result, [Width()])
    expand(source, result, [Dus()], overwrite=True)
    assert oracle.stock(result).config.num_hidden_layers == 4
    before = _snapshot(result)
    _weights(**{"model.norm.weight": NAN})(source)
    with pytest.raises(TritterError, match="not finite"):
        expand(source, result, [Width()], overwrite=True)
    assert _snapshot(result) == before
    assert {path.name for path in source.parent.iterdir()} == {"source", "result"}


def test_a_destination_below_a_file_is_refused(source: Path) -> None:
    (source.parent / "file").write_text("mine")
    with pytest.raises(RequestError, match="cannot be written"):
        expand(source, source.parent / "file" / "result", [Width()])
    assert (source.parent / "file").read_text() == "mine"


def test_a_full_disk_is_told_and_leaves_nothing(source: Path) -> None:
    before = _snapshot(source.parent)
    with file_size_limit(20_000), pytest.raises(TritterError, match="could not be written"):
        expand(source, source.parent / "result", [Width()])
    assert _snapshot(source.parent) == before


def test_a_sharded_source_gives_the_same_result(sound: Path, tmp_path: Path) -> None:
    oracle.stock(sound).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    whole = expand(sound, tmp_path / "a", [Width()]).lineage
    sharded = expand(tmp_path / "sharded", tmp_path / "b", [Width()]).lineage
    assert whole.model_hash == sharded.model_hash


def test_progress_counts_every_tensor(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    expand(source, source.parent / "r", [Dus()], progress=lambda done, of: seen.append((done, of)))
    assert seen == [(position, 39) for position in range(1, 40)]  # 4 layers × 9, and 3


def test_the_config_written_names_no_place_on_this_machine(source: Path) -> None:
    result = expand(source, source.parent / "result", [Width()])
    for name in ("config.json", "tritter.json"):
        assert str(source.parent) not in (result.folder / name).read_text()


def test_carried_masks_mark_the_old_block_through_two_expansions(source: Path) -> None:
    """24 → 48 together with 3 → 5 layers (0 1 1 2 2): new blocks 2 and 4 have no old entries."""
    config = read_model(source).config
    steps = build_steps(Model(config), [Width(), LlamaPro()], seed=0)
    assert steps[-1].parameter_map.layer_sources == (0, 1, 1, 2, 2)
    masks = masks_of(config, steps)
    assert masks["model.norm.weight"].tolist() == [True] * 24 + [False] * 24
    assert masks["model.embed_tokens.weight"].sum() == 97 * 24
    for layer, has_history in enumerate([True, True, False, True, False]):
        mask = masks[f"model.layers.{layer}.mlp.up_proj.weight"]
        assert mask.shape == (80, 48)
        assert int(mask.sum()) == (40 * 24 if has_history else 0)
        assert bool(mask[:40, :24].all()) == has_history
