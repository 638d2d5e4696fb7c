"""`megatron-rl convert`: a Hugging Face checkpoint to a Megatron one, and back, in one process, with verification.

A Megatron checkpoint in torch_dist format stores whole tensors, whatever the layout that wrote them, so the model is
built here once, whole, without gradients or optimizer, and core reads or writes it at tensor- and pipeline-parallel
size 1. The family's tensor maps say what the tensors are on the other side. The model takes the memory of its weights
once: on the GPU if there is one, else (CUDA_VISIBLE_DEVICES= ) on the host.

A converted checkpoint has the form of a run's (`iter_0000000` and the tracker file), but holds a model only. A run's
checkpoint can be read too, of this trainer or of another of Megatron's (`stored_names.py`); of its contents only the
model's tensors and what core stores once for all ranks are read. Classifiers, which are models with a scalar head, are
converted as language models are.

`largest_difference` verifies a conversion: log-probs (scores) of a few prompts by transformers and by Megatron.
"""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from megatron_rl.checkpoint.folders import LATEST, CheckpointError, cannot_write, iteration_folder, latest_step
from megatron_rl.checkpoint.hf_export import (
    DTYPES_OF_WEIGHTS,
    checkpoint_dtype,
    together,
    written_config,
    written_dtypes,
)
from megatron_rl.checkpoint.integrity import check_files, loading, stored_dtypes
from megatron_rl.checkpoint.stored_names import names_of, tensors_to_load, tensors_to_save
from megatron_rl.checkpoint.writer import write_now
from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import check_weights, read_json_object, read_model_shape
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.device import distributed_backend, this_device
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.models.build import build_gpt_model, transformer_config
from megatron_rl.models.families import check_family
from megatron_rl.models.scalar_head import ScalarHead, backbone_config, is_per_token, is_scalar, tables
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.files.hf_reader import HFCheckpointReader
from megatron_rl.weights.files.hf_writer import ExportPlan, ShardWriter, begin, complete
from megatron_rl.weights.files.local_shards import Place, check_table, local_parameters
from megatron_rl.weights.files.safetensors_files import DTYPES
from megatron_rl.weights.files.stored_forms import FLOATS

_NUM_PROMPTS, _NUM_TOKENS = 4, 32


def check_verifiable(hf: dict[str, Any]) -> None:
    """Raise UserError if transformers cannot load the checkpoint of a config.json here."""
    method = (hf.get("quantization_config") or {}).get("quant_method")
    if method == "fp8" and importlib.util.find_spec("accelerate") is None:
        raise UserError("--verify: transformers reads FP8 only beside the package accelerate, which is not installed")


@torch.no_grad()
def largest_difference(gpt: Any, folder: Path, hf: dict[str, Any]) -> float:
    """The largest difference of a token's log-prob, or of a classifier's score, between Megatron and transformers.

    Both compute in the dtype of their weights: in float32 they agree to about 1e-5, in bfloat16 to about 1e-1.

    Args:
        gpt: whole GPTModel on one rank.
        folder: of the Hugging Face checkpoint; its model is loaded beside, which takes its memory once more.
        hf: its config.json; the prompts are token ids below its vocab_size, drawn from a fixed seed.

    Returns:
        Nats, or what a score counts. Prompts of 32 tokens; four of them.
    """
    vocab_size = hf["vocab_size"]
    ids = torch.randint(vocab_size, (_NUM_PROMPTS, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(this_device())
    was_training = gpt.training
    gpt.eval()
    positions = torch.arange(_NUM_TOKENS, device=ids.device).expand_as(ids)
    ours = gpt(ids, positions, None)
    gpt.train(was_training)
    theirs = _load(folder, hf, next(gpt.parameters()).dtype).to(ids.device).eval()
    if is_scalar(hf):
        hidden = theirs.model(ids).last_hidden_state
        return float((ours.float() - theirs.score(hidden).float()).abs().max())
    return float((_log_probs(ours[..., :vocab_size], ids) - _log_probs(theirs(ids).logits, ids)).abs().max())


def _load(folder: Path, hf: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model; what is quantised in its files is unpacked, as it is here."""
    import transformers

    quantized = (hf.get("quantization_config") or {}).get("quant_method")
    unpacking = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}
    settings = {"quantization_config": unpacking[quantized](dequantize=True)} if quantized in unpacking else {}
    kind: Any = transformers.AutoModelForCausalLM
    if is_scalar(hf):
        per_token = is_per_token(hf)
        kind = (
            transformers.AutoModelForTokenClassification
            if per_token
            else (transformers.AutoModelForSequenceClassification)
        )
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **settings)
    for parameter in model.parameters():  # what transformers unpacks is bfloat16, whatever it was asked for
        parameter.data = parameter.data.to(dtype)
    return model


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L, V], [B, L] -> [B, L - 1] float32: of every token but the first."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


# Names in the checkpoint begin with a part of GPTModel; the optimizer's begin with "optimizer.".
_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")
_FLOAT32 = "router.expert_bias"
"""Kept so by every model, whatever the dtype of the others."""
_EMBEDDING, _OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"


class _WholeModel:
    """A model in this process, its weights not yet set."""

    def __init__(self, hf: dict[str, Any], dtype: torch.dtype) -> None:
        scalar = is_scalar(hf)
        backbone = backbone_config(hf) if scalar else hf
        self.maps = tables(hf)
        config = transformer_config(backbone, dtype=dtype, overrides={"perform_initialization": False})
        # Transformer Engine's layers store the same tensors, if not all under the same names.
        self.gpt = build_gpt_model(backbone, config, use_transformer_engine=False, pre_process=True, post_process=True)
        if scalar:
            self.gpt.output_layer = ScalarHead(config, bias=is_per_token(hf))
        self.parameters = local_parameters([self.gpt])
        check_table(self.parameters, self.maps, Place())

    def shown(self, doing: str) -> Iterator[TensorMap]:
        """The table, with a bar of the bytes gone through and the time left, where a terminal can show it."""
        sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in self.parameters.items()}
        with tqdm(total=sum(sizes.values()), desc=doing, unit="B", unit_scale=True, disable=None) as bar:
            for tensor_map in self.maps:
                yield tensor_map
                bar.update(sizes[tensor_map.name])

    def write(self, plan: ExportPlan, folder: Path) -> None:
        """Write every tensor into the files of a plan."""
        with ShardWriter(plan, folder) as writer:
            for tensor_map in self.shown("writing the Hugging Face files"):
                writer.write(tensor_map, 0, 1, self.parameters[tensor_map.name])


def hf_to_megatron(*, hf_path: Path, output: Path, verify: bool = False) -> float | None:
    """Write the Megatron checkpoint of a Hugging Face one.

    Args:
        hf_path: folder of a Hugging Face checkpoint.
        output: folder to create; it appears when it is complete.
        verify: compare the Megatron model with the Hugging Face one.

    Returns:
        With `verify` the largest difference of a log-prob (of a classifier: a score) between the two; else None.

    Raises:
        UserError: `output` has something in it, or no room; the checkpoint is not one of a supported model, or its
            files are missing, damaged or not what config.json says.
    """
    _refuse_occupied(output)
    hf = _read_config(hf_path)
    check_weights(hf_path, "--hf-path")
    reader, maps = HFCheckpointReader(hf_path), tables(hf)
    reader.check(maps)
    if verify:
        check_verifiable(hf)
    _tell(reader.left_out())
    with world_of_one(), torch.no_grad():
        model = _WholeModel(hf, _held_dtype(reader, maps, hf))
        for tensor_map in model.shown("reading the Hugging Face files"):
            reader.read_shard(tensor_map, 0, 1, model.parameters[tensor_map.name])
        with _whole_or_nothing(output) as partial:
            folder = iteration_folder(partial, 0)
            folder.mkdir(parents=True)
            write_now({"model": tensors_to_save(model.gpt)}, folder)
            (partial / LATEST).write_text("0\n")
        return largest_difference(model.gpt, hf_path, hf) if verify else None


def megatron_to_hf(*, checkpoint: Path, hf_path: Path, output: Path, verify: bool = False) -> float | None:
    """Write the Hugging Face checkpoint of a Megatron one.

    Core unpickles parts of a Megatron checkpoint, so one from an unknown source is as dangerous as a program.

    Args:
        checkpoint: folder with `latest_checkpointed_iteration.txt`, whose latest iteration is taken, or the folder of
            one iteration; of any parallel layout, with or without training state.
        hf_path: Hugging Face checkpoint of the same architecture; its config, tokenizer and other files are copied,
            and config.json says in which dtype the weights are written.
        output: folder to create; it appears when it is complete.
        verify: compare the Megatron model with the Hugging Face one.

    Returns:
        With `verify` the largest difference of a log-prob (of a classifier: a score) between the two; else None.

    Raises:
        UserError: `output` has something in it; a checkpoint's files are missing, damaged or do not fit config.json.
    """
    _refuse_occupied(output)
    hf = _read_config(hf_path)
    folder = _iteration(checkpoint)
    shapes = check_files(folder)
    with world_of_one(), torch.no_grad():
        model = _WholeModel(hf, _saved_dtype(folder))
        with loading(folder):
            metadata = dist_checkpointing.load_content_metadata(str(folder))
        template = tensors_to_load(model.gpt, shapes, metadata)
        _check_model(folder, shapes, template, hf)
        with loading(folder):
            loaded: dict[str, Tensor] = dist_checkpointing.load({"model": template}, str(folder))["model"]
        weights = dict(model.gpt.named_parameters()) | dict(model.gpt.named_buffers())
        for name in template:
            weights[name].copy_(loaded[name])
        plan = ExportPlan(model.maps, written_dtypes(hf_path, hf))
        partial = output.with_name(f".{output.name}.partial")
        together(output, lambda: plan.create(begin(output)))
        together(output, lambda: model.write(plan, partial))
        written = written_config(hf_path, hf)
        together(output, lambda: complete(partial, output, source=hf_path, config=written))
        return largest_difference(model.gpt, output, written or hf) if verify else None


@contextmanager
def world_of_one() -> Iterator[Groups]:
    """torch.distributed and Megatron's groups, with this process as the only rank."""
    assert not dist.is_initialized(), "a conversion makes a world of its own"
    dist.init_process_group(distributed_backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield initialize(ParallelConfig(), seed=0)
    finally:
        finalize()


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end of the context, or is deleted.

    Raises:
        CheckpointError: the operating system did not let it be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        os.replace(partial, output)
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        raise cannot_write(output, error) or error from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _held_dtype(reader: HFCheckpointReader, maps: list[TensorMap], hf: dict[str, Any]) -> torch.dtype:
    """The dtype that holds every weight of the files as it is."""
    dtype = checkpoint_dtype(hf, reader.folder)
    for name in {name for tensor_map in maps if not tensor_map.float32 for name in tensor_map.hf_shapes}:
        if name in reader.tensors and reader.tensors[name].dtype in FLOATS:
            dtype = torch.promote_types(dtype, DTYPES[reader.tensors[name].dtype])
    return dtype


def _saved_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds every weight of a Megatron checkpoint as it is."""
    dtypes = {
        dtype
        for name, dtype in stored_dtypes(folder).items()
        if name.startswith(_MODEL_PARTS) and not name.endswith(_FLOAT32)
    } & set(DTYPES_OF_WEIGHTS)
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _tell(line: str | None) -> None:
    if line is not None:
        print(f"megatron-rl: {line}", file=sys.stderr, flush=True)


def _read_config(hf_path: Path) -> dict[str, Any]:
    read_model_shape(hf_path, "--hf-path")  # says which size is missing
    hf = read_json_object(hf_path / "config.json", "--hf-path")
    check_family(backbone_config(hf) if is_scalar(hf) else hf)
    return hf


def _refuse_occupied(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: given '{output}', which exists; allowed: a new or an empty folder")


def _iteration(checkpoint: Path) -> Path:
    """The folder of one iteration that the user means."""
    if (checkpoint / "metadata.json").is_file():
        return checkpoint
    step = latest_step(checkpoint)
    if step is None:
        raise CheckpointError(
            f"--checkpoint: given '{checkpoint}'; allowed: a folder with {LATEST}, or an iteration's with metadata.json"
        )
    return iteration_folder(checkpoint, step)


def _check_model(
    folder: Path, shapes: dict[str, tuple[int, ...]], template: dict[str, Any], hf: dict[str, Any]
) -> None:
    """Raise CheckpointError unless the checkpoint holds the model of config.json, no tensor more or less."""
    expected = {name for entry in template.values() for name in names_of(entry)}
    stored = {name for name in shapes if name.startswith(_MODEL_PARTS)}
    for names, what in ((expected - stored, "is missing"), (stored - expected, "is unknown to the model")):
        if names:
            raise CheckpointError(f"{folder}: tensor '{min(names)}' {what} of config.json")
    # Core compares all shapes but these, which the parallel size of the run has padded.
    for name in {_EMBEDDING, *([] if is_scalar(hf) else [_OUTPUT_LAYER])} & stored:
        if shapes[name][0] < hf["vocab_size"] or shapes[name][1] != hf["hidden_size"]:
            expected_shape = (hf["vocab_size"], hf["hidden_size"])
            raise CheckpointError(f"{folder}: tensor '{name}' has shape {shapes[name]}, config.json {expected_shape}")
