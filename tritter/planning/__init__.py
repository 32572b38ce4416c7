"""Ways from one size to another: shapes that exist, what they cost, what a budget reaches."""

from tritter.planning.cost import Device
from tritter.planning.memory import (
    TrainingMemory,
    TrainingSetup,
    states_bytes,
    training_memory,
)
from tritter.planning.named_size import NamedShape, named_shape, preset_shape
from tritter.planning.plan import (
    Assumptions,
    ExpansionStep,
    GrowthPlan,
    plan_expansion_path,
    plan_growth,
)
from tritter.planning.scaling_law import CHINCHILLA, ScalingLaw
from tritter.planning.shapes import GrowthMethods, Shape
from tritter.planning.sharding import ShardingPlan, sharding_plan

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
