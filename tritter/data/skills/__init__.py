"""Generated skills: exercises without end, each with one right answer.

What is asked when a skill is scored occurs in no text of it, however long: the side of an
exercise follows from its own words. Nothing depends on the seed of a run.
"""

from tritter.data.skills.skill import (
    DEFAULT_COUNT,
    PREFIX,
    SKILL_VERSION,
    SKILLS,
    Skill,
    SkillText,
    skill_path,
    skills_origin,
)

__all__ = [
    "DEFAULT_COUNT",
    "PREFIX",
    "SKILLS",
    "SKILL_VERSION",
    "Skill",
    "SkillText",
    "skill_path",
    "skills_origin",
]
