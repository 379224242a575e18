"""ZeRO-3's arithmetic against what the replaced project's table says trained and what ran out."""

import pytest

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.plan.cards import load_card
from megatron_dsv3.plan.zero3 import Zero3, zero3_memory

# nodes of 8 x H100 80GB, sp, sequences, offload, trained: its eight rows at 32,768 tokens. The GB
# beside them (30 at 32k tokens a card, 74 at 16k) rise and fall without order and are no peaks.
ROWS = [
    (16, 8, 2, True, True),
    (32, 8, 1, True, True),
    (32, 4, 1, True, True),
    (32, 1, 1, True, True),
    (32, 4, 2, True, True),
    (32, 1, 2, True, False),
    (32, 4, 1, False, False),
    (32, 1, 1, False, False),
]


@pytest.mark.parametrize(("nodes", "sp_size", "batch_size", "offload", "trained"), ROWS)
def test_what_trained_fits_and_what_ran_out_does_not(nodes, sp_size, batch_size, offload, trained):
    row = Zero3(world_size=8 * nodes, sp_size=sp_size, batch_size=batch_size, offload=offload)
    memory = zero3_memory(DEEPSEEK_V3, row)
    assert (memory.total <= load_card("h100-80gb").memory_gib) == trained, memory


def test_the_parts_are_those_one_works_out_by_hand():
    memory = zero3_memory(
        DEEPSEEK_V3, Zero3(world_size=256, sp_size=4, batch_size=1, offload=False)
    )
    # 16 bytes of 671,026,404,352 parameters over 256 cards, and 4e9 bytes for the update.
    assert memory.states == pytest.approx((16 * 671_026_404_352 / 256 + 4e9) / 2**30)
    # 61 layers' inputs: 8192 tokens x 7168 x 2 bytes.
    assert memory.kept == pytest.approx(61 * 8192 * 7168 * 2 / 2**30)
    # 8192 x 129,280 logits of 6 bytes are more than a layer computed again.
    assert memory.working == pytest.approx(8192 * 129280 * 6 / 2**30)


def test_offload_takes_all_states_off_the_card():
    on, off = (
        zero3_memory(DEEPSEEK_V3, Zero3(world_size=128, sp_size=8, batch_size=1, offload=offload))
        for offload in (True, False)
    )
    assert (on.states, on.gathered, on.working) == (0.0, off.gathered, off.working)
    assert off.total - on.total == pytest.approx(off.states)
