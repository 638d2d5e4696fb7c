"""Reading shards from safetensors files and writing whole checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.models.tensor_map import TensorMap, gate_up, split, vocabulary
from megatron_rl.weights.files.hf_reader import HFCheckpointReader
from megatron_rl.weights.files.hf_writer import write_hf_checkpoint

INDEX = "model.safetensors.index.json"
MAPS = [
    vocabulary("embedding", "embed", (3, 2)),
    gate_up("fc1", "gate", "up", (4, 2)),
    split("fc2", "down", (2, 4), dim=1),
]


def tensors() -> dict[str, Tensor]:
    return {
        "embed": torch.arange(6.0).view(3, 2),
        "gate": torch.arange(10.0, 18.0).view(4, 2),
        "up": torch.arange(20.0, 28.0).view(4, 2),
        "down": torch.arange(30.0, 38.0).view(2, 4),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files, as large checkpoints have them."""
    folder = tmp_path / "source"
    folder.mkdir()
    half = tensors()
    down = {"down": half.pop("down")}
    save_file(half, folder / "model-00001-of-00002.safetensors")
    save_file(down, folder / "model-00002-of-00002.safetensors")
    files = {name: f"model-0000{1 + (name == 'down')}-of-00002.safetensors" for name in tensors()}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text('{"a": 1}\n')
    (folder / "tokenizer.json").write_bytes(b"\x00\xff")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        (folder / name).write_bytes(b"weights in another format")
    (folder / ".cache").mkdir()
    return folder


def read(reader: HFCheckpointReader, tensor_map: TensorMap, rank: int, size: int) -> list[list[float]]:
    into = torch.full(tensor_map.shard_shape(rank, size), torch.nan)
    reader.read_shard(tensor_map, rank, size, into)
    return into.tolist()


def test_a_rank_reads_its_slices_from_any_file(source: Path):
    reader = HFCheckpointReader(source)
    reader.check(MAPS)
    embedding, fc1, fc2 = MAPS
    # Three rows of vocabulary over two ranks: the fourth is padding.
    assert read(reader, embedding, 1, 2) == [[4.0, 5.0], [0.0, 0.0]]
    assert read(reader, fc1, 1, 2) == [[14.0, 15.0], [16.0, 17.0], [24.0, 25.0], [26.0, 27.0]]
    assert read(reader, fc2, 1, 2) == [[32.0, 33.0], [36.0, 37.0]]


def test_values_are_converted_to_the_shards_dtype(source: Path):
    into = torch.zeros(4, 2, dtype=torch.bfloat16)
    HFCheckpointReader(source).read_shard(split("g", "gate", (4, 2), dim=0), 0, 1, into)
    assert into.tolist() == tensors()["gate"].tolist()  # integers below 256 are exact in bfloat16


def test_no_safetensors(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"no \*\.safetensors files; only safetensors checkpoints are read"):
        HFCheckpointReader(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_named(source: Path, kept: int):
    """Nothing; a part of the header's length; a part of the header; all but the last byte."""
    file = source / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: not a complete safetensors file"):
        HFCheckpointReader(source)


def test_a_corrupt_header_is_named(source: Path):
    file = source / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[8] = ord("}")
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: not a safetensors file: its header"):
        HFCheckpointReader(source)


def test_a_file_that_the_index_promises(source: Path):
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: missing, which .*index\.json promises"):
        HFCheckpointReader(source)


def test_files_beside_those_of_the_index_are_not_read(source: Path):
    """Some checkpoints hold the same weights again, under other names."""
    save_file({"consolidated": torch.zeros(1)}, source / "consolidated.safetensors")
    assert HFCheckpointReader(source).names == set(tensors())


def test_a_dtype_that_is_no_weight_is_named(source: Path):
    save_file({"down": torch.zeros(2, 4, dtype=torch.int32)}, source / "model-00002-of-00002.safetensors")
    message = r"model-00002-of-00002\.safetensors: tensor 'down' has dtype I32, allowed: F32, BF16, F16, F8_E4M3 with"
    with pytest.raises(UserError, match=message):
        HFCheckpointReader(source).check(MAPS)


def test_what_follows_from_the_config_and_layers_after_the_last_are_not_read(source: Path):
    extra = ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.2.eh_proj.weight")
    (source / INDEX).unlink()
    save_file({name: torch.zeros(1) for name in extra}, source / "extra.safetensors")
    (source / "config.json").write_text('{"num_hidden_layers": 2, "num_nextn_predict_layers": 1}')
    HFCheckpointReader(source).check(MAPS)
    (source / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(UserError, match=r"extra\.safetensors: tensor 'model\.layers\.2\.eh_proj\.weight' is unknown"):
        HFCheckpointReader(source).check(MAPS)


def quantized(folder: Path, scales: Tensor) -> HFCheckpointReader:
    """A float8 matrix of 200 x 150: rows 0, 128 and columns 0, 128 begin a block."""
    values = torch.ones(200, 150).to(torch.float8_e4m3fn)
    save_file({"w": values, "w_scale_inv": scales}, folder / "model.safetensors")
    return HFCheckpointReader(folder)


@pytest.mark.parametrize("dim", [0, 1])
def test_float8_blocks_are_multiplied_by_their_scales(tmp_path: Path, dim: int):
    reader = quantized(tmp_path, torch.tensor([[2.0, 3.0], [5.0, 7.0]]))
    tensor_map = split("ours", "w", (200, 150), dim=dim)
    reader.check([tensor_map])
    whole = torch.empty(200, 150)
    whole[:128, :128], whole[:128, 128:], whole[128:, :128], whole[128:, 128:] = 2.0, 3.0, 5.0, 7.0
    for rank, expected in enumerate(whole.chunk(2, dim)):
        shard = torch.empty_like(expected)
        reader.read_shard(tensor_map, rank, 2, shard)
        assert torch.equal(shard, expected)


def test_float8_without_the_scales_of_its_blocks_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"'w_scale_inv' has shape \(1, 2\) and dtype F32; needed .* \(2, 2\)"):
        quantized(tmp_path, torch.ones(1, 2)).check([split("ours", "w", (200, 150), dim=0)])


def test_a_missing_an_unknown_and_a_wrong_tensor_are_named(source: Path):
    reader = HFCheckpointReader(source)
    with pytest.raises(UserError, match="tensor 'lm_head' is missing"):
        reader.check([*MAPS, vocabulary("output_layer", "lm_head", (3, 2))])
    with pytest.raises(UserError, match=r"tensor 'down' is unknown to the model of config\.json"):
        reader.check(MAPS[:-1])
    message = r"tensor 'down' has shape \(2, 4\), config\.json implies \(2, 8\)"
    with pytest.raises(UserError, match=message):
        reader.check([*MAPS[:-1], split("fc2", "down", (2, 8), dim=1)])


def test_a_tied_output_layer_may_be_stored_twice(source: Path):
    """Some writers store it again as lm_head.weight; the embedding is what counts, as in transformers."""
    (source / INDEX).unlink()
    save_file({"lm_head.weight": torch.zeros(3, 2)}, source / "tied.safetensors")
    reader = HFCheckpointReader(source)
    reader.check(MAPS)
    assert read(reader, MAPS[0], 0, 1) == tensors()["embed"].tolist()


def test_one_file_has_no_index(tmp_path: Path, source: Path):
    write_hf_checkpoint(tmp_path / "new", tensors().items(), source=source)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    # Everything of the source but weights in any format, their index and folders.
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == b"\x00\xff"
    assert_equal(load_file(tmp_path / "new" / "model.safetensors"), tensors())
    header = (tmp_path / "new" / "model.safetensors").read_bytes()[8:60]
    assert b'"__metadata__":{"format":"pt"}' in header  # transformers refuses files without it


def test_several_files_and_their_index(tmp_path: Path, source: Path):
    # Tensors of 24, 32, 32, 32 bytes in files of at most 60: [embed, gate] is 56, then up and down fit no more beside.
    write_hf_checkpoint(tmp_path / "new", tensors().items(), source=source, max_file_bytes=60)
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 120}
    assert index["weight_map"] == {"embed": first, "gate": first, "up": second, "down": third}
    for name in (first, second, third):
        expected = {key: tensors()[key] for key, file in index["weight_map"].items() if file == name}
        assert_equal(load_file(tmp_path / "new" / name), expected)
    HFCheckpointReader(tmp_path / "new").check(MAPS)


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path: Path, source: Path):
    write_hf_checkpoint(tmp_path / "new", tensors().items(), source=source, max_file_bytes=1)
    assert len(set(json.loads((tmp_path / "new" / INDEX).read_text())["weight_map"].values())) == 4


def test_tensors_may_be_views_and_may_change_when_the_next_one_is_asked_for(tmp_path: Path, source: Path):
    def reused() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.zeros(2, 3)
        for value in (1.0, 2.0):
            buffer.fill_(value)
            yield f"tensor_{value:g}", buffer.T

    write_hf_checkpoint(tmp_path / "new", reused(), source=source)
    expected = {"tensor_1": torch.ones(3, 2), "tensor_2": torch.full((3, 2), 2.0)}
    assert_equal(load_file(tmp_path / "new" / "model.safetensors"), expected)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, source: Path):
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from tensors().items()
        raise RuntimeError("a rank died")

    folder = tmp_path / "new"
    write_hf_checkpoint(folder, [("old", torch.ones(1))], source=source)
    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_checkpoint(folder, failing(), source=source, max_file_bytes=40)
    assert_equal(load_file(folder / "model.safetensors"), {"old": torch.ones(1)})
    # The next write starts over, and replaces the old one with all its files.
    (folder / "stale.json").touch()
    write_hf_checkpoint(folder, tensors().items(), source=source)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_equal(load_file(folder / "model.safetensors"), tensors())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]  # nothing temporary


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
