"""The options of `data`, and which text they name: domain by domain, task by task."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.data.built_in import built_in_path, is_built_in
from tritter.data.datasets import PREFIX, check_place, parse_name
from tritter.data.records import DEFAULT_FIELD
from tritter.data.skills import PREFIX as SKILL_PREFIX
from tritter.data.skills import SKILLS
from tritter.data.sources import TextRequest, find_texts
from tritter.errors import Problem, RequestError, key_name, nearest, refused
from tritter.limits import MAX_BATCH_TOKENS, MAX_COUNT
from tritter.options import Count, RunRequest, Text, options

# Domain → absolute paths (files, folders, globs) and built-in texts, in plain containers: they
# are part of the fingerprint, which is JSON.
TextSources = dict[str, list[str]]


@options
class DataConfig:
    """How text becomes batches; each option of `data` names a class made from this one.

    A class from outside says which domains there are, and yields the texts of each.

    Args:
        packing: see `tritter.data.packing`.
        validation_fraction: None: that of the checkpoint's lineage, or a fifth of a new one.
    """

    old_domains: ClassVar[tuple[str, ...]] = ()
    new_domains: ClassVar[tuple[str, ...]] = ()
    # 256 bytes and the end-of-text token are the least that byte-level BPE holds
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)]
    sequence_length: Annotated[int, Field(ge=2, le=MAX_COUNT)]
    batch_size: Count
    packing: Literal["stream", "documents"] = "stream"  # of a source from outside that does not say
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None

    def texts(self, domain: str) -> Iterable[str]:
        """Yield the texts of a domain, where `sources` don't say where they lie."""
        raise NotImplementedError(f"{type(self).__name__} has to yield the texts of {domain}")

    @property
    def old_sources(self) -> TextSources:
        """Old domain → where its text lies; nowhere: `texts` yields it."""
        return {name: [] for name in self.old_domains}

    @property
    def new_sources(self) -> TextSources:
        return {name: [] for name in self.new_domains}

    @property
    def task_sources(self) -> tuple[TextSources, ...]:
        """Tasks, trained one after the other, each as its domains and where their text lies."""
        return (self.new_sources,)

    @property
    def is_old_named(self) -> bool:
        """False: all that a checkpoint learned is old besides."""
        return True


@options
class StdlibDataConfig(DataConfig):
    """The text of the Python installation."""

    source: Literal["stdlib"]

    @property
    def old_sources(self) -> TextSources:
        return {"prose": ["stdlib:prose"]}

    @property
    def new_sources(self) -> TextSources:
        return {"code": ["stdlib:code"]}

    @property
    def is_old_named(self) -> bool:
        return False


@options
class NamedTextConfig(DataConfig):
    """Text that is named place by place.

    Args:
        old: None: what the checkpoint learned, if anything; empty: nothing.
        new: what is learned; empty where `tasks` says it.
        tasks: what is learned one after the other; empty: `new` is the one task.
    """

    old: TextSources | None
    new: TextSources
    tasks: list[TextSources]

    @property
    def old_sources(self) -> TextSources:
        return self.old or {}

    @property
    def new_sources(self) -> TextSources:
        """New domain → paths; what is old, and comes again in a later task, stays old."""
        again = {name for task in self.tasks[1:] for name in task if name in self.old_sources}
        return {
            name: paths
            for task in self.task_sources
            for name, paths in task.items()
            if name not in again or task is self.tasks[0]
        }

    @property
    def task_sources(self) -> tuple[TextSources, ...]:
        return tuple(self.tasks) or (self.new,)

    @property
    def is_old_named(self) -> bool:
        return self.old is not None


@options
class TextDataConfig(NamedTextConfig):
    """Text of one's own.

    Args:
        text_field: of records.
    """

    source: Literal["text"]
    text_field: Text


@options
class DatasetsConfig(NamedTextConfig):
    """Data sets of the hub or on disk, through the `datasets` library.

    `old`, `new` and `tasks` name them with what is meant of each: column and rows stand there.

    Args:
        streaming: those of the hub are read as they come, not fetched first.
        text_column: of those that name none.
        max_rows: the first of those that name no rows; None: all.
        weights: new domain → its weight among those of its task; None: all of it is mixed.
    """

    source: Literal["hf"]
    streaming: bool
    text_column: Text | None
    max_rows: Count | None
    weights: dict[str, Annotated[float, Field(gt=0)]] | None


@options
class SkillsDataConfig(NamedTextConfig):
    """Generated skills, beside any other text; each word that is named is a domain of its own.

    Args:
        old: None: what the checkpoint learned; of a new base `base_domains`.
        new: `new_domain` where neither it nor `tasks` is named.
        text_field: of records.
    """

    base_domains: ClassVar[tuple[str, ...]] = ("stdlib:prose",)
    new_domain: ClassVar[str] = "arithmetic"
    source: Literal["skills"]
    text_field: Text


Place = Callable[[str, str], str]  # key and word as typed → what is kept of it


def text_location(key: str, path: str) -> str:
    """Return the absolute path of text files, or a built-in text.

    Raises:
        RequestError: a path means no text.
    """
    if path.startswith(PREFIX):
        raise refused(key, path, "data sets are read with data=hf")
    if is_built_in(path):
        return built_in_path(key, path)
    try:
        named = Path(path).expanduser()
        # The last name stays as it was typed: a link's own says what kind of file it is
        is_name = named.name not in ("", "..")
        place = str(named.parent.resolve() / named.name if is_name else named.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(key, path, f"that is no path ({error})") from error
    find_texts(key, [place])
    return place


def skill_location(key: str, word: str) -> str:
    """Return what `text_location` does, or the skill that a word alone names.

    Raises:
        RequestError: it means neither a skill nor a text.
    """
    name = word.partition(":")[0]
    if name in SKILLS:
        return text_location(key, f"{SKILL_PREFIX}{word}")
    if word.isidentifier() and not Path(word).exists():
        reason = f"there is no such skill, file or folder; the skills are {', '.join(SKILLS)}"
        raise refused(key, word, reason, near=nearest(name, SKILLS))
    return text_location(key, word)


def dataset_location(key: str, word: str, *, column: str | None, max_rows: int | None) -> str:
    """Return the whole name of a data set, or a built-in text.

    Args:
        column: of one that names none.
        max_rows: of one that names no rows.

    Raises:
        RequestError: it names none, or nothing lies there.
    """
    if is_built_in(word):
        return built_in_path(key, word)
    source = parse_name(key, word)
    check_place(key, word, source)
    is_whole = source.rows == (0, None)
    rows = (0, max_rows) if is_whole else source.rows
    return str(replace(source, rows=rows, column=source.column or column))


def location_reader(kind: type[DataConfig], raw: Mapping[str, object]) -> Place:
    """Return how an option of `data` reads its words, given its keys as they stand in a config."""
    if issubclass(kind, TextDataConfig):
        return text_location
    if issubclass(kind, SkillsDataConfig):
        return skill_location
    column, rows = raw.get("text_column"), raw.get("max_rows")
    return partial(
        dataset_location,
        column=column if isinstance(column, str) and column else None,
        max_rows=rows if type(rows) is int and rows > 0 else None,
    )


def read_sources(
    key: str,
    value: object,
    *,
    default_name: str | None,
    problems: list[Problem],
    place_of_word: Place = text_location,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> TextSources:
    """Return domain → absolute paths of a value as it stands in a config.

    Args:
        key: what the value is called in messages.
        value: a path, a list of paths, or a mapping of domain names to either; null means none.
        default_name: of the domain when none is named; None: each word is a domain of its own,
            named after what it is.
        problems: gets a line for each path that means no text, and for a value of another form.
        place_of_word: says what a word means.
        known: domain → paths of what there is besides; the same paths are the same domain.
    """
    if value is None:
        return {}

    def places(key: str, value: object) -> list[str] | None:
        """Return what the words mean that can be read; None where they are no list of words."""
        words: Any = [value] if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(w, str) and w for w in words):
            reason = "allowed is a path, a list of paths, or a mapping of domain names to paths"
            problems.append(Problem(key, value, reason=reason))
            return None
        if not words:
            problems.append(Problem(key, value, reason="the list is empty; name a path"))
            return None
        found = []
        for word in words:
            try:
                found.append(place_of_word(key, word))
            except RequestError as error:
                problems.extend(error.problems)
        return found

    sources: TextSources = {}
    if default_name is None and not isinstance(value, Mapping):
        for path in places(key, value) or ():
            sources[_name_of([path], {**known, **sources})] = [path]
        return sources
    named = value if isinstance(value, Mapping) else {default_name: value}
    for name, paths in named.items():
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            reason = "a domain is named with letters, digits, - and _"
            problems.append(Problem(key, name, reason=reason))
        elif (own := places(f"{key}.{name}" if named is value else key, paths)) is not None:
            sources[name] = own
    return sources


def _name_of(paths: Sequence[str], known: Mapping[str, Sequence[str]]) -> str:
    """Return the name of the domain that has some paths, or one that no other has."""
    same = (name for name, others in known.items() if others == paths)
    return next(same, None) or unused_name(named_after(paths), known)


def read_tasks(
    value: object,
    old: TextSources,
    problems: list[Problem],
    place_of_word: Place = text_location,
    *,
    default_name: str | None = "text",
) -> list[TextSources]:
    """Return each task's domain → absolute paths, of `data.tasks` as it stands in a config.

    A task that is no mapping is one domain. It is called as the old domain or the earlier task
    whose paths it has, else after its first path.

    Args:
        old: old domain → paths.
        problems: gets a line for all that is wrong.
        default_name: None: as in `read_sources`.
    """
    key = "data.tasks"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        reason = "allowed is a list of texts, each a path, a list of paths or {NAME: PATHS}"
        problems.append(Problem(key, value, reason=reason))
        return []
    known, tasks = dict(old), []
    for number, one in enumerate(value, start=1):
        place = f"{key}[{number}]"
        if one in (None, {}, []):
            problems.append(Problem(place, one, reason="a task needs text: name a path"))
            continue
        task = read_sources(
            place,
            one,
            default_name=default_name,
            problems=problems,
            place_of_word=place_of_word,
            known=known,
        )
        if default_name is not None and not isinstance(one, Mapping):
            paths = task.get(default_name, [])
            task = {_name_of(paths, known): paths}
        for name, paths in task.items():
            if known.setdefault(name, paths) != paths:
                reason = f"{name} is the name of other text already; choose another"
                problems.append(Problem(f"{place}.{name}", paths, reason=reason))
        tasks.append(task)
    return tasks


def with_skills(
    kind: type[SkillsDataConfig], raw: Mapping[str, Any], *, is_new: bool
) -> dict[str, Any]:
    """Return a section in which is said what skills stand for null.

    Args:
        is_new: the base is, so that nothing was learned before.
    """
    named = dict(raw)
    if is_new and raw.get("old") is None:
        named["old"] = list(kind.base_domains)
    if raw.get("tasks") is None and raw.get("new") is None:
        named["new"] = kind.new_domain
    return named


def read_named(
    raw: Mapping[str, Any], kind: type[NamedTextConfig], problems: list[Problem]
) -> dict[str, Any]:
    """Return `old`, `new` and `tasks` as paths; None of what is old: what a checkpoint learned."""
    place_of_word, is_each_named = location_reader(kind, raw), issubclass(kind, SkillsDataConfig)
    sources: dict[str, Any] = {}
    for name in ("old", "new"):
        sources[name] = read_sources(
            f"data.{name}",
            raw.get(name),
            default_name=None if is_each_named else name,
            problems=problems,
            place_of_word=place_of_word,
            known=sources.get("old", {}),
        )
    tasks, has_new = raw.get("tasks"), raw.get("new") not in (None, {})
    sources["tasks"] = []
    if tasks is not None:
        sources["tasks"] = read_tasks(
            tasks,
            sources["old"],
            problems,
            place_of_word,
            default_name=None if is_each_named else "text",
        )
    if has_new and tasks is not None:
        reason = "data.new is the one task of a run that has no list; leave one of the two out"
        problems.append(Problem("data.tasks", tasks, reason=reason))
    elif not has_new and tasks is None:
        reason = "name the text to train on: files, folders or globs, data.new=PATH"
        problems.append(Problem("data.new", None, reason=reason))
    return sources if raw.get("old") is not None else {**sources, "old": None}


def named_after(paths: Sequence[str]) -> str:
    """Return what a domain is called that nobody named: after its first path."""
    first = next(iter(paths), "")
    place = Path(parse_name("", first).name if first.startswith(PREFIX) else first)
    word = first.split(":")[1] if is_built_in(first) else place.name
    if set(word) & set("*?["):
        word = place.parent.name
    name = re.sub(r"\W", "_", word.partition(".")[0])
    return name if name.isidentifier() else f"task_{name}"


def unused_name(name: str, taken: Mapping[str, object]) -> str:
    """Return a name that is not taken: NAME, else NAME_2, NAME_3 and so on."""
    numbers = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbers) if each not in taken)


def text_requests(data: DataConfig) -> tuple[TextRequest, ...]:
    """Return what a configuration asks for, domain by domain; built-in text needs no look."""
    if not isinstance(data, NamedTextConfig):
        return ()
    return tuple(
        TextRequest(key_name(domain_key(data, name)), tuple(paths), text_field(data))
        for sources in (data.old_sources, data.new_sources)  # a task's are among them
        for name, paths in sources.items()
    )


def text_field(data: DataConfig) -> str:
    """Return the field of records that holds their text."""
    if isinstance(data, TextDataConfig | SkillsDataConfig):
        return data.text_field
    return DEFAULT_FIELD


def domain_key(data: DataConfig, name: str) -> str:
    """Return the key that named the text of a domain, as a person wrote it."""
    is_old = name in data.old_sources
    if not is_old and isinstance(data, NamedTextConfig) and data.tasks:
        return f"data.tasks.{name}"
    side = "old" if is_old else "new"
    sources: TextSources = data.old_sources if is_old else data.new_sources
    return f"data.{side}" if list(sources) == [side] else f"data.{side}.{name}"


def batch_problems(config: RunRequest) -> Iterator[Problem]:
    size, length = config.data.batch_size, config.data.sequence_length
    if size * length > MAX_BATCH_TOKENS:
        reason = (
            f"with data.sequence_length = {length} a batch has {size * length:,} tokens; allowed "
            f"is at most {MAX_BATCH_TOKENS:,}"
        )
        yield Problem("data.batch_size", size, reason=reason)


def weight_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield the domains that are none of the new ones, or that a task is about alone."""
    data = config.data
    if not isinstance(data, DatasetsConfig) or not data.weights:
        return
    mixed = [name for task in config.text.tasks if len(task) > 1 for name in task]
    new = [name for task in config.text.tasks for name in task]
    for name, weight in data.weights.items():
        key = f"data.weights.{name}"
        if name not in new:
            known = tuple(dict.fromkeys(new))
            reason = f"there is no such new domain; there are {', '.join(known) or 'none'}"
            yield Problem(key, weight, reason=reason, nearest=nearest(name, known))
        elif name not in mixed:
            reason = "its task has no other domain, so that nothing is weighed; leave it out"
            yield Problem(key, weight, reason=reason)
