"""A whole training by the command line is one of transformers' model by torch alone.

Layouts are compared with one process; what one process does wrong, all of them do. Here nothing of
this program or of Megatron-Core is in the reference: transformers' modules, torch's cross-entropy,
clipping, AdamW and schedulers, on the samples one by one.
"""

from pathlib import Path

import hf_reference
import pytest
import small_job
import torch
import torch.nn.functional as F
from hf_reference import Reference
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from megatron_dsv3.data.store import Sample, Store
from megatron_dsv3.train.metrics import read_metrics

pytestmark = pytest.mark.slow

NUM_STEPS, WARM_UP, LR, MIN_LR, WEIGHT_DECAY, CLIP, EPS = 6, 2, 2e-3, 4e-4, 0.1, 1.0, 1e-5
BETAS = (0.8, 0.95)
MTP_WEIGHT = 0.3
MODEL = {"num_mtp_layers": 2}


def _losses(reference: Reference, samples: list[Sample]) -> Tensor:
    """Mean over counted targets by depth, [1 + MTP layers]."""
    sums, counted = [0.0] * 3, [0] * 3
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long()
        for depth, logits in enumerate(reference.logits(tokens[None])):
            ahead = 1 + depth
            keep = torch.from_numpy(sample.loss[ahead:].copy())
            losses = F.cross_entropy(logits[0, :-ahead], tokens[ahead:], reduction="none")
            sums[depth] += losses[keep].sum()
            counted[depth] += int(keep.sum())
    return torch.stack([total / number for total, number in zip(sums, counted, strict=True)])


def _train(reference: Reference, samples: list[Sample]) -> list[tuple[float, float, float, float]]:
    """Main loss, MTP's, gradient norm and learning rate of each step."""
    weights = [*reference.model.parameters(), *reference.mtp.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.dim() > 1]},
            {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=1 / (WARM_UP + 1), total_iters=WARM_UP),
            CosineAnnealingLR(optimizer, T_max=NUM_STEPS - WARM_UP, eta_min=MIN_LR),
        ],
        milestones=[WARM_UP],
    )
    steps = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        main, *mtp = _losses(reference, samples)
        mean = torch.stack(mtp).mean()
        (main + MTP_WEIGHT * mean).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
        steps.append((main.item(), mean.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return steps


@pytest.fixture
def job(tmp_path) -> Path:
    """Every step takes all the data, three rows of two packed samples each."""
    model = small_job.write_model(tmp_path / "model", **MODEL)
    return small_job.write_job(
        tmp_path,
        model,
        small_job.write_chats(tmp_path / "chats.jsonl"),
        data={"seq_length": 64},
        train={"global_batch_size": 3, "num_epochs": NUM_STEPS},
        optimizer={
            "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS,
            "weight_decay": WEIGHT_DECAY, "clip_grad": CLIP,
        },
        schedule={"warmup_steps": WARM_UP, "min_lr": MIN_LR},
        mtp={"loss_weight": MTP_WEIGHT},
        experts={"aux_loss_coefficient": 0.0},
        checkpoint={"every_steps": None},
    )  # fmt: skip


def test_a_training_is_that_of_transformers_and_torch(run, job, tmp_path):
    code, _, err = run("train", job)
    assert code == 0, err
    reference = hf_reference.build(**{**small_job.MODEL, **MODEL})
    before = {name: tensor.clone() for name, tensor in reference.tensors().items()}
    store = Store(tmp_path / "log" / "data" / "train")
    steps = _train(reference, [store.sample(number) for number in range(len(store))])
    records = read_metrics(tmp_path / "log")
    assert len(records) == len(steps) == NUM_STEPS
    for record, (main, mtp, norm, lr) in zip(records, steps, strict=True):
        assert record.loss == pytest.approx(main, rel=2e-5)
        assert record.mtp_loss == pytest.approx(mtp, rel=2e-5)
        assert record.grad_norm == pytest.approx(norm, rel=2e-4)
        assert record.lr == pytest.approx(lr, rel=1e-6)
        assert norm > CLIP
    after = hf_reference.read(tmp_path / "out")
    expected = reference.tensors()
    assert after.keys() == expected.keys()
    for name, wanted in expected.items():
        moved, theirs = after[name] - before[name], wanted - before[name]
        error = float((moved - theirs).norm() / theirs.norm().clamp(min=1e-12))
        assert error < 1e-3, f"{name}: {error:.1e}"
