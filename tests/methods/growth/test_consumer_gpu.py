"""The recipe for one consumer GPU: memory requirements of the model that it names."""

from dataclasses import replace
from pathlib import Path

from tests import oracle
from tests.pipeline.tiny import FIXTURES
from tritter.config.launch.composition import load_config
from tritter.config.schema import RunConfig
from tritter.core.families import Model
from tritter.core.models import save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.planning.run_memory import RunMemory

# config.json of Qwen/Qwen2.5-1.5B-Instruct, as far as sizes need it
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
}
LIMIT = 12 * 10**9


def eight_bit(config: RunConfig) -> RunConfig:
    """Return a config with the recipe's optimizer, which may not be installed here."""
    optimizer = replace(config.optimizer, target="bitsandbytes.optim.AdamW8bit")
    return replace(config, optimizer=optimizer)


def test_it_is_within_twelve_gigabytes(tmp_path: Path) -> None:
    base = oracle.saved(oracle.tiny_llama(max_position_embeddings=512), tmp_path / "base")
    save_tokenizer(
        train_tokenizer([Document("a", "a text")], vocab_size=280), base, end_of_text=END_OF_TEXT
    )
    text = (f"data.old={FIXTURES / 'text/old'}", f"data.new={FIXTURES / 'text/new.jsonl'}")
    words = (
        "experiment=consumer_gpu",
        f"model.path={base}",
        *text,
        "trainer=cpu",
        "optimizer=adamw",
    )
    config = eight_bit(load_config([*words, "trainer.precision=bf16-true"]))
    assert config.growth is not None and config.growth.options.freeze_attention
    (held,) = RunMemory(config, Model(QWEN)).needs()
    assert held.parameters == Model(QWEN).num_parameters == 1_543_714_304
    ffns = 28 * 3 * 1536 * 8960
    # bfloat16 weights; bfloat16 gradients and two moments in 8 bits of the FFNs alone
    num_changed = 2 * held.parameters + (2 + 2) * ffns
    assert abs(held.device - num_changed) < 0.02 * num_changed
    assert held.device + held.activations < LIMIT < held.device + 3 * held.activations
    with_attention = load_config([*words, "growth.freeze_attention=false"])
    (more,) = RunMemory(with_attention, Model(QWEN)).needs()
    assert more.device > held.device + 10**9
