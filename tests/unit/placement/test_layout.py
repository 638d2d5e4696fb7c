"""Layouts: ranks are counted as Megatron counts them, and engines are cut from the same line."""

import itertools

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config
from megatron_rl.placement.layout import Coordinates, Layout, layout_of


def test_coordinates_by_hand() -> None:
    # tp fastest, pp slowest: rank = (pp * 2 + dp) * 2 + tp
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, data_parallel_size=2)
    assert layout.world_size == 8
    assert layout.coordinates(0) == Coordinates(tensor=0, data=0, pipeline=0)
    assert layout.coordinates(3) == Coordinates(tensor=1, data=1, pipeline=0)
    assert layout.coordinates(6) == Coordinates(tensor=0, data=1, pipeline=1)
    assert layout.rank(Coordinates(tensor=1, data=0, pipeline=1)) == 5


@pytest.mark.parametrize(("tp", "pp", "dp", "cp"), itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2)))
def test_groups_are_megatrons(tp: int, pp: int, dp: int, cp: int) -> None:
    layout = Layout(tp, pp, dp, context_parallel_size=cp)
    megatron = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    ranks = range(layout.world_size)
    assert [layout.rank(layout.coordinates(rank)) for rank in ranks] == list(ranks)
    for name, dimension in (("tp", "tensor"), ("dp", "data"), ("pp", "pipeline"), ("cp", "context")):
        for group in megatron.get_ranks(name):
            # Along a group one coordinate counts up and the others stay.
            assert [getattr(layout.coordinates(rank), dimension) for rank in group] == list(range(len(group)))
            others = {"tensor", "data", "pipeline", "context"} - {dimension}
            assert all(len({getattr(layout.coordinates(rank), other) for rank in group}) == 1 for other in others)


def test_engines_are_consecutive_ranks() -> None:
    layout = Layout(4, 1, 2, engine_size=2)
    assert layout.num_engines == 4
    assert [layout.engine(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [list(layout.engine_ranks(engine)) for engine in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_layout_of_a_configuration() -> None:
    config = Config(name="a")
    config.parallel.tensor_model_parallel_size = 2
    config.rollout.tensor_model_parallel_size = 4
    assert layout_of(config, 8) == Layout(2, 1, 4, engine_size=4)
    assert layout_of(config) == Layout(2, 1, 1, engine_size=4)
    with pytest.raises(ConfigError, match="for 3 ranks"):
        layout_of(config, 3)
