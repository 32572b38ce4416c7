"""The sharding plan compared with fully_shard on stock models on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from tests.oracle import tiny_llama
from tritter.core.families import Config, Model
from tritter.core.families.presets import PRESETS
from tritter.core.models import stock_config_of
from tritter.errors import RequestError
from tritter.planning.memory import sharding_plan
from tritter.training.parameters import shard

CONFIGS = {
    "tritter_1b": PRESETS["tritter_1b"].config(),
    "tritter_7b": PRESETS["tritter_7b"].config(),
    "odd sizes": tiny_llama(tie_word_embeddings=True).config.to_dict(),
}


@contextmanager
def one_of(ranks: int, rank: int) -> Iterator[None]:
    """Act as one rank of a group without other processes."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def held(config: Config, *, ranks: int, rank: int) -> int:
    with one_of(ranks, rank), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock_config_of(config))
        shard(model, init_device_mesh("cpu", (ranks,)))
        parts = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(parts) == len([*model.parameters()])
        return sum(part.to_local().numel() for part in parts)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ranks", [2, 7])
def test_every_rank_holds_what_the_plan_says(name: str, ranks: int) -> None:
    config = CONFIGS[name]
    plan = sharding_plan(Model(config), ranks=ranks)
    for rank in {0, ranks - 1}:
        assert held(config, ranks=ranks, rank=rank) == plan.parameters[rank]
    assert sum(plan.parameters) == Model(config).num_parameters


def test_more_ranks_than_rows_leave_some_without() -> None:
    """By hand: only the embedding has 97 rows."""
    config = CONFIGS["odd sizes"]
    plan = sharding_plan(Model(config), ranks=97)
    assert plan.parameters[96] == config["hidden_size"]  # a row of the embedding, and nothing else
    assert held(config, ranks=97, rank=96) == plan.parameters[96]


def test_one_rank_holds_all_and_none_is_refused() -> None:
    config = CONFIGS["tritter_1b"]
    assert sharding_plan(Model(config), ranks=1).parameters == (Model(config).num_parameters,)
    with pytest.raises(RequestError, match="ranks = 0"):
        sharding_plan(Model(config), ranks=0)
