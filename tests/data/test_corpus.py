import logging
import shutil
from functools import cached_property

import pytest
import torch

from tritter.data import corpus as corpus_module
from tritter.data.batches import SequenceStream
from tritter.data.built_in import Stdlib
from tritter.data.corpus import Corpus
from tritter.data.documents import Documents, text_key
from tritter.data.sources import TextRequest
from tritter.data.split import SplitRule
from tritter.data.tokens import TextBounds, concatenate
from tritter.errors import RequestError
from tritter.storage import spool

OLD, NEW = (
    Documents.of(f"{name} has: " + str(index**9) * 9 for index in range(20))
    for name in ("the old — é", "the new")
)
DOMAINS = {"prose": OLD, "code": NEW}
FILES = ("tokens.safetensors", "corpus.json", "tokenizer.json", "checksums.json")


def build(cache_dir, **changes):
    options = {
        "origin": "made by hand",
        "vocab_size": 280,
        "validation_fraction": 0.2,
        "max_validation_tokens_per_document": 50,
        "seed": 0,
        "cache_dir": cache_dir,
    }
    domains = changes.pop("domains", DOMAINS)
    return Corpus.build(domains, **(options | changes))


def sources(corpus):
    return {name: domain.source for name, domain in corpus.domains.items()}


def assert_same(one, other):
    assert one.digest == other.digest and sources(one) == sources(other)
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    assert list(one.domains) == list(other.domains)
    for name in one.domains:
        for side in ("train", "validation"):
            left, right = getattr(one.domains[name], side), getattr(other.domains[name], side)
            assert list(left.identifiers) == list(right.identifiers)
            for part in ("tokens", "offsets", "num_bytes"):
                a, b = getattr(left, part), getattr(right, part)
                assert a.dtype == b.dtype and torch.equal(a, b)


def test_what_lies_on_disk_is_what_would_be_held(tmp_path, monkeypatch):
    domains = {name: Documents.of(each.text for each in d) for name, d in DOMAINS.items()}
    held = build(tmp_path / "held", domains=domains)
    monkeypatch.setattr(spool.Spool, "IN_MEMORY_BYTES", 0)
    domains = {name: Documents.of(each.text for each in d) for name, d in DOMAINS.items()}
    mapped = build(tmp_path / "mapped", domains=domains)
    assert_same(held, mapped)
    assert_same(held, build(tmp_path / "mapped", domains=domains))
    options = {"sequence_length": 16, "bounds": TextBounds(0)}
    packed = [[d.train.pack(**options) for d in c.domains.values()] for c in (held, mapped)]
    assert torch.equal(concatenate(packed[0]), concatenate(packed[1]))
    assert torch.equal(concatenate(packed[0]), torch.cat(packed[0]))
    streams = [SequenceStream(each[0], seed=1) for each in packed]
    assert torch.equal(*(stream.next_sequences(99) for stream in streams))


@pytest.fixture
def making(monkeypatch):
    """Counts the corpora that were built rather than loaded."""
    calls = []
    make = corpus_module._make

    def counted(*args, **options):
        calls.append(1)
        return make(*args, **options)

    monkeypatch.setattr(corpus_module, "_make", counted)
    return calls


def test_what_a_corpus_holds(tmp_path):
    corpus = build(tmp_path)
    for name, documents in (("prose", OLD), ("code", NEW)):
        domain = corpus.domains[name]
        texts = {document.identifier: document.text for document in documents}
        assert not set(domain.train.identifiers) & set(domain.validation.identifiers)
        assert set(domain.train.identifiers) | set(domain.validation.identifiers) == set(texts)
        assert domain.counts["validation"] == len(domain.validation) > 0
        assert int(domain.validation.offsets.diff().max()) <= 50
        for index, identifier in enumerate(domain.train.identifiers):
            tokens = domain.train.document(index).tolist()
            assert corpus.tokenizer.decode(tokens) == texts[identifier]
        assert domain.num_documents == 20 and domain.origin == "made by hand"
        assert domain.num_bytes == sum(len(text.encode()) for text in texts.values())


def test_the_tokenizer_never_sees_validation(tmp_path):
    corpus = build(tmp_path)
    held_out = set(corpus.domains["prose"].validation.identifiers)
    rule = SplitRule(seed=0, validation_fraction=0.2)
    others = (f"zzzz {number}" * 50 for number in range(99))
    other = (text for text in others if rule.side(text_key(text)) == "validation")
    altered = (next(other) if each.identifier in held_out else each.text for each in OLD)
    other = build(tmp_path, domains={"prose": Documents.of(altered), "code": NEW})
    assert other.digest != corpus.digest
    assert other.tokenizer.to_str() == corpus.tokenizer.to_str()


def test_the_second_time_it_is_loaded_and_the_same(tmp_path, making):
    first, second = build(tmp_path), build(tmp_path)
    assert len(making) == 1
    assert_same(first, second)
    folder = tmp_path / "corpora" / "1" / first.digest
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == [first.digest]


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 281},
        {"seed": 1},
        {"validation_fraction": 0.3},
        {"max_validation_tokens_per_document": 51},
        {"origin": "elsewhere"},
        {"domains": {"prose": OLD[:-1], "code": NEW}},
    ],
)
def test_whatever_makes_a_corpus_is_in_its_name(tmp_path, making, change):
    assert build(tmp_path).digest != build(tmp_path, **change).digest
    assert len(making) == 2


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flipped(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def damage_emptied(path):
    path.write_bytes(b"")


def damage_removed(path):
    path.unlink()


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_flipped, damage_emptied, damage_removed]
)
def test_a_damaged_entry_is_set_aside_and_made_again(tmp_path, making, caplog, name, damage):
    first = build(tmp_path)
    folder = tmp_path / "corpora" / "1" / first.digest
    damage(folder / name)
    with caplog.at_level(logging.WARNING):
        second = build(tmp_path)
    assert len(making) == 2
    assert_same(first, second)
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    assert len(list(folder.parent.glob("*.broken-*"))) == 1
    assert_same(build(tmp_path), first)
    assert len(making) == 2


def test_an_empty_folder_and_a_file_in_its_place_are_not_trusted(tmp_path, making):
    first = build(tmp_path)
    folder = tmp_path / "corpora" / "1" / first.digest
    shutil.rmtree(folder)
    folder.mkdir()
    assert_same(build(tmp_path), first)
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    assert_same(build(tmp_path), first)
    assert len(making) == 3


def test_an_entry_under_the_name_of_another_is_not_trusted(tmp_path, making):
    first, second = build(tmp_path), build(tmp_path, seed=1)
    corpora = tmp_path / "corpora" / "1"
    shutil.rmtree(corpora / first.digest)
    shutil.copytree(corpora / second.digest, corpora / first.digest)
    assert_same(build(tmp_path), first)
    assert len(making) == 3


def test_a_lost_race_is_no_error(tmp_path, monkeypatch):
    make = corpus_module._make

    def slow(*args, **options):
        monkeypatch.setattr(corpus_module, "_make", make)
        build(tmp_path)  # another process at the same time
        return make(*args, **options)

    monkeypatch.setattr(corpus_module, "_make", slow)
    mine = build(tmp_path)
    assert_same(mine, build(tmp_path))
    assert [path.name for path in (tmp_path / "corpora" / "1").iterdir()] == [mine.digest]


def test_a_cache_that_cannot_be_written_is_refused_before_any_work(tmp_path, making):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cache_dir: .*is not writable.*cache_dir=PATH"):
        build(tmp_path / "file")
    assert not making


def from_stdlib(cache_dir, **changes):
    options = {"vocab_size": 280, "validation_fraction": 0.2, "seed": 0}
    options |= {"max_validation_tokens_per_document": 50, "cache_dir": cache_dir}
    return Corpus.of_stdlib(**(options | changes))


@pytest.fixture
def gathering(monkeypatch):
    """A small library with a counter of reads."""
    calls = []

    def texts(library):
        calls.append(1)
        return {"prose": OLD, "code": NEW}

    once = cached_property(texts)
    once.__set_name__(Stdlib, "texts")
    monkeypatch.setattr(Stdlib, "texts", once)
    monkeypatch.setattr(Stdlib, "fingerprint", "one installation")
    return calls


def test_the_library_is_read_once(tmp_path, gathering, monkeypatch):
    first, second = from_stdlib(tmp_path), from_stdlib(tmp_path)
    assert len(gathering) == 1
    assert_same(first, second)
    assert list(first.domains) == ["prose", "code"]
    assert first.domains["code"].origin.startswith("python 3.")
    from_stdlib(tmp_path, seed=1)
    assert len(gathering) == 2
    monkeypatch.setattr(Stdlib, "fingerprint", "another installation")
    assert_same(from_stdlib(tmp_path), first)
    assert len(gathering) == 3


@pytest.mark.parametrize("content", [b"", b"\xff", b"../../somewhere", b"0" * 64, b"x\ny"])
def test_a_damaged_note_costs_only_another_reading(tmp_path, gathering, content):
    first = from_stdlib(tmp_path)
    (note,) = (tmp_path / "corpora" / "1" / "stdlib").iterdir()
    note.write_bytes(content)
    assert_same(from_stdlib(tmp_path), first)
    assert len(gathering) == 2
    assert_same(from_stdlib(tmp_path), first)
    assert len(gathering) == 2


def test_a_damaged_entry_behind_a_note_is_made_again(tmp_path, gathering):
    first = from_stdlib(tmp_path)
    damage_flipped(tmp_path / "corpora" / "1" / first.digest / "tokens.safetensors")
    assert_same(from_stdlib(tmp_path), first)
    assert len(gathering) == 2


def test_a_tokenizer_that_is_given_is_kept(tmp_path, making, tokenizer):
    corpus = build(tmp_path, tokenizer=tokenizer)
    assert corpus.tokenizer.to_str() == tokenizer.to_str()
    assert corpus.digest != build(tmp_path).digest
    assert_same(corpus, build(tmp_path, tokenizer=tokenizer, vocab_size=999))
    assert len(making) == 2


def test_domains_may_have_origins_of_their_own(tmp_path):
    corpus = build(tmp_path, origin={"prose": "a book", "code": "made by hand"})
    assert [corpus.domains[name].origin for name in ("prose", "code")] == ["a book", "made by hand"]
    same = build(tmp_path, origin={"prose": "made by hand", "code": "made by hand"})
    assert same.digest == build(tmp_path).digest


def test_a_domain_that_is_too_small_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"domain code.*validation_fraction"):
        build(tmp_path, domains={"prose": OLD, "code": NEW[:1]})


def test_what_was_skipped_is_told_each_time(tmp_path):
    lines = [f'{{"text": "a story of {number} words"}}' for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", "3", '{"text": "b', *lines]))
    for _ in range(2):  # made, and from the cache
        documents = TextRequest(
            [str(tmp_path / "a.jsonl")], key="data.new", text_field="text"
        ).documents()
        corpus = Corpus.build(
            {"new": documents},
            origin="files",
            vocab_size=300,
            validation_fraction=0.2,
            max_validation_tokens_per_document=100,
            seed=0,
            cache_dir=tmp_path / "cache",
        )
        note, dropped = corpus.notes
        assert dropped == "data.new: dropped of 80 documents: 40 duplicate."
        assert note.startswith("Skipped 3 of 83 records; the first: data.new: ")
        assert "a.jsonl, line 41 is not valid JSON" in note


def test_documents_of_several_domains_are_counted(tmp_path):
    texts = [f"text {number}" for number in range(40)]
    domains = {"old": texts[:20], "other": texts[30:], "new": [*texts[:6], *texts[20:31]]}
    of_domains = {name: Documents.of(each) for name, each in domains.items()}
    for _ in range(2):  # also from the cache
        notes = build(tmp_path, domains=of_domains).notes
        assert [note for note in notes if "also occur" in note] == [
            "new: of 17 documents, 6 also occur in old, 1 also occur in other. Held-out ones are "
            "scored in each domain, and no domain trains on them."
        ]
    assert not build(tmp_path, domains={"old": Documents.of(texts)}).notes
