"""What `data=skills` is asked for."""

from typing import ClassVar, Literal

from tritter.config.schema import NamedTextConfig
from tritter.options import Text, options


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
