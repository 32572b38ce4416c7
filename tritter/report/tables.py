"""The table at the end of a run, from summary.json alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from tritter.report.rows import DomainRow, LossUnit, domain_rows, score_of
from tritter.report.summary import Jump, MoeRecord, Summary
from tritter.report.table import (
    MISSING,
    Table,
    count_text,
    label,
    mean_shift_text,
    number_text,
    omitted_note,
    ratio_text,
    si_text,
)
from tritter.report.topics import topics_of
from tritter.terminal import Console

_FEW_TASKS = 3  # whose domains fit above the columns; those of more are in the caption
_STATUS_WORDS = {
    "kept": "kept",
    "rolled_back": "rolled back: the checkpoint is the baseline",
    "undecided": "undecided: inconclusive, the trained checkpoint is kept",
    "ungated": "ungated: gate=off keeps any result",
}
_SAMPLE_CHARACTERS = 400
_DOMAIN_CHARACTERS = 11
_MAX_EXPERTS = 12  # columns
_MAX_VALUES, _MAX_LISTED = 20, 12  # rows of a part from outside, and values in a cell
_STAGES = {"importance": "importance of parameters"}  # clearer names, where the key is too short


class SummaryTables:
    """The tables and lines of a finished run, for the terminal and the page.

    Args:
        summary: The run.
    """

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    @cached_property
    def rows(self) -> tuple[DomainRow, ...]:
        """One row per domain, then the same for a control."""
        return domain_rows(self.summary)

    def print(self, *, console: Console, folder: Path | None = None) -> None:
        """Print the run: losses per domain, cost, status and a sample.

        Args:
            console: Where to print.
            folder: The run folder; with it, the path of the checkpoint can be copied.
        """
        summary = self.summary
        tables = [self.results(self.rows)]
        if len(summary.tasks) > 1:
            tables.append(self.tasks())
        if summary.moe is not None:
            tables.append(moe_table(summary.moe))
        for topic, record in topics_of(summary):
            tables += topic.tables(record)
        if (outside := self.outside()).rows:
            tables.append(outside)
        for table in (*tables, self.stages()):
            console.print()
            console.print(table.to_rich(console))
        console.print()
        console.print(_grid(self._lines(console)))
        if checkpoint := summary.checkpoint:
            path = str(checkpoint if folder is None else folder / checkpoint)
            # Never wrapped, so that it can be copied
            console.print(Text(f"{'checkpoint':<12}{console.printable(path)}"), soft_wrap=True)
        for sample in summary.samples:
            console.print()
            lines = list[tuple[str, Text]]()
            said = {"prompt": sample.prompt, "before": sample.before, "after": sample.after}
            for name, words in said.items():
                text = " ".join(words.split())
                if (
                    name == "prompt" and len(text) > _SAMPLE_CHARACTERS
                ):  # its end is what is answered
                    text = f"..{text[2 - _SAMPLE_CHARACTERS :]}"
                text = console.shortened(text, _SAMPLE_CHARACTERS)
                lines.append((name, Text(text or MISSING)))
            console.print(_grid(lines))

    @property
    def size(self) -> str:
        """The parameters of the checkpoint; after a roll-back, also those of the grown model."""
        summary = self.summary
        kept, grown = summary.parameters.get("final"), summary.last_attempt.parameters
        experts = ""
        if summary.experts is not None:
            experts = f" + {count_text(summary.experts.parameters.trainable)} experts"
        if summary.status != "rolled_back":
            return f"{count_text(kept)}{experts}"
        if grown and (grown != kept or experts):
            return f"{count_text(kept)} (grown {count_text(grown)}{experts})"
        return count_text(kept)

    def results(self, rows: Sequence[DomainRow]) -> Table:
        """Return one row per domain: nats per token at each stage, change per byte, verdict."""
        summary = self.summary
        # Without an expansion it equals `before`
        has_grown = bool(summary.last_attempt.expansion)
        scored = ("before", "expanded", "trained") if has_grown else ("before", "trained")
        header = ("domain", "role", *scored, "change", "verdict")
        unit = LossUnit([summary])
        cells = [
            (
                label(row.domain),
                row.role,
                *(unit.text(getattr(row, stage)) for stage in scored),
                row.change.text(),
                row.verdict or MISSING,
            )
            for row in rows
        ]
        rules = [number for number, row in enumerate(rows) if row.is_control][:1]
        for number in rules:
            cells.insert(number, ("control:", *[""] * (len(header) - 1)))
        gate = summary.last_attempt.gate
        confidence = next((check.confidence for check in gate if check.confidence), None)
        lines = ["change: before to trained"]
        if confidence is not None:
            lines[0] += f", paired by document, with one-sided {confidence:.0%} bounds"
        if (control := summary.control) is not None:
            steps = f", {control.steps} steps from the base" if len(summary.rounds) > 1 else ""
            lines.append(f"control: same training, not grown{steps}")
        return Table(
            header,
            tuple(cells),
            numbers=tuple(range(2, 3 + len(scored))),
            title=f"Loss [nats/{unit.name}], change of the loss [% per byte]",
            caption="\n".join(lines),
            names={0: _DOMAIN_CHARACTERS},
            rules=tuple(rules),
        )

    def tasks(self) -> Table:
        """Return one row per domain: its loss before, and after each task."""
        summary, attempt = self.summary, self.summary.last_attempt
        columns = [("before", summary.baseline)]
        if attempt.expansion and attempt.expanded:
            columns.append(("expanded", attempt.expanded))
        named = [f"{n}: {' '.join(task.domains)}" for n, task in enumerate(summary.tasks, 1)]
        are_few = len(named) <= _FEW_TASKS
        for number, (name, task) in enumerate(zip(named, summary.tasks, strict=True), start=1):
            columns.append((name if are_few else str(number), task.final))
        unit = LossUnit([summary])
        rows = tuple(
            (
                label(row.domain),
                *(unit.text(score_of(scores, row.domain)) for _, scores in columns),
            )
            for row in self.rows
            if not row.is_control
        )
        return Table(
            ("domain", *(name for name, _ in columns)),
            rows,
            numbers=tuple(range(1, 1 + len(columns))),
            title=f"Loss after each task [nats/{unit.name}]",
            caption="" if are_few else ", ".join(named),
            names={0: _DOMAIN_CHARACTERS},
        )

    def attempts(self) -> Table:
        """Return a row per attempt or round; empty if there was only one."""
        summary = self.summary
        parts = summary.rounds or summary.attempts
        if len(parts) < 2:
            return Table((), ())
        unit = LossUnit(summary.model_copy(update={"jump": each.jump}) for each in parts)
        domains = [row.domain for row in self.rows if not row.is_control]
        rows = []
        for number, each in enumerate(parts, start=1):
            changes = each.overrides or ["as requested"]
            if summary.rounds:
                changes = each.expansion or ["no expansion"]
            scores = (unit.text(score_of(each.final, domain)) for domain in domains)
            verdict = str(each.status or MISSING).replace("_", " ")
            rows.append((f"{number}: {' '.join(changes)}", *scores, verdict))
        header = ("round" if summary.rounds else "attempt", *map(label, domains), "verdict")
        numbers = tuple(range(1, 1 + len(domains)))
        return Table(
            header, tuple(rows), numbers, f"Loss after each {header[0]} [nats/{unit.name}]"
        )

    def stages(self) -> Table:
        """Return seconds and FLOPs of each stage."""
        seconds, flops = self.summary.seconds, self.summary.flops
        # The total is last
        names = sorted(dict.fromkeys((*seconds, *flops)), key=lambda name: name == "total")
        rows = tuple(
            (
                _STAGES.get(name, name),
                number_text(seconds.get(name), ".1f"),
                si_text(flops.get(name, 0.0)),
            )
            for name in names
        )
        rules = (len(rows) - 1,) if "total" in names else ()
        return Table(("stage", "seconds", "FLOPs"), rows, (1, 2), title="Cost", rules=rules)

    def outside(self) -> Table:
        """Return a row per value that methods and stages from outside reported."""
        parts = [*self.summary.stages.items(), *self.summary.methods.items()]
        rows, captions, rules = list[tuple[str, str, str]](), list[str](), list[int]()
        for name, part in parts:
            values = list(_values(part))
            rules.append(len(rows))
            rows += [(name, key, text) for key, text in values[:_MAX_VALUES]]
            captions.append(omitted_note(len(values), _MAX_VALUES, of=f"values of {name} "))
        caption = "\n".join(filter(None, captions))
        return Table(
            ("part", "entry", "value"), tuple(rows), caption=caption, rules=tuple(rules[1:])
        )

    def _lines(self, console: Console) -> list[tuple[str, Text]]:
        """Return the lines below the tables: status and reasons, logit shift, parameters."""
        summary = self.summary
        attempt, status = summary.last_attempt, summary.status
        words = _STATUS_WORDS[status]
        if status == "rolled_back" and len(summary.rounds) > 1:
            words = "rolled back: the checkpoint is that of the previous round"
        lines = [("status", _text(console, words, Table.STYLES.get(status, "")))]
        if summary.target is not None:
            rounds, target = summary.rounds, summary.target
            done = ", ".join(
                f"{count_text(each.parameters)} {str(each.status).replace('_', ' ')}"
                for each in rounds
            )
            reached = "reached" if target.reaches_target else "not reached"
            progress = (
                f"{len(rounds)} of {len(target.planned)} planned: {done}; target "
                f"{count_text(target.target_params)} {reached}; the table shows the last"
            )
            lines.append(("rounds", _text(console, progress)))
        lines += self._attempt_lines(console)
        for check in attempt.gate:
            is_broken_off = check.check == "training" and bool(check.value)
            is_notable = check.verdict == "reported" and is_broken_off
            if is_notable or check.verdict in ("failed", "undecided"):
                what = f"{check.check} of {check.subject}: {check.detail}"
                lines.append((check.verdict, _text(console, what, Table.STYLES[check.verdict])))
        scored = {check.subject: check.scored for check in attempt.gate if check.scored}
        lines += [("scored", _text(console, f"{name}: {text}")) for name, text in scored.items()]
        jump = summary.jump or Jump()
        if jump.max_absolute is not None and jump.relative_to_std is not None:
            text = f"at expansion: max {jump.max_absolute:.1e} ({jump.relative_to_std:.1e} σ)"
            text += mean_shift_text(jump)
            if jump.new_token_mass is not None:
                text += f"; new tokens get {jump.new_token_mass:.1%} of the probability"
            lines.append(("logit shift", _text(console, text)))
        if summary.has_new_tokens and (fertility := self._fertility_text()):
            lines.append(("tokens/byte", _text(console, fertility)))
        for domain, text in self._windows_texts():
            lines.append(("long windows" if domain == 0 else "", _text(console, text)))
        before, after = (summary.parameters.get(name) for name in ("baseline", "final"))
        sizes = self.size
        if summary.experts is None or before != after or summary.status == "rolled_back":
            sizes = f"{count_text(before)} → {sizes}"
        if before and after and before != after and summary.experts is None and "(" not in sizes:
            sizes += f" ({ratio_text(after / before)})"
        lines.append(("parameters", _text(console, sizes)))
        for topic, record in topics_of(summary):
            if text := topic.text(record):
                lines.append((topic.name, _text(console, text)))
        if summary.moe is not None and (bias := _bias_text(summary.moe)) is not None:
            lines.append(("bias", _text(console, bias)))
        if summary.moe is not None and summary.moe.is_open is False and status != "rolled_back":
            reason = "not fully open, so stock classes compute another function: train longer"
            reason += ", or lower adaptation.anneal_steps"
            lines.append(("new experts", _text(console, reason)))
        return lines

    def _windows_texts(self) -> Iterator[tuple[int, str]]:
        """Yield the number and the losses of each domain with long documents."""
        record = self.summary.windows
        for number, (domain, scores) in enumerate(record.scores.items() if record else ()):
            assert record is not None
            losses = {name: number_text(each.loss, ".3f") for name, each in scores.items()}
            yield (
                number,
                f"{domain}: {losses.get('final', '-')} nats/token in windows of {record.length:,}; "
                f"source {losses.get('source', '-')} in windows of {record.source_length:,}, "
                f"{losses.get('source_long', '-')} in those of {record.length:,}",
            )

    def _attempt_lines(self, console: Console) -> list[tuple[str, Text]]:
        """Return a line per attempt if there are several: its overrides, changes and status."""
        attempts = self.summary.attempts
        if len(attempts) < 2:
            return []
        lines = [("attempts", Text(f"{len(attempts)}; the table shows the last"))]
        for number, attempt in enumerate(attempts, start=1):
            status, did = str(attempt.status), " ".join(attempt.overrides or ["as requested"])
            changes = ", ".join(
                f"{label(row.domain)} "
                f"{row.change.text() if row.change.in_points else f'{row.change.value:+.1%}'}"
                for row in domain_rows(self.summary.model_copy(update={"attempts": [attempt]}))
                if not row.is_control and row.change.value is not None
            )
            text = f"{number}: {did}: {changes}; {status.replace('_', ' ')}"
            lines.append(("", _text(console, text, Table.STYLES.get(status, ""))))
        return lines

    def _fertility_text(self) -> str:
        """Return the tokens per byte of each domain before and after a change of the tokenizer."""
        texts = []
        for row in self.rows:
            before, after = row.before.tokens_per_byte, row.trained.tokens_per_byte
            if before and after and not row.is_control:
                texts.append(f"{row.domain} {before:.3f} → {after:.3f} ({after / before - 1:+.1%})")
        return ", ".join(texts)


def _values(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each value in plain data; of many numbers, their number."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _values(each, f"{key}.{name}" if key else str(name))
    elif not isinstance(value, list):
        text = format(value, ".4g") if isinstance(value, float) else str(value)
        is_long = len(text) > _SAMPLE_CHARACTERS
        text = f"{text[: _SAMPLE_CHARACTERS - 2]}.." if is_long else text
        yield key, MISSING if value is None else text
    elif any(isinstance(each, list | Mapping) for each in value):
        yield from _values(dict(enumerate(value)), key)
    elif len(value) > _MAX_LISTED:
        yield key, f"{len(value):,} values"
    else:
        yield key, ", ".join(text for each in value for _, text in _values(each))


def moe_table(experts: MoeRecord) -> Table:
    """Return a row per domain: each expert's share of its assignments, mean over the layers.

    Of many experts, the most used are shown; the shares of appended ones are also added up.
    """
    usage = {
        domain: [sum(column) / len(layers) for column in zip(*layers, strict=True)]
        for domain, layers in experts.usage.items()
    }
    new, number = experts.new, experts.number
    shown = list(range(number))
    if number > _MAX_EXPERTS:
        total = [sum(shares) for shares in zip(*usage.values(), strict=True)]
        shown = sorted(sorted(shown, key=lambda expert: -total[expert])[:_MAX_EXPERTS])
    header = ["domain", *(f"{each}{'*' if each in new else ''}" for each in shown)]
    header += ["* new"] * bool(new)
    rows = tuple(
        (
            domain,
            *(f"{100 * shares[expert]:.0f}" for expert in shown),
            *([f"{100 * sum(shares[expert] for expert in new):.0f}"] if new else []),
        )
        for domain, shares in usage.items()
    )
    title = f"Experts [% of assignments], {experts.experts_per_token} per token"
    return Table(tuple(header), rows, tuple(range(1, len(header))), title=title)


def _bias_text(experts: MoeRecord) -> str | None:
    """Return a line on the effect of `moe_routing.bias_update_rate`; None without one."""
    effect = experts.selection_bias
    if not effect:
        return None
    parts = []
    for domain, losses in effect.items():
        texts = (f"{number_text(losses.get(each), '.3f')} {each}" for each in ("with", "without"))
        parts.append(f"{domain} {', '.join(texts)}")
    return f"loss with and without the selection bias (not saved): {'; '.join(parts)}"


def _text(console: Console, text: str, style: str = "") -> Text:
    return Text(console.printable(text), style)


def _grid(lines: Iterable[tuple[str, Text]]) -> RichTable:
    """Return labels next to their texts, which wrap within their column."""
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=11, overflow="fold")
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(*line)
    return grid
