"""Build and load configs, models and tokenizers with transformers."""

import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from tritter.core.families import (
    SIGMOID_ROUTERS,
    Config,
    Model,
    StoredTensor,
    check_config,
    find_family,
    on_disk,
)
from tritter.core.families.config_file import checked_config, errors_as
from tritter.core.families.dimensions import plain_floats
from tritter.core.families.discovery.configs import quiet
from tritter.core.families.discovery.skeleton import is_tower
from tritter.core.stock_routers import AddedExperts
from tritter.errors import RequestError, TritterError, brief
from tritter.storage.reading import check_links, read_object, require_file
from tritter.storage.tensors import TensorFolder, is_computed
from tritter.storage.writer import stripped

# Suffixes of files that transformers may read on its own
_SMALL_FILES = {".json", ".jinja", ".model", ".txt"}
# Minor versions of transformers that the tests ran with, first and last
_TESTED = ((5, 14), (5, 24))
# Names of the key-value cache, as an argument and in the output of a model; the newest first
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def _warn_of_untested_version(version: str) -> None:
    minor = tuple(int(part) for part in version.split(".")[:2])
    if not _TESTED[0] <= minor <= _TESTED[1]:
        first, last = (".".join(map(str, each)) for each in _TESTED)
        logging.getLogger(__name__).warning(
            "transformers %s was never tried with Tritter; tested: %s to %s", version, first, last
        )


_warn_of_untested_version(transformers.__version__)


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the key-value cache among the arguments or outputs of a model, or None."""
    names = [name for name in _CACHE_NAMES if name in values.keys()]  # noqa: SIM118 `in` warns
    return next((values[name] for name in names if values[name] is not None), None)


def cache_name(model: nn.Module) -> str:
    """Return the name of the argument that a model takes its key-value cache by."""
    for module in model.modules():  # the outermost ones may wrap the model
        arguments = inspect.signature(module.forward).parameters
        if found := [name for name in _CACHE_NAMES if name in arguments]:
            return found[0]
    return _CACHE_NAMES[0]


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Return the argument by which a model computes logits for the last position only, if any."""
    # A read of 64 x 512 tokens would yield 34 GB of logits for 262,144 tokens
    accepted = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}


def read_model(folder: Path, *, ffn_sizes: Sequence[int] | None = None) -> Model:
    """Return the model of a folder, its config.json completed with the defaults of its class.

    Its config has `ffn_sizes` if the FFN widths of the layers differ.

    Args:
        folder: the checkpoint folder.
        ffn_sizes: FFN widths of the folder's lineage; None reads the lineage.
    """
    return _model_in(folder, _stock_config(folder), ffn_sizes)


def _model_in(
    folder: Path, stock: PreTrainedConfig, ffn_sizes: Sequence[int] | None = None
) -> Model:
    return Model(_plain(stock)).with_live_sizes(folder, ffn_sizes=ffn_sizes)


def _plain(config: PreTrainedConfig) -> Config:
    """Return a config as transformers saves it, without its path and unused general defaults."""
    plain: Config = config.to_diff_dict()
    return {key: value for key, value in plain.items() if key != "_name_or_path"}


def _stock_config(folder: Path) -> PreTrainedConfig:
    """Return the transformers config of a folder after checking its config.json.

    Keys that name code (a class in the folder, a kernel from the hub) are omitted: classes and
    kernels always come from transformers.
    """
    family, own = checked_config(folder)
    with errors_as(f"{folder / 'config.json'} is not a usable config"), quiet():
        config = CONFIG_MAPPING[family.model_type].from_dict(plain_floats(own))
        check_config(Model(config.to_dict(), family))  # including defaults
        return config


def new_model(model: Model, *, seed: int) -> nn.Module:
    """Return a model with randomly initialised float32 weights, determined by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # leaves the generators of GPUs unchanged
        live = AutoModelForCausalLM.from_config(_stock_of(model.config), dtype=torch.float32)
    for stored in _narrower(model):
        value = _tensor_of(live, stored.name).detach()
        set_parameter(live, stored.name, value[tuple(map(slice, stored.shape))].clone())
    return _configure_model(live)


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, model: Model | None = None
) -> nn.Module:
    """Load a causal language model from safetensors; never runs code from the folder.

    New experts get the router offset in the folder's state, which stock classes ignore. FFNs that
    are padded on disk get their true width.

    Args:
        folder: the checkpoint folder.
        dtype: of the weights in memory.
        model: of a folder that this process wrote or has checked; None checks the folder first.
    """
    if model is None:
        _check_small_files(folder)
        stock = _stock_config(folder)
        model = _model_in(folder, stock)
        TensorFolder.open(folder)  # all commands accept the same files
    else:
        stock = _stock_of(model.config)
    with errors_as(f"{folder} cannot be loaded as a model"), quiet():
        live, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=stock,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below by name
            output_loading_info=True,
        )
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise TritterError(
            f"{folder}: {name} has shape {tuple(found)}, but config.json requires {tuple(wanted)}."
        )
    report["unexpected_keys"] = [n for n in report["unexpected_keys"] if not is_computed(n)]
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        advice = "; it was saved with adapters on the model" if ".base_layer." in str(wrong) else ""
        raise TritterError(f"{folder} does not match its config.json: {brief(wrong)}{advice}")
    for stored in _narrower(model):
        value = _tensor_of(live, stored.name).detach()
        value = stripped(value, stored.shape, name=f"{folder}: {stored.name}")
        set_parameter(live, stored.name, value.clone())
    _pad_when_saved(live, model)
    added = AddedExperts.read(folder)
    if added is not None and not added.is_settled:
        with errors_as(f"{folder} cannot be loaded as a model"):
            added.apply(live)
    return _configure_model(live)


def non_finite_tensors(model: nn.Module) -> list[str]:
    """Return the names of tensors that contain NaN or infinity."""
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def unloaded_model(
    folder: Path,
    description: Model,
    buffer_of: Callable[[str], Tensor | None],
    *,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return the stock model of a folder without its parameters, which are NaN without memory.

    Buffers (rotary frequencies, scales) have the values that `load_model` gives. Experts run one
    after the other, new ones with their router offset, as in `load_model`.

    Args:
        folder: the checkpoint folder.
        description: what `read_model` gives for it.
        buffer_of: returns the value of a buffer in the files; None if they lack it.
        dtype: of the parameters.
    """
    _check_small_files(folder)
    with errors_as(f"{folder} cannot be loaded as a model"), quiet():
        stock = _stock_of(description.config)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(stock, dtype=dtype)
        assert isinstance(model, PreTrainedModel)
        model.tie_weights()
        _fill_buffers(model, buffer_of)
        stand_ins: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    values = torch.tensor(torch.nan, dtype=dtype).expand(parameter.shape)
                    made = nn.Parameter(values, requires_grad=False)
                    module._parameters[key] = stand_ins.setdefault(parameter, made)
        if description.family.has_experts:
            model.set_experts_implementation("eager")
        added = AddedExperts.read(folder)
        if added is not None and not added.is_settled:
            added.apply(model)
    return model.eval()


def _fill_buffers(model: PreTrainedModel, buffer_of: Callable[[str], Tensor | None]) -> None:
    """Give all buffers their values, as `from_pretrained` does.

    The class initialises the whole model, since a module may fill the buffers of its children. What
    files have is marked as initialised, so the class leaves it.
    """
    computed = set()
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            value = buffer_of(f"{path}.{key}")
            if value is None:
                value = torch.empty_like(buffer, device="cpu")
                computed.add(value)
                if buffer.is_floating_point():
                    value.fill_(torch.nan)  # what a class forgets is noticed
            module._buffers[key] = value.to(buffer.dtype)
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = value not in computed
    model.initialize_weights()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, end_of_text: str) -> None:
    """Write a tokenizer so that AutoTokenizer loads it, in transformers 4 too."""
    wrapped_tokenizer(tokenizer, end_of_text=end_of_text).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = {**read_object(path), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def wrapped_tokenizer(tokenizer: Tokenizer, *, end_of_text: str) -> PreTrainedTokenizerBase:
    """Return a transformers tokenizer whose end of text is also its BOS and padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=end_of_text,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer; never runs code from the folder."""
    _check_small_files(folder)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    # The tokenizers library raises plain Exception
    except Exception as error:
        raise TritterError(f"{folder} has no usable tokenizer: {error!r}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):  # settings that somebody saved
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _check_small_files(folder: Path) -> None:
    """Refuse a folder in which transformers would open a huge file, or a link out of it."""
    check_links(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _SMALL_FILES:
            require_file(path)


def _configure_model(model: PreTrainedModel) -> PreTrainedModel:
    """Set the loss, and run experts one after the other if the default kernel rejects their shape.

    `grouped_mm` needs rows of a multiple of 16 bytes, also in bf16, and does not support float64.
    Otherwise it is at least as fast as the loop, also on a CPU. `batched_mm` copies the weights of
    an expert for every token, so it is never used.
    """
    model.loss_type = model.loss_type or "ForCausalLM"  # not derivable from some class names
    family = find_family(model.config.model_type)
    is_aligned = True
    if family is not None and family.has_experts:
        sizes = model_of(model).sizes
        is_aligned = sizes.hidden_size % 8 == 0 and sizes.expert_size % 8 == 0
    elif model.config.model_type in SIGMOID_ROUTERS:
        config = model.config
        is_aligned = config.hidden_size % 8 == 0 and config.moe_intermediate_size % 8 == 0
    if not is_aligned or model.dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a model in place, but what stock models of the dtype have in float32.

    That includes buffers that are not stored, such as the frequencies of rotary positions.
    """
    if not isinstance(model, PreTrainedModel):  # it wraps one
        return model.to(dtype)
    whole = model_of(model)
    kept = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    kept |= set(whole.family.unrounded(whole.config, dtype))
    tensors = chain(model.named_parameters(), model.named_buffers())
    values = {name: tensor.data for name, tensor in tensors if name in kept}
    nn.Module.to(model, dtype)  # also of a model with a quantised base
    for name, value in values.items():
        attrgetter(name)(model).data = value
    return _configure_model(model)


@contextmanager
def checkpoint_activations(model: nn.Module) -> Iterator[None]:
    """Enable activation checkpointing of each decoder layer inside the block.

    It has no effect in evaluation mode, which stores no activations.
    """
    assert isinstance(model, PreTrainedModel)
    with quiet():  # which of its two names for this is deprecated depends on the version
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # For reentrant checkpointing only; the hook can't be pickled and requests unused gradients
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()
    try:
        yield
    finally:
        with quiet():
            model.gradient_checkpointing_disable()


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part of a stock model that computes the last hidden states [B, T, hidden].

    It owns the list of layers: OPT calls `model.decoder`, and passes over `model`.
    """
    layers = layers_of(model)
    return next(owner for owner in model.modules() if layers in owner.children())


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers: of all lists outside image and audio encoders, the largest."""
    lists = {n: module for n, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    decoders = [module for name, module in lists.items() if not is_tower(name)]
    return max(
        decoders or lists.values(),
        key=lambda each: sum(value.numel() for value in each.parameters()),
    )


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the function from last hidden states to logits; it accepts any subset of tokens.

    None: a model type without a table, whose class may do more between the two.
    """
    config: Any = model.config
    if find_family(config.model_type) is None:
        return None
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    divisor: float = getattr(config, "logits_scaling", 1.0)  # Granite's

    def logits(hidden: Tensor) -> Tensor:
        plain: Tensor = head(hidden) if divisor == 1 else head(hidden) / divisor
        return plain if cap is None else cap * torch.tanh(plain / cap)

    return logits


def model_of(live: nn.Module, *, is_whole: bool = False) -> Model:
    """Return the `Model` of a live Hugging Face model, as `read_model` does for a folder.

    The FFN widths are read from the weights.
    """
    refuse_wrapped(live, may_be_sharded=not is_whole)
    stock = getattr(live, "config", None)
    if stock is None or not hasattr(stock, "to_diff_dict"):
        raise RequestError(f"{type(live).__name__} has no Hugging Face config.")
    config = _plain(stock)
    model = Model(config)
    # The axes of a model type without a table are found when they are needed
    if find_family(str(config.get("model_type"))) is None and _has_even_layers(live):
        return model
    return model.with_widths_of({n: live_shape(value) for n, value in live.named_parameters()})


def _has_even_layers(model: nn.Module) -> bool:
    """Return True if parameters of the same name have the same shape in all layers of a list."""
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    return all(
        shapes.setdefault((id(layers), name), live_shape(value)) == live_shape(value)
        for layers in model.modules()
        if isinstance(layers, nn.ModuleList)
        for layer in layers
        for name, value in layer.named_parameters()
    )


def refuse_wrapped(model: object, *, may_be_sharded: bool = False) -> None:
    """Refuse a model that PEFT or DDP wraps, or that FSDP or tensor parallelism has sharded."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise RequestError(f"{type(model).__name__} wraps the model: pass its attribute module.")
    peft = sys.modules.get("peft")  # a model that it wraps has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        raise RequestError(
            f"the model is a PeftModel ({type(model).__name__}), and adapters are not supported "
            "here: pass model.merge_and_unload(), or the base alone, model.unload()."
        )
    if may_be_sharded or not isinstance(model, nn.Module):
        return
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FullyShardedDataParallel, fsdp.FlatParameter) if fsdp else ()
    parts = (*model.modules(), *model.parameters())
    if any(isinstance(part, kinds) or hasattr(part, "full_tensor") for part in parts):
        raise RequestError(
            f"the weights of {type(model).__name__} are sharded (FSDP or tensor parallelism): "
            "expand a model, or add experts, before you shard it; penalties and growth need whole "
            "weights."
        )


def live_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter's values, also if bitsandbytes has packed them."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if packed is None else packed.shape)


def _stock_of(config: Config) -> PreTrainedConfig:
    """Return the transformers config object of a config."""
    plain = plain_floats(on_disk(config))
    options = {key: value for key, value in plain.items() if key != "model_type"}
    return AutoConfig.for_model(str(config["model_type"]), **options)


def model_with_tensors(model: Model, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model with these tensors (by logical name) in their own dtypes."""
    live = new_model(model, seed=0)
    for stored in model.layout("live"):
        value = stored.pack(tensors.__getitem__)
        set_parameter(live, stored.name, value.to(_tensor_of(live, stored.name).device))
    live.tie_weights()  # type: ignore[operator]
    assert isinstance(live, PreTrainedModel)
    _pad_when_saved(live, model)
    return _configure_model(live)


def _pad_when_saved(live: PreTrainedModel, model: Model) -> None:
    """Let `save_pretrained` pad FFNs of different width: stock classes load no others."""
    if model.padded_shapes("live"):
        vars(live)["save_pretrained"] = partial(_save_padded, live)


def _save_padded(
    live: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *arguments: Any,
    **options: Any,
) -> None:
    values = dict(live.state_dict() if state_dict is None else state_dict)
    model = Model(_plain(live.config)).with_widths_of({n: live_shape(values[n]) for n in values})
    for name, shape in model.padded_shapes("live").items():
        whole = values[name].new_zeros(shape)
        whole[tuple(map(slice, values[name].shape))] = values[name].detach()
        values[name] = whole
    save = type(live).save_pretrained
    save(live, save_directory, is_main_process, values, *arguments, **options)


def _tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter of a model, or a buffer that its files have."""
    found = attrgetter(name)(model)
    assert isinstance(found, Tensor)
    return found


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by a value of any shape, and update the sizes of its linear layer."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    before = _tensor_of(model, name)
    is_parameter = isinstance(before, nn.Parameter)
    new = nn.Parameter(value, requires_grad=before.requires_grad) if is_parameter else value
    setattr(module, attribute, new)
    if attribute == "weight":
        update_linear_sizes(module)


def update_linear_sizes(module: nn.Module) -> None:
    """Set the size attributes of an nn.Linear or Conv1D from its weight."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = live_shape(weight)
    elif isinstance(module, Conv1D) and weight is not None:
        module.nx, module.nf = weight.shape


def _narrower(model: Model) -> Iterator[StoredTensor]:
    """Yield the tensors that are narrower in memory than in stock classes."""
    shapes = model.padded_shapes("live")
    return (stored for stored in model.layout("live") if stored.name in shapes)


def uninitialised_model(config: Config) -> nn.Module:
    """Return the stock model of a config with uninitialised weights, to inspect its modules."""
    with torch.random.fork_rng(devices=[]), no_init_weights():
        return AutoModelForCausalLM.from_config(_stock_of(config), dtype=torch.float32)


# Check that transformers can build the model of a config, before anything is written


def check_loadable(model: Model, *, folder: Path) -> None:
    """Refuse a config from which transformers does not build the model of the family table.

    The check builds one layer of each kind on the meta device.

    Args:
        model: the model to check.
        folder: with the generation settings, which transformers loads too.
    """
    settings = folder / "generation_config.json"
    if settings.exists():
        try:
            with errors_as(f"{settings} is not usable"), quiet():
                read_object(settings)
                GenerationConfig.from_pretrained(folder, local_files_only=True)
        except TritterError as error:
            raise RequestError(str(error)) from error
    model = model.on_disk
    family, config = model.family, model.config
    if not family.has_table:  # without a table, the stock class is the source of all shapes
        _ = model.num_tensors
        return
    kinds: dict[tuple[object, ...], int] = {}  # kind of layer by the config → its first layer
    lists = [config.get(key) for key in family.per_layer_config_keys]
    for layer, kind in enumerate(model.layer_kinds):
        own = [str(values[layer]) for values in lists if isinstance(values, list)]
        kinds.setdefault((kind, *own), layer)
    shallow = model.with_layers(list(kinds.values()))
    try:
        with torch.device("meta"), quiet():
            _stock_of(config)
            live = AutoModelForCausalLM.from_config(_stock_of(shallow.config))
            found = {name: tuple(value.shape) for name, value in live.state_dict().items()}
    # Model classes trust their config and raise anything over invalid values
    except Exception as error:
        raise RequestError(
            f"config.json: transformers can't build this model: {_cause(config, error)}."
        ) from error
    expected = {stored.name: stored.shape for stored in shallow.layout("live")}
    tied = family.tied_names(shallow.config).keys()
    wrong = sorted(
        name
        for name in (found.keys() | expected.keys()) - tied
        if found.get(name) != expected.get(name)
    )
    if wrong:
        raise RequestError(
            f"config.json: transformers builds a different model from it: {wrong[0]} would have "
            f"shape {found.get(wrong[0])}, not {expected.get(wrong[0])}."
        )


def _cause(config: Config, error: Exception) -> str:
    """Return the config value that caused an error, or else the text of the error."""
    if isinstance(error, KeyError) and error.args:
        for key, value in config.items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            for inner, candidate in nested:
                if candidate == error.args[0]:
                    name = f"{key}.{inner}" if inner else key
                    return f"{name} = {candidate} is unknown"
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        return f"pad_token_id = {pad} is outside the vocabulary of {size} tokens"
    return " ".join(str(error).split()) or type(error).__name__
