"""Which of a GPU's faster kernels are taken; each can be left out, to be measured or suspected."""

from megatron_dsv3.config.section import Section


class KernelsSection(Section):
    """Kernels that give the same numbers but for rounding. Without a GPU they have no effect."""

    fused_rope: bool = True
    """Rotate and lay out queries, keys and values in place, by one Triton kernel each, with angles
    in fp32: instead of splits, products and copies. For bf16 weights and YaRN."""
    dense_single_documents: bool = True
    """A row of one document takes attention's kernel for unpacked rows: 5.8 ms instead of 6.9 for
    4096 tokens of DeepSeek-V3's 128 heads on an H100, forward and backward. Without context
    parallelism."""
    fused_loss: bool = False
    """Cross-entropy by Transformer Engine's Triton kernel, which overwrites the bf16 logits with
    their gradient: without it fp32 copies of them take 6 bytes a word and token more. Megatron-Core
    warns of its stability."""
    fused_router: bool = True
    """Scores, choice and weights of the experts by one kernel of Transformer Engine instead of 20,
    in fp32. For models that score a group by as many experts as DeepSeek-V3: top-k over groups a
    token is 2."""
    fused_swiglu: bool = True
    """The dense layers' SwiGLU by Transformer Engine's kernels. Megatron-Core's are compiled for
    all widths at once, which made their backward six times slower than memory allows."""
    fused_update: bool = True
    """Clipping and AdamW by one Triton kernel, instead of two passes over the gradients. Not where
    states are in host memory."""
