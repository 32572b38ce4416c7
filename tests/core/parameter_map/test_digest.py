"""The digest of a map depends on its content only, not on process state."""

import subprocess
import sys

import pytest

from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    LlamaPro,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Config, Model, llama_config

SCRIPT = """
from tests.core.parameter_map.test_digest import digest
from tritter.core.expansions import Width
print(digest(Width(init="net2net"), seed=3))
"""


def config() -> Config:
    return llama_config(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=64,
        initializer_range=0.02,
    )


def digest(spec: ExpansionSpec, *, seed: int = 0) -> str:
    return build_steps(Model(config()), [spec], seed=seed)[0].parameter_map.digest()


@pytest.mark.parametrize(
    "spec",
    [Width(), Width(init="net2net"), Dus(), Stack(), Interpolate(), LlamaPro()],
    ids=lambda spec: spec.name,
)
def test_the_same_request_has_the_same_digest(spec: ExpansionSpec) -> None:
    assert digest(spec) == digest(spec)
    assert len(digest(spec)) == 64


def test_every_decision_changes_the_digest() -> None:
    digests = [
        digest(Width(init="net2net")),
        digest(Width(init="net2net"), seed=1),
        digest(Width(init="net2net", shares="equal")),
        digest(Width(init="net2net", noise=0.01)),
        digest(Width(init="net2net", noise=0.02)),
        digest(Width(init="net2net", hidden_size=72)),
        digest(Width()),
        digest(Width(), seed=1),
        digest(Dus()),
        digest(Dus(identity_init=True)),
        digest(Stack()),
        digest(Stack(identity_init=True)),
        digest(Interpolate()),
        digest(Interpolate(identity_init=True)),
        digest(LlamaPro()),
        digest(LlamaPro(positions=(0, 0))),
    ]
    assert len(set(digests)) == len(digests)


def test_a_map_without_chance_has_one_digest_for_all_seeds() -> None:
    assert digest(Dus(), seed=0) == digest(Dus(), seed=1)


@pytest.mark.full
def test_the_digest_is_the_same_in_another_process() -> None:
    """Python salts str hashes per process; the digest must not depend on them."""
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == digest(Width(init="net2net"), seed=3)
