"""The glossary as patterns: words of an older voice, what to write instead, and where they occur.

`python -m tests.language [PATH …]` lists the places. Words that are right in some sentences
(`rate`, `text`, `behind`) are left to readers.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Pattern → what to write instead
GLOSSARY = {
    r"trainings\b(?! of)": "training runs",
    r"(?:go|goes|going|gone|went) on\b": "continue, resume",
    r"(?:stands?|stood|lies|lie|lay|lain) (?:in|on|at|by|there|here|below|above|under|beside|"
    r"behind|before|after|first|last|apart|where|elsewhere|near|next|outside|inside|still)\b": "is",
    r"(?:told|tells?|telling)\b": "reported, printed, logged; distinguishes",
    r"(?:said|says?|saying)\b": "reported; states; set",
    r"(?:held|hold|holds) against\b": "compared with",
    r"besides?\b": "next to, alongside, in addition to",
    r"(?:return|yield|say|write|find) (?:what|who|whom|where|how|why|all that)\b": "Return the …",
    r"whom\b|who (?:is|are|has|have)\b": "which, that",
    r"whatever\b|whoever\b|however often\b": "any, every, regardless of",
    r"(?:of )?one's own\b": "your own",
    r"at hand\b": "available",
    r"from (?:there|here) on\b": "from then on, afterwards",
    r"anew\b|alike\b|all the same\b|as ever\b": "again; the same; anyway",
    r"beforehand\b|meanwhile\b|thereby\b|therein\b|thereof\b": "before; at the same time; this",
    r"(?:takes?|taken|took|taking) (?:up|over from)\b": "load, adopt",
    r"(?:let|lets|letting) (?:it |them )?go\b": "release, remove",
    r"(?:is|are|was|were) (?:asked|wanted|meant)(?: for| of)?\b": "requested, required, intended",
    r"(?:give|gives|gave|given) (?:back|out|up)\b": "return, stop",
    r"un-?grown\b": "control (not grown)",
    r"right answers?\b": "accuracy",
    r"likeliest\b": "greedy decoding; most likely",
    r"protected by\b|methods against forgetting\b|against forgetting\b": "forgetting mitigation",
    r"rungs?\b|rosters?\b|meeting\b": "fallback; expert registry; scaling-law trigger",
    r"(?:the|an?|each|every|which|this|that|its|one|other|both|an) arms?\b": "branch",
    r"(?:a|the|each|no|its) looks?\b|looked at\b": "probe; inspected, examined",
    r"(?:of|by|from) itself alone\b|by itself alone\b": "on its own",
    r"(?:weights|moments|state) that follow\b|carried along\b": "mapped, carried over",
    r"on the way\b": "during training; intermediate",
    r"is to be\b|are to be\b|be it\b|ought\b|shall\b": "must, should",
    r"(?:the )?(?:like|same) (?:of it|it was)\b|and its like\b|and the like\b": "and similar",
    r"as (?:it|they) (?:is|was|were|are)\b(?! (?:in|on|at))": "unchanged",
    r"makes? nothing of\b|comes? to nothing\b|nothing (?:stands|is known)\b": "plain words",
    r"as (?:far|long) as (?:it|they) (?:goes|go|reaches|reach)\b": "up to",
    r"more than once\b.{0,1}|twice over\b": "repeatedly",
}  # fmt: skip
PATTERNS = {
    re.compile(rf"\b(?:{pattern})", re.IGNORECASE): better for pattern, better in GLOSSARY.items()
}
_ANY = re.compile(rf"\b(?:{'|'.join(GLOSSARY)})", re.IGNORECASE)  # most lines have none


class Hit(NamedTuple):
    """A place where the older voice is met."""

    path: Path
    line: int
    words: str
    better: str
    text: str


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of what a person reads: docs, comments of options, literals."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _literals(text)
        return
    is_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if path.suffix == ".yaml":
            line = line.partition("#")[2]
        elif line.startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
            continue
        if path.suffix == ".yaml":
            yield number, line


def _literals(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for number, line in enumerate(token.string.splitlines()):
                yield token.start[0] + number, re.sub(r"`[^`]*`|\{\w[^{}]*\}", "", line)


def hits(paths: list[Path]) -> list[Hit]:
    """Return the places in files where a pattern of the glossary is met."""
    found = []
    for path in paths:
        for line, text in prose_of(path):
            if not _ANY.search(text):
                continue
            for pattern, better in PATTERNS.items():
                found += [
                    Hit(path, line, match[0], better, text) for match in pattern.finditer(text)
                ]
    return found


def readable_files(folders: list[Path]) -> list[Path]:
    """Return the files with prose in folders, or those files themselves."""
    kinds = (".py", ".md", ".yaml", ".j2")
    below = [f for folder in folders for f in ([folder] if folder.is_file() else folder.rglob("*"))]
    return sorted(f for f in below if f.suffix in kinds and "__pycache__" not in f.parts)


if __name__ == "__main__":
    everything = [ROOT / "tritter", ROOT / "conf", ROOT / "docs", ROOT / "README.md"]
    all_hits = hits(readable_files([Path(word) for word in sys.argv[1:]] or everything))
    for hit in all_hits:
        at = max(0, hit.text.find(hit.words) - 30)
        print(f"{hit.path}:{hit.line}: {hit.words!r} → {hit.better}   | {hit.text[at : at + 80]}")
    print(len(all_hits), "places")
