"""The policy: this rank's shard of a Megatron-Core model, with the table that says what its tensors are elsewhere."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import read_json_object
from megatron_rl.config.numerics import megatron_numerics, token_multiple
from megatron_rl.config.schema import AdamImplementation, Dtype, LayerSpec, ModelConfig, ParallelConfig
from megatron_rl.engine.head import LogProbHead
from megatron_rl.engine.quantized_layers import fake_quantize
from megatron_rl.engine.routing import RoutingReplay
from megatron_rl.models import batch_invariance
from megatron_rl.models.build import build_gpt_model, known_arguments, transformer_config
from megatron_rl.models.capabilities import capabilities
from megatron_rl.models.choices import choose
from megatron_rl.models.families import family_of
from megatron_rl.models.sizes import model_sizes
from megatron_rl.parallel.groups import Groups
from megatron_rl.placement.sizes import ModelSizes
from megatron_rl.weights.files.gather import HFTensorIterator
from megatron_rl.weights.files.hf_reader import load_hf_weights
from megatron_rl.weights.files.local_shards import Place, check_table, local_parameters
from megatron_rl.weights.quantized.formats import refusal

TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


class Policy:
    """A model over the training ranks.

    Attributes:
        models: this rank's GPTModels, one per virtual pipeline stage; without those, one.
        chunks: the same, wrapped in core's DistributedDataParallel.
        choices: layers, kernels and Adam that this machine and the configuration gave.
        token_multiple: tokens that the part of a micro-batch which a rank computes is a multiple of.
        parameters: of all of them, by the names of the family's table.
    """

    def __init__(
        self,
        model: ModelConfig,
        groups: Groups,
        parallel: ParallelConfig,
        *,
        use_distributed_optimizer: bool = True,
        trained: bool = True,
        optimizer: AdamImplementation = AdamImplementation.auto,
    ) -> None:
        """Build this rank's part and load its weights, or draw them from the seed that `initialize` was given.

        Args:
            model: what is trained.
            groups: of this rank, as `initialize` made them from `parallel`.
            parallel: the layout.
            optimizer: whose Adam will step it.
            use_distributed_optimizer: shard the optimizer's state over the data-parallel ranks.
            trained: False for a model that only computes forward, and needs no memory for gradients.

        Raises:
            UserError: the checkpoint is not one of a supported model, or its files are not what config.json says.
        """
        self.groups = groups
        self.hf_path = Path(model.hf_path)
        self.hf: dict[str, Any] = self._model_config(read_json_object(self.hf_path / "config.json", "model.hf_path"))
        self.maps = family_of(self.hf).tensor_maps(self.hf)
        self.dtype = TORCH_DTYPES[model.params_dtype]
        self.choices = choose(capabilities(), model, optimizer)
        self.token_multiple = token_multiple(model, parallel)
        self.config = self._transformer_config(model, parallel)
        self.models = self._build_models(parallel.virtual_pipeline_model_parallel_size or 1)
        if model.quantization is not None:
            if reason := refusal(model.quantization, self.maps):
                raise UserError(f"model.quantization: given {model.quantization.value}; {reason}")
            for gpt in self.models:
                fake_quantize(gpt, model.quantization, groups.tp)
        self._install_head()
        self.routing = RoutingReplay(self.models, groups)
        self.parameters = local_parameters(self.models)
        check_table(self.parameters, self.maps, Place.of(groups))
        if model.load_weights:
            self.load_hf_weights(self.hf_path)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            fp8_param_gather=model.fp8_param,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_grad_reduce=False,
        )
        self.chunks: list[Any] = (
            [DistributedDataParallel(self.config, ddp, model) for model in self.models] if trained else self.models
        )

    def _transformer_config(self, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
        chosen = self.choices.transformer_fields(self.hf) | dict(
            # Drawn by core, weights that are about to be read would cost the memory of whole float32 tensors.
            perform_initialization=not model.load_weights,
            sequence_parallel=parallel.sequence_parallel,
            num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
            account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
            moe_enable_routing_replay=model.moe_routing_replay,
            recompute_granularity=model.recompute_granularity,
            recompute_method=model.recompute_method,
            recompute_num_layers=model.recompute_num_layers,
            **megatron_numerics(model),
        )
        if model.batch_invariant_mode:
            batch_invariance.enable()
            # Older cores have no choice of generations.
            chosen |= known_arguments(
                TransformerConfig,
                dict(
                    batch_invariant_mode=True,
                    attention_backend=AttnBackend.flash,
                    flash_attention_version=self.choices.flash_attention_version,
                ),
            )
        overrides = chosen | model.transformer_config
        config = transformer_config(self.hf, dtype=self.dtype, overrides=overrides)
        exchange = self.choices.context_parallel_fields(
            windows_or_sinks=config.window_size is not None or config.softmax_type != "vanilla",
            size=parallel.context_parallel_size,
            heads_of_rank=config.num_attention_heads // parallel.tensor_model_parallel_size,
            key_value_heads_of_rank=max(1, config.num_query_groups // parallel.tensor_model_parallel_size),
        )
        return transformer_config(self.hf, dtype=self.dtype, overrides=exchange | overrides) if exchange else config

    def _build_models(self, num_chunks: int) -> list[GPTModel]:
        return [
            build_gpt_model(
                self.hf,
                self.config,
                use_transformer_engine=self.choices.layer_spec is LayerSpec.transformer_engine,
                pre_process=self.groups.is_first_stage and chunk == 0,
                post_process=self.groups.is_last_stage and chunk == num_chunks - 1,
                vp_stage=chunk if num_chunks > 1 else None,
            )
            for chunk in range(num_chunks)
        ]

    @cached_property
    def sizes(self) -> ModelSizes:
        """Of the whole model."""
        return model_sizes(self.hf)

    def _model_config(self, hf: dict[str, Any]) -> dict[str, Any]:
        """The config.json of the model that is built, given that of model.hf_path."""
        return hf

    def _install_head(self) -> None:
        """Decide what the last stage gives for a micro-batch."""
        self.head: Any = LogProbHead(self.models[-1], self.groups, self.hf["vocab_size"])

    def export_config(self) -> dict[str, Any] | None:
        """The config.json of an exported checkpoint; None: that of model.hf_path."""
        return None

    def load_hf_weights(self, folder: Path) -> None:
        """Fill this rank's shards from a Hugging Face checkpoint, reading only what it holds.

        Raises:
            UserError: a tensor is missing, unknown or of the wrong shape, or a file is corrupt.
        """
        load_hf_weights(self.models, self.maps, self.groups, folder)

    def hf_tensors(self, *, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """The whole policy as (Hugging Face name, full tensor). Collective: every rank must exhaust it."""
        return iter(
            HFTensorIterator(self.parameters, self.maps, self.groups, dtype=self.dtype, bucket_bytes=bucket_bytes)
        )
