"""`tools/checkpoint/convert.py` as a user runs it: there and back, killed, capped, refused."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import small_checkpoints
import torch
from safetensors.torch import load_file

from megatron_dsv3.commands.convert import parse_size, share_of
from megatron_dsv3.commands.verify_checkpoint import verify_checkpoint
from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.convert.mapping import by_hf_name
from megatron_dsv3.convert.offline import Share
from megatron_dsv3.convert.safetensors_file import SafetensorsWriter, TensorInfo

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "checkpoint" / "convert.py"
LIMITED = 40_000


def start(
    *arguments: object, limit: int | None = None, env: Mapping[str, object] = MappingProxyType({})
) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)]

    def limit_files() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit_files,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        | {n: str(v) for n, v in env.items()},
    )


def convert(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess:
    process = start(*arguments, limit=limit)
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, error)


@pytest.fixture(scope="module")
def fp8_dir(tmp_path_factory) -> Path:
    config, tensors = small_checkpoints.bf16_tensors(**small_checkpoints.WIDE)
    directory = tmp_path_factory.mktemp("fp8") / "hf"
    small_checkpoints.save(directory, config, small_checkpoints.fp8_tensors(config, tensors))
    (directory / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return directory


TO_FP8 = ("--to", "hf", "--dtype", "fp8", "--shard-size", "1MB")


@pytest.fixture(scope="module")
def one_node(fp8_dir, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "out"
    done = convert(*TO_FP8, "--from", fp8_dir, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.safetensors"))) > 4
    return files(out)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*")}


@pytest.mark.slow
def test_untouched_fp8_comes_back_byte_for_byte(fp8_dir, tmp_path):
    there = convert("--to", "megatron", "--from", fp8_dir, "--out", tmp_path / "mcore")
    assert there.returncode == 0, there.stderr
    assert "complete" in there.stdout
    assert "GB of memory" in there.stdout
    assert verify_checkpoint(tmp_path / "mcore").num_tensors > 50
    back = convert(
        *("--to", "hf", "--from", tmp_path / "mcore", "--out", tmp_path / "back"),
        *("--dtype", "fp8", "--scales-from", fp8_dir, "--workers", 1, "--shard-size", "1MB"),
    )
    assert back.returncode == 0, back.stderr
    assert "serving: config.json: kv_lora_rank is 16" in back.stdout
    assert "serving: tokenizer" in back.stdout
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    original, found = load_file(fp8_dir / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        octets = tensor.contiguous().view(torch.uint8)
        assert torch.equal(found[name].contiguous().view(torch.uint8), octets), name
    tokenizer = "tokenizer.json"
    assert (tmp_path / "back" / tokenizer).read_bytes() == (fp8_dir / tokenizer).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [2, 4])
def test_nodes_with_their_own_arguments_write_what_one_writes(
    fp8_dir, one_node, tmp_path, num_nodes
):
    """Two by their arguments; four as srun starts them."""
    common = (*TO_FP8, "--from", fp8_dir, "--out", tmp_path / "out", "--workers", 1)
    nodes = []
    for rank in range(num_nodes):
        said = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": num_nodes}
        options = ("--node-rank", rank, "--num-nodes", num_nodes) if num_nodes == 2 else ()
        nodes.append(start(*common, *options, env=said if num_nodes == 4 else {}))
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0] * num_nodes, outputs
    assert sum("out: complete" in " ".join(out.split()) for out, _ in outputs) == 1, outputs
    assert files(tmp_path / "out") == one_node


@pytest.mark.slow
def test_finalize_completes_what_the_nodes_left(fp8_dir, one_node, tmp_path):
    common = (*TO_FP8, "--from", fp8_dir, "--out", tmp_path / "out", "--workers", 1)
    first = convert(*common, "--node-rank", 0, "--num-nodes", 2)
    assert "node 0 of 2 is done" in first.stdout
    early = convert(*common, "--finalize")
    assert early.returncode == 2
    assert "files are not finished" in early.stderr
    assert not (tmp_path / "out").exists()
    # Another node that was killed while it wrote the end.
    (tmp_path / "out.tmp" / ".journal" / "ending").touch()
    assert convert(*common, "--node-rank", 1, "--num-nodes", 2).returncode == 0
    assert not (tmp_path / "out").exists()
    assert convert(*common, "--finalize").returncode == 0
    assert files(tmp_path / "out") == one_node


@pytest.mark.slow
def test_killed_it_goes_on_and_a_second_time_it_refuses(fp8_dir, tmp_path):
    arguments = ("--to", "megatron", "--from", fp8_dir, "--out", tmp_path / "out")
    process = start(*arguments)
    while not (tmp_path / "out.tmp").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert convert(*arguments).returncode == 0
    before = files(tmp_path / "out")
    assert ".metadata" in before
    again = convert(*arguments)
    assert again.returncode == 2
    assert "exists and is not an empty directory" in again.stderr
    assert files(tmp_path / "out") == before


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_nothing_that_looks_finished(fp8_dir, tmp_path):
    done = convert("--to", "megatron", "--from", fp8_dir, "--out", tmp_path / "out", limit=LIMITED)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.tmp").glob("*.distcp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "megatron", "--max-memory", "1GB"), "is too little for 2 workers"),
        (("--to", "megatron", "--max-memory", "lots"), "expected a size such as 8GB"),
        (("--to", "megatron", "--num-nodes", 2), "--node-rank and --num-nodes: give both"),
        (("--to", "megatron", "--node-rank", 2, "--num-nodes", 2), "node rank 2 is not one of 2"),
        (("--to", "megatron", "--dtype", "fp8"), "dtype belong to --to hf"),
        (
            (
                "--to",
                "hf",
            ),
            "without a config.json nothing says which model it holds",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "in").mkdir()
    done = convert(*arguments, "--from", tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_target_that_is_taken_is_refused_before_the_source_is_read(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    done = convert("--to", "megatron", "--from", tmp_path / "none", "--out", tmp_path / "taken")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'taken'}: exists and is not an empty dir")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("500MiB", 500 * 2**20), ("12", 12), (" 1.5 tb ", 15 * 10**11)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 parsecs", "-1GB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


def test_slurm_says_which_share_this_is_unless_the_user_does():
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
    assert share_of(None, None, slurm) == Share(3, 8)
    assert share_of(1, 2, slurm) == Share(1, 2)
    assert share_of(None, None, {}) == Share(0, 1)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert share_of(None, None, batch_script) == Share(0, 1)


@pytest.mark.slow
def test_memory_stays_under_the_cap_with_tensors_that_would_not_fit(tmp_path):
    """All processes together have less than the embedding alone would take."""
    arch = replace(
        DEEPSEEK_V3, vocab_size=128_000, hidden_size=4096, num_layers=1, num_dense_layers=1,
        num_heads=2, ffn_hidden_size=128, q_lora_rank=None, num_mtp_layers=0, tie_embeddings=True,
    )  # fmt: skip
    (tmp_path / "hf").mkdir()
    infos = {
        name: TensorInfo(torch.bfloat16, param.hf_shape) for name, param in by_hf_name(arch).items()
    }
    with SafetensorsWriter(tmp_path / "hf" / "model.safetensors", infos) as writer:
        for name, info in infos.items():
            writer.write(name, torch.zeros(1, dtype=info.dtype).expand(info.shape))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(arch.to_hf()))
    done = convert(
        *("--to", "megatron", "--from", tmp_path / "hf", "--out", tmp_path / "out"),
        *("--max-memory", "1900MB", "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    (peak,) = re.findall(r"at most ([\d.]+) GB of memory", done.stdout)
    assert 0.4e9 < float(peak) * 1e9 < 1.9e9
