"""Lets vLLM compute with FP8 blocks on CPUs that its kernels refuse for lack of AMX tiles.

vLLM loads, fuses and places weights and scales as ever; torch multiplies the dequantised blocks in
place of its two kernels. What those round on their way is not shown by it. Runs in vLLM's Python.
"""

import torch
from torch.nn.functional import linear, silu
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

BLOCK = 128


def install() -> None:
    """Puts torch in the place of the kernels, in this process."""
    kernel, experts = CPUFp8BlockScaledMMKernel, cpu_moe.CPUExpertsFp8
    kernel.is_supported = classmethod(lambda cls, *_: (True, None))
    kernel.process_weights_after_loading = lambda *_: None
    kernel.apply_weights = _linear
    experts._supports_current_device = staticmethod(lambda: True)
    experts.apply = _experts
    # Torch multiplies in fp32 as well, in which numbers can be compared to the last digits.
    Fp8Config.get_supported_act_dtypes = classmethod(lambda _: [torch.bfloat16, torch.float32])
    cpu_moe.prepare_fp8_moe_layer_for_cpu = lambda gate_up, down: (gate_up, down)


def _dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape[-2:]
    wide = scale.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return weight.float() * wide[..., :rows, :columns]


def _linear(self, layer, x, bias=None, **_):
    params = self._get_layer_params(layer)
    scale = params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv
    return linear(x.float(), _dequantize(params.weight, scale), bias).to(x.dtype)


def _experts(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_, **__):
    total = torch.zeros(output.shape)
    for expert in topk_ids.unique().tolist():
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        both = linear(hidden_states[tokens].float(), _dequantize(w1[expert], self.w1_scale[expert]))
        gate, up = both.chunk(2, -1)
        answer = linear(silu(gate) * up, _dequantize(w2[expert], self.w2_scale[expert]))
        total.index_add_(0, tokens, answer * topk_weights[tokens, slots, None])
    output.copy_(total)
