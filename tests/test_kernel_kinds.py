"""Kernels of a real step's profile (Transformer Engine 2.20.2 on an H100) fall into their kinds."""

import pytest

from megatron_dsv3.train.kernel_kinds import KINDS, OTHER, by_kind, exposed, kind_of

SEEN = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void co": "attention",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "matrix products",
    "void multi_tensor_apply_kernel<TensorListMetadata<4, false>": "optimizer, norm, clipping",
    "_sort_chunks_by_map_kernel": "expert dispatch",
    "_unpermute_kernel": "expert dispatch",
    "rotary_fwd_q_kernel": "rotation",
    "void transformer_engine::normalization::rmsnorm_bwd_general_kernel<": "norms",
    "triton_poi_fused_add_cat_mul_rsub_sigmoid_silu_split_0": "activations",
    "cross_entropy_forward_kernel": "loss",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage": "communication",
    "Memcpy DtoH (Device -> Pinned)": "copies and fills",
    "void at::native::vectorized_elementwise_kernel<8, at::native::bfloa": OTHER,
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_kernel_that_was_seen_is_of_its_kind(name):
    assert kind_of(name) == SEEN[name]


def test_times_add_up_and_the_longest_comes_first():
    sums = by_kind([("nvjet_a", 1.0), ("NVJET_b", 2.0), ("rmsnorm_x", 4.0), ("what is this", 0.5)])
    assert sums == {"norms": 4.0, "matrix products": 3.0, OTHER: 0.5}
    assert list(sums) == ["norms", "matrix products", OTHER]
    assert sums.keys() <= {*KINDS, OTHER}


@pytest.mark.parametrize(
    ("kernels", "alone"),
    [
        ([("nvjet", 0.0, 4.0), ("rmsnorm", 4.0, 5.0)], 0.0),
        ([("nccl", 0.0, 4.0)], 4.0),
        ([("nvjet", 0.0, 4.0), ("nccl", 1.0, 3.0)], 0.0),
        ([("nvjet", 0.0, 4.0), ("nccl", 3.0, 6.0)], 2.0),
        ([("nccl a", 0.0, 3.0), ("nccl b", 2.0, 5.0), ("nvjet", 4.0, 9.0)], 4.0),
        ([("nccl", 0.0, 9.0), ("nvjet", 2.0, 4.0), ("rmsnorm", 3.0, 5.0)], 6.0),
        ([("nccl", 5.0, 6.0), ("nvjet", 0.0, 1.0), ("nccl", 2.0, 3.0)], 2.0),
    ],
)
def test_communication_is_exposed_where_nothing_else_runs(kernels, alone):
    assert exposed(kernels) == alone
