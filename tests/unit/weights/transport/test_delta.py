"""Messages of changed elements: exact, and refused wherever they would not be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.weights.plan.blocks import BlockCopy
from megatron_rl.weights.plan.shard_plan import Slice
from megatron_rl.weights.transport.exchange import verified
from megatron_rl.weights.transport.messages import (
    SentCopy,
    TransferError,
    apply_changes,
    message_bytes,
    open_message,
    pack_changes,
    pack_whole,
    sent_copy,
    slices_in,
    take_changes,
)

VERIFY = verified("full", 0)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def integers(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def allocate(num_bytes: int) -> Tensor:
    return torch.full((num_bytes,), 255, dtype=torch.uint8)


def pieces(shapes: list[tuple[int, int]], dtypes: list[str]) -> list[Slice]:
    return [
        Slice(f"p{i}", f"t{i}", BlockCopy((0, 0), (0, 0), shape), dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def test_changes_are_found_by_their_bits() -> None:
    """A zero that changes its sign is a change, a nan that stays is none."""
    old = torch.tensor([0.0, 1.0, float("nan"), 2.0])
    new = torch.tensor([-0.0, 1.0, float("nan"), 2.5])
    held, other = bits(old).clone(), bits(old).clone()
    positions, values = take_changes(held, new)
    assert positions.tolist() == [0, 3]
    assert values.tolist() == [-(2**31), 0x40200000]  # the bits of -0.0 and of 2.5
    apply_changes(other, positions, values)
    assert torch.equal(held, bits(new))
    assert torch.equal(other, bits(new))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    names=st.lists(st.sampled_from(sorted(DTYPES)), min_size=5, max_size=5),
    shares=st.lists(st.sampled_from([0.0, 0.02, 0.2, 1.0]), min_size=3, max_size=3),
    seed=st.integers(0, 999),
)
def test_receivers_hold_what_senders_hold(
    shapes: list[tuple[int, int]], names: list[str], shares: list[float], seed: int
) -> None:
    """Over several versions with elements changed at random, whether changes or everything travelled."""
    generator = torch.Generator().manual_seed(seed)
    plan = pieces(shapes, names[: len(shapes)])
    parameters = {p.source: torch.randn(p.block.size, generator=generator).to(DTYPES[p.dtype]) for p in plan}
    message = pack_whole(plan, parameters, allocate, version=1, verify=VERIFY)
    sender = sent_copy(message, plan, 1)
    open_message(message, plan, "", version=1, verify=VERIFY, copy=None)
    receiver = sent_copy(message, plan, 1)
    for version, share in enumerate(shares, 2):
        for name, tensor in parameters.items():
            new = integers(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            where = torch.rand(tensor.shape, generator=generator) < share
            parameters[name] = torch.where(where, new, integers(tensor)).view(tensor.dtype)
        message = pack_changes(plan, parameters, allocate, sender, max_changed=0.1, version=version, verify=VERIFY)
        assert len(message) <= message_bytes(plan, VERIFY)
        opened = open_message(message, plan, "", version=version, verify=VERIFY, copy=receiver)
        for piece, values, checksum in slices_in(opened, plan, VERIFY):
            assert torch.equal(bits(values), bits(parameters[piece.source]))
            assert checksum is not None
        if opened.slices is not receiver.slices:
            receiver = sent_copy(message, plan, version)
        assert receiver.version == sender.version == version
        assert torch.equal(receiver.slices, sender.slices)


def one_slice() -> tuple[list[Slice], dict[str, Tensor], SentCopy]:
    plan = pieces([(100, 10)], ["bfloat16"])
    parameters = {"p0": torch.randn(100, 10, generator=torch.Generator().manual_seed(0)).bfloat16()}
    return plan, parameters, sent_copy(pack_whole(plan, parameters, allocate, version=1, verify=VERIFY), plan, 1)


def changed(count: int, version: int) -> tuple[list[Slice], Tensor, SentCopy]:
    """A message in which `count` of 1,000 elements differ from version 1, and the copy of version 1."""
    plan, parameters, sender = one_slice()
    receiver = SentCopy(sender.slices.clone(), 1)
    parameters["p0"].view(-1)[:count] += 1
    message = pack_changes(plan, parameters, allocate, sender, max_changed=0.1, version=version, verify=VERIFY)
    return plan, message, receiver


def test_few_changes_are_few_bytes_and_many_are_everything() -> None:
    # 30 elements of 2 bytes and positions of 4: 8 + 120 + 64 (60, padded), a checksum and 4 words more.
    assert len(changed(30, 2)[1]) == 8 + 120 + 64 + 8 + 32
    whole = 2000 + 8 + 32
    assert len(changed(100, 2)[1]) == 8 + 400 + 200 + 8 + 32
    assert len(changed(101, 2)[1]) == whole


def test_changes_to_a_version_that_the_receiver_does_not_have_are_refused() -> None:
    """An engine that was started anew has nothing; one that missed a version has another."""
    plan, message, copy = changed(30, 2)
    with pytest.raises(TransferError, match=r"t0 on\): changes since version 1, and the engine's rank holds nothing"):
        open_message(message, plan, "from rank 0", version=2, verify=VERIFY, copy=None)
    copy.version = 0
    with pytest.raises(TransferError, match="changes since version 1, and the engine's rank holds version 0"):
        open_message(message, plan, "from rank 0", version=2, verify=VERIFY, copy=copy)


def test_a_wrong_copy_is_detected() -> None:
    plan, message, copy = changed(30, 2)
    copy.slices[1000] ^= 1
    with pytest.raises(TransferError, match="changes since version 1 do not make version 2"):
        open_message(message, plan, "from rank 0", version=2, verify=VERIFY, copy=copy)


def test_a_flipped_bit_among_changes_is_never_applied() -> None:
    plan, message, copy = changed(30, 2)
    before = copy.slices.clone()
    message[20] ^= 4
    with pytest.raises(TransferError, match="damaged on the way"):
        open_message(message, plan, "from rank 0", version=2, verify=VERIFY, copy=copy)
    assert torch.equal(copy.slices, before)
