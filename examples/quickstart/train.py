"""`megatron-dsv3 train`, and at the end the logits of the trained model for a check from outside.

    torchrun --nproc-per-node 2 examples/quickstart/train.py PROBE.pt JOB.yaml [a.b=c ...]

PROBE.pt gets {"tokens": [1, seq], "logits": [1, seq, vocab]} of the live Megatron model.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_dsv3 import cli
from megatron_dsv3.commands.train import Trained, run
from megatron_dsv3.config.job import load_job

PROBE_LENGTH = 64


def main() -> None:
    """Trains; the arguments are the probe's path, the job and its overrides."""
    probe, job, *overrides = sys.argv[1:]

    def save_logits(trained: Trained) -> None:
        [model] = trained.chunks
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.vocab_size, (1, PROBE_LENGTH), generator=generator)
        positions, device = torch.arange(PROBE_LENGTH)[None], trained.groups.device
        model.eval()
        with torch.no_grad():  # every rank takes part: the experts are spread over them
            logits = model(tokens.to(device), positions.to(device), None)[0].cpu()
        if dist.get_rank() == 0:
            torch.save({"tokens": tokens, "logits": logits}, probe)

    with cli.user_errors():
        run(load_job(Path(job), overrides), Console(), on_end=[save_logits])


if __name__ == "__main__":
    main()
