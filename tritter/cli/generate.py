"""`tritter generate`: generate text from a prompt or in a conversation with stock transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tritter.cli.options import AsJson, Checkpoint, Seed, flag, option
from tritter.cli.output import model_on_device, print_json, refuse_damage
from tritter.errors import Problem, RequestError, TritterError
from tritter.loading import loading
from tritter.storage.hub import locate
from tritter.storage.tensors import WEIGHT_DTYPES
from tritter.terminal import say, status

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NEW_TOKENS, _ANSWER_TOKENS = 50, 512  # defaults without and with --chat
_MAX_NEW_TOKENS = 2**20
_STANDARD_INPUT = "-"


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None,
        option(
            "--prompt",
            "TEXT",
            "Text to continue. Default, or -: standard input; with --chat at a terminal, turn by "
            "turn.",
            shows_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, flag("--chat", "Render the prompt with the checkpoint's chat template, and answer.")
    ] = False,
    system: Annotated[
        str | None, option("--system", "TEXT", "System message of the conversation, with --chat.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        option(
            "--max-new-tokens",
            "N",
            f"Maximum number of new tokens. Default: {_NEW_TOKENS}; with --chat: {_ANSWER_TOKENS}; "
            "less if the model has fewer positions left.",
            least=1,
            most=_MAX_NEW_TOKENS,
            shows_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, option("--temperature", "X", "Sampling temperature; 0: greedy decoding.", least=0)
    ] = 0.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Generate text from a prompt or in a conversation, in stock transformers.

    tritter generate base --prompt "The class"
    """
    if system is not None and not chat:
        raise RequestError(Problem("--system", system, reason="requires --chat"))
    is_conversation = chat and prompt is None and sys.stdin.isatty()
    if is_conversation and as_json:
        raise RequestError("--json prints one answer: set its --prompt, or pipe it.")
    text = "" if is_conversation else _prompt_text(prompt)
    with loading("transformers"):
        from tritter.core.models import read_model

    with refuse_damage():
        folder = locate(checkpoint, key="--checkpoint")
        whole, tokenizer = read_model(folder), _read_tokenizer(folder, needs_template=chat)
        writer = _Writer(
            folder,
            tokenizer,
            positions=whole.position_limit,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        # The length of a prompt is checked before the model is loaded
        first = None
        if not is_conversation:
            first = writer.rendered(_messages(system, text)) if chat else writer.encoded(text)
            writer.room(first)
        if tokenizer.chat_template is not None and not chat:
            say(f"note: {folder} has a chat template; --chat sends a message.", is_error=True)
        with status("loading the model"):
            stated = whole.config.get("dtype")
            model = model_on_device(folder, str(stated if stated in WEIGHT_DTYPES else "float32"))
    if first is None:
        _converse(writer, model, system)
        return 0
    written = writer.write(model, first, is_chat=chat, is_shown=not as_json, start=text)
    if as_json:
        print_json({"prompt": text, **written.record(), "temperature": temperature, "seed": seed})
    return 0


def _prompt_text(prompt: str | None) -> str:
    """Return the prompt, from standard input without `--prompt`."""
    if prompt is None and sys.stdin.isatty():
        raise RequestError("Missing --prompt TEXT: set it, pipe it, or chat with --chat.")
    if prompt in (None, _STANDARD_INPUT):
        try:
            prompt = sys.stdin.read().removesuffix("\n")
            prompt.encode()  # with a C locale, Python reads other bytes as surrogates
        except UnicodeError as error:
            raise RequestError(f"--prompt: standard input is not text ({error}).") from error
    return str(prompt)


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def _read_tokenizer(folder: Path, *, needs_template: bool) -> Any:
    """Return a checkpoint's tokenizer."""
    from tritter.core.models import load_tokenizer

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise RequestError(
            f"{folder} contains no tokenizer ({', '.join(_TOKENIZERS)}); generate needs one."
        )
    tokenizer = load_tokenizer(folder)
    if needs_template and tokenizer.chat_template is None:
        raise RequestError(
            f"--chat: {folder} has no chat template (chat_template.jinja), so it is not a chat "
            "model; leave --chat out to continue a text."
        )
    return tokenizer


def _converse(writer: _Writer, model: nn.Module, system: str | None) -> None:
    """Answer turn by turn, until an empty line or the end of the input."""
    say(f"Chat with {writer.folder}: an empty line or Ctrl-D ends it.", is_error=True)
    messages: list[dict[str, str]] = []
    while text := _read_line():
        messages += _messages(None if messages else system, text)
        ids = writer.rendered(messages)
        most = writer.max_new_tokens or _ANSWER_TOKENS
        if writer.positions is not None:
            most = min(most, writer.positions - ids.shape[-1])
        if most < 1:
            full = f"the conversation fills the {writer.positions} positions of the model"
            say(f"({full}; begin another)", is_error=True)
            return
        fitting = replace(writer, max_new_tokens=most)
        written = fitting.write(model, ids, is_chat=True, is_shown=True)
        messages.append({"role": "assistant", "content": written.text})


def _read_line() -> str:
    try:
        return input("> ").strip().encode(errors="replace").decode()
    except EOFError:
        say("")
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """Tokenizer and options of generation.

    Args:
        folder: the checkpoint, for messages.
        tokenizer: its tokenizer, of transformers.
        positions: number of positions of the model; None is unlimited.
        max_new_tokens: limit of new tokens; None is the default.
        temperature: of sampling; 0 decodes greedily.
        seed: of sampling.
    """

    folder: Path = field(kw_only=False)
    tokenizer: Any = field(kw_only=False)
    positions: int | None
    max_new_tokens: int | None
    temperature: float
    seed: int

    def encoded(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 [1, T], with those that the tokenizer adds."""
        from tritter.core.families.config_file import errors_as

        with errors_as(f"{self.folder} contains no usable tokenizer"):
            ids: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids

    def rendered(self, messages: list[dict[str, str]]) -> Tensor:
        """Return the tokens of a conversation with the prompt for an answer, int64 [1, T]."""
        try:
            ids: Tensor = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        # Templates come from a checkpoint and raise errors of any kind
        except Exception as error:
            message = " ".join(str(error).split())[:300] or type(error).__name__
            advice = "; try without --system" if messages[0]["role"] == "system" else ""
            raise RequestError(
                f"--chat: the chat template of {self.folder} fails ({message}){advice}."
            ) from error
        return ids

    def room(self, ids: Tensor, *, default: int = 1) -> int:
        """Return the limit of new tokens after a prompt, int64 [1, T].

        Without `--max-new-tokens`, it is `default`, or the positions that are left.
        """
        num_tokens, limit = ids.shape[-1], self.max_new_tokens or 1
        if num_tokens == 0:
            raise RequestError("--prompt = (empty): the prompt must have at least one token.")
        room = None if self.positions is None else self.positions - num_tokens
        if room is not None and room < limit:
            is_full = room < 1
            allowed = "give a shorter --prompt" if is_full else f"at most {room}"
            raise RequestError(
                f"{'--prompt' if is_full else f'--max-new-tokens = {limit}'}: the prompt has "
                f"{num_tokens} tokens and the model supports {self.positions} positions; {allowed}."
            )
        return self.max_new_tokens or min(default, room or default)

    def write(
        self, model: nn.Module, ids: Tensor, *, is_chat: bool, is_shown: bool, start: str = ""
    ) -> _Answer:
        """Continue a prompt, and print the text token by token.

        Args:
            model: the model.
            ids: the prompt, int64 [1, T].
            is_chat: the prompt ends where an answer begins.
            is_shown: print the text.
            start: text to print before that of a continuation.
        """
        import torch

        from tritter.core.families.config_file import errors_as
        from tritter.data.chat import end_of_turn_ids
        from tritter.evaluation.inference import continued_text, generated_tokens

        prompt = [] if is_chat else ids[0].tolist()
        limit = self.room(ids, default=_ANSWER_TOKENS if is_chat else _NEW_TOKENS)

        def decode(tokens: list[int]) -> str:
            return str(
                self.tokenizer.decode(
                    tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )

        def text_of(new: list[int]) -> str:
            return continued_text(decode, prompt, new)

        ends = {self.tokenizer.eos_token_id, *_ends_of(model)} - {None}
        ends |= set(end_of_turn_ids(self.tokenizer)) if is_chat else set()
        answer = _Answer(text_of, ends, is_shown=is_shown)
        own: dict[str, Any] = {"streamer": answer}
        if is_shown:
            say("" if is_chat else start, end="")
        with errors_as(f"transformers can't generate from {self.folder}"):
            _refuse_overflow(model, ids)
            if self.temperature > 0:
                own |= {"do_sample": True, "temperature": self.temperature}
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                generated_tokens(
                    model, ids[0].tolist(), max_new_tokens=limit, end_ids=sorted(ends), **own
                )
        if is_shown:
            say("")
        if is_shown and is_chat and not answer.is_complete:
            is_full = self.positions == ids.shape[-1] + limit
            limits = f"the model has {self.positions} positions"
            where = limits if is_full else "see --max-new-tokens"
            say(f"(cut after {limit} tokens: {where})", is_error=True)
        return answer


def _ends_of(model: nn.Module) -> Iterator[int]:
    """Yield the end tokens of generation_config.json."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    yield from ends if isinstance(ends, list) else [] if ends is None else [ends]


class _Answer:
    """Streamer of transformers that keeps new text; prints it once later tokens can't change it.

    Attributes:
        num_tokens: number of new tokens.
        is_complete: the model ended the text, rather than the limit of tokens.
    """

    def __init__(
        self, text_of: Callable[[list[int]], str], ends: set[int], *, is_shown: bool
    ) -> None:
        self.num_tokens, self.is_complete = 0, False
        self._text_of, self._ends, self._is_shown = text_of, ends, is_shown
        self._ids: list[int] | None = None  # until the prompt was received
        self._num_printed = 0

    @property
    def text(self) -> str:
        """The new text, without a part of a character at its end."""
        return self._text_of(self._ids or []).rstrip("\ufffd")

    def record(self) -> dict[str, Any]:
        reason = "stop" if self.is_complete else "length"
        return {"text": self.text, "num_new_tokens": self.num_tokens, "finish_reason": reason}

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then the new tokens."""
        if self._ids is None:
            self._ids = []
            return
        for token in map(int, value.flatten()):
            self.num_tokens, self.is_complete = self.num_tokens + 1, token in self._ends
            if not self.is_complete:
                self._ids.append(token)
        if self._is_shown:
            text = self.text
            say(text[self._num_printed :], end="")
            self._num_printed = max(self._num_printed, len(text))

    def end(self) -> None:
        """Do nothing: the line is ended by the caller."""


def _refuse_overflow(model: Any, ids: Tensor) -> None:
    """Raise a `TritterError` if the logits after a prompt are not finite."""
    import torch

    from tritter.core.models import last_logits_only

    with torch.inference_mode():
        kept = last_logits_only(model)  # those of a long prompt take gigabytes
        logits = model(input_ids=ids.to(model.device), use_cache=False, **kept).logits[:, -1]
    if not logits.isfinite().all():
        raise TritterError(
            "the model's logits for the prompt are not finite although its weights are: it "
            f"overflows in {logits.dtype}."
        )
