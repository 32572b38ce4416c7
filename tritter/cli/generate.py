"""`tritter generate`: generate text from a prompt with stock transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from tritter.cli.options import AsJson, Checkpoint, Seed, option
from tritter.cli.output import new_console, print_json, refuse_damage
from tritter.errors import RequestError, TritterError
from tritter.limits import MAX_NEW_TOKENS
from tritter.loading import loading
from tritter.storage.hub import locate
from tritter.storage.tensors import WEIGHT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, option("--prompt", "TEXT", "Text to continue.")],
    max_new_tokens: Annotated[
        int,
        option(
            "--max-new-tokens", "N", "Maximum number of new tokens.", least=1, most=MAX_NEW_TOKENS
        ),
    ] = 50,
    temperature: Annotated[
        float, option("--temperature", "X", "Sampling temperature; 0: greedy decoding.", least=0)
    ] = 0.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Generate text from a prompt with a checkpoint, in stock transformers."""
    with loading("transformers"):
        import torch

        from tritter.core.families import position_limit
        from tritter.core.families.config_file import errors_as
        from tritter.core.models import load_tokenizer, non_finite_tensors, read_config
        from tritter.methods.experts.whole import load_whole

    with refuse_damage():
        folder = locate(checkpoint, key="--checkpoint")
        config = read_config(folder)
        if not any((folder / name).is_file() for name in _TOKENIZERS):
            raise RequestError(
                f"{folder} contains no tokenizer ({', '.join(_TOKENIZERS)}); generate needs one."
            )
        tokenizer = load_tokenizer(folder)
        with errors_as(f"{folder} contains no usable tokenizer"):
            input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        num_tokens, positions = input_ids.shape[-1], position_limit(config)
        if num_tokens == 0:
            raise RequestError("--prompt = (empty): the prompt must have at least one token.")
        if positions is not None and num_tokens + max_new_tokens > positions:
            room = positions - num_tokens
            allowed = f"at most {room}" if room > 0 else "a shorter --prompt"
            raise RequestError(
                f"--max-new-tokens = {max_new_tokens}: the prompt has {num_tokens} tokens and the "
                f"model supports {positions} positions; {allowed}."
            )
        is_known = config.get("dtype") in WEIGHT_DTYPES
        dtype = getattr(torch, str(config["dtype"])) if is_known else torch.float32
        model = load_whole(folder, dtype=dtype)
        if broken := non_finite_tensors(model):
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise RequestError(
                f"{folder}: {broken[0]}{more} has values that are not finite (NaN or infinity). "
                "Use an earlier checkpoint."
            )
    with errors_as(f"transformers can't generate from {folder}"):
        new_ids = continuation(
            model,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            pad_token_id=tokenizer.eos_token_id,
        )
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    if as_json:
        numbers = {"num_new_tokens": len(new_ids), "temperature": temperature, "seed": seed}
        print_json({"prompt": prompt, "text": text, **numbers})
    else:
        new_console().print(prompt + text, soft_wrap=True)
    return 0


def continuation(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    pad_token_id: int | None,
) -> list[int]:
    """Return only the new tokens: greedy at temperature 0, otherwise sampled with `seed`."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(model, torch.nn.Module)
    model.to(device).eval()
    # Sampling settings of generation_config.json are disabled; only the options count.
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    input_ids = input_ids.to(device)
    with torch.inference_mode():
        logits = model(input_ids=input_ids, use_cache=False).logits[:, -1]
    if not logits.isfinite().all():
        raise TritterError(
            "the model's logits for the prompt are not finite although its weights are: it "
            f"overflows in {logits.dtype}."
        )
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            top_k=None,
            top_p=None,
            **sampling,
        )
    return [int(token) for token in output[0, input_ids.shape[-1] :]]
