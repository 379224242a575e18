"""The router by Transformer Engine's kernels, against the same router in torch, at V3's size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import DeepseekV3Router

pytestmark = pytest.mark.gpu

TOKENS = 2048
DOCUMENTS = 5
V3 = replace(DEEPSEEK_V3, hidden_size=64)
RULES = {
    "DeepSeek-V3": V3,
    "one group": replace(V3, num_groups=1, num_groups_per_token=1),
    # No rule of the kernel's: what the choice falls back to.
    "three a group": replace(V3, num_experts_per_token=12),
    "not normalised": replace(V3, normalize_topk=False),
}


def _router(arch: Architecture, groups: Groups, *, fused: bool) -> DeepseekV3Router:
    config = mcore_config(
        arch,
        Parallel(),
        dtype=torch.bfloat16,
        device=groups.device,
        experts=ExpertsSection(aux_loss_coefficient=0.5),
        kernels=KernelsSection(fused_router=fused),
    )
    router = DeepseekV3Router(config=config, pg_collection=groups.collection).cuda()
    router.set_layer_number(1)
    router.balance_weight = 1 / DOCUMENTS
    generator = torch.Generator("cuda").manual_seed(1)
    router.weight.data.normal_(generator=generator)
    router.expert_bias.normal_(0.0, 0.1, generator=generator)
    return router


def _membership() -> Tensor:
    """Documents of several lengths, one of a single token, and padding."""
    lengths = torch.tensor([900, 1, 400, 37, 500])
    documents = torch.arange(DOCUMENTS).repeat_interleave(lengths)
    documents = torch.nn.functional.pad(documents, (0, TOKENS - len(documents)), value=-1)
    return (documents[:, None] == torch.arange(DOCUMENTS)).cuda()[:, None]


@pytest.mark.parametrize("arch", RULES.values(), ids=RULES.keys())
def test_choice_weights_counts_and_gradients_are_those_in_torch(groups, arch):
    generator = torch.Generator("cuda").manual_seed(2)
    logits = torch.randn(TOKENS, 1, arch.num_experts, device="cuda", generator=generator)
    towards = torch.randn(TOKENS, arch.num_experts, device="cuda", generator=generator)
    outcomes = []
    for fused in (True, False):
        router, leaf = _router(arch, groups, fused=fused), logits.clone().requires_grad_()
        probs, routing_map = router.routing(leaf, _membership())
        (gradient,) = torch.autograd.grad((probs * towards).sum(), leaf)
        (balance,) = torch.autograd.grad((router.routing(leaf, _membership())[0] * 0).sum(), leaf)
        outcomes.append((probs, routing_map, router.local_tokens_per_expert, gradient, balance))
    (probs, chosen, counts, gradient, balance), (*expected,) = outcomes
    assert torch.equal(chosen, expected[1])
    assert torch.equal(counts, expected[2])
    assert counts.sum() == 2 * 1838 * arch.num_experts_per_token
    torch.testing.assert_close(probs, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected[3], rtol=1e-4, atol=1e-6)
    assert expected[4].abs().max() > 1e-4
    torch.testing.assert_close(balance, expected[4], rtol=1e-4, atol=1e-9)


def test_deepseek_v3s_choice_takes_the_kernel(groups, monkeypatch):
    from megatron.core.transformer.moe import moe_utils

    calls = []
    kernel = moe_utils.fused_topk_with_score_function
    monkeypatch.setattr(
        moe_utils, "fused_topk_with_score_function", lambda *a: calls.append(a) or kernel(*a)
    )
    logits = torch.randn(8, 1, V3.num_experts, device="cuda")
    for fused, arch in ((True, V3), (True, RULES["three a group"]), (False, V3)):
        _router(arch, groups, fused=fused).routing(logits)
    assert len(calls) == 1
