"""Training checkpoints of Lightning: converted exactly, and nothing that they hold is run."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.checkpoints.test_export import tiny_experts
from tests.oracle import logits, saved, stock, tiny_llama, tokens
from tritter.checkpoints.lightning_file import read_lightning_file
from tritter.core.models import model_of
from tritter.errors import RequestError, TritterError


class Wrapped(lightning.LightningModule):
    """What people write around a Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(path: Path, model: nn.Module) -> Wrapped:
    """Train three steps and save as Lightning does."""
    module = Wrapped(model)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(list(tokens(batch=6)), batch_size=2))
    trainer.save_checkpoint(path)
    model.eval()
    return module


def convert(path: Path, model: nn.Module, destination: Path, **options: Any) -> tuple[str, ...]:
    weights, skipped = read_lightning_file(path, model_of(model), **options)
    weights.export(destination, dtype=weights.widest_dtype, artifacts=())
    return (skipped,) if skipped else ()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_the_model_without_its_optimizer(tmp_path: Path, is_tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=is_tied)
    trained(tmp_path / "run.ckpt", model)
    assert convert(tmp_path / "run.ckpt", model, tmp_path / "out") == ()
    assert torch.equal(logits(stock(tmp_path / "out"), tokens()), logits(model, tokens()))
    assert not (tmp_path / "out/state").exists()


def test_experts_that_share_a_tensor_in_memory(tmp_path: Path) -> None:
    model = tiny_experts("mixtral")
    trained(tmp_path / "run.ckpt", model)
    assert convert(tmp_path / "run.ckpt", model, tmp_path / "out") == ()
    assert torch.equal(logits(stock(tmp_path / "out"), tokens()), logits(model, tokens()))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"net.inner.{name}",
        lambda name: f"model._orig_mod.{name}",
        lambda name: name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    ],
)
def test_names_are_found_behind_any_prefix(tmp_path: Path, rename: Callable[[str], str]) -> None:
    model = tiny_llama()
    named = {rename(name): value for name, value in model.state_dict().items()}
    # What a module of ours says beside its weights
    torch.save({"state_dict": named | {"_extra_state": {"journal": []}}}, tmp_path / "run.ckpt")
    torch.save(named, tmp_path / "weights.pt")
    for name in ("run.ckpt", "weights.pt"):
        assert convert(tmp_path / name, model, tmp_path / f"{name}-out") == ()
        assert torch.equal(
            logits(stock(tmp_path / f"{name}-out"), tokens()), logits(model, tokens())
        )


def _two_models(path: Path) -> nn.Module:
    student, teacher = tiny_llama(), tiny_llama(initializer_range=0.1)
    named = {f"student.{name}": value for name, value in student.state_dict().items()}
    named |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    torch.save({"state_dict": named}, path)
    return student


def test_of_two_models_one_is_named(tmp_path: Path) -> None:
    student = _two_models(tmp_path / "run.ckpt")
    with pytest.raises(
        RequestError, match=r"2 models with the prefixes 'student.', 'teacher.'; .* --prefix"
    ):
        convert(tmp_path / "run.ckpt", student, tmp_path / "out")
    with pytest.raises(RequestError, match=r"--prefix = studnt: .* Did you mean 'student\.'"):
        convert(tmp_path / "run.ckpt", student, tmp_path / "out", prefix="studnt")
    notes = convert(tmp_path / "run.ckpt", student, tmp_path / "out", prefix="student")
    assert "30 tensors outside 'student' were skipped: teacher.model.embed" in notes[0]
    assert torch.equal(logits(stock(tmp_path / "out"), tokens()), logits(student, tokens()))


# Tensors that do not fit


def _with(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with("loss.weight", torch.ones(3)), ["1 tensors that llama does not have: loss.weight",
                                               "--prefix model. skips"]),
        (_with("model.model.norm.weight", None), ["1 tensors are missing: model.norm.weight"]),
        (_with("model.model.norm.weight", torch.ones(5)), ["norm.weight has shape (5,)", "(24,)"]),
        (_with("model.model.norm.weight", torch.ones(24, dtype=torch.int8)), ["torch.int8"]),
        (_with("model.model.norm.weight", torch.eye(24).to_sparse()), ["no state_dict"]),
        (_with("model.model.embed_tokens.weight", None), ["whose name ends with model.embed_t"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: list[str]
) -> None:
    model = tiny_llama()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    change(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "run.ckpt")
    with pytest.raises(TritterError) as error:
        convert(tmp_path / "run.ckpt", model, tmp_path / "out")
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_a_head_that_only_the_config_ties(tmp_path: Path) -> None:
    untied, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    torch.save({"state_dict": untied.state_dict()}, tmp_path / "run.ckpt")
    with pytest.raises(TritterError, match=r"lm_head.weight differs from model.embed_tokens"):
        convert(tmp_path / "run.ckpt", tied, tmp_path / "out")


def test_old_rotary_frequencies_are_no_leftovers(tmp_path: Path) -> None:
    model = tiny_llama()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    torch.save({"state_dict": model.state_dict() | frequencies}, tmp_path / "run.ckpt")
    convert(tmp_path / "run.ckpt", model, tmp_path / "out")
    assert stock(tmp_path / "out")


# Hostile and damaged files


class Trap:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, is_zip: bool, place: str) -> None:
    model, sprung = tiny_llama(), tmp_path / "sprung"
    content = {"state_dict": dict(model.state_dict())}
    content.setdefault(place, {})["x"] = Trap(sprung)  # type: ignore[assignment]
    path = tmp_path / "run.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(TritterError) as error:
        convert(path, model, tmp_path / "out")
    assert not sprung.exists()
    assert "system" in str(error.value)
    assert "execute code when loaded" in str(error.value)
    torch.load(path, weights_only=False)  # the trap is a real one
    assert sprung.exists()
    assert not (tmp_path / "out").exists()


def test_no_setting_of_the_environment_opens_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": {}, "x": Trap(tmp_path / "sprung")}, tmp_path / "run.ckpt")
    with pytest.raises(TritterError, match="execute code when loaded"):
        convert(tmp_path / "run.ckpt", tiny_llama(), tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


def _cut(path: Path) -> None:
    torch.save({"state_dict": tiny_llama().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:20_000])


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "cut off": _cut,
    "random": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("sprung")))),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "no tensors": lambda path: torch.save({"state_dict": {"a": 1}}, path),
    "an empty one": lambda path: torch.save({"state_dict": {}}, path),
    "other keys": lambda path: torch.save({"epoch": 3, "model": {"a": torch.ones(2)}}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_checkpoint_is_told(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / "run.ckpt")
    with pytest.raises(
        TritterError, match=r"run\.ckpt (is not a|contains no|contains obj|cannot be r)"
    ):
        convert(tmp_path / "run.ckpt", tiny_llama(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.ckpt"]


def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_llama().state_dict()}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "run.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry) + bytes(10**6))
    with pytest.raises(TritterError, match=r"run\.ckpt is a compressed archive .* expand to 10"):
        convert(tmp_path / "run.ckpt", tiny_llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_saved_folder_is_the_better_way_and_gives_the_same(tmp_path: Path) -> None:
    model = tiny_llama()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "run.ckpt")
    convert(tmp_path / "run.ckpt", model, tmp_path / "out")
    assert torch.equal(
        logits(stock(tmp_path / "out"), tokens()),
        logits(stock(saved(model, tmp_path / "base")), tokens()),
    )
