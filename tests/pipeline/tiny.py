"""The smallest real job: a tenth of a second a stage, on text of the fixtures."""

from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures/format_1"
TINY = (
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "data=text",
    f"data.old={FIXTURES / 'text/old'}",
    f"data.new={FIXTURES / 'text/new.jsonl'}",
    "data.vocab_size=280",
    "data.sequence_length=32",
    "data.batch_size=4",
    "pretraining.max_steps=6",
    "training.max_steps=6",
    "evaluation.max_tokens_per_document=64",
    "evaluation.sample_tokens=4",
    "trainer.progress=off",
    "trainer.precision=32-true",
    "trainer.save_every_n_steps=4",
    "forgetting=[ewc,replay]",
    "gate=off",
    "logger=csv",
)
