"""What a review of the GPU's code paths found, each held by a test that needs no GPU."""

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from megatron_rl.checkpoint import optimizer_state
from megatron_rl.config.errors import ConfigError, UserError
from megatron_rl.config.numerics import token_multiple
from megatron_rl.config.schema import AdamImplementation, Fp8Format, Fp8Recipe, ModelConfig, ParallelConfig
from megatron_rl.models import capabilities
from megatron_rl.models.capabilities import Capabilities
from megatron_rl.models.choices import Choices, choose
from megatron_rl.parallel import linear_head
from megatron_rl.rollout import engine as rollout_engine

ROOT = Path(__file__).parents[2]
HOPPER = Capabilities((9, 0), transformer_engine=True)
PLAIN = {"hidden_act": "silu", "model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 4096}

YARN_MODEL = PLAIN | {"rope_parameters": YARN, "max_position_embeddings": 131072}


def on_hopper() -> Choices:
    return choose(HOPPER, ModelConfig(), AdamImplementation.auto)


def test_finding_2_engines_start_on_releases_without_a_finalizer() -> None:
    rollout_engine._keep_process_groups(SimpleNamespace())
    finalizer = MagicMock()
    rollout_engine._keep_process_groups(SimpleNamespace(_finalizer=finalizer))
    finalizer.detach.assert_called_once_with()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """An engine on a GPU whose vLLM only says what it is told, in order."""
    told: list[str] = []

    class Vllm:
        def sleep(self, level: int) -> None:
            told.append(f"sleep {level}")

        def wake_up(self, tags: list[str] | None = None) -> None:
            told.append(f"wake {tags}")

        def reset_prefix_cache(self) -> bool:
            return True

        def collective_rpc(self, *_: Any, **__: Any) -> None:
            told.append("load")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty_cache"))
    made: Any = object.__new__(rollout_engine.RolloutEngine)
    made._llm, made._engine = SimpleNamespace(ON_CPU=False), Vllm()
    made._asleep = made._has_cache_to_map = False
    return made, told


def test_finding_3_memory_is_given_back_before_an_engine_maps_its_own(engine: tuple[Any, list[str]]) -> None:
    made, told = engine
    made.sleep()
    made.wake_up()
    with pytest.raises(RuntimeError, match="no weights"):
        made._require_awake()
    made.load_weights([], version=1)
    made._require_awake()
    assert told[2:4] == ["empty_cache", "wake ['weights']"]
    assert told[-2:] == ["empty_cache", "wake ['kv_cache']"]  # buckets and the cache never coexist
    assert told.index("load") < told.index("wake ['kv_cache']")


def test_finding_18_weights_are_not_kept_on_the_host_and_no_step_is_in_flight(engine: tuple[Any, list[str]]) -> None:
    made, told = engine
    made.sleep()
    assert told == ["synchronize", "sleep 2"]
    made.wake_up()
    made.load_weights([], version=1)
    assert told[told.index("load") - 1] == "synchronize"


def test_finding_4_yarn_is_not_fused() -> None:
    assert on_hopper().transformer_fields(PLAIN)["apply_rope_fusion"]
    assert not on_hopper().transformer_fields(YARN_MODEL)["apply_rope_fusion"]
    assert not on_hopper().transformer_fields(PLAIN | {"kv_lora_rank": 8})["apply_rope_fusion"]


@pytest.mark.parametrize("factor", [1.0, 1.3466])
def test_finding_4_cores_packed_rope_is_right_only_where_it_is_not_fused(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import rope_utils

    def recorder(t: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return t  # at position 0 a rotation leaves everything as it is

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", recorder)
    t, bounds = torch.ones(1, 2, 8), torch.tensor([0, 1], dtype=torch.int32)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    def norm(fused: bool) -> float:
        fields = dict(rotary_interleaved=False, multi_latent_attention=False, mrope_section=None)
        config: Any = SimpleNamespace(apply_rope_fusion=fused, **fields)
        rotated = rope_utils.apply_rotary_pos_emb(
            t, torch.zeros(1, 1, 1, 8), config, cu_seqlens=bounds, mscale=factor, cp_group=group
        )
        return float(rotated.norm() / t.norm())

    assert norm(fused=False) == pytest.approx(factor, rel=1e-6)
    assert (norm(fused=True) == pytest.approx(factor, rel=1e-6)) == (factor == 1.0)


def test_finding_5_transformer_engine_is_found_as_pip_lays_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        assert not capabilities.has_transformer_engine()
    library = tmp_path / "transformer_engine" / "wheel_lib"
    library.mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (library / "transformer_engine_torch.so").touch()
    about = tmp_path / "transformer_engine_torch-2.18.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine_torch\nVersion: 2.18.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("transformer_engine_torch") is None
    assert capabilities.has_transformer_engine()


@pytest.mark.parametrize("moments", ["cpu", "cuda"])
def test_finding_6_moments_are_saved_wherever_they_are(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    exchanged: list[str] = []

    def exchange(receiving: torch.Tensor, sending: torch.Tensor, *_: Any, group: Any) -> None:
        exchanged.extend([receiving.device.type, sending.device.type])

    monkeypatch.setattr(optimizer_state.dist, "all_to_all_single", exchange)
    monkeypatch.setattr(
        optimizer_state.dist, "all_gather_object", lambda held, mine, group: held.__setitem__(slice(None), [mine, mine])
    )
    with FakeTensorMode():
        parameter = torch.empty(2, 4, device="cuda")
        piece = optimizer_state._Piece(
            parameter,
            torch.empty(8, device="cuda"),
            0,
            {name: torch.empty(8, device=moments) for name in ("exp_avg", "exp_avg_sq")},
        )
        monkeypatch.setattr(optimizer_state, "_numbered", lambda *_: [(0, piece)])
        one: Any = SimpleNamespace(gbuf_ranges=[], data_parallel_group=group)
        entries: Any = [SimpleNamespace(data=parameter)]
        kinds = [kind for _, kind, _ in optimizer_state._whole_tensors(one, entries)]
    assert kinds == ["exp_avg", "exp_avg_sq"]
    assert set(exchanged) == {"cpu"}  # over gloo: beside an engine that is awake a GPU has no room


def test_finding_7_training_memory_is_free_before_an_engine_asks_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.trainer import rl

    told: list[str] = []
    names = ("load_tokenizer", "load_prompts", "resolve_rewards", "resolve_estimator", "resolve_policy_loss")
    names += ("DataOrder", "needs_critic", "Training", "KLPenalty", "LearnedReward", "RolloutWorker", "WeightSync")
    for name in (*names, "training_sampling"):
        monkeypatch.setattr(rl, name, MagicMock(return_value=MagicMock(models={"policy": MagicMock()})))
    memory = SimpleNamespace(free=lambda: told.append("free"))
    monkeypatch.setattr(rl, "TrainingMemory", lambda _: memory)
    monkeypatch.setattr(rl, "place_engine", lambda *_: told.append("engine"))
    config = MagicMock()
    config.rollout.num_prompts_per_step = config.rollout.num_samples_per_prompt = 2
    config.train.global_batch_size, config.train.num_epochs_per_step = 4, 1
    rl.RLTrainer(config, MagicMock(), MagicMock())
    assert told == ["free", "engine"]


def test_finding_8_gloo_connects_when_needed_and_files_are_not_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.engine import initialize

    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        initialize._prepare_sockets()
        assert os.environ["TORCH_GLOO_LAZY_INIT"] == "1"
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_finding_9_windows_and_sinks_exchange_heads() -> None:
    sizes = dict(size=4, heads_of_rank=64, key_value_heads_of_rank=8)
    choices = on_hopper()
    assert choices.context_parallel_fields(windows_or_sinks=True, **sizes) == {"cp_comm_type": "a2a"}
    assert choices.context_parallel_fields(windows_or_sinks=False, **sizes) == {}
    portable = choose(Capabilities(None), ModelConfig(), AdamImplementation.auto)
    assert portable.context_parallel_fields(windows_or_sinks=True, **sizes) == {}
    with pytest.raises(ConfigError, match="allowed: a divisor of 8: with windows or sinks"):
        choices.context_parallel_fields(windows_or_sinks=True, **(sizes | {"size": 16}))


def test_finding_11_routes_are_recorded_on_the_runner_that_can_be_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl import rollout

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    seen: list[str | None] = []

    def start(**_: Any) -> None:
        seen.append(os.environ.get("VLLM_USE_V2_MODEL_RUNNER"))
        raise InterruptedError

    stand_in = SimpleNamespace(start_engine=start, ON_CPU=True)
    monkeypatch.setitem(sys.modules, "megatron_rl.rollout.llm", stand_in)
    monkeypatch.setattr(rollout, "llm", stand_in, raising=False)
    for records in (False, True):
        with pytest.raises(InterruptedError):
            rollout_engine.RolloutEngine(model_path="m", max_model_len=8, record_routes=records)
    assert seen == [None, "0"]


def test_finding_12_a_task_gets_the_cores_that_it_asked_for() -> None:
    def command(**variables: str) -> str:
        script = ["bash", str(ROOT / "slurm/train.sbatch"), "--dry-run", "c.yaml"]
        environment = {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout

    assert "--cpus-per-task=14 " in command(SLURM_CPUS_PER_TASK="14")
    assert "cpus-per-task" not in command()


@given(st.integers(1, 40_000), st.integers(1, 2_400), st.sampled_from([None, 512, 1760]))
def test_finding_13_tiles_on_a_gpu_are_aligned(num_tokens: int, vocab: int, chunk: int | None) -> None:

    class Weight:
        is_cuda = True

        def __len__(self) -> int:
            return 128 * vocab

    weight: Any = Weight()
    tile = linear_head.TileShape.of(weight, num_tokens, chunk, None)
    assert tile.columns % 128 == 0
    assert tile.rows * tile.columns <= max(2**23, 128 * tile.rows)
    # A tile's two operands and its float32 logits, H = 1,024: products that are not bound by memory (H200: 206 FLOP/B).
    if tile.rows >= 1024 and vocab >= 16:
        moved = 2 * 1024 * (tile.rows + tile.columns) + 4 * tile.rows * tile.columns
        assert 2 * 1024 * tile.rows * tile.columns / moved > 206


def test_finding_14_a_sum_is_added_to_in_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch, "addmm", lambda *_, **given: called.append(f"addmm {given['out_dtype']}"))
    monkeypatch.setattr(torch, "mm", lambda *_, **__: called.append("mm"))
    a = torch.ones(8, 8, dtype=torch.bfloat16)
    linear_head.add_product(a, a, out=torch.zeros(8, 8))
    assert called == ["addmm torch.float32"]


def test_finding_15_experts_are_one_product() -> None:
    experts = PLAIN | {"num_experts": 8}
    fields = on_hopper().transformer_fields(experts)
    assert fields["moe_grouped_gemm"]
    assert fields["moe_permute_fusion"]
    assert "moe_grouped_gemm" not in on_hopper().transformer_fields(PLAIN)
    portable = choose(Capabilities(None), ModelConfig(), AdamImplementation.auto)
    assert "moe_grouped_gemm" not in portable.transformer_fields(experts)


def test_finding_16_no_recipe_recomputes_fused_attention_alone() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    assert [file.name for file in files if "recompute_granularity: selective" in file.read_text()] == []


def test_finding_17_blockwise_rows_are_whole_blocks_on_every_rank() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    for recipe, multiple in ((Fp8Recipe.blockwise, 128), (Fp8Recipe.mxfp8, 32), (Fp8Recipe.tensorwise, 16)):
        model = ModelConfig(fp8=Fp8Format.hybrid, fp8_recipe=recipe)
        assert token_multiple(model, parallel) == 4 * multiple


def test_a_rank_without_a_gpu_of_its_number_is_told_so() -> None:
    from megatron_rl.engine import initialize

    initialize._check_local_rank(3, 4)
    with pytest.raises(UserError, match="LOCAL_RANK: given 3, allowed: below 1"):
        initialize._check_local_rank(3, 1)
