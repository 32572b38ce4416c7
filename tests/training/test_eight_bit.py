"""Optimizers of bitsandbytes on the CPU, where it is installed: killed, and as if never killed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.pipeline.tiny import TINY
from tests.training.test_module_callbacks import ADAMW, killed, same_weights, train
from tritter.config.launch.composition import load_config
from tritter.pipeline import run_pipeline
from tritter.training import OptimizerSettings
from tritter.training.checkpoint_io import SafetensorsCheckpointIO

SMALLEST = 64  # of a tensor whose moments are in 8 bits; here few have 4,096 numbers


def settings(name: str) -> OptimizerSettings:
    betas = [0.9, 0.99] if "Lion" in name else [0.9, 0.95]
    return OptimizerSettings(
        target=f"bitsandbytes.optim.{name}",
        weight_decay=0.01,
        arguments={"betas": betas, "min_8bit_size": SMALLEST},
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit"])
def test_moments_in_eight_bits_resume_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole, expected = train(tmp_path / "whole", optimizer=settings(name))
    killed(tmp_path / "parts", 7, optimizer=settings(name))
    saved = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "parts/saved")
    parts, result = train(tmp_path / "parts", optimizer=settings(name))
    assert same_weights(whole, parts)
    # Tables of codes, which all parameters share, come back once for each
    assert replace(result, seconds=0.0, memory=None) == replace(expected, seconds=0.0, memory=None)
    (optimizer,) = saved["optimizer_states"]
    assert "torch.uint8" in str({key: each.dtype for key, each in tensors(optimizer).items()})
    plain, _ = train(tmp_path / "plain", optimizer=ADAMW)
    assert not same_weights(whole, plain)


def tensors(value: object, place: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {place: value}
    pairs = value.items() if isinstance(value, dict) else ()
    return {k: v for name, each in pairs for k, v in tensors(each, f"{place}.{name}").items()}


@pytest.mark.full
@pytest.mark.filterwarnings("error:Paged")
def test_a_run_says_that_a_cpu_has_no_pages(tmp_path: Path) -> None:
    words = ("optimizer=paged_adamw8bit", "expansion=none", f"cache_dir={tmp_path / 'cache'}")
    (tmp_path / "run").mkdir()
    outcome = run_pipeline(load_config([*TINY, *words]), run_folder=tmp_path / "run")
    notes = json.loads(outcome.summary_path.read_text())["notes"]
    assert "There is no paging on the CPU: PagedAdamW8bit is equivalent to AdamW8bit." in notes
