"""A larger vocabulary in a run: new tokens learned from the new domains, before the expansion."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tritter.checkpoints import Source
from tritter.core.expansions import Vocab, vocab_place
from tritter.data.tokens import PretrainedTokenizer
from tritter.data.vocabulary import BpeTokenizer
from tritter.errors import Problem, RequestError
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.run import Run
from tritter.pipeline.stage import Stage
from tritter.storage.records import record
from tritter.terminal import ShowProgress
from tritter.transform.vocabulary import learned

_KEY = "expansion.vocab"


def check(run: Run) -> None:
    """Reject conversations, whose answers are marked by token, for a larger vocabulary."""
    specs = (spec for config in run.config.attempts for spec in config.expansion)
    if not any(isinstance(spec, Vocab) for spec in specs):
        return
    domains = run.data.corpus.domains.values()
    if any(side.has_marks for each in domains for side in (each.train, each.validation)):
        reason = "conversations keep their tokens; train on their plain text with "
        reason += "data.chat_template=none data.loss_on=all"
        raise RequestError(Problem(_KEY, reason=reason))


@record
class _VocabularyFound:
    """The ids of the two parts of each new token, one pair after the other."""

    merges: tuple[int, ...]


class LearnTokens(Stage):
    """Learn new tokens from the training documents of a branch's new domains."""

    name = "vocabulary"
    found = _VocabularyFound

    def is_needed(self, run: Run, branch: Branch) -> bool:
        """Return True if the data of the run gives the new tokens."""
        return _is_learned(branch)

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Learn the merges of a branch's vocabulary expansion."""
        place = vocab_place(branch.specs)
        assert place is not None
        spec, source = branch.specs[place], run.source(branch.start)
        assert isinstance(spec, Vocab)
        number = spec.num_tokens(source.model)
        most = "" if spec.new_tokens else "up to "
        names = run.data.new_domains_of(branch)
        run.say("vocabulary", f"{most}{number:,} new tokens from {', '.join(names)}")
        documents, rule = run.data.text.documents(), run.data.text.split
        texts = rule.training_texts(documents, names)
        with run.progress_bars() as new_bar:
            total = sum(len(run.data.corpus.domains[name].train) for name in names)
            merges = learned(spec, source, _shown(texts, new_bar("vocabulary"), total)).merges
        assert merges is not None
        return StageResult(_VocabularyFound(merges=merges))

    def finish(self, run: Run, branch: Branch) -> Branch:
        """Return the branch with the learned tokens."""
        return _with_merges(branch, run.ledger.found(self.key(branch), _VocabularyFound).merges)


def _shown(texts: Iterable[str], bar: ShowProgress | None, total: int) -> Iterator[str]:
    """Yield documents and show how many are read."""
    for number, text in enumerate(texts, start=1):
        yield text
        if bar is not None:
            bar(number, total)


def _is_learned(branch: Branch) -> bool:
    return any(isinstance(spec, Vocab) and spec.is_learned for spec in branch.specs)


def _with_merges(branch: Branch, merges: tuple[int, ...]) -> Branch:
    specs = (
        replace(spec, merges=merges) if isinstance(spec, Vocab) and spec.is_learned else spec
        for spec in branch.specs
    )
    return replace(branch, specs=tuple(specs))


def with_example(branch: Branch, source: Source) -> Branch:
    """Return a branch whose learned tokens are replaced by a possible one, to check the rest."""
    if not _is_learned(branch):
        return branch
    size = source.model.sizes.vocab_size
    tokenizer = BpeTokenizer(PretrainedTokenizer.read(source.folder, vocab_size=size).tokenizer)
    longest = max(tokenizer.content["model"]["vocab"].items(), key=lambda entry: len(entry[0]))[1]
    return _with_merges(branch, (longest, longest))  # no token is twice as long
