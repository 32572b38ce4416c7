"""Sizes above the limits are refused by every command before anything is built."""

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests import oracle
from tests.cli.conftest import Run, place, run, sources  # noqa: F401
from tritter.config.launch.composition import load_config
from tritter.config.schema import SECTIONS, RootValues
from tritter.core.expansions import EXPANSIONS, Dus, Moe, MoeAdd, Stack, Width, build_steps
from tritter.core.expansions.targets import reach_parameters
from tritter.core.families import FAMILIES, Model, check_config, llama_config
from tritter.core.models import load_model, read_model
from tritter.data.options import DatasetsConfig, StdlibDataConfig, TextDataConfig
from tritter.errors import Problem, RequestError, TritterError
from tritter.limits import MAX_EXPERTS, MAX_LAYERS, MAX_TENSORS, MAX_VOCABULARY, MAX_WIDTH
from tritter.methods.forgetting import EWC, L2SP, Replay
from tritter.options import read_options

BYTES, SECONDS = 400 * 2**20, 5.0


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A refusal takes seconds at most, and little memory."""
    started, before = time.process_time(), _peak_bytes()
    yield
    assert time.process_time() - started < SECONDS
    assert _peak_bytes() - before < BYTES


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _config(**changes: object) -> dict[str, object]:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    plain: dict[str, object] = {"model_type": "llama", **sizes, "rms_norm_eps": 1e-6}
    return plain | changes


LARGE: list[dict[str, object]] = [
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 10**30},
    {"num_hidden_layers": MAX_LAYERS + 1},
    {"hidden_size": 6_400_000},
    {"hidden_size": MAX_WIDTH + 1},
    {"intermediate_size": 10**12},
    {"vocab_size": MAX_VOCABULARY + 1},
    {"num_attention_heads": 10**9, "head_dim": 2},
    {"num_attention_heads": 2**15, "num_key_value_heads": 1, "head_dim": 2**15},
    {"num_key_value_heads": 2**19, "head_dim": 128},
    {"head_dim": 10**8},
    {"num_labels": 10**9},
    {"num_labels": -1},
    {"max_position_embeddings": 10**30},
    {"sliding_window": 10**30},
    {"pad_token_id": 10**30},
    {"bos_token_id": -(10**30)},
    {"architectures": "x" * 10**5},
    {"hidden_size": MAX_WIDTH, "intermediate_size": MAX_WIDTH, "num_hidden_layers": 9_000},
    {"model_type": "mixtral", "num_local_experts": 5_000, "num_experts_per_tok": 2},
    {
        "model_type": "mixtral",
        "num_local_experts": MAX_EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": MAX_LAYERS,
    },
]
WRONG: list[dict[str, object]] = [
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": True},
    {"tie_word_embeddings": "yes"},
    {"id2label": [1]},
    {"dtype": "Tensor"},
    {"torch_dtype": 3},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "no-such-package"}},
    {"model_type": "qwen2", "layer_types": ["full_attention"]},
    {"model_type": "qwen2", "layer_types": "full_attention"},
    {"model_type": "qwen2", "max_window_layers": "all"},
]


def _named(changes: dict[str, object]) -> set[str]:
    return set(changes) | {"parameters", "tensors", "heads"}


@pytest.mark.parametrize("changes", [*LARGE, *WRONG], ids=lambda c: "-".join(c)[:40])
def test_a_checkpoints_config_is_refused_by_key(tmp_path: Path, changes: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config(**changes)))
    for read in (read_model, load_model):
        with pytest.raises(TritterError) as error:
            read(tmp_path)
        assert any(name in str(error.value) for name in _named(changes))
        assert len(str(error.value)) < 600


def test_limits_themselves_are_allowed() -> None:
    for changes in (
        {"num_hidden_layers": MAX_LAYERS},
        {"hidden_size": MAX_WIDTH},
        {"vocab_size": MAX_VOCABULARY},
        {"model_type": "mixtral", "num_local_experts": MAX_EXPERTS, "num_experts_per_tok": 2},
    ):
        config = _config(**changes)
        check_config(Model(config))


def test_every_stock_config_passes() -> None:
    for family in FAMILIES.values():
        config = oracle_config(family.model_type)
        check_config(Model(config, family))


def oracle_config(model_type: str) -> dict[str, Any]:
    from tests.oracle.families import tiny

    return dict(tiny(model_type).config.to_dict())


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_tensors_are_counted_as_they_are_listed(model_type: str) -> None:
    config = oracle_config(model_type)
    family = FAMILIES[model_type]
    assert Model(config, family).num_tensors == len(Model(config, family).tensors) < MAX_TENSORS


BASE = llama_config(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    initializer_range=0.02,
)


@pytest.mark.parametrize(
    "spec",
    [
        Width(hidden_size=6_400_000),
        Width(intermediate_size=10**30),
        Width(num_attention_heads=10**30, num_key_value_heads=10**30),
        Stack(target_layers=2 * 10**6),
        Moe(num_experts=10**30),
        Moe(granularity=10**9),
        Moe(num_experts=MAX_EXPERTS * 2),
    ],
    ids=repr,
)
def test_targets_are_refused_before_they_are_mapped(spec: Any) -> None:
    with pytest.raises(RequestError):
        build_steps(Model(BASE), [spec], seed=0)


def test_what_defaults_lead_to_is_refused_too() -> None:
    deep = {**BASE, "num_hidden_layers": MAX_LAYERS}
    for spec in (Dus(), Stack()):
        with pytest.raises(RequestError, match="num_hidden_layers"):
            build_steps(Model(deep), [spec], seed=0)
    wide = {**BASE, "hidden_size": MAX_WIDTH, "num_attention_heads": 2}
    with pytest.raises(RequestError, match="hidden_size"):
        build_steps(Model(wide), [Width()], seed=0)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("spec", [Stack(), Width(), Moe()], ids=repr)
def test_no_count_of_parameters_is_searched_for_without_end(spec: Any) -> None:
    with pytest.raises(RequestError):
        reach_parameters(Model(BASE), [spec], 10**14)


COMMANDS = [
    "--method moe --num-experts {}",
    "--method moe --granularity {}",
    "--method moe --experts-per-token {}",
    "--method width --hidden-size {}",
    "--method width --intermediate-size {}",
    "--method width --num-heads {}",
    "--method width --num-kv-heads {}",
    "--method stack --target-layers {}",
    "--method dus --drop-layers {}",
    "--method llama_pro --positions {}",
    "--method llama_pro --target-params {}",
    "--method moe --sparse-layers {}",
    "--method width --max-shard-size {}",
    "--method width --seed {}",
    "--method width --noise {}",
]


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", ["9" * 31, "9" * 5_000, "1e99"], ids=["31", "5000", "1e99"])
def test_options_of_expand(run: Run, place: Path, command: str, value: str) -> None:  # noqa: F811
    result = run("expand --checkpoint base --output out " + command.format(value))
    assert result.code == 2, result
    assert result.err.startswith("error: ")
    assert len(result.err) < 7_000
    assert not (place / "out").exists()


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "words",
    [
        ["model.hidden_size=6400000"],
        ["model.num_hidden_layers=1000000"],
        ["model.num_attention_heads=" + "9" * 30],
        ["model.intermediate_size=1e30"],
        ["model.max_position_embeddings=" + "9" * 30],
        ["data.batch_size=100000000", "data.sequence_length=256"],
        ["data.sequence_length=" + "9" * 12],
        ["training.max_steps=" + "9" * 30],
        ["training.learning_rate=" + "9" * 400],
        ["expansion=moe", "expansion.moe.num_experts=" + "9" * 30],
        ["expansion=width", "expansion.width.hidden_size=6400000"],
        ["expansion=stack", "expansion.stack.target_layers=1000000"],
        ["pipeline.target_params=1e30"],
        ["seed=1e400"],
        ["seed=" + "9" * 30],
    ],
    ids=lambda words: words[-1][:50],
)
def test_keys_of_a_run(words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        load_config(words)
    assert words[0].partition("=")[0].split(".")[0] in str(error.value)


def _records() -> Iterator[type]:
    yield from (RootValues, StdlibDataConfig, TextDataConfig, DatasetsConfig)
    for section in SECTIONS.values():
        yield from get_args(section) or (section,)
    yield from (EWC.Options, L2SP.Options, Replay.Options)
    yield from EXPANSIONS.values()


@pytest.mark.parametrize("record", _records(), ids=lambda record: record.__name__)
def test_every_whole_number_has_an_upper_limit(record: type) -> None:
    hints = get_type_hints(record, include_extras=True)
    numbers = [name for name, hint in hints.items() if "int" in str(hint)]
    values = {name: [10**30] if "tuple" in str(hints[name]) else 10**30 for name in numbers}
    problems: list[Problem] = []
    read_options(record, values, prefix="x", problems=problems)
    assert {f"x.{name}" for name in numbers} <= {p.key for p in problems if "at most" in p.reason}


def test_experts_that_are_added_are_counted_with_those_there_are() -> None:
    config = oracle_config("mixtral")
    with pytest.raises(RequestError, match="num_local_experts"):
        build_steps(Model(config), [MoeAdd(num_experts=MAX_EXPERTS)], seed=0)


@pytest.mark.parametrize(
    "line",
    [
        "plan --source 1e30 --target 10B --gpu-hours 1",
        "plan --source 1B --target 1e30 --gpu-hours 1",
        "plan --source 1B --target 99999999999999999 --gpu-hours 1",
        "plan --source 1B --target 2B --gpu-hours 1 --batch-size 99999999999999999999999",
        "plan --source 1B --target 2B --gpu-hours 1 --sequence-length 0",
        "plan --source 1B --target 2B --gpu-hours inf",
        "plan --source 1B --target 2B --gpu-hours nan",
        "plan --source 1B --target 2B --gpu-hours 1 --device-flops 1e99",
        "plan --source 1B --target 2B --gpu-hours 1 --mfu nan",
        "plan --source 1B --target 2B --gpu-hours 1 --tokens-per-parameter 1e400",
        "generate --checkpoint base --prompt a --max-new-tokens 99999999999999999999",
        "generate --checkpoint base --prompt a --temperature nan",
    ],
)
def test_other_commands(run: Run, place: Path, line: str) -> None:  # noqa: F811
    result = run(line)
    assert result.code == 2, result
    assert result.err.startswith("error: ")


def test_a_sound_model_is_still_read(tmp_path: Path) -> None:
    folder = oracle.saved(oracle.tiny_llama(), tmp_path / "model")
    assert read_model(folder).config["hidden_size"] == load_model(folder).config.hidden_size
