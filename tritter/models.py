"""The one door to transformers: configs, models and tokenizers, built or loaded."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tritter.errors import RequestError, TritterError, brief
from tritter.families import (
    FAMILIES,
    Config,
    check_config,
    check_values,
    family_of,
    layout,
    match,
    pack_all,
    unpack_all,
)
from tritter.routing import AddedExperts
from tritter.storage.links import check_links
from tritter.storage.names import named_path
from tritter.storage.reading import read_object, require_file
from tritter.storage.tensors import SINGLE_NAME, TensorFolder

_LONGEST_REASON = 300
_NAMING_CODE = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
# Of these transformers may read any by itself.
_SMALL_FILES = {".json", ".jinja", ".model", ".txt"}


def read_config(folder: Path) -> Config:
    """Return the content of a folder's config.json with all defaults written out.

    Raises:
        RequestError: a family that there is no table for; names those there are.
        TritterError: there is none, it is not a config that transformers accepts, or its sizes
            are beyond all limits.
    """
    config = _stock_config(folder).to_dict()
    # Where the folder lies on this machine is no part of the model; stock saves leave it out too.
    config.pop("_name_or_path", None)
    return config


def _stock_config(folder: Path) -> PreTrainedConfig:
    """Return transformers' own record of a folder's config.json, once that was found sane.

    Whatever in it names code (a class beside the model, a kernel from the hub) is left out: the
    classes and kernels are always transformers' own.
    """
    check_links(folder)
    path = folder / "config.json"
    if not path.exists():
        lacks = "holds no config.json" if folder.is_dir() else "is not a folder"
        raise TritterError(f"{folder} {lacks}.")
    plain = read_object(path)
    family = family_of(plain)
    _refuse_other_weights(folder, plain)
    own = {key: value for key, value in plain.items() if key not in _NAMING_CODE}
    with refused_as(f"{path} is not a usable config"), quiet():
        check_values(family, plain)
        config = CONFIG_MAPPING[str(plain["model_type"])].from_dict(own)
        check_config(family, config.to_dict())  # with the defaults of what the file leaves out
        return config


def new_model(config: Config, *, seed: int) -> nn.Module:
    """Return a model with freshly drawn float32 weights; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = stock_config_of(config)
        return _with_expert_kernel(AutoModelForCausalLM.from_config(built, dtype=torch.float32))


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal language model from safetensors; never runs code from the folder.

    Experts that are being added get the router offset that the folder's state says, so that the
    model computes what it should where stock classes alone would not.

    Raises:
        TritterError: transformers cannot load it, or a tensor is missing or left over.
    """
    _check_small_files(folder)
    config = _stock_config(folder)
    TensorFolder.open(folder)  # one reader decides for all commands what is taken
    with refused_as(f"{folder} cannot be loaded as a model"), quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        raise TritterError(f"{folder} does not fit its config.json: {wrong}")
    added = AddedExperts.read(folder)
    if added is not None and not added.is_settled:
        with refused_as(f"{folder} cannot be loaded as a model"):
            added.apply(model)
    return _with_expert_kernel(model)


def named_tensors(model: nn.Module, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of a live model, in the family's order; ties once.

    Experts that share a tensor in memory come one by one, as views.

    Raises:
        TritterError: the model holds a tensor that its family has not, or lacks one.
    """
    state = model.state_dict()
    for stored in match(family_of(config), config, state):
        for tensor, value in stored.unpack(state[stored.name].detach()):
            yield tensor.disk_name, value


def live_tensors(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name in memory → tensor, for values (of a state, a mask) by name on disk."""
    family = family_of(config)
    logical = family.logical_tensors(config)
    held = {t.name: tensors[t.disk_name] for t in logical if t.disk_name in tensors}
    return pack_all(family, config, held)


def disk_tensors(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name on disk → tensor, for values by name in memory."""
    family = family_of(config)
    held = unpack_all(family, config, tensors)
    return {t.disk_name: held[t.name] for t in family.logical_tensors(config) if t.name in held}


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
    _check_small_files(folder)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    # The tokenizers library raises Exception itself, so nothing narrower catches it.
    except Exception as error:
        raise TritterError(f"{folder} holds no usable tokenizer: {error!r}") from error


def _refuse_other_weights(folder: Path, config: Mapping[str, object]) -> None:
    """Refuse a folder in which transformers would take other weights than `TensorFolder`.

    Raises:
        TritterError: says which.
    """
    named = config.get("transformers_weights")
    if named is not None:
        raise TritterError(
            f"{folder}: config.json names a file of weights itself (transformers_weights = "
            f"{brief(named)}); take that out and call the file {SINGLE_NAME}."
        )
    if (folder / "adapter_config.json").exists():
        raise TritterError(
            f"{folder} holds an adapter (adapter_config.json) beside the model, which peft adds on "
            "loading; merge it into the weights, or take it out."
        )


def _check_small_files(folder: Path) -> None:
    """Refuse a folder in which transformers would open what is no file of it, or a huge one.

    Raises:
        TritterError: names it.
    """
    check_links(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _SMALL_FILES:
            require_file(path)


def _with_expert_kernel(model: PreTrainedModel) -> PreTrainedModel:
    """Let experts compute one after the other where the default kernel refuses them.

    `grouped_mm` wants rows of whole 16 bytes, in bf16 as well, and knows no float64; elsewhere it
    is as quick as the loop or quicker (measured on a CPU too). `batched_mm` copies an expert's
    weights for every token and is never taken.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.has_experts:
        return model
    dimensions = family.dimensions(config_of(model))
    is_aligned = dimensions.hidden_size % 8 == 0 and dimensions.expert_size % 8 == 0
    if not is_aligned or model.dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """Turn what libraries raise over a damaged file into one line that names the file."""
    try:
        yield
    except RequestError as error:
        reason = str(error).removeprefix("config.json: ")
        raise TritterError(f"{what}: {reason}") from error
    except TritterError:
        raise
    # The border to libraries that build what a file says: packages that are not installed, bad
    # ranges, endless nesting and failed assertions come out of them as whatever they happen to be
    except Exception as error:
        raise TritterError(f"{what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """Return what a library said, without its advice on further lines."""
    text = " ".join(str(error).split())
    return text[:_LONGEST_REASON] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
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


def stock_config_of(config: Config) -> PreTrainedConfig:
    """Return transformers' own record of a config."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(str(config["model_type"]), **options)


def model_with_tensors(config: Config, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model of a config that holds these tensors (by name on disk), dtypes kept."""
    model = new_model(config, seed=0)
    family = family_of(config)
    disk_names = {t.name: t.disk_name for t in family.logical_tensors(config)}
    for stored in layout(family, config, "live"):
        value = stored.pack(lambda name: tensors[disk_names[name]])
        module, _, attribute = stored.name.rpartition(".")
        parameter = model.get_parameter(stored.name)
        setattr(model.get_submodule(module), attribute, nn.Parameter(value.to(parameter.device)))
    model.tie_weights()  # type: ignore[operator]
    assert isinstance(model, PreTrainedModel)
    return _with_expert_kernel(model)


def locate(checkpoint: str) -> Path:
    """Return the folder of a checkpoint: a folder as it is, a hub id downloaded.

    Of a hub id only configs, tokenizer files and safetensors are fetched; nothing is executed.

    Raises:
        RequestError: neither a folder nor a hub id that can be reached.
    """
    folder = named_path(checkpoint, key="checkpoint")
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
