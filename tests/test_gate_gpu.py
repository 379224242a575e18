"""The parity gate over Transformer Engine's modules on a GPU.

In bf16 alone: no attention kernel of a GPU takes the gate's packed rows in fp32.
"""

import gate_model
import hf_reference
import pytest
import torch
from hf_reference import REAL_HEADS

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import PrecisionSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.model.groups import SharedError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    model = hf_reference.build(**REAL_HEADS)
    return model.save(tmp_path_factory.mktemp("hf"), dtype=torch.bfloat16)


def _swap_first_experts_gate_and_up(bridge: Bridge) -> None:
    name = "decoder.layers.2.mlp.experts.linear_fc1.weight0"
    [tensor] = [tensor for param, tensor in bridge.local_tensors() if param.mcore == name]
    tensor.data.copy_(torch.cat(tensor.data.chunk(2)[::-1]))


@pytest.mark.parametrize("fp8", ["off", "blockwise"])
def test_bf16_passes_and_a_swapped_expert_is_named(groups, hf_dir, fp8):
    settings = {
        "dtype": torch.bfloat16,
        "longest": 250,
        "transformer_engine": True,
        "precision": PrecisionSection(fp8=fp8),
    }
    report = gate_model.check(hf_dir, groups, Parallel(), **settings)
    shares = {difference.part: difference.share for difference in report.differences}
    assert max(shares.values()) < 0.8, shares
    with pytest.raises(SharedError, match="first in layer 2 "):
        gate_model.check(
            hf_dir, groups, Parallel(), damage=_swap_first_experts_gate_and_up, **settings
        )
