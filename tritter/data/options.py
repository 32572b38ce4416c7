"""The options of `data` and the sources that they name, by domain and task."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.data.built_in import built_in_path, is_built_in
from tritter.data.chat import LossOn
from tritter.data.datasets import DatasetName
from tritter.data.documents import PIECE_CHARACTERS
from tritter.data.local_files import has_records
from tritter.data.records import DEFAULT_FIELD
from tritter.data.skills import SKILLS, SkillText
from tritter.data.sources import TextRequest, text_files
from tritter.errors import Problem, RequestError, key_name, nearest, refused
from tritter.limits import MAX_COUNT
from tritter.options import Count, RunRequest, Text, options

# Domain → absolute paths (files, folders, globs) and built-in texts, in plain containers for the
# JSON fingerprint
TextSources = dict[str, list[str]]
_MAX_BATCH_TOKENS = 2**28
_PathResolver = Callable[[str, str], str]  # key and path as typed → resolved path


@options
class DataConfig:
    """Base class of all options of `data`.

    A third-party class defines `old_domains` and `new_domains` and implements `texts`.

    Args:
        vocab_size: vocabulary of a newly trained tokenizer.
        sequence_length: tokens per sequence.
        batch_size: sequences per batch.
        packing: see `tritter.data.packing`. None is `documents` if there are conversations whose
            tokens are not plain text, else `stream`.
        chat_template: see `tritter.data.chat.ChatChoice`; a file as an absolute path.
        loss_on: tokens of conversations to predict. None is `answers`.
        validation_fraction: share of the documents for validation. None uses that of the
            checkpoint's lineage, or 0.2 for a new lineage.
    """

    old_domains: ClassVar[tuple[str, ...]] = ()
    new_domains: ClassVar[tuple[str, ...]] = ()
    # Byte-level BPE needs at least 256 bytes and the end-of-text token
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)]
    sequence_length: Annotated[int, Field(ge=2, le=MAX_COUNT)]
    batch_size: Count
    # Defaults for third-party sources
    packing: Literal["stream", "documents"] | None = None
    chat_template: Text | None = None
    loss_on: LossOn | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None

    def texts(self, domain: str) -> Iterable[str]:
        """Yield the texts of a domain without paths."""
        raise NotImplementedError(f"{type(self).__name__} must implement texts() for {domain}")

    @property
    def old_sources(self) -> TextSources:
        """Old domain → its paths; empty if `texts` yields the domain."""
        return {name: [] for name in self.old_domains}

    @property
    def new_sources(self) -> TextSources:
        return {name: [] for name in self.new_domains}

    @property
    def task_sources(self) -> tuple[TextSources, ...]:
        """Sequential tasks, each as domain → paths."""
        return (self.new_sources,)

    @property
    def is_old_named(self) -> bool:
        """False if all earlier domains of a checkpoint also count as old."""
        return True

    @property
    def record_field(self) -> str:
        """The field of records that contains the text."""
        return DEFAULT_FIELD

    @property
    def text_requests(self) -> tuple[TextRequest, ...]:
        """The files and data sets that it names, by domain."""
        return ()

    def domain_key(self, name: str) -> str:
        """Return the configuration key that names a domain."""
        side = "old" if name in self.old_sources else "new"
        sources: TextSources = getattr(self, f"{side}_sources")
        return f"data.{side}" if list(sources) == [side] else f"data.{side}.{name}"

    def same_source_problems(self) -> Iterator[Problem]:
        """Yield new domains of the first task with the paths of an old one."""
        yield from ()


@options
class StdlibDataConfig(DataConfig):
    """The documentation and code of the Python standard library."""

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
    """Sources with old and new domains.

    Args:
        old: old domain → paths. None means all earlier domains of the checkpoint.
        new: new domain → paths; empty if `tasks` is set.
        tasks: sequential tasks; empty if `new` is the only task.
        weights: new domain → sampling weight within its task; None mixes domains by size.
        piece_characters: size of the `pieces` of long texts. None uses that of the checkpoint's
            lineage, or 20,000 for a new lineage.
    """

    is_word_a_domain: ClassVar[bool] = False  # of `old`, `new` and `tasks`
    old: TextSources | None
    new: TextSources
    tasks: list[TextSources]
    weights: dict[str, Annotated[float, Field(gt=0)]] | None
    piece_characters: Annotated[int, Field(ge=PIECE_CHARACTERS, le=10**8)] | None = None

    @property
    def old_sources(self) -> TextSources:
        return self.old or {}

    @property
    def new_sources(self) -> TextSources:
        """New domain → paths; an old domain that recurs in a later task stays old."""
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

    @property
    def text_requests(self) -> tuple[TextRequest, ...]:
        return tuple(
            TextRequest(
                tuple(paths), key=key_name(self.domain_key(name)), text_field=self.record_field
            )
            for sources in (self.old_sources, self.new_sources)  # these include all tasks
            for name, paths in sources.items()
        )

    def domain_key(self, name: str) -> str:
        is_of_task = bool(self.tasks) and name not in self.old_sources
        return f"data.tasks.{name}" if is_of_task else super().domain_key(name)

    def same_source_problems(self) -> Iterator[Problem]:
        side = "tasks" if self.tasks else "new"
        for name, paths in self.task_sources[0].items():
            key = f"data.{side}" if name == side else f"data.{side}.{name}"
            same = [old for old, others in self.old_sources.items() if set(others) == set(paths)]
            if same:
                reason = f"the old domain {same[0]} is the same data; name other data"
                yield Problem(key, paths, reason=reason)

    @classmethod
    def path_resolver(cls, raw: Mapping[str, object]) -> _PathResolver:
        """Return the function that resolves the paths of a section of the config."""
        return _text_location

    @classmethod
    def read_named(
        cls, raw: Mapping[str, Any], problems: list[Problem], *, is_new: bool
    ) -> dict[str, Any]:
        """Read `old`, `new` and `tasks` as paths; `old` is None if the config does not set it.

        Args:
            raw: its section of the config.
            problems: collects all problems.
            is_new: the run trains a new base.
        """
        resolve = cls.path_resolver(raw)
        sources: dict[str, Any] = {}
        for name in ("old", "new"):
            sources[name] = read_sources(
                f"data.{name}",
                raw.get(name),
                default_name=None if cls.is_word_a_domain else name,
                problems=problems,
                resolve=resolve,
                known=sources.get("old", {}),
            )
        tasks, has_new = raw.get("tasks"), raw.get("new") not in (None, {})
        sources["tasks"] = []
        if tasks is not None:
            default_name = None if cls.is_word_a_domain else "text"
            sources["tasks"] = _read_tasks(
                tasks, sources["old"], problems, resolve, default_name=default_name
            )
        if has_new and tasks is not None:
            reason = "data.tasks and data.new exclude each other; remove one of them"
            problems.append(Problem("data.tasks", tasks, reason=reason))
        elif not has_new and tasks is None:
            reason = "set the data to train on (files, folders or globs): data.new=PATH"
            problems.append(Problem("data.new", None, reason=reason))
        return sources if raw.get("old") is not None else {**sources, "old": None}


@options
class TextDataConfig(NamedTextConfig):
    """Your own files.

    Args:
        text_field: field of records that contains the text.
    """

    source: Literal["text"]
    text_field: Text

    @property
    def record_field(self) -> str:
        return self.text_field


@options
class DatasetsConfig(NamedTextConfig):
    """Data sets from the hub or from disk, read with the `datasets` library.

    Names in `old`, `new` and `tasks` may include a column and a range of rows.

    Args:
        streaming: read data sets while the model trains, those of the hub without a download.
        text_column: column of data sets whose name has none.
        max_rows: row limit of data sets whose name has no range; None reads all rows.
    """

    source: Literal["hf"]
    streaming: bool
    text_column: Text | None
    max_rows: Count | None

    @classmethod
    def path_resolver(cls, raw: Mapping[str, object]) -> _PathResolver:
        column, rows = raw.get("text_column"), raw.get("max_rows")
        return partial(
            _dataset_location,
            column=column if isinstance(column, str) and column else None,
            max_rows=rows if type(rows) is int and rows > 0 else None,
        )


@options
class SkillsDataConfig(NamedTextConfig):
    """Generated skills and your own files; each name is a separate domain.

    Args:
        old: None means the earlier domains of the checkpoint, or `base_domains` for a new base.
        new: defaults to `new_domain` if neither `new` nor `tasks` is set.
        text_field: field of records that contains the text.
    """

    is_word_a_domain = True
    base_domains: ClassVar[tuple[str, ...]] = ("stdlib:prose",)
    new_domain: ClassVar[str] = "arithmetic"
    source: Literal["skills"]
    text_field: Text

    @property
    def record_field(self) -> str:
        return self.text_field

    @classmethod
    def path_resolver(cls, raw: Mapping[str, object]) -> _PathResolver:
        return _skill_location

    @classmethod
    def read_named(
        cls, raw: Mapping[str, Any], problems: list[Problem], *, is_new: bool
    ) -> dict[str, Any]:
        named = dict(raw)
        if is_new and raw.get("old") is None:
            named["old"] = list(cls.base_domains)
        if raw.get("tasks") is None and raw.get("new") is None:
            named["new"] = cls.new_domain
        return super().read_named(named, problems, is_new=is_new)


def _text_location(key: str, path: str) -> str:
    """Return the absolute path of text files, or the name of a built-in text."""
    if path.startswith(DatasetName.PREFIX):
        raise refused(key, path, "data sets require data=hf")
    if is_built_in(path):
        return built_in_path(key, path)
    try:
        named = Path(path).expanduser()
        # Keep the last name as typed: the extension of a link determines the file type
        is_name = named.name not in ("", "..")
        resolved = str(named.parent.resolve() / named.name if is_name else named.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(key, path, f"this is not a valid path ({error})") from error
    text_files(key, [resolved])
    return resolved


def _skill_location(key: str, word: str) -> str:
    """Return the full name of a skill, or `_text_location` of any other word."""
    name = word.partition(":")[0]
    if name in SKILLS:
        return _text_location(key, f"{SkillText.PREFIX}{word}")
    if word.isidentifier() and not Path(word).exists():
        reason = f"there is no such skill, file or folder; the skills are {', '.join(SKILLS)}"
        raise refused(key, word, reason, near=nearest(name, SKILLS))
    return _text_location(key, word)


def _dataset_location(key: str, word: str, *, column: str | None, max_rows: int | None) -> str:
    """Return the full name of a data set, or the name of a built-in text.

    Args:
        key: the configuration key, for messages.
        word: the name as typed.
        column: default column.
        max_rows: default limit of rows.
    """
    if is_built_in(word):
        return built_in_path(key, word)
    source = DatasetName.named(key, word)
    source.check_on_disk(key, word)
    rows = (0, max_rows) if source.rows == (0, None) else source.rows
    return str(replace(source, rows=rows, column=source.column or column))


def read_sources(
    key: str,
    value: object,
    *,
    default_name: str | None,
    problems: list[Problem],
    resolve: _PathResolver = _text_location,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> TextSources:
    """Read domain → absolute paths from a config value.

    Args:
        key: the configuration key, for messages.
        value: a path, a list of paths, or a mapping of domain names to either; null means none.
        default_name: name of the domain if the value has none. None makes each word a domain,
            named after the word.
        problems: collects a problem for each unreadable path or malformed value.
        resolve: resolves a single path.
        known: domain → paths of other domains; equal paths mean the same domain.
    """
    if value is None:
        return {}

    def resolve_all(key: str, value: object) -> list[str] | None:
        """Return the resolved paths; None if the value is malformed."""
        words: Any = [value] if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(w, str) and w for w in words):
            reason = "must be a path, a list of paths, or a mapping of domain names to paths"
            problems.append(Problem(key, value, reason=reason))
            return None
        if not words:
            problems.append(Problem(key, value, reason="the list is empty; add a path"))
            return None
        found = []
        for word in words:
            try:
                found.append(resolve(key, word))
            except RequestError as error:
                problems.extend(error.problems)
        return found

    sources: TextSources = {}
    if default_name is None and not isinstance(value, Mapping):
        for path in resolve_all(key, value) or ():
            sources[_name_of([path], {**known, **sources})] = [path]
        return sources
    named = value if isinstance(value, Mapping) else {default_name: value}
    for name, paths in named.items():
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            reason = "a domain name consists of letters, digits, - and _"
            problems.append(Problem(key, name, reason=reason))
        elif (own := resolve_all(f"{key}.{name}" if named is value else key, paths)) is not None:
            sources[name] = own
    return sources


def _name_of(paths: Sequence[str], known: Mapping[str, Sequence[str]]) -> str:
    """Return the name of the domain with these paths, or a new unused name."""
    same = (name for name, others in known.items() if others == paths)
    return next(same, None) or unused_name(named_after(paths), known)


def _read_tasks(
    value: object,
    old: TextSources,
    problems: list[Problem],
    resolve: _PathResolver = _text_location,
    *,
    default_name: str | None = "text",
) -> list[TextSources]:
    """Read each task's domain → absolute paths from `data.tasks`.

    A task that is not a mapping is one domain. It has the name of the domain with the same
    paths, otherwise a name derived from its first path.

    Args:
        value: the config value.
        old: old domain → paths.
        problems: collects all problems.
        resolve: resolves a single path.
        default_name: as in `read_sources`.
    """
    key = "data.tasks"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        reason = "must be a list of tasks, each a path, a list of paths or {NAME: PATHS}"
        problems.append(Problem(key, value, reason=reason))
        return []
    known, tasks = dict(old), []
    for number, one in enumerate(value, start=1):
        task_key = f"{key}[{number}]"
        if one in (None, {}, []):
            problems.append(Problem(task_key, one, reason="a task needs data: add a path"))
            continue
        task = read_sources(
            task_key,
            one,
            default_name=default_name,
            problems=problems,
            resolve=resolve,
            known=known,
        )
        if default_name is not None and not isinstance(one, Mapping):
            paths = task.get(default_name, [])
            task = {_name_of(paths, known): paths}
        for name, paths in task.items():
            if known.setdefault(name, paths) != paths:
                reason = f"another domain is already named {name}; choose another name"
                problems.append(Problem(f"{task_key}.{name}", paths, reason=reason))
        tasks.append(task)
    return tasks


def named_after(paths: Sequence[str]) -> str:
    """Return the name of an unnamed domain, derived from its first path."""
    first = next(iter(paths), "")
    path = Path(
        DatasetName.named("", first).name if first.startswith(DatasetName.PREFIX) else first
    )
    word = first.split(":")[1] if is_built_in(first) else path.name
    if set(word) & set("*?["):
        word = path.parent.name
    name = re.sub(r"\W", "_", word.partition(".")[0])
    return name if name.isidentifier() else f"task_{name}"


def unused_name(name: str, taken: Mapping[str, object]) -> str:
    """Return the first unused name of NAME, NAME_2, NAME_3 and so on."""
    numbers = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbers) if each not in taken)


def _streaming_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield domains that can't be streamed, because they also have built-in texts."""
    data = config.data
    if not isinstance(data, DatasetsConfig) or not data.streaming:
        return
    for name, domain in config.text.domains.items():
        names = DatasetName.names_in(domain.paths) if domain.is_head else ()
        if names and len(names) < len(domain.paths):
            reason = f"{name} mixes data sets and built-in texts; make two domains of it"
            yield Problem("data.streaming", True, reason=reason)


def _reading_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield options of reading that no file or data set of the run needs."""
    data, unused = config.data, dict[str, tuple[object, str]]()
    if data.record_field != DEFAULT_FIELD:
        files = chain.from_iterable(each.files for each in data.text_requests)
        if not any(map(has_records, files)):
            unused["text_field"] = (data.record_field, "no file of the run has records")
    if isinstance(data, DatasetsConfig):
        names = chain.from_iterable(DatasetName.names_in(each.paths) for each in data.text_requests)
        sources = [DatasetName.named("data", name) for name in names]
        if data.max_rows and not any(each.rows == (0, data.max_rows) for each in sources):
            unused["max_rows"] = (data.max_rows, "each dataset has a range of its own")
        if data.text_column and not any(each.column == data.text_column for each in sources):
            unused["text_column"] = (data.text_column, "each dataset has a column of its own")
    for name, (value, reason) in unused.items():
        yield Problem(f"data.{name}", value, reason=f"{reason}, so it has no effect; remove it")


def _batch_problems(config: RunRequest) -> Iterator[Problem]:
    size, length = config.data.batch_size, config.data.sequence_length
    if size * length > _MAX_BATCH_TOKENS:
        reason = (
            f"with data.sequence_length = {length} a batch has {size * length:,} tokens; the "
            f"limit is {_MAX_BATCH_TOKENS:,}"
        )
        yield Problem("data.batch_size", size, reason=reason)


def _weight_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield problems of `data.weights`: unknown domains, and domains alone in their task."""
    data = config.data
    if not isinstance(data, NamedTextConfig) or not data.weights:
        return
    mixed = [name for task in config.text.tasks if len(task) > 1 for name in task]
    new = [name for task in config.text.tasks for name in task]
    for name, weight in data.weights.items():
        key = f"data.weights.{name}"
        if name not in new:
            known = tuple(dict.fromkeys(new))
            reason = f"there is no such new domain; available: {', '.join(known) or 'none'}"
            yield Problem(key, weight, reason=reason, nearest=nearest(name, known))
        elif name not in mixed:
            reason = "its task has no other domain, so the weight has no effect; remove it"
            yield Problem(key, weight, reason=reason)


# Validation rules of this section
RULES = (_batch_problems, _weight_problems, _reading_problems, _streaming_problems)
