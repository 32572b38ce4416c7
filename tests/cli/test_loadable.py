"""What transformers could not build is refused before anything is written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.cli.conftest import Run, snapshot
from tests.oracle.families import LAYER_NORM, generic, tiny
from tritter.core.families import Model
from tritter.core.models import check_loadable, read_model
from tritter.errors import RequestError, TritterError

UNBUILDABLE: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "nosuch"}, "hidden_act = nosuch is unknown"),
    "padding": ({"pad_token_id": 300}, "pad_token_id = 300 is outside the vocabulary of 300"),
    "padding below": ({"pad_token_id": -301}, "pad_token_id = -301"),
    "rotary kind": (
        {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1e4}},
        "rope_parameters.rope_type = nosuch is unknown",
    ),
    "rotary values": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "Missing required keys in `rope_parameters`",
    ),
    "type": ({"dtype": "int8"}, "int8"),
    "flag": ({"attention_bias": "yes"}, "attention_bias"),
}


def _configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("values", "said"), UNBUILDABLE.values(), ids=UNBUILDABLE.keys())
@pytest.mark.parametrize(
    "words",
    [
        "expand --checkpoint base --method width",
        "expand --checkpoint base --method width,llama-pro --output old --overwrite",
        "export --checkpoint base --output out",
    ],
)
def test_what_transformers_cannot_build_is_not_written(
    run: Run, place: Path, words: str, values: dict[str, Any], said: str
) -> None:
    assert run("expand --checkpoint base --method dus --output old --no-measure").code == 0
    _configure(place / "base", **values)
    before = snapshot(place)
    result = run(words)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.endswith("Nothing was written.\n")
    assert snapshot(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["base", "old"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"max_new_tokens": -5}'),
        ("generation_config.json", '{"watermarking_config": 3}'),
        ("tokenizer_config.json", "{"),
        ("special_tokens_map.json", "3"),
    ],
)
def test_damaged_settings_do_not_travel(run: Run, place: Path, name: str, text: str) -> None:
    (place / "base" / name).write_text(text)
    before = snapshot(place)
    for words in ("expand --method dus", "export"):
        result = run(f"{words} --checkpoint base --output out")
        assert result.code == 2
        assert name in result.err
    assert snapshot(place) == before


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic())
def test_the_tables_alone_write_the_same_model(run: Run, place: Path, family: str) -> None:
    tiny(family).save_pretrained(place / "source")
    grown = "" if family not in LAYER_NORM else " --intermediate-size 96"
    words = f"expand source --method width,dus{grown}"
    assert run(f"{words} --output checked").code == 0
    assert run(f"{words} --output trusted --no-measure").code == 0
    checked, trusted = (
        AutoConfig.from_pretrained(place / name).to_dict() for name in ("checked", "trusted")
    )
    same = {key: trusted[key] for key in checked} | {"_name_or_path": checked["_name_or_path"]}
    assert same == checked  # in "trusted", defaults of the class may be written, too
    for name in ("model.safetensors", "generation_config.json"):
        assert (place / "checked" / name).read_bytes() == (place / "trusted" / name).read_bytes()


def test_what_only_measuring_finds_is_not_written_either(run: Run, place: Path) -> None:
    """Such a config loads, and fails when the model is used."""
    assert run("expand --checkpoint base --method dus --output old --no-measure").code == 0
    _configure(place / "base", return_dict=False)
    before = snapshot(place)
    result = run("expand --checkpoint base --method width --output old --overwrite")
    assert result.code == 2
    assert "cannot be measured" in result.err
    assert snapshot(place) == before


def test_something_written_after_all_is_said(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritter.storage import atomic

    remove = atomic._remove

    def fails(folder: Path) -> None:
        remove(folder)
        raise TritterError("the disk is gone")

    monkeypatch.setattr(atomic, "_remove", fails)
    result = run("expand --checkpoint base --method dus --output out --no-measure")
    assert result.code == 1
    assert result.err == ("error: the disk is gone\nout was written and is complete.\n")
    assert (place / "out" / "tritter.json").exists()


def test_large_models_are_looked_at_without_memory_or_time(place: Path) -> None:
    large = {
        "num_hidden_layers": 500,
        "hidden_size": 16_384,
        "intermediate_size": 65_536,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 500_000,
    }
    config = {**read_model(place / "base").config, **large}
    start = time.process_time()
    check_loadable(Model(config), folder=place / "base")
    assert time.process_time() - start < 5
    with pytest.raises(RequestError, match="hidden_act = nosuch"):
        check_loadable(Model({**config, "hidden_act": "nosuch"}), folder=place / "base")
