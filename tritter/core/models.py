"""Where transformers is used: configs, models and tokenizers, built or loaded."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tritter.core.families import (
    Config,
    StoredTensor,
    check_config,
    family_of,
    find_family,
    layout,
    match,
    on_disk,
    pack_all,
    padded_shapes,
    unpack_all,
    with_ffn_sizes,
    with_live_sizes,
)
from tritter.core.families.config_file import refused_as, sane_config
from tritter.core.stock_routers import AddedExperts
from tritter.errors import RequestError, TritterError
from tritter.storage.reading import check_links, read_object, require_file
from tritter.storage.tensors import TensorFolder, is_computed
from tritter.storage.writer import stripped

# Of these transformers may read any by itself.
_SMALL_FILES = {".json", ".jinja", ".model", ".txt"}


def read_config(folder: Path, *, ffn_sizes: Sequence[int] | None = None) -> Config:
    """Return the content of a folder's config.json with the defaults of its own class written out.

    Where its layers' FFNs differ in width, `ffn_sizes` says so.

    Args:
        ffn_sizes: those of the folder's lineage; None: it was not read yet.

    Raises:
        RequestError: a family that there is no table for; names those there are.
        TritterError: there is none, it is not a config that transformers accepts, or its sizes
            are beyond all limits.
    """
    return _config_in(folder, _stock_config(folder), ffn_sizes)


def _config_in(
    folder: Path, stock: PreTrainedConfig, ffn_sizes: Sequence[int] | None = None
) -> Config:
    config = _plain(stock)
    return with_live_sizes(family_of(config), config, folder, ffn_sizes=ffn_sizes)


def _plain(config: PreTrainedConfig) -> Config:
    """Return a config as stock saves write it: without its place, and general unused defaults."""
    plain: Config = config.to_diff_dict()
    return {key: value for key, value in plain.items() if key != "_name_or_path"}


def _stock_config(folder: Path) -> PreTrainedConfig:
    """Return transformers' own record of a folder's config.json, once that was found sane.

    Whatever in it names code (a class beside the model, a kernel from the hub) is left out: the
    classes and kernels are always transformers' own.
    """
    family, own = sane_config(folder)
    with refused_as(f"{folder / 'config.json'} is not a usable config"), quiet():
        config = CONFIG_MAPPING[family.model_type].from_dict(own)
        check_config(family, config.to_dict())  # with the defaults of what the file leaves out
        return config


def new_model(config: Config, *, seed: int) -> nn.Module:
    """Return a model with freshly drawn float32 weights; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the GPUs' generators stay as they are
        built = stock_config_of(config)
        model = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
    for stored in _narrower(config):
        value = model.get_parameter(stored.name).detach()
        set_parameter(model, stored.name, value[tuple(map(slice, stored.shape))].clone())
    return _made_ready(model)


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, config: Config | None = None
) -> nn.Module:
    """Load a causal language model from safetensors; never runs code from the folder.

    Experts that are being added get the router offset that the folder's state says, so that the
    model computes what it should where stock classes alone would not. FFNs that are padded on disk
    get the width that they have.

    Args:
        config: of a folder that this process wrote or has checked; None checks the folder first.

    Raises:
        TritterError: transformers cannot load it, a tensor is missing or left over, or what should
            be padding is none.
    """
    if config is None:
        _check_small_files(folder)
        stock = _stock_config(folder)
        config = _config_in(folder, stock)
        TensorFolder.open(folder)  # one reader decides for all commands what is taken
    else:
        stock = stock_config_of(config)
    with refused_as(f"{folder} cannot be loaded as a model"), quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=stock,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    report["unexpected_keys"] = [n for n in report["unexpected_keys"] if not is_computed(n)]
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        raise TritterError(f"{folder} does not fit its config.json: {wrong}")
    for stored in _narrower(config):
        value = model.get_parameter(stored.name).detach()
        live = stripped(value, stored.shape, name=f"{folder}: {stored.name}")
        set_parameter(model, stored.name, live.clone())
    added = AddedExperts.read(folder)
    if added is not None and not added.is_settled:
        with refused_as(f"{folder} cannot be loaded as a model"):
            added.apply(model)
    return _made_ready(model)


def non_finite(model: nn.Module) -> list[str]:
    """Return the names of tensors that hold NaN or infinity."""
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def unloaded_model(folder: Path) -> nn.Module:
    """Return the stock model of a folder without its weights: its parameters are on meta.

    Buffers (rotary frequencies, scales) hold what the stock class computes. Experts compute one
    after the other, those that are being added behind their router offset, as in `load_model`.

    Raises:
        TritterError: transformers cannot build it.
    """
    _check_small_files(folder)
    stock = _stock_config(folder)
    config = _config_in(folder, stock)
    with refused_as(f"{folder} cannot be loaded as a model"), quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock, dtype=torch.float32)
        assert isinstance(model, PreTrainedModel)
        for module in model.modules():  # the stock class fills the buffers that no file holds
            buffers, names = module._buffers, module._non_persistent_buffers_set
            names = {name for name in names if buffers[name] is not None}
            for name in names:
                buffers[name] = torch.empty_like(buffers[name], device="cpu")
            if names:
                model._init_weights(module)
        assert not any(buffer.is_meta for buffer in model.buffers())
        if family_of(config).has_experts:
            model.set_experts_implementation("eager")
        added = AddedExperts.read(folder)
        if added is not None and not added.is_settled:
            for stored in layout(config, "live"):
                if stored.parts[0].tensor.kind == "router":  # offsets lie where the weight does
                    set_parameter(model, stored.name, torch.empty(stored.shape))
            added.apply(model)
    return model.eval()


def named_tensors(model: nn.Module, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of a live model, in the family's order; ties once.

    Experts that share a tensor in memory alone come one by one, as views.

    Raises:
        TritterError: the model holds a tensor that its family has not, or lacks one.
    """
    yield from stored_tensors(model.state_dict(), config)


def stored_tensors(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of a live model's state dict; see `named_tensors`."""
    for stored in match(config, state):
        held = state[stored.name].detach()
        if stored.is_whole:
            yield stored.parts[0].tensor.disk_name, held
        elif stored.is_of_experts:
            yield from ((tensor.disk_name, value) for tensor, value in stored.unpack(held))
        else:
            yield stored.name, held


def live_tensors(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name in memory → tensor, for values (of a state, a mask) by their name there."""
    family = family_of(config)
    logical = family.logical_tensors(config)
    held = {t.name: tensors[t.disk_name] for t in logical if t.disk_name in tensors}
    return pack_all(layout(config, "live"), held)


def disk_tensors(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name in a state → tensor, for values by name in memory."""
    family = family_of(config)
    held = unpack_all(layout(config, "live"), tensors)
    return {t.disk_name: held[t.name] for t in family.logical_tensors(config) if t.name in held}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, end_of_text: str) -> None:
    """Write a tokenizer so that AutoTokenizer loads it."""
    wrapped_tokenizer(tokenizer, end_of_text=end_of_text).save_pretrained(folder)


def wrapped_tokenizer(tokenizer: Tokenizer, *, end_of_text: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer as transformers has them; its end of text begins and pads texts too."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=end_of_text,
    )


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


def _check_small_files(folder: Path) -> None:
    """Refuse a folder in which transformers would open what is no file of it, or a huge one.

    Raises:
        TritterError: names it.
    """
    check_links(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _SMALL_FILES:
            require_file(path)


def _made_ready(model: PreTrainedModel) -> PreTrainedModel:
    """Let experts compute one after the other where the default kernel refuses them; name the loss.

    `grouped_mm` wants rows of whole 16 bytes, in bf16 as well, and knows no float64; elsewhere it
    is as quick as the loop or quicker (measured on a CPU too). `batched_mm` copies an expert's
    weights for every token and is never taken.
    """
    model.loss_type = model.loss_type or "ForCausalLM"  # which some classes' names do not say
    family = find_family(model.config.model_type)
    if family is None or not family.has_experts:
        return model
    dimensions = family.dimensions(config_of(model))
    is_aligned = dimensions.hidden_size % 8 == 0 and dimensions.expert_size % 8 == 0
    if not is_aligned or model.dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


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


@contextmanager
def activations_recomputed(model: nn.Module) -> Iterator[None]:
    """Let each decoder layer keep no more than its input within, and compute again what it needs.

    Only where the model is in training mode: while it is looked at, nothing is kept anyway.
    """
    assert isinstance(model, PreTrainedModel)
    with quiet():  # which of its two names for this is deprecated depends on the version
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # For the other kind; it can't be sent to a process, and asks for gradients that nobody needs
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()
    try:
        yield
    finally:
        with quiet():
            model.gradient_checkpointing_disable()


def backbone_of(model: nn.Module) -> nn.Module:
    """Return what of a stock model gives the last hidden states [B, T, hidden], no logits."""
    backbone: nn.Module = getattr(model, str(model.base_model_prefix))
    return backbone


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what makes logits of last hidden states, for any part of the tokens."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    divisor: float = getattr(model.config, "logits_scaling", 1.0)  # Granite's

    def logits(hidden: Tensor) -> Tensor:
        plain: Tensor = head(hidden) if divisor == 1 else head(hidden) / divisor
        return plain if cap is None else cap * torch.tanh(plain / cap)

    return logits


def config_of(model: nn.Module) -> Config:
    """Return the config of a live Hugging Face model, as `read_config` gives it.

    How wide its FFNs are, their weights say.

    Raises:
        RequestError: the model has none, or is wrapped by PEFT.
    """
    refuse_peft(model)
    held = getattr(model, "config", None)
    if held is None or not hasattr(held, "to_diff_dict"):
        raise RequestError(f"{type(model).__name__} has no Hugging Face config.")
    config = _plain(held)
    family = find_family(str(config.get("model_type")))
    if family is None or family.has_experts:
        return config
    parameters = dict(model.named_parameters())
    (up,) = (tensor for tensor in family.tensors if tensor.kind == "ffn.up")
    names = [up.for_layer(n).disk_name for n in range(held.num_hidden_layers)]
    if not all(name in parameters for name in names):  # a part of a model
        return config
    sizes = [live_shape(parameters[name])[int(up.is_transposed)] for name in names]
    return with_ffn_sizes(config, sizes, key=family.sizes["intermediate_size"])


def refuse_peft(model: object) -> None:
    """Refuse a model that PEFT wraps.

    Raises:
        RequestError: names its class and what to pass instead.
    """
    peft = sys.modules.get("peft")  # a model that it wraps has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        raise RequestError(
            f"the model is a PeftModel ({type(model).__name__}), and adapters are not supported "
            "here: pass model.merge_and_unload(), or the base alone, model.unload()."
        )


def live_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter's values, where bitsandbytes holds them packed too."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if packed is None else packed.shape)


def stock_config_of(config: Config) -> PreTrainedConfig:
    """Return transformers' own record of a config."""
    options = {key: value for key, value in on_disk(config).items() if key != "model_type"}
    return AutoConfig.for_model(str(config["model_type"]), **options)


def model_with_tensors(config: Config, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model of a config that holds these tensors (by logical name), dtypes kept."""
    model = new_model(config, seed=0)
    for stored in layout(config, "live"):
        value = stored.pack(tensors.__getitem__)
        set_parameter(model, stored.name, value.to(model.get_parameter(stored.name).device))
    model.tie_weights()  # type: ignore[operator]
    assert isinstance(model, PreTrainedModel)
    return _made_ready(model)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value of any shape in a parameter's place; a linear layer's own sizes follow."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    requires_grad = model.get_parameter(name).requires_grad
    setattr(module, attribute, nn.Parameter(value, requires_grad=requires_grad))
    if attribute == "weight":
        state_sizes(module)


def state_sizes(module: nn.Module) -> None:
    """Let a linear layer of either kind state the sizes that its weight has."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = live_shape(weight)
    elif isinstance(module, Conv1D) and weight is not None:
        module.nx, module.nf = weight.shape


def _narrower(config: Config) -> Iterator[StoredTensor]:
    """Yield what has another shape in memory than stock classes give it."""
    shapes = padded_shapes(config)
    return (stored for stored in layout(config, "live") if stored.name in shapes)


def weightless_model(config: Config) -> nn.Module:
    """Return the stock model of a config, its weights never drawn; for what its modules are."""
    with torch.random.fork_rng(devices=[]), no_init_weights():
        return AutoModelForCausalLM.from_config(stock_config_of(config), dtype=torch.float32)


# Whether transformers can build the model that a config describes, before anything is written


def check_loadable(config: Config, *, folder: Path) -> None:
    """Refuse a config from which transformers would not build the model of its family's table.

    One layer of each kind is built, without memory for its tensors.

    Args:
        folder: where its generation settings lie, which are read on loading too.

    Raises:
        RequestError: says what transformers made of it.
    """
    settings = folder / "generation_config.json"
    if settings.exists():
        try:
            with refused_as(f"{settings} is not usable"), quiet():
                read_object(settings)
                GenerationConfig.from_pretrained(folder, local_files_only=True)
        except TritterError as error:
            raise RequestError(str(error)) from error
    family, config = family_of(config), on_disk(config)
    kinds: dict[tuple[object, ...], int] = {}  # of layers that the config tells apart → the first
    stated = [config.get(key) for key in family.per_layer_config_keys]
    for layer, kind in enumerate(family.layer_kinds(config)):
        own = [str(values[layer]) for values in stated if isinstance(values, list)]
        kinds.setdefault((kind, *own), layer)
    shallow = family.with_layers(config, list(kinds.values()))
    try:
        with torch.device("meta"), quiet():
            stock_config_of(config)
            model = AutoModelForCausalLM.from_config(stock_config_of(shallow))
            found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # The border to classes that trust their config: they raise whatever its values lead them to
    except Exception as error:
        raise RequestError(
            f"config.json: transformers can't build this model: {_blamed(config, error)}."
        ) from error
    expected = {stored.name: stored.shape for stored in layout(shallow, "live")}
    tied = family.tied_names(shallow)
    wrong = sorted(
        name
        for name in (found.keys() | expected.keys()) - tied
        if found.get(name) != expected.get(name)
    )
    if wrong:
        raise RequestError(
            f"config.json: transformers builds another model from it: {wrong[0]} would be of shape "
            f"{found.get(wrong[0])}, not {expected.get(wrong[0])}."
        )


def _blamed(config: Config, error: Exception) -> str:
    """Name the values of a config that an error speaks of, or say what it says."""
    if isinstance(error, KeyError) and error.args:
        for key, value in config.items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            for inner, held in nested:
                if held == error.args[0]:
                    name = f"{key}.{inner}" if inner else key
                    return f"{name} = {held} is not known to it"
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        return f"pad_token_id = {pad} is no token of a vocabulary of {size}"
    return " ".join(str(error).split()) or type(error).__name__
