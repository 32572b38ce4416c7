"""How unlike what is known a batch is: by its loss, or by where its features lie.

B samples of a batch
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tritter.errors import RequestError, TritterError
from tritter.novelty.library import SkillLibrary
from tritter.novelty.observation import Observation, joined
from tritter.novelty.options import Confidence, Detector
from tritter.novelty.statistics import share_bound
from tritter.options import Count, options


@options
class BurstOptions:
    """When novel samples of mixed batches are handed over.

    Args:
        min_samples: alike ones, of a burst.
        window_samples: seen last, among which they are.
        usual_share: of samples of known skills that may look novel.
        confidence: with which their share is above that of the largest group of known samples.
        similarity: cosine of whitened features with the mean of those it joins, at least.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    window_samples: Count = 1024
    usual_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    confidence: Confidence = 0.99
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.3


# Novelty of single samples: novel ones of mixed batches are gathered until they make a burst.
#
# A batch of which a tenth is new looks hardly unusual as a whole. Here each sample counts by
# itself, and those that are alike are handed over together, for training on them alone.

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Burst:
    """Alike novel samples.

    Args:
        seen: what the base says of them.
        rows: what the caller gave of each, as its token ids.
        share: of all samples of the window; its lower bound lies above `usual`.
    """

    seen: Observation
    rows: tuple[Tensor, ...]
    share: float
    lower: float
    usual: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """Alike samples, and when each was seen; `direction` [H] is the sum of their unit offsets."""

    seen: list[Observation]
    rows: list[Tensor]
    directions: list[Tensor]
    at: list[int]

    def is_like(self, direction: Tensor, least: float) -> bool:
        mean = normalize(torch.stack(self.directions).sum(dim=0), dim=0)
        return float(mean @ direction) >= least

    def keep_from(self, first: int) -> None:
        kept = [index for index, at in enumerate(self.at) if at >= first]
        for name in ("seen", "rows", "directions", "at"):
            held = getattr(self, name)
            setattr(self, name, [held[index] for index in kept])


class NovelSamples:
    """Gathers novel samples, whichever batches they come in.

    A sample is novel if it is less like anything known than all but `usual_share` of held-out
    samples are. Of those that lie in one direction from what the base knows, `min_samples` are a
    burst, once they are more of the samples seen last than the largest such group was of the
    held-out ones: with a confidence, against the upper bound of that.
    """

    def __init__(
        self, detector: Detector, library: SkillLibrary, asked: BurstOptions | None = None
    ) -> None:
        self.detector, self.library = detector, library
        self.options = asked or BurstOptions()
        self._threshold, self._usual, self._count = float("nan"), 1.0, 0
        self._groups: list[_Group] = []

    def calibrate(self, batches: Sequence[Observation]) -> None:
        """Learn from held-out batches of known skills what samples of these look like.

        They are to be others than those that the library rests on.

        Raises:
            RequestError: they are too few to tell the usual share.
        """
        samples = torch.cat([self.detector.score(each, self.library).samples for each in batches])
        share = self.options.usual_share
        if len(samples) * share < 1:
            raise RequestError(
                f"novelty: {len(samples)} samples don't tell what a share of {share:g} of them "
                f"looks like; that takes {int(1 / share) + 1}."
            )
        self._threshold = float(samples.quantile(1 - share))
        groups: list[_Group] = []
        for each in batches:
            self._gather(each, [torch.zeros(0)] * len(each), groups, at=0)
        alike = max((len(group.at) for group in groups), default=0)
        self._usual = share_bound(alike, len(samples), confidence=0.95, is_lower=False)

    def novel(self, seen: Observation) -> Tensor:
        """Return which samples are novel, bool [B].

        Raises:
            RequestError: `calibrate` was not called.
        """
        if self._threshold != self._threshold:
            raise RequestError("novelty: calibrate the bursts on held-out batches first.")
        return self.detector.score(seen, self.library).samples > self._threshold

    def add(self, seen: Observation, rows: Sequence[Tensor]) -> Burst | None:
        """Take a batch; return a burst as soon as there is one, and forget its samples.

        Args:
            rows: whatever training on a sample takes, one tensor for each.
        """
        assert len(rows) == len(seen), "each sample has something that it can be trained on by"
        self._gather(seen, rows, self._groups, at=self._count)
        self._count += len(seen)
        for group in self._groups:
            group.keep_from(self._count - self.options.window_samples)
        self._groups = [group for group in self._groups if group.at]
        return self._burst()

    def state_dict(self) -> dict[str, Any]:
        groups = [
            {
                "seen": [each.state_dict() for each in group.seen],
                "rows": list(group.rows),
                "directions": list(group.directions),
                "at": list(group.at),
            }
            for group in self._groups
        ]
        return {
            "format_version": FORMAT_VERSION,
            "threshold": self._threshold,
            "usual": self._usual,
            "count": self._count,
            "groups": groups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            TritterError: it is of another format.
        """
        if state.get("format_version") != FORMAT_VERSION:
            raise TritterError(
                f"novelty: gathered samples of format {state.get('format_version')}; this Tritter "
                f"reads {FORMAT_VERSION}"
            )
        self._threshold, self._usual = state["threshold"], state["usual"]
        self._count = state["count"]
        self._groups = [
            _Group(
                seen=[Observation.of_state(each) for each in held["seen"]],
                rows=list(held["rows"]),
                directions=list(held["directions"]),
                at=list(held["at"]),
            )
            for held in state["groups"]
        ]

    def _gather(
        self, seen: Observation, rows: Sequence[Tensor], groups: list[_Group], *, at: int
    ) -> None:
        """Put the novel samples of a batch into the groups they are like, or into new ones."""
        novel = self.novel(seen).nonzero().flatten()
        centre = self.library.gaussian(self.library.reference.name)
        directions = normalize(centre.whitened(seen.features[novel]), dim=1)
        for index, direction in zip(novel.tolist(), directions, strict=True):
            least = self.options.similarity
            group = next((g for g in groups if g.is_like(direction, least)), None)
            if group is None:
                group = _Group(seen=[], rows=[], directions=[], at=[])
                groups.append(group)
            group.seen.append(seen.rows(torch.tensor([index])))
            group.rows.append(rows[index].detach().clone())
            group.directions.append(direction)
            group.at.append(at + index)

    def _burst(self) -> Burst | None:
        asked = self.options
        window = min(self._count, asked.window_samples)
        for group in self._groups:
            n = len(group.at)
            lower = share_bound(n, window, confidence=asked.confidence, is_lower=True)
            if n >= asked.min_samples and lower > self._usual:
                self._groups.remove(group)
                return Burst(
                    seen=joined(group.seen),
                    rows=tuple(group.rows),
                    share=n / window,
                    lower=lower,
                    usual=self._usual,
                )
        return None
