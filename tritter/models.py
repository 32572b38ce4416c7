"""The one door to transformers: configs, models and tokenizers, built or loaded."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tritter.errors import TritterError
from tritter.families import Config, family_of


def read_config(folder: Path) -> Config:
    """Return the content of a folder's config.json with all defaults written out.

    Raises:
        TritterError: there is none, or it is not a config that transformers knows.
    """
    if not (folder / "config.json").is_file():
        raise TritterError(f"{folder} holds no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise TritterError(f"{folder / 'config.json'} is not a usable config: {error}") from error
    return config.to_dict()


def write_config(folder: Path, config: Config) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def new_model(config: Config, *, seed: int) -> nn.Module:
    """Return a model with freshly drawn float32 weights; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {key: value for key, value in config.items() if key != "model_type"}
        built = AutoConfig.for_model(str(config["model_type"]), **options)
        return AutoModelForCausalLM.from_config(built, dtype=torch.float32)


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal language model from safetensors; never runs code from the folder.

    Raises:
        TritterError: transformers cannot load it, or a tensor is missing or left over.
    """
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise TritterError(f"{folder} cannot be loaded as a model: {error}") from error
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        raise TritterError(f"{folder} does not fit its config.json: {wrong}")
    return model


def named_tensors(model: nn.Module, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of a live model, in the family's order; ties once."""
    state = model.state_dict()
    matched = family_of(config).match(state, config)
    for name in matched:
        yield name, state[name].detach()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, end_of_text: str) -> None:
    """Write a tokenizer so that AutoTokenizer loads it."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=end_of_text,
    )
    wrapped.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer; never runs code from the folder."""
    with _quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notices of success off the screen."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
