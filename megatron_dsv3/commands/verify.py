"""`megatron-dsv3 verify HF_DIR job.yaml`: does the job's layout compute what transformers does?"""

import os
from pathlib import Path

from rich.console import Console

from megatron_dsv3.commands.assemble import build_model
from megatron_dsv3.commands.gate import check_parity
from megatron_dsv3.commands.train import device_for, read_inputs, session
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.sections import PrecisionSection
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.model.build import wrap
from megatron_dsv3.train.step import TrainStep


def run(hf_dir: Path, job: Job, console: Console) -> None:
    """Loads the job's model in its layout and compares it; only the data's store is written.

    Raises:
        ValueError: The job cannot work, or a part differs beyond the tolerance of its precision.
    """
    inputs = read_inputs(job, int(os.environ.get("WORLD_SIZE", "1")), device_for(job))
    HFReader(hf_dir).check_against(inputs.checkpoint)
    with session(inputs) as groups:
        # Nor are weights kept in FP8: rounding is no mistake, and would hide one.
        plain = job.model_copy(
            update={"precision": PrecisionSection(compute=job.precision.compute)}
        )
        bridge = build_model(plain, inputs.arch, groups, checkpoint=inputs.checkpoint)
        bridge.load(inputs.reader)
        step = TrainStep(
            wrap(bridge.chunks, bridge.chunks[0].config),
            None,  # nothing is updated
            groups,
            mtp_loss_weight=job.mtp.loss_weight,
            experts=job.experts,
        )
        samples = inputs.open_feed(groups, console).train.store
        check_parity(step, bridge, samples, job=job, hf_dir=hf_dir, console=console)
    if groups.rank == 0:
        console.print(f"{hf_dir}: the model is transformers'", highlight=False, soft_wrap=True)
