"""The site of docs/: built strictly, so that a dead link, anchor or page of no menu ends it."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^```|`python train\.py [^`]+`", re.MULTILINE)


def built(site: Path, **other: object) -> None:
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), **other))


def test_the_site_is_built(tmp_path: Path) -> None:
    built(tmp_path)
    docs = ROOT / "docs"
    pages = {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("index.html")}
    written = {path.relative_to(docs).with_suffix("") for path in docs.rglob("*.md")}
    assert pages >= written - {Path("index")} and len(written) > 30
    text = "".join(path.read_text("utf-8") for path in tmp_path.glob("**/*.html"))
    assert "```" not in text and "](" not in text and "/experiments/20" not in text
    assert (tmp_path / "figures/parameter_map.png").is_file()
    assert not list(tmp_path.rglob("*.py"))


def test_every_page_begins_with_code_and_can_be_read_in_one_sitting() -> None:
    """Reference pages may be longer; README, overview and all others have at most 1,500 words."""
    docs = ROOT / "docs"
    pages = {path.relative_to(docs): path.read_text("utf-8") for path in docs.rglob("*.md")}
    reference = {page for page in pages if "reference" in page.parts or page.stem == "reference"}
    long = {page: len(text.split()) for page, text in pages.items() if page not in reference}
    long[Path("README.md")] = len((ROOT / "README.md").read_text("utf-8").split())
    assert not [page for page, words in long.items() if words > 1_500]
    beginnings = {page: text.partition("\n## ")[0] for page, text in pages.items()}
    assert not [page for page, text in beginnings.items() if not CODE.search(text)]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("page", "is_sound"),
    [
        ("[there](other.md#its-heading), [outside](../README.md#nowhere)", True),
        ("[there](other.md#no-heading)", False),
        ("[here](#no-heading)", False),
        ("[there](nowhere.md)", False),
        ("![there](nowhere.png)", False),
        ("[there](/other.md)", False),
    ],
)
def test_what_leads_nowhere_ends_the_build(tmp_path: Path, page: str, is_sound: bool) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Overview\n\n{page}\n")
    (docs / "other.md").write_text("# Other\n\n## Its heading\n")
    words = {"docs_dir": str(docs), "nav": ["index.md", "other.md"]}
    if is_sound:
        built(tmp_path / "site", **words)
        with pytest.raises(Abort):  # a page that no menu shows
            built(tmp_path / "site", **words | {"nav": ["index.md"]})
    else:
        with pytest.raises(Abort):
            built(tmp_path / "site", **words)
