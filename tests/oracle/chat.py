"""Small chat checkpoints: a stock tokenizer with special tokens and a template, and a Llama."""

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import oracle

# As in Qwen2.5, without and with marks of what the assistant generates
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Mistral: begins with BOS, ends answers with EOS, has no system message
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# Drops earlier answers, as templates of reasoning models drop earlier thoughts
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|im_end|>", "<|im_start|>", "<s>", "<|pad|>"]
SENTENCE = (
    "the small model learns to add a layer and keeps all that it knew before, déjà vu 猫; what is "
    "a gate? It compares two models. Who are you? I am Tritter. user assistant system [INST]"
)


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose end of text also ends every turn."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([SENTENCE] * 4, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        bos_token="<s>",
        pad_token="<|pad|>",
        chat_template=template,
    )


def checkpoint(folder: Path, template: str | None = CHATML, **changes: Any) -> Path:
    """Write a stock checkpoint with a chat template."""
    own = tokenizer(template)
    ends = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id}
    changes = {"vocab_size": len(own), "max_position_embeddings": 256, **ends, **changes}
    own.save_pretrained(folder)
    return oracle.saved(oracle.tiny_llama(**changes), folder)


def messages(number: int, *, turns: int = 1, system: bool = False) -> list[dict[str, str]]:
    """Return a conversation of random words."""
    draw = random.Random(number)
    found = [{"role": "system", "content": "You keep what you knew."}] if system else []
    for _ in range(turns):
        for role, words in (("user", 8), ("assistant", 6)):
            content = " ".join(draw.choices(SENTENCE.split(), k=draw.randint(1, words)))
            found.append({"role": role, "content": content})
    return found
