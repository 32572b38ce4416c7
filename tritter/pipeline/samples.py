"""What two models say to a prompt."""

from dataclasses import dataclass
from typing import Any

from tritter.evaluation.samples import prompt_in_words, sample_text
from tritter.families import position_limit
from tritter.models import config_of
from tritter.pipeline import experts
from tritter.pipeline.context import MAX_POSITIONS, RunContext

SAMPLE_PROMPT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Said:
    """What two models say to one prompt, as in summary.json, and the FLOPs of it."""

    texts: dict[str, str]
    flops: float


def said(context: RunContext, domain: str, before: Any, after: Any) -> Said:
    document = context.corpus.domains[domain].validation.document(0)
    # Documents begin with headings and imports, which show less than what comes after them.
    tokenizer, max_new = context.corpus.tokenizer, context.config.evaluation.sample_tokens
    # Of learned positions there are no more; the last token that is said is not read
    positions = position_limit(config_of(before)) or MAX_POSITIONS
    prompt = prompt_in_words(
        document[: 4 * SAMPLE_PROMPT_TOKENS].tolist(),
        tokenizer.decode,
        skipped_tokens=SAMPLE_PROMPT_TOKENS,
        max_tokens=min(SAMPLE_PROMPT_TOKENS, positions // 2),
    )
    max_new = min(max_new, positions - len(prompt))
    texts, flops = {}, 0.0
    for name, model in (("before", before), ("after", after)):
        tokens = sample_text(
            model,
            prompt_ids=prompt,
            max_new_tokens=max_new,
            end_of_text_id=context.end_of_text_id,
        )
        texts[name] = str(tokenizer.decode(tokens))
        # End of text, the prompt and what was said; the last token is not read any more
        said = min(len(tokens), max_new - 1)
        flops += experts.reading_flops(model).of(1 + len(prompt) + said)
    record = {"domain": domain, "prompt": str(tokenizer.decode(prompt)), **texts}
    return Said(record, flops)
