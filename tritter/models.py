"""The one door to transformers: configs, models and tokenizers, built or loaded."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
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

from tritter.errors import RequestError, TritterError
from tritter.families import Config, family_of

# What the libraries behind this door raise when a file is damaged or hostile.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
    SafetensorError,
)


def read_config(folder: Path) -> Config:
    """Return the content of a folder's config.json with all defaults written out.

    Raises:
        RequestError: a family that there is no table for; names those there are.
        TritterError: there is none, or it is not a config that transformers accepts.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise TritterError(f"{folder} holds no config.json.")
    with _refused_as(f"{path} is not a usable config"):
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict):
            raise TritterError(f"{path} is not a usable config: no JSON object.")
        family_of(plain)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    # Where the folder lies on this machine is no part of the model; stock saves leave it out too.
    config.pop("_name_or_path", None)
    return config


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
    with _refused_as(f"{folder} cannot be loaded as a model"), _quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
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
    """Load a folder's tokenizer; never runs code from the folder.

    Raises:
        TritterError: there is none, or it is damaged.
    """
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    # The tokenizers library raises Exception itself, so nothing narrower catches it.
    except Exception as error:
        raise TritterError(f"{folder} holds no usable tokenizer: {error!r}") from error


@contextmanager
def _refused_as(what: str) -> Iterator[None]:
    """Turn what libraries raise over a damaged file into one line that names the file."""
    try:
        yield
    except TritterError:
        raise
    except _DAMAGE as error:
        raise TritterError(f"{what}: {error}") from error


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


def config_of(model: nn.Module) -> Config:
    """Return the config of a live Hugging Face model, as `read_config` gives it.

    Raises:
        RequestError: the model has none.
    """
    held = getattr(model, "config", None)
    if held is None or not hasattr(held, "to_dict"):
        raise RequestError(f"{type(model).__name__} has no Hugging Face config.")
    config = held.to_dict()
    config.pop("_name_or_path", None)
    return config


def model_with_tensors(config: Config, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model of a config that holds these tensors (by name on disk), dtypes kept."""
    model = new_model(config, seed=0)
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], nn.Parameter(tensors[name].to(parameter.device)))
    model.tie_weights()  # type: ignore[operator]
    return model


def locate(checkpoint: str) -> Path:
    """Return the folder of a checkpoint: a folder as it is, a hub id downloaded.

    Of a hub id only configs, tokenizer files and safetensors are fetched; nothing is executed.

    Raises:
        RequestError: neither a folder nor a hub id that can be reached.
    """
    folder = Path(checkpoint).expanduser()
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise RequestError(
            f"checkpoint = {checkpoint}: no such folder, and no hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise RequestError(
            f"checkpoint = {checkpoint}: no such folder, and the hub does not give it "
            f"({type(error).__name__}: {error})."
        ) from error
