"""The command line from outside: a run that works, and what a user can do wrong.

Each mistake ends with exit code 2, one message, no traceback, and nothing written.
"""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_job import CONVERSATIONS, conversation, write_chats, write_job, write_model
from transformers import AutoModelForCausalLM

from megatron_dsv3.train.metrics import read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_job_ends_with_a_directory_that_transformers_loads(run, model, tmp_path):
    job = write_job(tmp_path, model, write_chats(tmp_path / "chats.jsonl"))
    code, out, _ = run("train", job, "train.num_epochs=2", "parallel.stages=Et*2mL")
    assert code == 0
    lines = re.findall(
        r"^step (\d)/6 epoch \d\.\d\d loss \d+\.\d{4} mtp_loss \d+\.\d{4} valid_loss - "
        r"lr \d\.\d\de-\d\d grad_norm [\d.]+ tok/s [\d,]+ tok/s/device [\d,]+ "
        r"counted_tok/s [\d,]+ counted_tok/s/device [\d,]+ TFLOP/s/device [\d.e-]+ MFU - "
        r"mem_GiB - expert_balance \d+\.\d\d skipped 0$",
        out,
        re.MULTILINE,
    )
    assert lines == list("123456")
    placement = "|".join(out.partition("Placement")[2].partition("step 1/")[0].split("\n")[4:5])
    assert re.findall(r"[\w.-]+", placement) == ["0", "0", "yes", "0-1", "yes", "yes", "1.00"]
    assert "experts' biases: as loaded" in out
    records = read_metrics(tmp_path / "log")
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1].epoch == 2
    assert records[-1].loss < records[0].loss
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before, after = load_file(model / "model.safetensors"), loaded.state_dict()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(before[bias], after[bias]), "the bias is frozen unless the job says not"


def _trained(run, model: Path, directory: Path, *overrides: str) -> dict[str, torch.Tensor]:
    job = write_job(directory, model, write_chats(directory / "chats.jsonl"))
    code, out, err = run("train", job, *overrides)
    assert code == 0, out + err
    return load_file(directory / "out" / "model.safetensors")


@pytest.mark.parametrize("mode", ["off", "freeze"])
def test_mtp_that_is_not_trained_is_written_as_it_was_loaded(run, model, tmp_path, mode):
    before = load_file(model / "model.safetensors")
    after = _trained(run, model, tmp_path, f"mtp.mode={mode}")
    assert after.keys() == before.keys()
    prefix = "model.layers.2."
    copies = {f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight"}
    own = [name for name in before if name.startswith(prefix) and name not in copies]
    assert len(own) > 20
    assert not [name for name in own if not torch.equal(before[name], after[name])]
    assert torch.equal(after[f"{prefix}shared_head.head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert (read_metrics(tmp_path / "log")[0].mtp_loss is None) == (mode == "off")


def test_biases_move_where_the_job_says_so_and_loads_are_recorded(run, model, tmp_path):
    before = load_file(model / "model.safetensors")
    job = write_job(tmp_path, model, write_chats(tmp_path / "chats.jsonl"))
    code, out, _ = run("train", job, "experts.bias=update", "experts.bias_update_rate=0.5")
    assert code == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    moved = (after[name] - before[name]).abs()
    assert moved.max() > 0.4
    assert torch.allclose(moved / 0.5, (moved / 0.5).round(), atol=1e-5), "steps of the rate"
    drift = json.loads((tmp_path / "log" / "expert_bias_drift.json").read_text())
    assert drift["layers"] == [1, 2]
    assert drift["largest_change"][0] == pytest.approx(moved.max().item())
    largest = max(drift["largest_change"])
    assert f"moved by at most {largest:.2e} since they were loaded (layer " in out
    [line] = (tmp_path / "log" / "expert_load.jsonl").read_text().splitlines()
    assert json.loads(line)["layers"] == [1, 2]


def test_validation_is_the_loss_of_the_model_at_that_step(run, model, tmp_path):
    """Validated on the data of the last step: before its update the loss is the training loss."""
    chats = tmp_path / "validation.jsonl"
    write_chats(chats, CONVERSATIONS[:3])
    settings = [f"validation.paths=[{chats}]", "validation.every_steps=2", "optimizer.lr=1e-12"]
    _trained(run, model, tmp_path, *settings)
    records = read_metrics(tmp_path / "log")
    validated = [record.step for record in records if record.validation_loss is not None]
    assert validated == [2, 3]
    # With no learning, three steps over six samples: the mean of two halves of the same set.
    assert records[1].validation_loss == pytest.approx(records[2].validation_loss, rel=1e-5)
    code, _, _ = run(
        "train",
        write_job(tmp_path, model, chats, output={"dir": str(tmp_path / "out2")}),
        "train.global_batch_size=3",
        f"log.dir={tmp_path / 'log2'}",
    )
    assert code == 0
    [record] = read_metrics(tmp_path / "log2")
    assert record.loss == pytest.approx(records[1].validation_loss, rel=1e-5)


def test_a_spike_can_be_skipped_and_is_listed(run, model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    _nan_weight(copy, tmp_path)
    job = write_job(tmp_path, copy, write_chats(tmp_path / "chats.jsonl"))
    code, out, _ = run("train", job, "spikes.action=skip", "train.global_batch_size=3")
    assert code == 0
    assert re.search(r"step 1 skipped: loss is not finite; .*chats\.jsonl:\d", out)
    records = read_metrics(tmp_path / "log")
    assert [record.num_skipped for record in records] == [1, 2]
    before, after = (load_file(d / "model.safetensors") for d in (copy, tmp_path / "out"))
    assert all(torch.equal(before[n], after[n]) for n in before if n != "model.norm.weight")


def _edit_config(**changes: object) -> Callable[[Path, Path], None]:
    def edit(model: Path, _: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _truncate(model: Path, _: Path) -> None:
    file = model / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1000)


def _shard(model: Path) -> dict[str, str]:
    """Splits the one file in two with an index, and returns the index's map."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": names[::2]}
    files["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, model / file)
    where = {name: file for file, part in files.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def _missing_shard(model: Path, _: Path) -> None:
    _shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def _index_names_another_file(model: Path, _: Path) -> None:
    where = _shard(model)
    where["lm_head.weight"] = "model-00003-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _fp8_without_scale(model: Path, _: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors")


def _missing_tensor(model: Path, _: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def _nan_weight(model: Path, _: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors")


def _chats(*rows: object) -> Callable[[Path, Path], None]:
    def write(_: Path, chats: Path) -> None:
        write_chats(chats, list(rows))

    return write


def _occupied(_: Path, chats: Path) -> None:
    (chats.parent / "out").mkdir()
    (chats.parent / "out" / "thesis.txt").write_text("mine")


MISTAKES: dict[str, tuple[Callable[[Path, Path], None] | None, list[str], str]] = {
    "another architecture": (
        _edit_config(architectures=["LlamaForCausalLM"]),
        [],
        r"model: expected .*DeepseekV3ForCausalLM.*LlamaForCausalLM",
    ),
    "another scoring function": (
        _edit_config(scoring_func="softmax"),
        [],
        r"scoring_func.*softmax.*sigmoid",
    ),
    "a truncated file": (_truncate, [], r"model\.safetensors: .*(truncated|bytes)"),
    "a missing shard": (_missing_shard, [], r"model-00002-of-00002\.safetensors"),
    "an index naming a file that is not there": (
        _index_names_another_file,
        [],
        r"model-00003-of-00002\.safetensors",
    ),
    "an FP8 tensor without its scale": (
        _fp8_without_scale,
        [],
        r"no _scale_inv: model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "a missing tensor": (_missing_tensor, [], r"experts\.3\.up_proj\.weight"),
    "JSON that does not parse": (
        _chats(CONVERSATIONS[0], '{"messages": [}'),
        [],
        r"chats\.jsonl.*(line 2|:2)",
    ),
    "an unknown role": (
        _chats({"messages": [{"role": "critic", "content": "no"}]}),
        [],
        r"chats\.jsonl:1 .*critic",
    ),
    "an empty conversation": (_chats({"messages": []}), [], r"chats\.jsonl:1 .*(empty|no )"),
    "a sample without a counted token": (
        _chats(CONVERSATIONS[0], conversation("a", "b", loss=False)),
        [],
        r"chats\.jsonl:2 .*no counted token",
    ),
    "sizes that do not divide": (
        None,
        ["parallel.ep_size=3"],
        r"n_routed_experts 8 is not divisible by ep_size\(3\)",
    ),
    "a world that does not fit the layout": (
        None,
        ["parallel.tp_size=2"],
        r"world size 1 is not tp_size\(2\) \* pp_size\(1\) \* cp_size\(1\) \* dp",
    ),
    "optimizer instances that do not divide the copies": (
        None,
        ["parallel.num_optimizer_instances=2"],
        r"instances 2 must divide both dp\(1\) \* cp\(1\) = 1 and edp\(1\); use one of 1$",
    ),
    "a layer placed twice": (
        None,
        ["parallel.stages=Et*3mL"],
        r"stages 'Et\*3mL': expected 2 x t, got 3",
    ),
    "what needs a GPU, on a CPU": (
        None,
        ["optimizer.moments=bf16"],
        r"optimizer\.moments=bf16 needs Transformer Engine on a GPU; use fp32",
    ),
    "activations to offload, on a CPU": (
        None,
        ["memory.offload_activations=[core_attn]"],
        r"memory\.offload_activations needs a GPU to offload from; use \[\]",
    ),
    "a dispatcher that gloo refuses": (
        None,
        ["parallel.etp_size=2"],
        r"etp_size\(2\) .* gloo refuses; use experts\.dispatcher=allgather or etp_size 1",
    ),
    "an output directory that is not empty": (_occupied, [], r"out.*not .*empty"),
    "an unknown setting": (None, ["train.global_batch=4"], r"global_batch.*global_batch_size"),
    "a loss that is not finite": (
        _nan_weight,
        ["train.global_batch_size=1", "train.num_steps=1"],
        r"step 1: loss is not finite; .*chats\.jsonl:\d",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_with_one_message_and_nothing_written(run, model, tmp_path, mistake):
    make, overrides, message = mistake
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    chats = write_chats(tmp_path / "chats.jsonl")
    if make:
        make(copy, chats)
    job = write_job(tmp_path, copy, chats)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, _, err = run("train", job, *overrides)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(told) == 1, err
    assert re.search(message, err), err
    assert "Traceback" not in err
    log = tmp_path / "log"  # a run that had begun keeps its log
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if log not in (p, *p.parents)}
    assert after == before


def test_a_missing_job_file_is_named(run, tmp_path):
    code, _, err = run("train", tmp_path / "nowhere.yaml")
    assert code == 2
    assert re.search(r"nowhere\.yaml", err)


def test_a_damaged_header_is_named(run, model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**40))
    job = write_job(tmp_path, copy, write_chats(tmp_path / "chats.jsonl"))
    code, _, err = run("train", job)
    assert code == 2
    assert re.search(r"error: .*model\.safetensors", err)
