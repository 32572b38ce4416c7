"""A larger vocabulary: old rows keep their bits, old logits do not change, state follows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests import oracle
from tests.data.test_vocabulary import sentence_piece
from tests.oracle.families import generic, tiny
from tests.real import real_checkpoint
from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.state import KeptSequences, State, write_state
from tritter.core.expansions import LlamaPro, Vocab, Width
from tritter.core.families import Model
from tritter.core.models import load_tokenizer, model_of, read_model, save_tokenizer
from tritter.core.parameter_map import Fill, TensorMap
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, parsed_tokenizer, train_tokenizer
from tritter.data.vocabulary import BpeTokenizer, ExtendedTokenizer
from tritter.errors import RequestError
from tritter.evaluation.jump import Jump
from tritter.storage.reading import LINEAGE_NAME
from tritter.storage.writer import TensorStream
from tritter.transform import expand
from tritter.transform.vocabulary import learned

SIZE, TOKENS = 320, ("dog", "jump", "jumps", " boxes")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 30


def written(folder: Path, model: PreTrainedModel, *, padding: int = 0) -> Path:
    """Save a model with a tokenizer that has special tokens after its vocabulary.

    Args:
        folder: of the checkpoint.
        model: the model.
        padding: number of rows without a token.
    """
    oracle.saved(model, folder)
    tokenizer = train_tokenizer([Document("d", TEXT)], vocab_size=290)
    spare = model.config.vocab_size - padding - tokenizer.get_vocab_size() - 1
    tokenizer.add_special_tokens([*(f"<|{number}|>" for number in range(spare)), "<|end|>"])
    save_tokenizer(tokenizer, folder, end_of_text=END_OF_TEXT)
    return folder


def vocab(**options: Any) -> Vocab:
    return Vocab(tokens=TOKENS, multiple_of=1, **options)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("family", generic())
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_family_keeps_the_logits_of_old_tokens(
    tmp_path: Path, family: str, is_tied: bool
) -> None:
    model = tiny(family, vocab_size=SIZE, tie_word_embeddings=is_tied)
    source = written(tmp_path / "base", model)
    made = expand(source, tmp_path / "grown", [vocab()]).plan.vocabulary
    assert made is not None and len(made.new_ids) > len(TOKENS)  # and the parts on the way
    grown = oracle.stock(tmp_path / "grown")
    ids = oracle.tokens(SIZE)
    before, after = (oracle.logits(each, ids) for each in (model, grown))
    assert after.shape[-1] == SIZE + len(made.new_ids)
    assert (after[..., :SIZE] - before).abs().max() < 1e-5 * before.std()
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "grown"))
    for tensor in model_of(model).tensors:
        name = tensor.disk_name
        if name in new:
            assert torch.equal(new[name][: len(old[name])], old[name]), name
            added = len(made.new_ids) if tensor.kind in ("embed", "head") else 0
            assert len(new[name]) == len(old[name]) + added


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    model = oracle.tiny_llama(vocab_size=SIZE, tie_word_embeddings=False)
    return written(tmp_path / "base", model)


def extension(source: Path) -> ExtendedTokenizer:
    merges = Lineage.of(source).expansion_history[-1].options["merges"]
    tokenizer = Tokenizer.from_file(str(source.parent / "base" / "tokenizer.json"))
    pairs = tuple(zip(merges[::2], merges[1::2], strict=True))
    return ExtendedTokenizer(BpeTokenizer(tokenizer).content, pairs)


def test_new_rows_are_means_of_the_tokens_they_consist_of(llama: Path, tmp_path: Path) -> None:
    expand(llama, tmp_path / "grown", [vocab()], dtype=torch.float64)
    new = load_file(tmp_path / "grown" / "model.safetensors")
    made = extension(tmp_path / "grown")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = load_file(llama / "model.safetensors")[name].double()
        for number, parts in made.parts.items():
            mean = torch.stack([old[part] for part in parts]).mean(dim=0)
            assert torch.allclose(new[name][number], mean, atol=1e-7)


@pytest.mark.parametrize("init", ["mean", "random"])
def test_16_bit_rows_keep_their_bits_and_unused_rows_are_quiet(tmp_path: Path, init: Any) -> None:
    model = oracle.tiny_llama(vocab_size=SIZE).to(torch.bfloat16)
    source = written(tmp_path / "base", model)
    spec = replace(vocab(init=init), multiple_of=64)
    made = expand(source, tmp_path / "grown", [spec]).plan.vocabulary
    assert made is not None
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "grown"))
    embedding = "model.embed_tokens.weight"
    assert new[embedding].dtype == torch.bfloat16 and len(new[embedding]) == 384
    assert torch.equal(new[embedding][:SIZE], old[embedding])
    rows, unused = old[embedding].double(), new[embedding][SIZE + len(made.new_ids) :]
    mean, length = rows.mean(dim=0), rows.square().sum(dim=1).mean().sqrt()
    expected = (mean * length / mean.norm()).to(torch.bfloat16)
    assert torch.equal(unused, expected.expand(len(unused), -1)) and len(unused) > 50


def test_the_tokenizer_loads_in_transformers(llama: Path, tmp_path: Path) -> None:
    expand(llama, tmp_path / "grown", [vocab()])
    before, after = (AutoTokenizer.from_pretrained(tmp_path / f) for f in ("base", "grown"))
    text = "dog jumps boxes <|end|>"
    special = before.convert_tokens_to_ids("<|end|>")
    assert special == len(before) - 1 and after.convert_tokens_to_ids("<|end|>") == special
    ids = after(text)["input_ids"]
    assert len(ids) < len(before(text)["input_ids"]) and after.decode(ids) == text
    assert sum(number >= SIZE for number in ids) == 2 and special in ids
    assert after.eos_token == before.eos_token


def test_other_forms_of_the_old_tokenizer_are_removed(llama: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (llama / name).write_text("{}", encoding="utf-8")
    expand(llama, tmp_path / "grown", [vocab()])
    assert {each.name for each in (tmp_path / "grown").iterdir()}.isdisjoint(
        {"vocab.json", "merges.txt", "tokenizer.model"}
    )


@pytest.mark.parametrize("order", ["before", "after"])
def test_it_composes_with_width_and_depth(llama: Path, tmp_path: Path, order: str) -> None:
    others = [Width(hidden_size=48, intermediate_size=80), LlamaPro(target_layers=4)]
    specs = [vocab(), *others] if order == "before" else [*others, vocab()]
    expand(llama, tmp_path / "grown", specs)
    before, after = (oracle.stock(tmp_path / f) for f in ("base", "grown"))
    jump = Jump.between(before, after, oracle.tokens(SIZE))
    assert jump.relative_to_std < 1e-4 and jump.new_token_mass is not None
    recorded = [record.method for record in Lineage.of(tmp_path / "grown").expansion_history]
    assert sorted(recorded) == ["llama_pro", "vocab", "width"]


def test_a_changed_old_row_is_noticed(llama: Path, tmp_path: Path) -> None:
    expand(llama, tmp_path / "grown", [vocab()])
    before, after = (oracle.stock(tmp_path / f) for f in ("base", "grown"))
    with torch.no_grad():
        after.lm_head.weight[3] += 0.1
    assert Jump.between(before, after, oracle.tokens(SIZE)).relative_to_std > 1e-3


def test_the_probability_of_new_tokens_is_measured_alike_in_memory_and_from_disk(
    llama: Path, tmp_path: Path
) -> None:
    expand(llama, tmp_path / "grown", [vocab()])
    ids = oracle.tokens(SIZE)
    before, after = (oracle.stock(tmp_path / f) for f in ("base", "grown"))
    jump, streamed = (
        Jump.between(before, after, ids),
        Jump.of_folders(tmp_path / "base", tmp_path / "grown", ids)[0],
    )
    mass = oracle.logits(after, ids).double().softmax(dim=-1)[..., SIZE:].sum(dim=-1).mean()
    assert jump.new_token_mass == pytest.approx(float(mass), rel=1e-4)
    assert streamed.new_token_mass == pytest.approx(float(mass), rel=1e-4)
    assert streamed.relative_to_std < 1e-4


def test_moments_and_importances_follow(llama: Path, tmp_path: Path) -> None:
    model = oracle.stock(llama)
    draws = torch.Generator().manual_seed(0)
    kinds = {}
    for kind in ("exp_avg", "exp_avg_sq", "fisher", "anchor"):
        values = {n: torch.rand(p.shape, generator=draws) for n, p in model.named_parameters()}
        kinds[kind] = TensorStream.of(oracle.disk_tensors(model_of(model), values).items())
    write_state(llama, kinds, step=3)
    expand(llama, tmp_path / "grown", [vocab()])
    old, new = (State.read(tmp_path / f) for f in ("base", "grown"))
    assert old is not None and new is not None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for kind, fresh in (("exp_avg", 0.0), ("fisher", 0.0), ("exp_avg_sq", None)):
            before, after = old.kinds[kind].get(name), new.kinds[kind].get(name)
            assert torch.equal(after[:SIZE], before)
            value = before.double().mean().float() if fresh is None else torch.tensor(fresh)
            assert torch.allclose(after[SIZE:], value)
        anchor = new.kinds["anchor"].get(name)  # filled like the weights
        number, parts = next(iter(extension(tmp_path / "grown").parts.items()))
        before = old.kinds["anchor"].get(name)
        assert torch.allclose(anchor[number], before[list(parts)].mean(dim=0))


@pytest.mark.parametrize("has_settings", [False, True])
def test_stored_sequences_get_the_new_tokens(
    llama: Path, tmp_path: Path, has_settings: bool
) -> None:
    old = Tokenizer.from_file(str(llama / "tokenizer.json"))
    if has_settings:  # as somebody saved them
        limited = Tokenizer.from_file(str(llama / "tokenizer.json"))
        limited.enable_truncation(3)
        limited.enable_padding(length=40)
        limited.save(str(llama / "tokenizer.json"))
    ids = [*old.encode("the dog jumps over boxes").ids, 0] * 40
    rows = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16).int()
    kept = KeptSequences({"old": rows}, {"old": torch.rand(len(rows))}, {"old": 900})
    kept.write(llama)
    expand(llama, tmp_path / "grown", [vocab()])
    again = KeptSequences.read(tmp_path / "grown")
    new = Tokenizer.from_file(str(tmp_path / "grown" / "tokenizer.json"))
    assert (new.truncation is not None) == has_settings  # the file of the user keeps them
    assert (
        0.3 * len(rows) < len(again.sequences["old"]) < len(rows)
        and int(again.sequences["old"].max()) >= SIZE
    )
    assert "the dog jumps over boxes" in new.decode(again.sequences["old"].flatten().tolist())
    if has_settings:
        loaded, text = load_tokenizer(tmp_path / "grown"), "the lazy dog jumps over boxes"
        expected = parsed_tokenizer(new.to_str()).encode(text, add_special_tokens=False).ids
        assert loaded(text)["input_ids"] == loaded.backend_tokenizer.encode(text).ids == expected


@pytest.mark.parametrize(("init", "has_weights"), [("overlap", True), ("random", False)])
def test_other_inits_differ_in_the_new_rows_only(
    llama: Path, tmp_path: Path, init: Any, has_weights: bool
) -> None:
    for folder, spec in (("mean", vocab()), ("other", vocab(init=init))):
        expand(llama, tmp_path / folder, [spec])
    rows = [
        load_file(tmp_path / f / "model.safetensors")["lm_head.weight"] for f in ("mean", "other")
    ]
    assert torch.equal(rows[0][:SIZE], rows[1][:SIZE]) and not torch.equal(rows[0], rows[1])
    spread = rows[1][SIZE:].std() / rows[1][:SIZE].std()
    assert (spread < 1.01) if has_weights else (0.7 < spread < 1.3)


def test_omp_fits_rows_in_the_embedding_of_another_model(llama: Path, tmp_path: Path) -> None:
    # The donor is the grown model with another embedding, of which new rows are combinations
    expand(llama, tmp_path / "donor", [vocab()])
    donor = oracle.stock(tmp_path / "donor")
    with torch.no_grad():
        embedding = donor.model.embed_tokens.weight
        embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)))
        made = extension(tmp_path / "donor")
        number = made.new_ids[0]
        first, second = list(made.parts[number])[:2]
        embedding[number] = 2 * embedding[first] - embedding[second]
    oracle.saved(donor, tmp_path / "donor")
    (tmp_path / "donor" / LINEAGE_NAME).unlink()
    spec = Vocab(tokenizer=str(tmp_path / "donor"), init="omp", multiple_of=1)
    made_of = expand(llama, tmp_path / "grown", [spec])
    assert made_of.plan.vocabulary is not None
    assert made_of.plan.vocabulary.new_ids == tuple(made.new_ids)
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "grown"))
    text = made.surfaces[number]
    mine = Tokenizer.from_file(str(tmp_path / "grown" / "tokenizer.json")).token_to_id(text)
    rows = old["lm_head.weight"]
    assert torch.allclose(
        new["lm_head.weight"][mine], 2 * rows[first] - rows[second], atol=1e-3 * float(rows.std())
    )
    # A donor may have more tokens than rows: the last one gets the mean
    donor.resize_token_embeddings(max(made.new_ids))
    oracle.saved(donor, tmp_path / "donor")
    fewer = expand(llama, tmp_path / "fewer", [spec]).plan.vocabulary
    assert fewer is not None and fewer.new_ids == tuple(made.new_ids)
    (said,) = fewer.remarks
    assert said.startswith(f"{len(made.new_ids) - 1:,} of them")


def test_quiet_rows_take_less_probability(tmp_path: Path) -> None:
    """Training with Adam moves the mean row against the hidden states; here it is made so."""
    model = oracle.tiny_llama(vocab_size=SIZE, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight -= 0.2 * model.model.norm.weight
        model.model.embed_tokens.weight += 1.0
    source = written(tmp_path / "base", model)
    mass = {}
    for head in ("same", "quiet"):
        expand(source, tmp_path / head, [vocab(head_init=head)])
        models = (oracle.stock(tmp_path / f) for f in ("base", head))
        mass[head] = Jump.between(*models, oracle.tokens(SIZE)).new_token_mass
    assert mass["quiet"] < 0.5 * mass["same"]


def test_sums_of_rows_in_blocks_equal_the_whole() -> None:
    draws = torch.Generator().manual_seed(0)
    source = torch.randn(30, 7, generator=draws)
    index = torch.tensor([[3, 4], [0, 7], [29, 29]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [2.0, -1.0]]).double()
    fill = Fill("rows", index=index, values=weights)
    sums = fill.new_rows(source)
    expected = torch.stack([source[3:5].mean(0), source[0], source[29]]).double()
    assert torch.allclose(sums(0, 3), expected, atol=1e-6)
    assert torch.equal(torch.cat([sums(0, 1), sums(1, 3)]), sums(0, 3))
    random = replace(fill, index=torch.full((40, 1), -2), values=torch.ones(40, 1), seed=1)
    whole, parts = random.new_rows(source)(0, 40), random.new_rows(source)
    assert torch.equal(torch.cat([parts(0, 1), parts(1, 3), parts(3, 40)]), whole)
    assert 0.8 < whole.std() / source.std() < 1.2 and len(whole.unique()) == 280
    spec = TensorMap(source="w", fill=fill)
    assert torch.equal(spec.mapped(lambda name: source), source)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("kind", ["bytes", "pieces", "hole"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("padding", [40, 5])
def test_new_tokens_take_the_rows_of_padding_first(
    tmp_path: Path, kind: str, is_tied: bool, padding: int
) -> None:
    """Ids have no holes, so other libraries add tokens and resize as on any tokenizer."""
    model = oracle.tiny_llama(vocab_size=SIZE + padding, tie_word_embeddings=is_tied)
    source = written(tmp_path / "base", model, padding=padding)
    if kind == "pieces":
        specials = ("<unk>", "<s>", END_OF_TEXT)
        tokenizer = sentence_piece(TEXT, vocab_size=300, specials=specials)
        spare = SIZE - tokenizer.get_vocab_size()
        tokenizer.add_special_tokens([f"<|{number}|>" for number in range(spare)])
        save_tokenizer(tokenizer, source, end_of_text=END_OF_TEXT)
    elif kind == "hole":
        content = json.loads((source / "tokenizer.json").read_text("utf-8"))
        del content["added_tokens"][5:8]
        (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    size = len(AutoTokenizer.from_pretrained(source))
    plan = expand(source, tmp_path / "grown", [vocab()]).plan
    made, tokenizer = plan.vocabulary, AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert made is not None and len(tokenizer) == size + len(made.new_ids)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    before, after = (oracle.stock(tmp_path / f) for f in ("base", "grown"))
    rows = max(SIZE + padding, len(tokenizer))
    assert after.config.vocab_size == len(after.lm_head.weight) == rows

    old = torch.tensor([n for n in range(SIZE + padding) if n not in made.new_ids])
    ids = old[oracle.tokens(len(old))]
    logits = [oracle.logits(each, ids) for each in (before, after)]
    assert (logits[1][..., old] - logits[0][..., old]).abs().max() < 1e-5 * logits[0].std()
    jumps = [
        Jump.between(before, after, ids, new_tokens=made.new_ids),
        Jump.of_folders(source, tmp_path / "grown", ids, new_tokens=made.new_ids)[0],
    ]
    mass = float(logits[1].double().softmax(-1)[..., made.new_ids].sum(-1).mean())
    for jump in jumps:
        assert jump.relative_to_std < 1e-5
        assert jump.new_token_mass == pytest.approx(mass, rel=1e-4)
    parts = extension(tmp_path / "grown").parts
    for number in made.new_ids:
        embedding = before.model.embed_tokens.weight
        mean = embedding[list(parts[number])].mean(dim=0)
        assert torch.allclose(after.model.embed_tokens.weight[number], mean, atol=1e-6)

    text, grown_head = "dog jumps boxes", after.lm_head.weight.detach().clone()
    encoded = tokenizer(text)["input_ids"]
    assert tokenizer.add_tokens(["<mine>", "<yours>"]) == 2
    assert tokenizer.convert_tokens_to_ids(["<mine>", "<yours>"]) == [
        len(tokenizer) - 2, len(tokenizer) - 1
    ]  # fmt: skip
    after.resize_token_embeddings(len(tokenizer))
    after.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    again = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert again(text)["input_ids"] == encoded and again.decode(encoded).strip() == text
    assert again.get_vocab() == tokenizer.get_vocab()
    resized = oracle.stock(tmp_path / "theirs")
    size = max(made.new_ids) + 1
    assert torch.equal(resized.lm_head.weight[:size], grown_head[:size])


@pytest.mark.slow
def test_a_real_model_gets_ids_without_holes(tmp_path: Path) -> None:
    """Qwen2.5 has 151,665 tokens in 151,936 rows, and special tokens behind its BPE."""
    source = real_checkpoint("qwen")
    opened = Source.open(source, read_model(source))
    code = (path.read_text("utf-8") for path in sorted(Path("tritter").rglob("*.py")))
    spec = learned(Vocab(new_tokens=500), opened, code)
    made = expand(source, tmp_path / "grown", [spec]).plan.vocabulary
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert made is not None and made.new_ids == tuple(range(151_665, 152_165))
    assert len(tokenizer) == 152_165
    assert sorted(tokenizer.get_vocab().values()) == list(range(152_165))
    others = [f"<mine {number}>" for number in range(30)]
    tokenizer.add_tokens(others)
    assert tokenizer.convert_tokens_to_ids(others) == list(range(152_165, 152_195))


def test_moments_of_rows_that_were_padding_are_those_of_new_rows(tmp_path: Path) -> None:
    model = oracle.tiny_llama(vocab_size=SIZE, tie_word_embeddings=False)
    source = written(tmp_path / "base", model, padding=20)
    values = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    kinds = {
        kind: TensorStream.of(oracle.disk_tensors(model_of(model), values).items())
        for kind in ("exp_avg", "exp_avg_sq", "fisher", "anchor")
    }
    write_state(source, kinds, step=3)
    made = expand(source, tmp_path / "grown", [vocab()]).plan.vocabulary
    old, new = (State.read(tmp_path / f) for f in ("base", "grown"))
    assert made is not None and old is not None and new is not None
    assert made.new_ids[0] == SIZE - 20 and made.new_ids[-1] < SIZE
    number, parts = next(iter(extension(tmp_path / "grown").parts.items()))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = list(made.new_ids)
        kept = [row for row in range(SIZE) if row not in rows]
        for kind in kinds:
            before, after = old.kinds[kind].get(name), new.kinds[kind].get(name)
            assert torch.equal(after[kept], before[kept]), kind
            if kind in ("exp_avg", "fisher"):
                assert not after[rows].any()
        anchor = new.kinds["anchor"].get(name)[number]
        assert torch.allclose(anchor, old.kinds["anchor"].get(name)[list(parts)].mean(dim=0))


def test_unused_rows_are_no_new_tokens(llama: Path, tmp_path: Path) -> None:
    """The reported probability is that of new tokens, whatever pads the vocabulary."""
    masses = []
    for multiple in (1, 1024):
        spec = replace(vocab(), multiple_of=multiple)
        made = expand(llama, tmp_path / f"{multiple}", [spec]).plan.vocabulary
        assert made is not None
        ids, folders = oracle.tokens(SIZE), (tmp_path / "base", tmp_path / f"{multiple}")
        streamed = Jump.of_folders(*folders, ids, new_tokens=made.new_ids)[0]
        before, after = map(oracle.stock, folders)
        jump = Jump.between(before, after, ids, new_tokens=made.new_ids)
        assert streamed.new_token_mass == pytest.approx(jump.new_token_mass, rel=1e-4)
        probabilities = oracle.logits(after, ids).double().softmax(dim=-1)
        mass = probabilities[..., SIZE : SIZE + len(made.new_ids)].sum(dim=-1).mean()
        assert jump.new_token_mass == pytest.approx(float(mass), rel=1e-4)
        masses.append(jump.new_token_mass)
    assert masses[1] < masses[0]


def test_quiet_rows_of_a_head_with_a_bias(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "phi", vocab_size=SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    source = written(tmp_path / "base", AutoModelForCausalLM.from_config(config).eval())
    for head in ("same", "quiet"):
        expand(source, tmp_path / head, [vocab(head_init=head)])
        before, after = (oracle.stock(tmp_path / f) for f in ("base", head))
        assert Jump.between(before, after, oracle.tokens(SIZE)).relative_to_std < 1e-5
    bias = load_file(tmp_path / "quiet/model.safetensors")["lm_head.bias"]
    assert torch.equal(bias[SIZE:], bias[:SIZE].min().expand(len(bias) - SIZE))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Vocab(tokens=("a",), tokenizer="x"), "tokenizer also sets the tokens"),
    (lambda: Vocab(tokens=("a",), new_tokens=3), "tokens lists the new tokens"),
    (lambda: Vocab(merges=(1, 2, 3)), "two ids for each new token"),
    (lambda: Vocab(init="omp"), "embedding of another model"),
]


@pytest.mark.parametrize(("made", "reason"), BAD)
def test_contradictions_are_refused(made: Callable[[], Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        made()


def test_impossible_requests_write_nothing(llama: Path, tmp_path: Path) -> None:
    destination = tmp_path / "grown"
    for specs, reason in (
        ([Vocab()], "data must give the new tokens"),
        ([vocab(), vocab()], "one at a time"),
        ([Vocab(tokens=("the dog",))], "can't cross words"),
        ([Vocab(tokens=("the",), multiple_of=1)], "already has all"),
        ([Vocab(merges=(1, 99_999))], "of another tokenizer"),
    ):
        with pytest.raises(RequestError, match=reason):
            expand(llama, destination, specs)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        expand(llama, destination, [vocab()])
    assert not destination.exists()


def test_a_tied_head_has_no_rows_of_its_own(tmp_path: Path) -> None:
    source = written(
        tmp_path / "base", oracle.tiny_llama(vocab_size=SIZE, tie_word_embeddings=True)
    )
    with pytest.raises(RequestError, match="the head is the embedding"):
        expand(source, tmp_path / "grown", [vocab(head_init="quiet")])


def test_the_recorded_merges_make_the_same_model_again(llama: Path, tmp_path: Path) -> None:
    first = expand(llama, tmp_path / "grown", [vocab()])
    record = first.lineage.expansion_history[-1]
    assert record.expansion_type == "vocab" and record.claims_exact
    options = {**record.options, "merges": tuple(record.options["merges"])}
    options["tokens"] = None
    second = expand(llama, tmp_path / "again", [Vocab(**options)])
    assert second.lineage.model_hash == first.lineage.model_hash
    files = [
        json.loads((tmp_path / f / "tokenizer.json").read_text("utf-8")) for f in ("grown", "again")
    ]
    assert files[0] == files[1]
    assert Source.open(tmp_path / "grown", Model(first.plan.target.config)).lineage is not None
