"""transformers' DeepseekV3ForCausalLM in a plain loop: grouped_mm, SDPA, AdamW in bf16."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.bench import (
    Measured,
    peak_gib,
    reset_peak,
    slice_of_v3,
    summary,
    time_steps,
)

SEQ_LENGTH = 4096


def measure(groups: Groups, num_micro_batches: int, num_steps: int) -> Measured:
    """Whole steps: forward and backward of every micro-batch, clipping, update."""
    reset_peak(groups.device)
    arch = slice_of_v3()
    config = DeepseekV3Config(**{**arch.to_hf(), "use_cache": False})
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    with torch.device("cuda"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    tokens = torch.randint(0, arch.vocab_size, (num_micro_batches, 1, SEQ_LENGTH), device="cuda")
    losses: list[torch.Tensor] = []

    def step() -> None:
        for row in tokens:
            loss = model(input_ids=row, labels=row, use_cache=False).loss / len(tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() * len(tokens))

    times = time_steps(step, groups.device, num_steps=num_steps)
    return summary(
        "transformers",
        arch,
        times,
        num_tokens=num_micro_batches * SEQ_LENGTH,
        document_length=SEQ_LENGTH,
        peak_gib=peak_gib(groups.device),
        loss=float(losses[-1]),
    )
