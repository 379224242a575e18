"""Round trips through Megatron's format, and what transformers makes of the result."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import hf_reference
import pytest
import small_checkpoints
import torch
from small_checkpoints import WIDE
from transformers import DeepseekV3ForCausalLM

from megatron_dsv3.commands.compare import open_checkpoint
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert import megatron_layout, megatron_write, offline, sources
from megatron_dsv3.convert.compare import WholeHF, compare
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.megatron_write import ToMegatron
from megatron_dsv3.convert.memory import PIECE_BYTES, Budget
from megatron_dsv3.convert.offline import Direction, Share
from megatron_dsv3.convert.sources import HFSource, MegatronSource
from megatron_dsv3.convert.to_hf import ToHF

CONFIG, BF16 = small_checkpoints.bf16_tensors(**WIDE)
FP8 = small_checkpoints.fp8_tensors(CONFIG, BF16)
ARCH = Architecture.from_hf(CONFIG)
TOKENIZER = {"tokenizer.json": "{}", "generation_config.json": "{}", "modeling_x.py": "x = 1\n"}


@pytest.fixture(autouse=True, scope="module")
def _one_layout():
    """The layout of a model is asked of a process of its own, which starts for 8 s."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(megatron_layout.layouts)
        for module in (sources, megatron_write):
            patch.setattr(module, "layouts", cached)
        yield


def run_here(direction: Direction, out: Path) -> Path:
    """What the engine does, without its processes."""
    out.mkdir()
    reports = {
        unit.name: direction.write(
            unit.name, out / unit.name, piece_bytes=PIECE_BYTES, on_bytes=lambda _: None
        ).report
        for unit in direction.units()
    }
    # As they come back from the journal.
    direction.finish(out, json.loads(json.dumps(reports)))
    return out


def through_megatron(hf: Path, work: Path, **options) -> Path:
    """HF -> Megatron -> HF."""
    middle = run_here(ToMegatron.open(hf), work / "mcore")
    source = MegatronSource.open(middle, ARCH, source="weights")
    back = ToHF.open(source, ARCH, place=middle, shard_bytes=400_000, **options)
    return run_here(back, work / "back")


def same_tensors(a: Path, b: Path) -> bool:
    first, second = hf_reference.read(a), hf_reference.read(b)
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype
        and torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8))
        for n in first
    )


def test_bf16_through_megatron_comes_back_bit_for_bit(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, BF16)
    for name, text in TOKENIZER.items():
        (hf / name).write_text(text)
    back = through_megatron(hf, tmp_path, precision="bf16", template=hf)
    assert same_tensors(hf, back)
    HFReader(back).check_against(ARCH)
    HFReader(back).check_copies(ARCH)
    assert Architecture.from_hf(back) == ARCH
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert {name: (back / name).read_text() for name in TOKENIZER} == TOKENIZER


def test_a_megatron_checkpoint_is_compared_with_a_directory_and_a_swap_in_it_is_found(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, FP8)
    mcore = run_here(ToMegatron.open(hf), tmp_path / "mcore")
    for a, b in ((hf, mcore), (mcore, hf), (mcore, mcore)):
        opened = [open_checkpoint(path, config_from=hf) for path in (a, b)]
        assert compare(*opened).is_equal
    whole = open_checkpoint(mcore, config_from=hf)
    boxes = dict(whole.source.boxes)
    stem = "model.layers.1.mlp.experts."
    for one, other in (("3.gate_proj", "3.up_proj"), ("5.down_proj", "6.down_proj")):
        a, b = (f"{stem}{name}.weight" for name in (one, other))
        boxes[a], boxes[b] = boxes[b], boxes[a]
    wrong = replace(whole, source=replace(whole.source, boxes=boxes))
    found = compare(WholeHF(hf), wrong)
    assert len(found.differences) == 4
    assert (found.only_a, found.only_b) == ([], [])


def test_fp8_through_megatron_comes_back_byte_for_byte_with_its_scales(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, FP8)
    back = through_megatron(hf, tmp_path, precision="fp8", scales_from=hf)
    assert same_tensors(hf, back)
    config = json.loads((back / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    report = json.loads((back / "conversion_errors.json").read_text())
    kinds = report["kinds"].values()
    assert sum(kind["blocks_kept"] for kind in kinds) == sum(kind["blocks"] for kind in kinds) > 0
    assert report["worst"] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_transformers_computes_the_same_logits_from_the_result(tmp_path, precision):
    reference = hf_reference.build(**WIDE, bias_std=100.0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    hf = reference.save(tmp_path / "hf", dtype=dtype)
    back = through_megatron(hf, tmp_path, precision=precision)
    tokens = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = []
    for directory in (hf, back):
        model = DeepseekV3ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    if precision == "fp32":
        expected = reference.logits(tokens)[0]
        assert torch.allclose(logits[1], expected, atol=1e-5)


def test_nodes_write_the_same_bytes_as_one_and_a_finished_shard_is_not_written_again(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, FP8)
    direction = ToHF.open(
        HFSource(hf, ARCH), ARCH, place=hf, precision="fp8", shard_bytes=400_000, scales_from=hf
    )
    alone = run_here(direction, tmp_path / "alone")
    budget = Budget(2_000_000_000, 1)
    out = tmp_path / "out"
    first = offline.convert(direction, out, budget=budget, share=Share(0, 2))
    assert not first.is_finished
    assert not out.exists()
    written = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out.tmp").glob("*.safetensors")}
    assert 0 < len(written) < len(direction.shards)
    last = offline.convert(direction, out, budget=budget)
    assert last.is_finished
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    files = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in out.iterdir()) == files
    assert all((out / name).read_bytes() == (alone / name).read_bytes() for name in files)


def open_fp8(hf: Path, **options) -> ToHF:
    return ToHF.open(HFSource(hf, ARCH), ARCH, place=hf, **options)


def test_what_does_not_fit_the_architecture_is_refused_before_any_work(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, BF16)
    with pytest.raises(ValueError, match=r"of the wrong shape: .* expected \[160, 192\]"):
        ToHF.open(
            HFSource(hf, ARCH), replace(ARCH, moe_ffn_hidden_size=160), place=hf, precision="bf16"
        )
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        open_fp8(hf, precision="bf16", template=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="scales are kept in fp8 alone, not in bf16"):
        open_fp8(hf, precision="bf16", scales_from=hf)
    with pytest.raises(ValueError, match="tensors are not those whose scales are to be kept"):
        open_fp8(hf, precision="fp8", scales_from=hf)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
