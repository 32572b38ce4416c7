"""`tritter expand`: what it makes is exact, what it refuses is told, and nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.cli.conftest import VOCABULARY, Run, snapshot
from tests.core.expansions.test_expand_errors import DAMAGED
from tests.oracle import relative_difference, saved, stock, tiny_llama, tokens
from tests.storage.test_tensors import file_size_limit
from tritter.checkpoints import Lineage

TOKENS = tokens(VOCABULARY)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "words",
    [
        "--method width",
        "--method llama-pro --positions 0,2",
        "--method dus --identity-init",
        "--method stack --identity-init",
        "--method stack --identity-init --partial --target-layers 7",
        "--method interpolate --identity-init --target-layers 8",
        "--method layers --layers 0:2,0:3 --identity 0,1",
        "--method layers --sources 0,1,1,2 --identity true",
        "--method width --width-init net2net --intermediate-size 57",
        "--method width --width-init zero-pad --hidden-size 32 --num-heads 8 --num-kv-heads 4",
        "--method width,llama-pro",
        "--method llama_pro --method width",
    ],
)
def test_the_result_computes_what_the_source_does(
    run: Run, sources: Path, tmp_path: Path, family: str, words: str
) -> None:
    result = run(f"expand --checkpoint {sources / family} --output {tmp_path / 'grown'} {words}")
    assert result.code == 0, result.err
    before, after = stock(sources / family), stock(tmp_path / "grown")
    assert after.num_parameters() > before.num_parameters()
    assert relative_difference(before, after, TOKENS) < 1e-4
    assert "exact yes" in " ".join(result.out.split())
    assert AutoTokenizer.from_pretrained(tmp_path / "grown")("the")["input_ids"]


def test_the_default_place_and_what_is_said(run: Run, place: Path) -> None:
    before = snapshot(place / "base")
    result = run("expand --checkpoint base --method width,llama_pro --hidden_size 32")
    assert result.code == 0
    assert result.err == ""  # no progress bar without a terminal
    for words in (
        "hidden size 24 32 1.33 times",
        "layers 3 5 1.67 times",
        "hidden_size 24 → 32",
        "head counts unchanged",
        "layers from 0 1 1 2 2",
        "exact yes",
        "written base-width-llama-pro",
        "next tritter inspect base-width-llama-pro",
    ):
        assert words in " ".join(result.out.split())
    assert snapshot(place / "base") == before
    assert sorted(path.name for path in place.iterdir()) == ["base", "base-width-llama-pro"]
    assert run("expand --checkpoint base/ --method dus").code == 0
    assert (place / "base-dus").is_dir()


@pytest.mark.full
def test_on_a_terminal_a_bar_shows_what_is_left(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    assert "39/39" in run("expand --checkpoint base --method dus").err
    assert run("expand --checkpoint base --method width --json").err == ""


def test_a_lossy_method_says_that_its_jump_is_to_be_measured(run: Run, place: Path) -> None:
    result = run("expand --checkpoint base --method dus --dry-run")
    said = " ".join(result.out.split())
    assert "no: dus (exact with --identity-init). Expect a higher loss" in said
    assert "until you continue training" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--layers 0:2,1:3", "no: layers (exact with --identity true). Expect"),
        ("--layers [[0,2],[1,3]]", "layers from 0 1 1 2"),
        ("--layers 0:2", "dropped source layers: 2"),
        ("--layers 0:2,1:2", "no: layers. Expect"),
        ("--sources 2,1,0 --identity true", "no: layers. Expect"),
    ],
)
def test_a_layer_table_says_what_it_drops_and_whether_it_is_exact(
    run: Run, place: Path, words: str, said: str
) -> None:
    result = run(f"expand --checkpoint base --method layers {words} --dry-run")
    assert said in " ".join(result.out.split())


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--width-init net2net --noise 0.1", " (exact with --noise 0)"),
        ("--width-init aki", " (exact with --width-init fresh)"),
        ("--width-init aki --noise 0.1", ""),
    ],
)
def test_what_alone_would_make_a_lossy_method_exact_is_named(
    run: Run, place: Path, words: str, remedy: str
) -> None:
    result = run(f"expand --checkpoint base --method width --dry-run {words}")
    assert f"no: width{remedy}. Expect a higher loss" in " ".join(result.out.split())


def test_a_dry_run_looks_past_an_output_that_exists(run: Run, place: Path) -> None:
    (place / "base-width").mkdir()
    result = run("expand --checkpoint base --method width --dry-run")
    assert result.code == 0
    assert "refused base-width already exists; choose" in " ".join(result.out.split())
    result = run("expand --checkpoint base --method width --dry-run --overwrite")
    assert "refused base-width is not replaced" in " ".join(result.out.split())
    assert "refused" not in run("expand --checkpoint base --method dus --dry-run").out
    assert list((place / "base-width").iterdir()) == []


def test_the_current_folder_is_a_source(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "base")
    assert run("expand --checkpoint . --method dus").code == 0
    assert (place / "base-dus" / "config.json").is_file()


def test_every_option_reaches_its_method(run: Run, place: Path) -> None:
    words = (
        "--hidden-size 30 --intermediate-size 50 --num-heads 5 --num-kv-heads 5 --multiple-of 2 "
        "--head-strategy fresh --width-init net2net --shares equal --noise 0.01 --seed 7"
    )
    result = run(f"expand --checkpoint base --method width --dry-run --json {words}")
    assert result.code == 2  # five key/value heads leave one query head a group
    words = words.replace("--num-heads 5", "--num-heads 10")
    (step,) = run(f"expand --checkpoint base --method width --dry-run --json {words}").json["steps"]
    assert step["options"] == {
        "hidden_size": 30,
        "intermediate_size": 50,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "multiple_of": 2,
        "head_strategy": "fresh",
        "init": "net2net",
        "shares": "equal",
        "noise": 0.01,
    }
    assert not step["is_exact"]
    depth = run(
        "expand --checkpoint base --method dus,llama-pro --dry-run --json --drop-layers 1 "
        "--identity-init --positions 0,3"
    ).json
    assert [step["method"] for step in depth["steps"]] == ["dus", "llama_pro"]
    assert [step["layer_sources"] for step in depth["steps"]] == [[0, 1, 1, 2], [0, 0, 1, 2, 3, 3]]
    assert depth["steps"][0]["options"]["identity_init"] is True


def test_a_dry_run_says_the_same_and_writes_nothing(run: Run, place: Path) -> None:
    planned = run("expand --checkpoint base --method width --seed 3 --dry-run --json").json
    assert [path.name for path in place.iterdir()] == ["base"]
    written = run("expand --checkpoint base --method width --seed 3 --json").json
    assert not planned["written"] and written["written"]
    for key in ("shapes", "parameters", "steps", "destination"):
        assert planned[key] == written[key]
    lineage = Lineage.read(place / "base-width")
    assert lineage is not None
    assert written["model_hash"] == lineage.model_hash
    assert written["steps"][0]["map_digest"] == lineage.expansion_history[0].map_digest
    assert lineage.expansion_history[0].seed == 3
    assert stock(place / "base-width").num_parameters() == written["parameters"]["after"]


def test_target_params_takes_the_nearest_shape(run: Run, place: Path) -> None:
    five_layers = 2 * 300 * 24 + 5 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 40 * 24 + 2 * 24) + 24
    words = f"--method llama-pro --target-params {five_layers + 900} --json"
    content = run(f"expand --checkpoint base {words}").json
    assert content["shapes"]["after"]["num_hidden_layers"] == 5
    assert content["parameters"]["after"] == five_layers
    refused = run("expand --checkpoint base --method dus --target-params 7B --output far")
    assert refused.code == 2
    assert "--target-params = 7,000,000,000" in refused.err
    assert not (place / "far").exists()


def test_far_more_layers_than_the_source_has_are_advised_against(run: Run, place: Path) -> None:
    words = "expand base --method llama-pro --dry-run --no-measure"
    deep = " ".join(run(f"{words} --target-params 1M").out.split())
    assert "of hidden size 24 are deep and thin" in deep and "width,llama-pro" in deep
    assert "thin:" not in run(f"{words} --target-layers 100").out


def test_the_config_holds_what_changed_and_no_general_defaults(run: Run, place: Path) -> None:
    run("expand base --method width --hidden-size 40 --output wide")
    before, after = (json.loads((place / n / "config.json").read_text()) for n in ("base", "wide"))
    assert after.pop("rope_theta") == before["rope_parameters"]["rope_theta"]  # transformers 4's
    assert after.keys() == before.keys()
    changed = {key: value for key, value in after.items() if value != before[key]}
    assert changed == {"hidden_size": 40, "intermediate_size": 67, "rms_norm_eps": 0.0006}
    record = json.loads((place / "wide/tritter.json").read_text())["expansion_history"][0]
    assert "id2label" not in {*record["source_config"], *record["target_config"]}


def test_head_counts_are_blamed_for_a_hidden_size_that_was_not_typed(run: Run, place: Path) -> None:
    words = "--num-heads 10 --num-kv-heads 2 --head-strategy gqa"
    refused = run(f"expand base --method width {words}")
    assert refused.code == 2 and "--hidden-size" not in refused.err
    assert "--num-heads = 10: llama accepts only head counts that divide" in refused.err
    assert "nearest: 8 or 12." in refused.err


@pytest.mark.full
def test_a_plain_word_is_the_checkpoint(run: Run, place: Path) -> None:
    run("expand base --method width --output a")
    run("expand --checkpoint base --method width --output b")
    assert snapshot(place / "a").keys() == snapshot(place / "b").keys()
    weights = [snapshot(place / name)["model.safetensors"] for name in "ab"]
    assert weights[0] == weights[1]
    shown = run("plan base --target 40k --gpu-hours 1 --json").json
    assert shown == run("plan --source base --target 40k --gpu-hours 1 --json").json
    said = run("generate base --prompt grows --json").json
    assert said == run("generate --checkpoint base --prompt grows --json").json
    for option in ("", "--checkpoint "):
        assert run(f"export {option}a --output hf{len(option)}").code == 0
    assert snapshot(place / "hf0") == snapshot(place / "hf13")


def test_dtype_and_shards(run: Run, place: Path) -> None:
    words = "--method width --dtype bfloat16 --max-shard-size 20kB"
    assert run(f"expand --checkpoint base {words}").code == 0
    files = sorted((place / "base-width").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(
        tensor.dtype is torch.bfloat16 for file in files for tensor in load_file(file).values()
    )
    assert json.loads((place / "base-width" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--method dsu",
            [
                "--method = dsu",
                "context, dus, interpolate, layers, llama-pro, moe, moe-add, stack, vocab, width",
                "Did you mean dus?",
            ],
        ),
        ("--method width,", ["--method = (empty)"]),
        (
            "--method width --drop-layers 3",
            ["--drop-layers = 3", "width does not have this option", "dus does"],
        ),
        (
            "--method dus --hidden-size 48 --noise 0.1",
            ["2 things", "--hidden-size = 48", "--noise = 0.1", "width does"],
        ),
        ("--method dus,llama-pro --target-layers 4", ["dus and llama-pro both have this option"]),
        (
            "--method dus,stack,interpolate --identity-init",
            ["dus, stack and interpolate all have this option"],
        ),
        ("--method dus --partial", ["--partial", "dus does not have this option; stack does"]),
        (
            "--method llama-pro --identity-init",
            ["llama-pro does not have this option; dus, interpolate and stack do"],
        ),
        ("--method dus,dus --drop-layers 1", ["dus and dus both have this option"]),
        (
            "--method width --width-init net2nt",
            ["--width-init = net2nt", "fresh, net2net, zero_pad", "Did you mean net2net?"],
        ),
        ("--method width --shares same", ["--shares = same", "unequal, equal"]),
        ("--method width --hidden-size 12", ["--hidden-size = 12", "smaller", "at least 24"]),
        ("--method width --hidden-size 25", ["--hidden-size = 25", "nearest: 28"]),
        ("--method width --noise nan", ["--noise = nan"]),
        (
            "--method width --hidden-size 48 --noise 0.1",
            ["--noise = 0.1", "use --width-init=net2net or --width-init=zero_pad"],
        ),
        ("--method width --noise inf", ["--noise"]),
        ("--method dus --target-layers 3", ["--target-layers = 3", "nearest: 4"]),
        ("--method dus --target-layers 4 --drop-layers 2", ["--drop-layers = 2: it contradicts"]),
        (
            "--method stack --target-layers 7",
            ["--target-layers = 7", "nearest: 6 or 9", "--partial allows", "first 1 layer"],
        ),
        ("--method stack --partial --target-layers 3", ["--target-layers = 3", "at least 4"]),
        ("--method interpolate --target-layers 3", ["--target-layers = 3", "at least 4"]),
        ("--method llama-pro --positions 3", ["--positions = [3]", "from 0 to 2"]),
        ("--method llama-pro --target-layers 2", ["--target-layers = 2", "at least 4"]),
        ("--method layers", ["--method layers: set exactly one of --sources and --layers"]),
        ("--method layers --layers 0:2,2:4", ["--layers = 2:4", "0 ≤ start < end ≤ 3"]),
        ("--method layers --layers 0-2", ["--layers: 0-2 is not a range of layers", "0:20"]),
        ("--method layers --sources 0,3", ["--sources = 3: list source layers from 0 to 2"]),
        ("--method layers --sources 0,x", ["--sources = [0,x]: must be a list"]),
        ("--method layers --sources 0 --identity yes", ["--identity = [yes]: must be true or"]),
        ("--method layers --layers 0:3 --target-params 1M", ["--target-params: layers has no"]),
        (
            "--method width,llama-pro --target-params 40k",
            ["--target-params: it needs exactly one method, not width, llama_pro"],
        ),
        ("--method width --dtype int8", ["--dtype = int8", "bfloat16"]),
    ],
)
def test_a_wrong_request_is_told_and_writes_nothing(
    run: Run, place: Path, words: str, said: list[str]
) -> None:
    before = snapshot(place)
    result = run(f"expand --checkpoint base {words}")
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in said:
        assert text in result.err
    assert snapshot(place) == before


def _missing_shard(folder: Path) -> None:
    _sharded(folder)
    next(folder.glob("model-00002-*")).unlink()


def _swapped_shards(folder: Path) -> None:
    _sharded(folder)
    first, second = sorted(folder.glob("model-0*"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _truncated_shard(folder: Path) -> None:
    _sharded(folder)
    second = next(folder.glob("model-00002-*"))
    second.write_bytes(second.read_bytes()[:-7])


def _index_outside(folder: Path) -> None:
    _sharded(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))


def _extra_shard(folder: Path) -> None:
    """A shard with a tensor that the architecture has not, known to the index."""
    _sharded(folder)
    save_file({"stray": torch.ones(2)}, folder / "extra.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["stray"] = "extra.safetensors"
    index.write_text(json.dumps(content))


def _sharded(folder: Path) -> None:
    model = stock(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")


STREAMED = {"not a number"}  # found only when the tensor is read
BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    **{name: (case[0], case[2]) for name, case in DAMAGED.items() if name not in STREAMED},
    "missing shard": (_missing_shard, ["model-00002"]),
    "mismatched shards": (_swapped_shards, ["lacks the tensor"]),
    "truncated shard": (_truncated_shard, ["cannot be read"]),
    "extra shard": (_extra_shard, ["does not have: stray"]),
    "index outside": (_index_outside, ["points outside its folder"]),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(), tmp_path_factory.mktemp("bare") / "source")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("words", ["", "--dry-run"])
@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_a_damaged_source_is_a_wrong_request(
    run: Run,
    bare: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    said: list[str],
    words: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(bare, source)
    damage(source)
    before = snapshot(tmp_path)
    result = run(f"expand --checkpoint {source} --method width {words}")
    assert result.code == 2
    assert result.out == ""
    for text in said:
        assert text in result.err
    assert result.err.endswith("Nothing was written.\n")
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_not_there(run: Run, place: Path) -> None:
    for name in ("nowhere", "no/where", "base/config.json"):
        result = run(f"expand --checkpoint {name} --method width")
        assert result.code == 2
        assert name in result.err
    assert [path.name for path in place.iterdir()] == ["base"]


def test_what_only_reading_finds_fails_and_leaves_nothing(run: Run, place: Path) -> None:
    path = place / "base" / "model.safetensors"
    content = load_file(path)
    content["model.norm.weight"][3] = float("nan")
    save_file(content, path, metadata={"format": "pt"})
    before = snapshot(place)
    result = run("expand --checkpoint base --method width")
    assert result.code == 2
    assert "model.norm.weight would contain values that are not finite" in result.err
    assert snapshot(place) == before


def test_a_full_disk_is_a_failure(run: Run, place: Path) -> None:
    before = snapshot(place)
    with file_size_limit(20_000):
        result = run("expand --checkpoint base --method width")
    assert result.code == 1
    assert "could not be written" in result.err
    assert snapshot(place) == before


def test_an_existing_output_is_kept_unless_it_is_to_be_replaced(run: Run, place: Path) -> None:
    (place / "base-width").mkdir()
    (place / "base-width" / "mine.txt").write_text("mine")
    before = snapshot(place)
    refused = run("expand --checkpoint base --method width")
    assert refused.code == 2
    assert "base-width already exists" in refused.err
    assert "--overwrite" in refused.err
    refused = run("expand --checkpoint base --method width --overwrite")
    assert refused.code == 2
    assert "base-width is not replaced, because it contains other files: mine.txt" in refused.err
    assert snapshot(place) == before
    (place / "base-width" / "mine.txt").unlink()
    (place / "base-width").rmdir()
    assert run("expand --checkpoint base --method width").code == 0
    assert run("expand --checkpoint base --method width --seed 1 --overwrite").code == 0
    assert Lineage.read(place / "base-width").expansion_history[0].seed == 1  # type: ignore[union-attr]


def test_the_step_0_error_is_measured_and_recorded(run: Run, place: Path) -> None:
    result = run("expand --checkpoint base --method width --json --output wide")
    error = json.loads(result.out)["step0_error"]
    assert 0 < error < 1e-4
    (record,) = Lineage.read(place / "wide").expansion_history  # type: ignore[union-attr]
    assert record.step0_error == error
    assert run("history wide --verify").code == 0
    result = run("expand --checkpoint base --method dus --output deep")
    assert "σ on random tokens" in result.out
    (record,) = Lineage.read(place / "deep").expansion_history  # type: ignore[union-attr]
    assert record.step0_error is not None and record.step0_error > 1e-3
    for words in ("stack", "interpolate --target-layers 7"):
        assert run(f"expand --checkpoint base --method {words} --output jump --overwrite").code == 0
        (record,) = Lineage.read(place / "jump").expansion_history  # type: ignore[union-attr]
        assert record.step0_error is not None and record.step0_error > 1e-3
    result = run("expand --checkpoint base --method dus --output raw --no-measure")
    assert "not measured" in result.out
