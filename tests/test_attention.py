"""Core attention against a softmax written out, in every layout of documents over ranks."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dsv3.model import attention, cpu
from megatron_dsv3.model.attention import CoreAttention, zigzag

HEADS, QK_DIM, V_DIM = 3, 12, 8  # MLA's keys are wider than its values
SCALE = 0.37
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def _core(*, cp_rank: int = 0, cp_size: int = 1) -> CoreAttention:
    group = SimpleNamespace(rank=lambda: cp_rank, size=lambda: cp_size)
    config = SimpleNamespace(context_parallel_size=cp_size)
    return CoreAttention(
        config, layer_number=1, softmax_scale=SCALE, pg_collection=SimpleNamespace(cp=group)
    )


def _inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return tuple(
        torch.randn(*shape, HEADS, dim, generator=generator).requires_grad_()
        for dim in (QK_DIM, QK_DIM, V_DIM)
    )


def _naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One document: [seq, heads, dim] each -> [seq, heads * dim]."""
    output = torch.zeros(len(query), HEADS, V_DIM)
    for head in range(HEADS):
        for t in range(len(query)):
            scores = torch.stack([query[t, head] @ key[s, head] for s in range(t + 1)]) * SCALE
            output[t, head] = (scores.softmax(0)[:, None] * value[: t + 1, head]).sum(0)
    return output.flatten(1)


def _packed(*lengths: int) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


def test_a_batch_is_the_softmax_written_out():
    tensors = _inputs(7, 2)
    output = _core()(*tensors, None)
    assert output.shape == (7, 2, HEADS * V_DIM)
    for row in range(2):
        expected = _naive(*(tensor[:, row] for tensor in tensors))
        torch.testing.assert_close(output[:, row], expected, **TOLERANCE)


def test_gradients_are_those_of_the_softmax_written_out():
    tensors = _inputs(6, 1)
    weight = torch.randn(6, HEADS * V_DIM, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((_core()(*tensors, None)[:, 0] * weight).sum(), tensors)
    theirs = torch.autograd.grad((_naive(*(t[:, 0] for t in tensors)) * weight).sum(), tensors)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, **TOLERANCE)


@pytest.mark.parametrize("lengths", [(5,), (4, 4), (1, 6, 3), (2, 1, 1, 5)], ids=str)
def test_packed_documents_are_documents_alone(lengths):
    tensors = _inputs(sum(lengths))
    packed = _core()(*tensors, None, packed_seq_params=_packed(*lengths))
    assert packed.shape == (sum(lengths), HEADS * V_DIM)
    alone = [_naive(*parts) for parts in zip(*(t.split(lengths) for t in tensors), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), **TOLERANCE)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zigzag_covers_every_position_once(size):
    length = 12 * size
    parts = [zigzag(length, cp_rank=rank, cp_size=size) for rank in range(size)]
    assert {len(part) for part in parts} == {12}
    assert torch.cat(parts).sort().values.tolist() == list(range(length))


def test_zigzag_by_hand():
    parts = [zigzag(8, cp_rank=rank, cp_size=2).tolist() for rank in range(2)]
    assert parts == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (0, 4), (2, 4), (3, 4)])
def test_zigzag_takes_the_positions_whose_rotary_embedding_megatron_takes(rank, size):
    cpu.enable()
    group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    embedding = torch.arange(48.0)[:, None]
    theirs = get_pos_emb_on_this_cp_rank(embedding, 0, group)
    assert torch.equal(embedding[zigzag(48, cp_rank=rank, cp_size=size)], theirs)


def test_zigzag_balances_the_causal_work():
    work = [int((zigzag(64, cp_rank=rank, cp_size=4) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


@pytest.mark.parametrize(("length", "size"), [(6, 2), (7, 1), (20, 4)])
def test_a_length_that_cannot_be_cut_is_refused(length, size):
    message = (
        rf"document of {length} tokens cannot be cut for cp_size\({size}\): its padded length must "
        rf"be a multiple of 2 \* cp_size = {2 * size}"
    )
    with pytest.raises(ValueError, match=message):
        zigzag(length, cp_rank=0, cp_size=size)


def _shares(tensor: Tensor, lengths: tuple[int, ...], size: int) -> list[Tensor]:
    """What each context-parallel rank holds of packed documents."""
    documents = tensor.split(lengths)
    return [
        torch.cat([d[zigzag(len(d), cp_rank=rank, cp_size=size)] for d in documents])
        for rank in range(size)
    ]


def _gathered(shares: list[Tensor], local: list[int]) -> list[Tensor]:
    """What an exchange among all ranks brings: [ranks, n, 1, heads, dim] of each document."""
    parts = [share.unsqueeze(1).split(local) for share in shares]
    return [torch.stack(of_all_ranks) for of_all_ranks in zip(*parts, strict=True)]


@pytest.mark.parametrize(("lengths", "size"), [((8,), 2), ((4, 12, 8), 2), ((8, 16), 4)], ids=str)
def test_context_parallel_ranks_give_their_share_of_the_whole(monkeypatch, lengths, size):
    tensors = _inputs(sum(lengths))
    whole = _core()(*tensors, None, packed_seq_params=_packed(*lengths))
    expected = _shares(whole, lengths, size)
    queries, keys, values = (_shares(tensor, lengths, size) for tensor in tensors)
    local = [length // size for length in lengths]
    exchanges = list(zip(_gathered(keys, local), _gathered(values, local), strict=True))
    for rank in range(size):
        sent, answers = [], iter([tensor for pair in exchanges for tensor in pair])

        def exchange(tensor, _, sent=sent, answers=answers):
            sent.append(tensor)
            return next(answers)

        monkeypatch.setattr(attention._AllGather, "apply", exchange)
        core = _core(cp_rank=rank, cp_size=size)
        output = core(
            queries[rank], keys[rank], values[rank], None, packed_seq_params=_packed(*lengths)
        )
        torch.testing.assert_close(output, expected[rank], **TOLERANCE)
        assert torch.equal(torch.cat(sent[::2]).squeeze(1), keys[rank])
        assert torch.equal(torch.cat(sent[1::2]).squeeze(1), values[rank])


def test_nothing_of_it_is_saved_but_an_empty_extra_state():
    core = _core()
    assert core.sharded_state_dict("prefix.") == {}
    assert {name: t.numel() for name, t in core.state_dict().items()} == {"_extra_state": 0}
    core.load_state_dict({}, strict=True)
    assert not list(core.parameters())
