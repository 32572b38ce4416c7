"""Growth planning: reachable shapes, their costs, and the result of a budget."""

from tritter.planning.memory import (
    ShardingPlan,
    TrainingMemory,
    TrainingSetup,
    sharding_plan,
    states_bytes,
    training_memory,
)
from tritter.planning.plan import (
    CHINCHILLA,
    Assumptions,
    Device,
    ExpansionStep,
    GrowthPlan,
    ScalingLaw,
    plan_expansion_path,
    plan_growth,
)
from tritter.planning.shapes import GrowthMethods, NamedShape, Shape, named_shape, preset_shape

__all__ = [
    "CHINCHILLA",
    "Assumptions",
    "Device",
    "ExpansionStep",
    "GrowthMethods",
    "GrowthPlan",
    "NamedShape",
    "ScalingLaw",
    "Shape",
    "ShardingPlan",
    "TrainingMemory",
    "TrainingSetup",
    "named_shape",
    "plan_expansion_path",
    "plan_growth",
    "preset_shape",
    "sharding_plan",
    "states_bytes",
    "training_memory",
]
