"""The public names for type checkers; `_EXPORTS` in `__init__.py` imports them lazily."""

from tritter.api import add_experts as add_experts
from tritter.api import expand as expand
from tritter.api import gate as gate
from tritter.api import grow as grow
from tritter.api import load as load
from tritter.api import protect as protect
from tritter.api import run as run
from tritter.checkpoints import ExpansionRecord as ExpansionRecord
from tritter.checkpoints.expert_files import AdapterShape as AdapterShape
from tritter.config.launch.continued_pretraining import (
    ContinuedPretrainingConfig as ContinuedPretrainingConfig,
)
from tritter.core.expansions import Context as Context
from tritter.core.expansions import Dus as Dus
from tritter.core.expansions import Interpolate as Interpolate
from tritter.core.expansions import Layers as Layers
from tritter.core.expansions import LlamaPro as LlamaPro
from tritter.core.expansions import Moe as Moe
from tritter.core.expansions import MoeAdd as MoeAdd
from tritter.core.expansions import Stack as Stack
from tritter.core.expansions import Width as Width
from tritter.data.benchmark_names import PROGRESSIVE_BENCHMARKS as PROGRESSIVE_BENCHMARKS
from tritter.data.curriculum import CurriculumLearning as CurriculumLearning
from tritter.data.replay import MemoryReplayBuffer as MemoryReplayBuffer
from tritter.methods.experts.gates import Routing as Routing
from tritter.methods.experts.mixture import ExpertMixture as ExpertMixture
from tritter.methods.forgetting import EWC as EWC
from tritter.methods.forgetting import L2SP as L2SP
from tritter.methods.forgetting import SI as SI
from tritter.methods.forgetting.ewc import ElasticWeightConsolidation as ElasticWeightConsolidation
from tritter.methods.growth.growable import GrowableCausalLM as GrowableCausalLM
from tritter.methods.growth.growable import GrowableFFN as GrowableFFN
from tritter.methods.growth.growable import GrowableLinear as GrowableLinear
from tritter.methods.growth.growable import GrowableQwen as GrowableQwen
from tritter.methods.growth.triggers import Percentile as Percentile
from tritter.methods.growth.triggers import Plateau as Plateau
from tritter.methods.growth.triggers import Scheduled as Scheduled
from tritter.methods.moe_routing.live import MoEExpansionConfig as MoEExpansionConfig
from tritter.methods.moe_routing.live import ProgressiveMoE as ProgressiveMoE
from tritter.methods.moe_routing.live import adapt_router as adapt_router
from tritter.methods.moe_routing.live import train_new_experts as train_new_experts
from tritter.methods.novelty import NoveltyDetector as NoveltyDetector
from tritter.methods.novelty import SkillLibrary as SkillLibrary
from tritter.planning.plan import ExpansionStep as ExpansionStep
from tritter.planning.plan import plan_expansion_path as plan_expansion_path
from tritter.transform.live import ModelExpander as ModelExpander
from tritter.transform.live import ProgressiveCheckpoint as ProgressiveCheckpoint
from tritter.transform.live import depth_upscale as depth_upscale
from tritter.transform.live import expand_attention_heads as expand_attention_heads
from tritter.transform.live import expand_linear as expand_linear
from tritter.transform.live import width_upscale as width_upscale

__version__: str
__all__: list[str]
