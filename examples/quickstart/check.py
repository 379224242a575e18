"""Checks a quickstart from outside: reloads the written model with transformers, and tells all.

python examples/quickstart/check.py DIR
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dsv3.train.metrics import StepRecord, read_metrics

LOGIT_TOLERANCE = 1e-4
LEAST_FALL = 2.0
PROMPT = "What is the remainder when 2^10 is divided by 7?"


def main() -> int:
    """Prints the summary; exit code 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    directory = parser.parse_args().dir
    logging.getLogger("transformers").setLevel(logging.ERROR)
    records = read_metrics(directory / "log")
    model = AutoModelForCausalLM.from_pretrained(directory / "output", dtype=torch.float32).eval()
    difference = worst_logit(model, directory / "probe.pt")
    plot(records, directory / "loss.png")
    fall = records[0].loss - records[-1].loss
    promises = {
        f"logits of Megatron and transformers within {LOGIT_TOLERANCE:.0e}": (
            difference < LOGIT_TOLERANCE
        ),
        f"loss fell by {LEAST_FALL} or more": fall >= LEAST_FALL,
    }
    config = model.config
    most = config.n_routed_experts / config.num_experts_per_tok
    told = {
        "expert balance": f"{balance(records)} (1 is even, {most:.0f} the worst)",
        "largest logit difference": f"{difference:.1e} (Megatron against transformers)",
        "greedy continuation": generate(model, directory / "output"),
    }
    Console().print(summary(records, told, directory))
    broken = [promise for promise, kept in promises.items() if not kept]
    print("; ".join(f"NOT KEPT: {promise}" for promise in broken) or "all checks passed")
    return 1 if broken else 0


def worst_logit(model: torch.nn.Module, probe: Path) -> float:
    """Largest difference to the logits that the trained Megatron model gave."""
    saved = torch.load(probe, weights_only=True)
    with torch.no_grad():
        logits = model(saved["tokens"]).logits
    return (logits - saved["logits"]).abs().max().item()


def generate(model: torch.nn.Module, hf_dir: Path) -> str:
    """What the model goes on with; after 60 steps from random weights, words rather than sense."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


def plot(records: list[StepRecord], path: Path) -> None:
    """Loss over steps, the main one and that of multi-token prediction."""
    steps = [record.step for record in records]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, [record.loss for record in records], label="next token")
    axes.plot(steps, [record.mtp_loss for record in records], label="token after next (MTP)")
    axes.set(xlabel="step", ylabel="loss per counted token", title="Quickstart: CHAMP")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def balance(records: list[StepRecord]) -> str:
    """Largest load of an expert over the mean, at the first step and at the last."""
    return f"{records[0].expert_balance:.2f} -> {records[-1].expert_balance:.2f}"


def summary(records: list[StepRecord], told: Mapping[str, str], directory: Path) -> Table:
    """All of it in one table."""
    seconds = sum(record.seconds for record in records)
    rows = {
        "loss": f"{records[0].loss:.2f} -> {records[-1].loss:.2f} in {len(records)} steps",
        "tokens/s": f"{sum(record.tokens for record in records) / seconds:,.0f}",
        **told,
        "model": str(directory / "output"),
        "loss curve": str(directory / "loss.png"),
    }
    table = Table(title="Quickstart", show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


if __name__ == "__main__":
    sys.exit(main())
