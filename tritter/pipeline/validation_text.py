"""What `tritter validate` reads: text that is named, or what the result's lineage held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tritter.checkpoint import Lineage
from tritter.config.schema import TextSources
from tritter.data.documents import Document
from tritter.data.sources import source_documents
from tritter.data.split import DomainDocuments, Earlier, part_documents
from tritter.errors import RequestError

DOCUMENT_CHARACTERS = 4000  # of a document, from its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationText:
    """The text of a validation.

    Args:
        kept: domain → where the text lies that is to be kept; None: what the lineage recorded.
        target: domain → the same of what was to be learned.
        limit: documents of a domain.
    """

    kept: TextSources | None
    target: TextSources | None
    limit: int


class ValidationDomains:
    """The documents that are asked about, and why there are none.

    Recorded text is what the result's lineage holds out; text that is named is taken whole.
    """

    def __init__(
        self, source: Lineage | None, result: Lineage | None, text: ValidationText
    ) -> None:
        self._source, self._lineage, self._text = source, result, text
        self.why: dict[str, str] = {}

    def read(self, kind: str) -> dict[str, list[Document]]:
        """Return documents by domain of what is `kept`, or of the `target`.

        Raises:
            RequestError: named text can't be read.
        """
        named: TextSources | None = getattr(self._text, kind)
        option = "--data" if kind == "kept" else "--target-data"
        if named is not None:
            self.why[kind] = f"{option} names no text"
            found: dict[str, Sequence[Document]] = {
                name: source_documents(paths, key=f"{option} {name}", text_field="text")
                for name, paths in named.items()
            }
            return self._limited(found)
        try:
            found, self.why[kind] = self._recorded(kind)
        except RequestError as error:
            found, self.why[kind] = {}, f"recorded text can't be read: {str(error).rstrip('.')}"
        if not found:
            self.why[kind] += f"; name it as {option}"
        return self._limited(found)

    def _recorded(self, kind: str) -> tuple[dict[str, Sequence[Document]], str]:
        """Return held-out documents of recorded domains, and what to say where there are none."""
        lineage = self._lineage
        if lineage is None or lineage.split is None or not lineage.domains:
            return {}, "the result records no text"
        trained = is_trained(self._source, lineage)
        new = set(lineage.training_config.get("new") or ()) if trained else set()
        if kind == "target" and not trained:
            return {}, "the result was not trained on since the source"
        wanted = {
            name: domain
            for name, domain in lineage.domains.items()
            if (name in new) == (kind == "target") and domain.paths
        }
        documents = {
            name: DomainDocuments(
                source_documents(
                    domain.paths,
                    key=name,
                    text_field=domain.text_field,
                    is_ranked=bool(domain.ranked),
                    is_recorded=True,
                ),
                domain.ranked,
            )
            for name, domain in wanted.items()
        }
        rule = replace(lineage.split.as_rule, rule="threshold")
        parted = part_documents(documents, rule=rule, earlier=Earlier(lineage.split.exceptions, ()))
        held_out: dict[str, Sequence[Document]] = {
            name: split.validation for name, split in parted.domains.items()
        }
        return held_out, "the result records no such domain"

    def _limited(self, found: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
        return {
            name: [
                replace(document, text=document.text[:DOCUMENT_CHARACTERS])
                for document in documents[: self._text.limit]
            ]
            for name, documents in found.items()
        }


def is_trained(source: Lineage | None, result: Lineage) -> bool:
    """Say whether the result was trained after what the source is; an expansion changes nothing."""
    return dict(result.training_config) != dict(source.training_config if source else {})
