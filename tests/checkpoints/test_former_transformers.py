"""What Tritter writes is read alike by transformers 4, whose config keys are others."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.core.families.model_types import example
from tests.former import former_python
from tests.oracle.families import OWN, generic, tiny
from tritter.checkpoints.folder import write_config
from tritter.cli import main as tritter
from tritter.core.expansions import Context, LlamaPro, Vocab
from tritter.core.expansions.targets import growth_examples
from tritter.core.families import Config, Model
from tritter.core.families.config_file import with_former_keys
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import read_model, save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import RequestError
from tritter.transform import expand

VOCABULARY = 300
DERIVED_HEADS = ("qwen2_moe", "granitemoe")  # in 4.57, which has no head_dim there
# Experts that transformers 5 stacks in memory, under other names
FURTHER = ("olmoe", "granitemoe", "gpt_oss", "glm4_moe")
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
SCALING = {"rope_type": "yarn", "factor": 4.0}
# Runs in either version. make: saves a model of each config.json; read: prints logits as JSON, and
# the ids of a text where there is a tokenizer
SCRIPT = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
action, ids, *folders = sys.argv[1:]
result = []
for folder in folders:
    if action == "make":
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if hasattr(model, "set_experts_implementation"):  # 5: grouped_mm needs larger experts
        model.set_experts_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(json.loads(ids)), use_cache=False).logits.tolist()
    text = None
    if (Path(folder) / "tokenizer.json").exists():
        text = AutoTokenizer.from_pretrained(folder)("the model grows a layer")["input_ids"]
    result.append([logits, text])
print("RESULT", json.dumps(result))
"""


@pytest.mark.parametrize(
    ("config", "former"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": YARN},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
        ),
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}}},
            {
                "rope_theta": 5e5,
                "rope_scaling": SCALING,
                "rope_local_base_freq": 1e4,
            },
        ),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
            },
            {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
        ),
        ({"num_local_experts": 4}, {"num_experts": 4}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {}),
    ],
)
def test_former_keys_stand_beside_the_new_ones(config: Config, former: Config) -> None:
    assert with_former_keys(config) == {**config, **former}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic())
def test_former_keys_change_nothing_for_transformers_5(tmp_path: Path, family: str) -> None:
    folder = oracle.saved(tiny(family), tmp_path)
    config = read_model(folder).config
    write_config(folder, config)
    again = read_model(folder).config
    assert {key: again[key] for key in config} == config


@pytest.mark.slow
def test_transformers_4_reads_what_its_own_models_become(tmp_path: Path) -> None:
    """Sources are made by 4.57, grown by Tritter, and read by both."""
    sources, targets = [], []
    for family in (*OWN, *FURTHER):
        folder = tmp_path / family
        folder.mkdir()
        config = dict(with_former_keys({**_tiny_config(family), "vocab_size": VOCABULARY}))
        config.pop("rope_parameters", None)  # as a release before 5 stores it
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        sources.append(folder)
    made = _run(former_python(), "make", sources)
    text = "the model grows a layer where data asks for one and keeps what it knew\n"
    tokenizer = train_tokenizer([Document("d", text * 20)], vocab_size=VOCABULARY)
    for source in sources:
        save_tokenizer(tokenizer, source, end_of_text=END_OF_TEXT)
        targets += _grown(source)
    exports = [target.with_name(f"{target.name}-export") for target in targets]
    for target, export in zip(targets, exports, strict=True):
        assert tritter(["export", "--checkpoint", str(target), "--output", str(export)]) == 0
    new = _run(sys.executable, "read", [*targets, *exports])
    old = _run(former_python(), "read", [*targets, *exports])
    logits = {source.name: logits for source, (logits, _) in zip(sources, made, strict=True)}
    wrong = []
    for target, (seen, ids), (again, ids_again) in zip([*targets, *exports], old, new, strict=True):
        family, name = target.name.split("-")[:2]
        expected = again if name == "context" else logits[family]
        seen, expected = torch.tensor(seen), torch.tensor(expected)
        change = (seen[..., : expected.shape[-1]] - expected).abs().max() / expected.std()
        if not change < 1e-3 or ids != ids_again:
            wrong.append((target.name, float(change)))
    assert len(targets) > 60 and not wrong


def _tiny_config(family: str) -> Config:
    if family in OWN:
        return tiny(family).config.to_dict()
    return {**Twin.of(example(family)).config.to_dict(), "dtype": "float32"}


def _grown(source: Path) -> list[Path]:
    """Return the folders of what can grow in a model."""
    config = read_model(source).config
    sizes = growth_examples(Model(config))
    specs = {name: examples[:1] for name, examples in sizes.items()}
    specs |= {"depth": [LlamaPro()], "vocab": [Vocab(tokens=("grows",))]}
    # OLMo 2 of transformers 4 refuses YaRN
    method = "base" if source.name == "olmo2" else "yarn"
    specs["context"] = [Context(target_length=256, method=method)]
    if source.name in DERIVED_HEADS:
        del specs["heads"]
    folders = []
    for name, [spec] in specs.items():
        folder = source.with_name(f"{source.name}-{name.replace(' ', '_')}")
        with suppress(RequestError):  # no experts, heads that follow from another size
            folders.append(expand(source, folder, [spec]).folder)
    return folders


def _run(python: str, action: str, folders: list[Path]) -> list[Any]:
    ids = json.dumps(oracle.tokens(60).tolist())
    command = [python, "-c", SCRIPT, action, ids, *map(str, folders)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-2000:]
    result: list[Any] = json.loads(shown.stdout.rpartition("RESULT ")[2])
    return result
