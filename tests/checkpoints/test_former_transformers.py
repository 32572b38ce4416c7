"""What Tritter writes is read alike by transformers 4, whose config keys are others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import oracle
from tests.oracle.families import OWN, generic, tiny
from tritter.checkpoints.folder import write_config
from tritter.core.expansions import Context, LlamaPro
from tritter.core.families import Config
from tritter.core.families.config_file import with_former_keys
from tritter.core.models import read_config
from tritter.errors import RequestError
from tritter.transform import expand

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
SCALING = {"rope_type": "yarn", "factor": 4.0}
# Reads folders, and prints the logits of each
READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, __version__
assert __version__.startswith("4."), __version__
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    options = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        print("LOGITS", json.dumps(model(input_ids=ids, use_cache=False).logits.tolist()))
"""


@pytest.mark.parametrize(
    ("config", "former"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": YARN, "head_dim": None, "hidden_size": 8, "num_attention_heads": 2},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                "head_dim": 4,
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
    config = read_config(folder)
    write_config(folder, config)
    again = read_config(folder)
    assert {key: again[key] for key in config} == config


@pytest.mark.slow
def test_transformers_4_computes_the_same_logits(tmp_path: Path) -> None:
    """Set TRITTER_OLD_TRANSFORMERS_PYTHON to a Python that has transformers 4.57."""
    python = os.environ.get("TRITTER_OLD_TRANSFORMERS_PYTHON")
    if python is None:
        pytest.skip("TRITTER_OLD_TRANSFORMERS_PYTHON names no Python with transformers 4.57")
    folders = []
    for family in OWN:
        source = oracle.saved(tiny(family), tmp_path / family)
        write_config(source, read_config(source))
        # OLMo 2 of transformers 4 refuses YaRN
        method = "base" if family == "olmo2" else "yarn"
        for spec in (LlamaPro(), Context(target_length=256, method=method)):
            try:
                expand(source, target := tmp_path / f"{family}-{spec.name}", [spec])
            except RequestError:  # some models have no context to extend
                continue
            folders.append(str(target))
    ids = json.dumps(oracle.tokens().tolist())
    (tmp_path / "reader.py").write_text(READER)
    command = [str(tmp_path / "reader.py"), ids, *folders]
    former = _logits(python, command)
    (tmp_path / "reader.py").write_text(READER.replace('"4."', '"5."'))
    wrong = [
        folder
        for folder, old, new in zip(folders, former, _logits(sys.executable, command), strict=True)
        if old != pytest.approx(new, abs=1e-3)
    ]
    assert len(folders) > 20 and not wrong


def _logits(python: str, command: list[str]) -> list[list[float]]:
    shown = subprocess.run([python, *command], capture_output=True, text=True, check=True).stdout
    lines = [line.removeprefix("LOGITS ") for line in shown.splitlines() if line.startswith("LOG")]
    nested: list[Any] = [json.loads(line) for line in lines]
    return [[value for row in each for token in row for value in token] for each in nested]
