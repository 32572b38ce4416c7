"""Grown checkpoints in the tools that use them: the same function as before, to rounding.

torchao, ONNX and mergekit come with `tritter[clients]`. llama.cpp needs a checkout of it, named by
LLAMA_CPP, and the package llama-cpp-python.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from tests import oracle
from tritter.core.expansions import Layers, LlamaPro, Moe, Vocab, Width
from tritter.data.vocabulary import pursuit_rows
from tritter.transform.folder import expand

pytestmark = pytest.mark.full
TEXT = "def read(path):\n    return open(path).read()  # each of them\n"
GROWN = {
    "width": Width(hidden_size=192),
    "llama_pro": LlamaPro(),
    "moe": Moe(num_experts=4, noise=0.0),
}


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE with bytes for unknown characters: llama.cpp accepts it without knowing its name."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    made.train_from_iterator([TEXT] * 20, trainer)
    plain = json.loads(made.to_str())
    del plain["added_tokens"][3:]  # bytes are no special tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and what grew from it, in sizes that quantisers take."""
    place, tokenizer = tmp_path_factory.mktemp("clients"), llama_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    model = oracle.tiny_llama(
        vocab_size=len(tokenizer), num_key_value_heads=2, num_hidden_layers=2,
        initializer_range=0.1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        head_dim=32, **sizes,
    )  # fmt: skip
    oracle.saved(model, place / "base")
    tokenizer.save_pretrained(place / "base")
    for name, spec in GROWN.items():
        expand(place / "base", place / name, [spec])
    return place


@pytest.fixture(params=["base", *GROWN])
def folder(request: pytest.FixtureRequest, place: Path) -> Path:
    found: Path = place / request.param
    return found


def tokens_of(folder: Path) -> Tensor:
    """Token ids [1, T] of the text."""
    ids: Tensor = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    return ids


def check_near(found: Tensor, folder: Path, *, most: float) -> None:
    """Compare logits with the stock model of the base: RMS, relative to their deviation."""
    expected = oracle.logits(oracle.stock(folder.parent / "base"), tokens_of(folder))
    assert (found - expected).square().mean().sqrt() <= most * expected.std()


def test_bitsandbytes_quantises_to_four_bits(folder: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = oracle.stock(folder, quantization_config=settings)
    check_near(oracle.logits(model, tokens_of(folder)), folder, most=0.5)


def test_torchao_quantises_to_eight_bits(folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = oracle.stock(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    check_near(oracle.logits(model, tokens_of(folder)), folder, most=0.05)


class _Logits(nn.Module):
    """Logits [B, T, V] without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def test_onnx_runtime_computes_the_same(folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    # The default implementation of experts, grouped_mm, has no ONNX function
    model, ids = oracle.stock(folder, experts_implementation="batched_mm"), tokens_of(folder)
    torch.onnx.export(
        _Logits(model).eval(), (ids,), tmp_path / "model.onnx", input_names=["input_ids"],
        dynamo=True, dynamic_shapes=({1: torch.export.Dim.AUTO},), verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for read in (ids, ids[:, :5]):
        (found,) = session.run(None, {"input_ids": read.numpy()})
        expected = oracle.logits(oracle.stock(folder), read)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)


def test_mergekit_merges_two_of_one_shape(folder: Path, tmp_path: Path) -> None:
    merge = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    shutil.copytree(folder, tmp_path / "other")
    half = {"parameters": {"weight": 0.5}}
    both = [{"model": str(each), **half} for each in (folder, tmp_path / "other")]
    asked = {"merge_method": "linear", "models": both, "dtype": "float32"}
    merge.run_merge(MergeConfiguration.model_validate(asked), str(tmp_path / "m"), MergeOptions())
    check_near(oracle.logits(oracle.stock(tmp_path / "m"), tokens_of(folder)), folder, most=1e-5)


@pytest.mark.parametrize(
    "slices",
    [
        [(0, 6), (2, 8)],  # SOLAR, arXiv 2312.15166: 0:24, 8:32
        [(start, start + 2) for start in range(7)],  # MegaDolphin-120b: 0:20, 10:30, …, 60:80
        [(4, 8), (0, 1), (3, 4)],
    ],
    ids=["solar", "megadolphin", "reordered"],
)
def test_a_layer_table_is_the_passthrough_of_mergekit(
    tmp_path: Path, slices: list[tuple[int, int]]
) -> None:
    merge = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    source = oracle.saved(oracle.tiny_llama(num_hidden_layers=8), tmp_path / "source")
    ranges = [{"model": str(source), "layer_range": list(each)} for each in slices]
    asked = {
        "merge_method": "passthrough", "slices": [{"sources": [each]} for each in ranges],
        "dtype": "float32",
    }  # fmt: skip
    options = MergeOptions(copy_tokenizer=False)
    merge.run_merge(MergeConfiguration.model_validate(asked), str(tmp_path / "merged"), options)
    grown = expand(source, tmp_path / "grown", [Layers(slices=tuple(slices))]).folder
    merged, made = (oracle.stock(each) for each in (tmp_path / "merged", grown))
    assert merged.config.num_hidden_layers == made.config.num_hidden_layers
    expected, found = merged.state_dict(), made.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_lm_eval_scores_it_as_its_base(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def score(path: Path) -> float:
        model = HFLM(pretrained=str(path), device="cpu", dtype="float32")
        request = Instance("loglikelihood", {}, (TEXT[:20], TEXT[20:]), 0)
        return float(model.loglikelihood([request], disable_tqdm=True)[0][0])

    assert score(folder) == pytest.approx(score(folder.parent / "base"), rel=1e-5)


def test_peft_trains_an_adapter_on_it(folder: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(oracle.stock(folder), LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids, losses = tokens_of(folder), []
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    for _ in range(5):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_trl_fine_tunes_it(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-3, logging_steps=1, max_length=16, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=oracle.stock(folder),
        args=settings,
        train_dataset=Dataset.from_dict({"text": [TEXT] * 32}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]


# llama.cpp


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    """The library of llama.cpp, which must be there with the scripts of its checkout."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    return pytest.importorskip("llama_cpp")


def gguf_of(folder: Path, kind: str = "f32") -> Path:
    path = folder.parent / f"{folder.name}.{kind}.gguf"
    if path.exists():
        return path
    script = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    words = [str(folder), "--outtype", kind, "--outfile", str(path)]
    subprocess.run([sys.executable, script, *words], check=True, capture_output=True)
    return path


def logits_of(library: Any, path: Path, ids: Tensor) -> Tensor:
    """Logits [1, T, V] of llama.cpp."""
    model = library.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    model.eval(ids[0].tolist())
    return torch.tensor(numpy.array(model.scores[: ids.shape[1]]))[None]


def test_llama_cpp_computes_the_same(folder: Path, llama_cpp: Any) -> None:
    found = logits_of(llama_cpp, gguf_of(folder), tokens_of(folder))
    check_near(found, folder, most=2e-3)  # its KV cache has 16 bits
    expected = oracle.logits(oracle.stock(folder), tokens_of(folder))
    assert found.topk(10).indices.equal(expected.topk(10).indices)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_llama_cpp_quantises_it(folder: Path, llama_cpp: Any, kind: str, tmp_path: Path) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    source, small = gguf_of(folder), tmp_path / "small.gguf"
    given = (str(source).encode(), str(small).encode(), ctypes.byref(options))
    assert llama_cpp.llama_model_quantize(*given) == 0
    check_near(logits_of(llama_cpp, small, tokens_of(folder)), folder, most=0.5)


def test_llama_cpp_reads_new_tokens(place: Path, llama_cpp: Any) -> None:
    grown, text = place / "vocab", "def ranch(chance):\n    return open(chance) panther"
    expand(place / "base", grown, [Vocab(tokens=("ranch", "chance", " panther"), multiple_of=1)])
    ids: Tensor = AutoTokenizer.from_pretrained(grown)(text, return_tensors="pt").input_ids
    size = oracle.stock(place / "base").config.vocab_size
    assert int((ids >= size).sum()) >= 3
    path = gguf_of(grown)
    model = llama_cpp.Llama(str(path), n_ctx=128, vocab_only=True, verbose=False)
    assert model.tokenize(text.encode(), add_bos=int(ids[0, 0]) == 1) == ids[0].tolist()
    found, expected = (logits_of(llama_cpp, path, ids), oracle.logits(oracle.stock(grown), ids))
    assert (found - expected).square().mean().sqrt() < 2e-3 * expected.std()


def test_rows_by_matching_pursuit_are_those_of_tokensurgeon() -> None:
    omp = pytest.importorskip("mergekit.tokensurgeon.omp")
    generator = torch.Generator().manual_seed(0)
    targets, dictionary = torch.randn(72, 24, generator=generator).split([12, 60])
    # Of equal length: tokensurgeon compares products, Tritter cosines
    dictionary = torch.nn.functional.normalize(dictionary, dim=1)
    numbers = [7 * place for place in range(60)]
    found = pursuit_rows(targets, dictionary, numbers, size=6)
    chosen, factors = omp.batch_omp(targets.double(), dictionary.double(), 6)
    for row, places, weights in zip(found, chosen.tolist(), factors.tolist(), strict=True):
        assert list(row) == [numbers[place] for place in places]
        assert list(row.values()) == pytest.approx(weights, rel=1e-5)
