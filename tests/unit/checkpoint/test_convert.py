"""Conversion in one process: there and back is bit-exact, and every mistake is one line."""

import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_rl.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_rl.checkpoint.folders import LATEST, iteration_folder, latest_step
from megatron_rl.checkpoint.integrity import CheckpointError, check_files
from megatron_rl.config.errors import UserError
from tests.checkpoints import FAMILIES, make_checkpoint, make_classifier


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3_untied", seed=4)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, hf_path: Path) -> Path:
    output = tmp_path_factory.mktemp("megatron") / "checkpoint"
    hf_to_megatron(hf_path=hf_path, output=output)
    return output


@pytest.fixture
def copied(tmp_path: Path, converted: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copied"))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_file_is_the_same(tmp_path: Path, family: str) -> None:
    source = make_checkpoint(tmp_path / "hf", family, seed=1)
    (source / "LICENSE").write_text("a file that no library knows")
    differences = [
        hf_to_megatron(hf_path=source, output=tmp_path / "megatron", verify=True),
        megatron_to_hf(checkpoint=tmp_path / "megatron", hf_path=source, output=tmp_path / "back", verify=True),
    ]
    # float32: the two round differently; a tensor in the wrong place makes more than 0.1.
    assert all(difference is not None and difference < 1e-4 for difference in differences)
    assert latest_step(tmp_path / "megatron") == 0
    assert files(tmp_path / "back") == files(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]  # nothing temporary


def test_weights_come_from_the_checkpoint_and_the_rest_from_the_hf_folder(tmp_path: Path, converted: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "qwen3_untied", seed=5)
    (other / "README.md").write_text("the other")
    iteration = iteration_folder(converted, 0)  # the folder of one iteration is accepted as well
    megatron_to_hf(checkpoint=iteration, hf_path=other, output=tmp_path / "back")
    expected, mixed = files(other), files(tmp_path / "back")
    assert mixed.pop("model.safetensors") != expected.pop("model.safetensors")
    assert mixed == expected


def test_config_json_says_the_dtype(tmp_path: Path, hf_path: Path, converted: Path) -> None:
    half = Path(shutil.copytree(hf_path, tmp_path / "half"))
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (half / "model.safetensors").unlink()  # else each tensor is written in the dtype that it has there
    megatron_to_hf(checkpoint=converted, hf_path=half, output=tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in load_file(hf_path / "model.safetensors").items():
        assert written[name].dtype is torch.bfloat16
        assert torch.equal(written[name], tensor.to(torch.bfloat16)), name


def test_what_is_finer_than_config_json_says_stays_so(tmp_path: Path, hf_path: Path) -> None:
    mixed = Path(shutil.copytree(hf_path, tmp_path / "mixed"))
    change(mixed / "config.json", dtype="bfloat16")
    tensors = load_file(mixed / "model.safetensors")
    halved = {name: x if "norm" in name else x.to(torch.bfloat16) for name, x in tensors.items()}  # norms in float32
    save_file(halved, mixed / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf_path=mixed, output=tmp_path / "megatron")
    megatron_to_hf(checkpoint=tmp_path / "megatron", hf_path=mixed, output=tmp_path / "back")
    assert files(tmp_path / "back") == files(mixed)


def test_what_exists_is_never_replaced(tmp_path: Path, hf_path: Path, converted: Path) -> None:
    output = tmp_path / "photographs"
    output.mkdir()
    (output / "one.png").touch()
    with pytest.raises(UserError, match=r"--output: given '.*photographs', which exists"):
        hf_to_megatron(hf_path=hf_path, output=output)
    with pytest.raises(UserError, match=r"--output: given '.*one\.png', which exists"):
        megatron_to_hf(checkpoint=converted, hf_path=hf_path, output=output / "one.png")
    assert [path.name for path in output.iterdir()] == ["one.png"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def with_norm(value: torch.Tensor | None, name: str = "model.norm.weight") -> Callable[[Path], None]:
    """Replaces the last norm, or adds a tensor of another name; None: drops it."""

    def damage(file: Path) -> None:
        tensors = {**load_file(file), name: value}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)

    return damage


def corrupt_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8] = ord("}")
    file.write_bytes(content)


def pickled(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", Path.unlink, r"config\.json does not exist"),
        ("config.json", lambda file: file.write_text("{"), r"config\.json is malformed JSON"),
        (
            "config.json",
            lambda file: change(file, architectures=["GPT2LMHeadModel"]),
            "'GPT2LMHeadModel' .* allowed: DeepseekV2ForCausalLM",
        ),
        ("config.json", lambda file: change(file, dtype="float64"), "dtype 'float64' .* allowed: float32, bfloat16"),
        ("config.json", lambda file: change(file, hidden_size=100), r"\(259, 96\), config\.json implies \(259, 100\)"),
        ("model.safetensors", Path.unlink, r"no weights in"),
        ("model.safetensors", truncate, r"model\.safetensors is truncated"),
        ("model.safetensors", corrupt_header, r"model\.safetensors is no safetensors file: its header is malformed"),
        ("model.safetensors", pickled, r"only pickled weights such as pytorch_model\.bin, never read"),
        ("model.safetensors", with_norm(None), r"tensor 'model\.norm\.weight' is missing"),
        (
            "model.safetensors",
            with_norm(torch.zeros(1), "model.extra"),
            r"model\.safetensors: tensor 'model\.extra' is unknown to the model of config\.json",
        ),
        (
            "model.safetensors",
            with_norm(torch.zeros(95)),
            r"model\.safetensors: tensor 'model\.norm\.weight' has shape \(95,\), config\.json implies \(96,\)",
        ),
        (
            "model.safetensors",
            with_norm(torch.zeros(96, dtype=torch.int32)),
            r"model\.safetensors: tensor 'model\.norm\.weight' has dtype I32, allowed: F32, BF16, F16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_a_damaged_hugging_face_checkpoint(tmp_path: Path, hf_path: Path, name: str, damage: Any, message: str) -> None:
    source = Path(shutil.copytree(hf_path, tmp_path / "hf"))
    damage(source / name)
    with pytest.raises(UserError, match=message):
        hf_to_megatron(hf_path=source, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def take_common_state_out(folder: Path) -> None:
    """Into a file of its own, as core before 0.19 writes it and later releases still read it."""
    if (folder / "common.pt").exists():
        return
    torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / "common.pt")
    index = pickle.loads((folder / ".metadata").read_bytes())
    for name in [name for name in index.state_dict_metadata if name.startswith("common_state/")]:
        del index.state_dict_metadata[name]
    for entry in [entry for entry in index.storage_data if entry.fqn.startswith("common_state/")]:
        del index.storage_data[entry]
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_a_checkpoint_with_a_file_of_the_common_state(tmp_path: Path, hf_path: Path, copied: Path) -> None:
    take_common_state_out(copied / "iter_0000000")
    megatron_to_hf(checkpoint=copied, hf_path=hf_path, output=tmp_path / "out")
    assert files(tmp_path / "out") == files(hf_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (LATEST, Path.unlink, f"allowed: a folder with {LATEST}"),
        (LATEST, lambda file: file.write_text("5"), "names step 5, but .*iter_0000005 is missing"),
        ("iter_0000000/metadata.json", Path.unlink, "iter_0000000 is missing"),
        ("iter_0000000/metadata.json", truncate, r"metadata\.json is damaged"),
        (
            "iter_0000000/metadata.json",
            lambda file: change(file, sharded_backend="zarr"),
            "format 'zarr'; allowed: torch",
        ),
        ("iter_0000000/.metadata", Path.unlink, r"\.metadata is missing"),
        ("iter_0000000/.metadata", truncate, r"\.metadata is damaged"),
        ("iter_0000000/common.pt", Path.unlink, r"common\.pt is missing"),
        ("iter_0000000/common.pt", truncate, r"common\.pt is truncated or damaged"),
        ("iter_0000000/__0_0.distcp", Path.unlink, r"__0_0\.distcp is missing, which \.metadata promises"),
        ("iter_0000000/__0_0.distcp", truncate, r"__0_0\.distcp is truncated: \d+ bytes, but \.metadata says \d+"),
        ("iter_0000000/__0_0.distcp", lambda f: f.write_bytes(bytes(f.stat().st_size)), "iter_0000000 cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_damaged_megatron_checkpoint(
    tmp_path: Path, hf_path: Path, copied: Path, name: str, damage: Any, message: str
) -> None:
    if name.endswith("common.pt"):
        take_common_state_out(copied / "iter_0000000")
    damage(copied / name)
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(checkpoint=copied, hf_path=hf_path, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied"]


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3", {}, "tensor 'output_layer.weight' is unknown to the model"),
        ("qwen2", {}, r"tensor 'decoder\.layers\.self_attention\.linear_qkv\.bias' is missing"),
        ("llama", {"tie_word_embeddings": False}, r"'decoder\.layers\.self_attention\.k_layernorm\.weight' is unknown"),
        # More rows than stored; fewer are cut as padding, which a tensor-parallel run may have added.
        ("qwen3_untied", {"vocab_size": 260}, r"shape \(259, 96\), config\.json \(260, 96\)"),
        ("qwen3_untied", {"hidden_size": 128}, r"shape \(259, 96\), config\.json \(259, 128\)"),
        ("qwen3_untied", {"num_hidden_layers": 3}, "cannot be read"),
        ("qwen3_untied", {"intermediate_size": 192}, "cannot be read"),
    ],
)
def test_a_model_of_another_shape(
    tmp_path: Path, converted: Path, family: str, overrides: dict[str, Any], message: str
) -> None:
    other = make_checkpoint(tmp_path / "other", family, seed=1, **overrides)
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(checkpoint=converted, hf_path=other, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, about half of the model that is written to it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_nothing_behind(small_disk: Path, hf_path: Path, converted: Path) -> None:
    message = r"disk/out cannot be written: No space left on device; nothing was written"
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(hf_path=hf_path, output=small_disk / "out")
    assert list(small_disk.iterdir()) == []
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(checkpoint=converted, hf_path=hf_path, output=small_disk / "out")
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for convert, source in (
        (hf_to_megatron, {"hf_path": hf_path}),
        (megatron_to_hf, {"checkpoint": converted, "hf_path": hf_path}),
    ):
        with pytest.raises(CheckpointError, match="disk/out cannot be written: Read-only file system"):
            convert(**source, output=small_disk / "out")  # type: ignore[operator]


def test_files_that_may_not_be_so_large(tmp_path: Path, hf_path: Path, converted: Path) -> None:
    """As under `ulimit -f`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="out cannot be written: File too large; nothing was written"):
            megatron_to_hf(checkpoint=converted, hf_path=hf_path, output=tmp_path / "out")
        with pytest.raises(CheckpointError, match="out cannot be written: File too large; nothing was written"):
            hf_to_megatron(hf_path=hf_path, output=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("per_token", [False, True])
def test_a_classifier_there_and_back(tmp_path: Path, per_token: bool) -> None:
    source = make_classifier(tmp_path / "hf", "qwen3", seed=1, per_token=per_token)
    differences = [
        hf_to_megatron(hf_path=source, output=tmp_path / "megatron", verify=True),
        megatron_to_hf(checkpoint=tmp_path / "megatron", hf_path=source, output=tmp_path / "back", verify=True),
    ]
    assert all(difference is not None and difference < 1e-4 for difference in differences)  # as of log-probs
    assert files(tmp_path / "back") == files(source)


class Intruder:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_an_index_that_would_run_code_is_refused(tmp_path: Path, copied: Path) -> None:
    marker = tmp_path / "marker"
    index = iteration_folder(copied, 0) / ".metadata"
    index.write_bytes(pickle.dumps(Intruder(f"touch {marker}")))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: .*asks for posix\.system, which no index needs"):
        check_files(index.parent)
    # The same function, reached through a module that the index may name. Protocol 4 resolves dotted names.
    command = f"touch {marker}".encode()
    index.write_bytes(
        b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.system\nU" + bytes([len(command)]) + command + b"\x85R."
    )
    with pytest.raises(CheckpointError, match=r"asks for torch\.distributed\.checkpoint\.filesystem\.os\.system"):
        check_files(index.parent)
    assert not marker.exists()
    with index.open("rb") as stream:
        pickle.load(stream)  # what the refusal prevents
    assert marker.exists()
