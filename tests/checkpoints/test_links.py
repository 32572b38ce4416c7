"""A checkpoint folder's links end inside it, or in the hub's cache; nothing else is read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, place, run, snapshot, sources
from tritter.errors import TritterError
from tritter.storage.reading import check_links

__all__ = ["place", "run", "sources"]
SECRET = "the secret of another folder"
COMMANDS = (
    "export --checkpoint base --output out",
    "expand --checkpoint base --method dus --output out --no-measure",
    "expand --checkpoint base --method dus --output out --dry-run",
    "inspect base",
    "history base",
    "history base --verify",
    "generate --checkpoint base --prompt the --max-new-tokens 1",
    "plan --source base --target 120k --gpu-hours 1",
    "train --checkpoint base --data secret.txt --output out",
)


def _replaced(name: str) -> Callable[[Path], object]:
    """Let a file be a link to what lies outside, with the same content."""

    def change(base: Path) -> None:
        shutil.copy(base / name, base.parent / "outside")
        (base / name).unlink()
        (base / name).symlink_to("../outside")

    return change


def _added(name: str, end: str = "../secret.txt") -> Callable[[Path], object]:
    def change(base: Path) -> None:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).symlink_to(end)

    return change


def _by_way_of_an_inner_link(base: Path) -> None:
    (base / "a.txt").symlink_to("merges.txt")
    (base / "merges.txt").symlink_to("../secret.txt")


def _absolute(base: Path) -> None:
    (base / "vocab.json").symlink_to(base.parent / "secret.txt")


OUTSIDE: dict[str, Callable[[Path], object]] = {
    "config": _replaced("config.json"),
    "weights": _replaced("model.safetensors"),
    "tokenizer": _replaced("tokenizer.json"),
    "tokenizer settings": _replaced("tokenizer_config.json"),
    "merges": _added("merges.txt"),
    "chat template": _added("additional_chat_templates/a.jinja", "../../secret.txt"),
    "record": _added("tritter.json"),
    "state": _added("state", "../elsewhere"),
    "a file of the state": _added("state/state.json", "../../secret.txt"),
    "an expert": _added("experts/a/adapter_config.json", "../../../secret.txt"),
    "special tokens": _added("special_tokens_map.json"),
    "nowhere": _added("merges.txt", "../nowhere"),
    "two steps": _by_way_of_an_inner_link,
    "absolute": _absolute,
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_no_command_follows_a_link_out_of_the_folder(
    run: Run, place: Path, change: Callable[[Path], object]
) -> None:
    (place / "secret.txt").write_text(SECRET)
    (place / "elsewhere").mkdir()
    change(place / "base")
    before = snapshot(place)
    for words in COMMANDS:
        result = run(words)
        assert result.code == 2, words
        assert "leaves the folder" in result.err, words
        assert SECRET not in result.out + result.err
    assert snapshot(place) == before
    assert not (place / "out").exists()


def test_a_ckpt_takes_nothing_from_a_folder_with_such_a_link(run: Run, place: Path) -> None:
    import torch

    from tests.oracle import stock

    torch.save(stock(place / "base").state_dict(), place / "last.ckpt")
    (place / "secret.txt").write_text(SECRET)
    (place / "base" / "merges.txt").symlink_to("../secret.txt")
    result = run("export --checkpoint last.ckpt --config base --output out")
    assert result.code == 2
    assert "merges.txt leaves the folder" in result.err
    assert not (place / "out").exists()


def test_the_folder_itself_and_what_ends_inside_may_be_links(run: Run, place: Path) -> None:
    (place / "base").rename(place / "real")
    (place / "base").symlink_to("real")
    (place / "real" / "tokenizer.json").rename(place / "real" / "t.json")
    (place / "real" / "tokenizer.json").symlink_to("t.json")
    (place / "real" / "merges.txt").symlink_to(place / "base" / "t.json")
    assert run("export --checkpoint base --output out").code == 0
    assert (place / "out" / "tokenizer.json").read_bytes() == (
        place / "real" / "t.json"
    ).read_bytes()
    assert not (place / "out" / "tokenizer.json").is_symlink()


def _as_snapshot(base: Path, cache: Path, *, is_shared: bool) -> Path:
    """Lay a folder out as the hub's cache keeps a download."""
    repository = cache / "models--owner--name"
    revision = repository / "snapshots" / "0123abcd"
    revision.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (cache / "blobs" / "ab").mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if is_shared:
            shared = cache / "blobs" / "ab" / f"{number:064x}"
            shutil.copy(path, shared)
            blob.symlink_to(f"../../blobs/ab/{shared.name}")
        else:
            shutil.copy(path, blob)
        (revision / path.name).symlink_to(f"../../blobs/{blob.name}")
    return revision


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_shared", [False, True], ids=["own blobs", "shared blobs"])
def test_a_snapshot_of_the_hub_is_read(run: Run, place: Path, is_shared: bool) -> None:
    revision = _as_snapshot(place / "base", place / "hub", is_shared=is_shared)
    before = snapshot(revision)
    for words in ("export", "expand --method dus --no-measure"):
        assert run(f"{words} --checkpoint {revision} --output out").code == 0
        shutil.rmtree(place / "out")
    assert run(f"generate --checkpoint {revision} --prompt the --max-new-tokens 1").code == 0
    assert snapshot(revision) == before


def test_a_snapshot_that_links_to_another_download_is_refused(place: Path) -> None:
    revision = _as_snapshot(place / "base", place / "hub", is_shared=False)
    other = place / "hub" / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "1").write_text(SECRET)
    (revision / "merges.txt").symlink_to("../../../models--owner--other/blobs/1")
    with pytest.raises(TritterError, match=r"merges\.txt leaves the folder"):
        check_links(revision)


def test_a_record_names_no_file_behind_a_link(run: Run, place: Path) -> None:
    """A link in a folder that only the record speaks of."""
    import json

    from tritter.storage.records import signed_text

    assert run("expand --checkpoint base --method dus --output grown --no-measure").code == 0
    (place / "secret.txt").write_text(SECRET)
    (place / "grown" / "notes").mkdir()
    (place / "grown" / "notes" / "a.txt").symlink_to("../../secret.txt")
    path = place / "grown" / "tritter.json"
    plain = json.loads(path.read_text())
    plain["file_digests"]["notes/a.txt"] = "0" * 64
    path.write_text(signed_text(plain))
    refused = run("export --checkpoint grown --output out")
    assert refused.code == 2
    assert "notes/a.txt leaves the folder" in refused.err
    verified = run("history grown --verify")
    assert verified.code == 3
    assert "leaves the folder" in " ".join(verified.out.split())


def test_a_record_names_no_file_outside(run: Run, place: Path) -> None:
    """Digests in a record would tell whether a file elsewhere holds what somebody guesses."""
    import json

    from tritter.storage.records import signed_text

    assert run("expand --checkpoint base --method dus --output grown --no-measure").code == 0
    (place / "secret.txt").write_text(SECRET)
    path = place / "grown" / "tritter.json"
    plain = json.loads(path.read_text())
    plain["file_digests"]["../secret.txt"] = "0" * 64
    path.write_text(signed_text(plain))
    refused = run("export --checkpoint grown --output out")
    assert refused.code == 2
    assert "must be the name of a file inside the folder" in refused.err
    verified = run("history grown --verify")
    assert verified.code == 3
    assert "name of a file inside the folder" in " ".join(verified.out.split())
