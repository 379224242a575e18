"""HF -> Megatron: Megatron-Core's own `load`, compared with transformers, and at full size."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hf_reference
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron_dirs import write_all

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.convert import megatron_write
from megatron_dsv3.convert.fp8 import SCALE_SUFFIX, quantize, scale_shape
from megatron_dsv3.convert.mapping import by_hf_name, exported_copies
from megatron_dsv3.convert.megatron_io import Chunk, MegatronReader, Place, _tiles
from megatron_dsv3.convert.megatron_layout import MegatronLayout, layouts
from megatron_dsv3.convert.megatron_write import MegatronPlan, ToMegatron, plan
from megatron_dsv3.convert.safetensors_file import SafetensorsWriter, TensorInfo
from megatron_dsv3.convert.sources import HFSource, MegatronSource
from megatron_dsv3.model.build import build_chunks
from megatron_dsv3.model.config import mcore_config

LENGTH = 48
LOGIT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference() -> hf_reference.Reference:
    return hf_reference.build()


@pytest.fixture(scope="module")
def hf_dir(reference, tmp_path_factory) -> Path:
    return reference.save(tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def layout(hf_dir) -> MegatronLayout:
    return layouts(Architecture.from_hf(hf_dir))[0]


@pytest.fixture(scope="module")
def direction(hf_dir, layout) -> ToMegatron:
    return _direction(hf_dir, layout)


@pytest.fixture
def worst_logit(reference, hf_dir, groups) -> Callable[[Path], float]:
    """Largest error of what the trainer's model computes after Megatron-Core's own strict load."""
    arch, device = Architecture.from_hf(hf_dir), torch.device("cpu")
    config = mcore_config(arch, Parallel(), dtype=torch.float32, device=device)
    tokens = torch.randint(0, arch.vocab_size, (2, LENGTH))

    def measure(directory: Path) -> float:
        (model,) = build_chunks(
            arch, Parallel(), groups, config, max_seq_length=LENGTH, transformer_engine=False
        )
        metadata = {"dp_cp_group": groups.collection.dp_cp}
        with torch.no_grad():
            state = {"model": model.sharded_state_dict(metadata=metadata)}
            state = dist_checkpointing.load(state, str(directory), strict="raise_all")
            model.load_state_dict(state["model"], strict=True)
            ours = list(model(tokens, torch.arange(LENGTH).expand_as(tokens), None))
            theirs = reference.logits(tokens)
        return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))

    return measure


def _direction(hf_dir: Path, layout: MegatronLayout) -> ToMegatron:
    source = HFSource(hf_dir, Architecture.from_hf(hf_dir))
    return ToMegatron(source, plan(source.arch, layout, source.infos(), file_bytes=300_000))


def _swap(layout: MegatronLayout, a: str, b: str) -> MegatronLayout:
    """Every tensor whose name has `a` goes where the one with `b` belongs, and back."""
    boxes = dict(layout.boxes)
    for name in layout.boxes:
        if a in name:
            other = name.replace(a, b)
            boxes[name], boxes[other] = layout.boxes[other], layout.boxes[name]
    return replace(layout, boxes=boxes)


def test_logits_after_megatrons_own_load_are_those_of_transformers(
    direction, worst_logit, tmp_path
):
    directory = write_all(direction, tmp_path / "out")
    assert len(list(directory.glob("*.distcp"))) > 3
    assert worst_logit(directory) < LOGIT_TOLERANCE


def test_what_a_training_said_of_attention_does_not_concern_the_layout(hf_dir, layout, monkeypatch):
    """Megatron-Core writes these into its own environment, and a converter may be its child."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "0")
    assert layouts(Architecture.from_hf(hf_dir))[0] == layout


MUTATIONS = {
    "gate and up swapped": ("gate_proj", "up_proj"),
    "an expert off by one": ("experts.3.", "experts.4."),
    "two layers": ("layers.1.", "layers.2."),
}


@pytest.mark.parametrize("names", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_wrong_place_would_be_seen(hf_dir, layout, worst_logit, tmp_path, names):
    wrong = _direction(hf_dir, _swap(layout, *names))
    assert worst_logit(write_all(wrong, tmp_path / "out")) > 100 * LOGIT_TOLERANCE


def test_a_piece_that_is_smaller_than_a_tensor_changes_nothing(
    hf_dir, layout, worst_logit, monkeypatch, tmp_path
):
    monkeypatch.setattr(megatron_write, "PIECE_BYTES", 1000)
    cut = _direction(hf_dir, layout)
    assert sum(map(len, cut.plan.files.values())) > 2 * len(layout.boxes)
    assert worst_logit(write_all(cut, tmp_path / "out")) < LOGIT_TOLERANCE


def test_every_tensor_comes_back_bit_for_bit(direction, layout, hf_dir, tmp_path):
    directory = write_all(direction, tmp_path / "out")
    source = direction.source
    back = MegatronSource(MegatronReader(directory), layout.boxes)
    assert list(back.infos()) == list(source.infos())
    for name, info in source.infos().items():
        assert back.infos()[name] == info
        assert torch.equal(back.read(name), source.read(name)), name
    for name in ("config.json",):
        assert (directory / name).read_bytes() == (hf_dir / name).read_bytes()


def test_the_expert_bias_stays_fp32_beside_bf16_weights(reference, layout, tmp_path):
    hf_dir = reference.save(tmp_path / "bf16", dtype=torch.bfloat16)
    direction = _direction(hf_dir, layout)
    back = MegatronSource(MegatronReader(write_all(direction, tmp_path / "out")), layout.boxes)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert back.infos()[bias].dtype == torch.float32
    assert torch.equal(back.read(bias), reference.tensors()[bias])
    assert not torch.equal(back.read(bias).bfloat16().float(), reference.tensors()[bias])
    assert back.infos()["lm_head.weight"].dtype == torch.bfloat16


def test_fp8_blocks_arrive_as_the_bf16_numbers_they_stand_for(reference, layout, tmp_path):
    plain = reference.save(tmp_path / "plain", dtype=torch.bfloat16)
    table = by_hf_name(Architecture.from_hf(plain))
    # Copies: the file that is read here is written anew below.
    tensors = {name: tensor.clone() for name, tensor in hf_reference.read(plain).items()}
    expected = dict(tensors)
    for name in [name for name in tensors if name in table and table[name].quantised]:
        fp8, scale = quantize(tensors[name])
        expected[name] = (
            fp8.float()
            * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[
                : fp8.shape[0], : fp8.shape[1]
            ]
        ).bfloat16()
        tensors |= {name: fp8, name + SCALE_SUFFIX: scale}
    layout_of_file = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    with SafetensorsWriter(plain / "model.safetensors", layout_of_file) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    direction = _direction(plain, layout)
    back = MegatronSource(MegatronReader(write_all(direction, tmp_path / "out")), layout.boxes)
    for name in table:
        assert torch.equal(back.read(name), expected[name]), name


def test_tensors_of_two_types_are_not_joined_to_one(hf_dir, layout):
    source = HFSource(hf_dir, Architecture.from_hf(hf_dir))
    infos = dict(source.infos())
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    infos[name] = TensorInfo(torch.bfloat16, infos[name].shape)
    with pytest.raises(ValueError, match=f"1 tensors differ in type .*: {name} torch.bfloat16"):
        plan(source.arch, layout, infos)


def test_another_architecture_is_refused_with_what_differs(direction, tmp_path):
    directory = write_all(direction, tmp_path / "out")
    arch = direction.source.arch
    with pytest.raises(ValueError, match=r"surplus: mtp\.layers\.0"):
        MegatronSource.open(directory, replace(arch, num_mtp_layers=0), source="weights")
    with pytest.raises(ValueError, match=r"of the wrong shape: embedding.* expected \[256, 64\]"):
        MegatronSource.open(directory, replace(arch, vocab_size=256), source="weights")


def _v3_infos() -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(torch.float32 if p.is_buffer else torch.bfloat16, p.hf_shape)
        for name, p in by_hf_name(DEEPSEEK_V3).items()
    }


def _is_covered(planned: MegatronPlan) -> bool:
    """Whether each sharded tensor is written in full, each element once."""
    chunks: dict[str, list[Chunk]] = {key: [] for key in planned.tensors}
    for group in planned.files.values():
        for chunk in group:
            chunks[chunk.key].append(Chunk(chunk.offsets, chunk.sizes, Place(Path(), 0, 0)))
    return all(_tiles(chunks[key], info.shape) for key, info in planned.tensors.items())


@pytest.mark.slow
def test_the_671b_is_checked_planned_and_placed_in_a_minute(tmp_path):
    began = time.monotonic()
    hf_dir = _sparse_v3(tmp_path / "hf")
    made = time.monotonic() - began
    began = time.monotonic()
    source = HFSource(hf_dir, Architecture.from_hf(hf_dir))
    source.reader.check_against(source.arch)
    planned = plan(source.arch, layouts(source.arch)[0], source.infos())
    assert _is_covered(planned)
    assert time.monotonic() - began < 60, f"the directory itself took {made:.0f} s"
    stored = json.loads((hf_dir / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(stored) == 91_991
    weights = [i for key, i in planned.tensors.items() if not key.endswith("expert_bias")]
    assert sum(info.nbytes for info in weights) == 2 * (671_026_404_352 + 11_610_067_968)
    assert len(planned.objects) == len(set(planned.objects)) > 30_000


def _sparse_v3(directory: Path) -> Path:
    """DeepSeek's FP8 directory with holes in place of numbers."""
    directory.mkdir()
    table = by_hf_name(DEEPSEEK_V3)
    infos = _v3_infos()
    infos |= {copy: infos[original] for copy, original in exported_copies(DEEPSEEK_V3).items()}
    for name in list(infos):
        if name in table and table[name].quantised:
            shape = infos[name].shape
            infos[name] = TensorInfo(torch.float8_e4m3fn, shape)
            infos[name + SCALE_SUFFIX] = TensorInfo(torch.float32, scale_shape(shape))
    names = list(infos)
    weight_map = {}
    for number in range(163):
        file = f"model-{number + 1:05}-of-00163.safetensors"
        group = {name: infos[name] for name in names[number::163]}
        weight_map |= dict.fromkeys(group, file)
        SafetensorsWriter(directory / file, group)._file.finish()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(DEEPSEEK_V3.to_hf()))
    return directory


@pytest.mark.slow
def test_megatron_core_loads_ours_in_a_layout_and_we_read_what_it_saves(
    reference, layout, tmp_path
):
    hf_dir = reference.save(tmp_path / "hf", dtype=torch.bfloat16)
    direction = _direction(hf_dir, layout)
    ours, saved = write_all(direction, tmp_path / "ours"), tmp_path / "saved"
    worker = Path(__file__).with_name("megatron_worker.py")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=4", str(worker), str(hf_dir), str(ours), str(saved)]
    command += ["tp_size=2", "pp_size=2", "ep_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    arch = direction.source.arch
    for folder, kind in (("weights", "weights"), ("training", "weights"), ("training", "master")):
        theirs = MegatronSource.open(saved / folder, arch, source=kind)
        for name, info in direction.source.infos().items():
            expected, found = direction.source.read(name), theirs.read(name)
            assert found.dtype == (torch.float32 if kind == "master" else info.dtype)
            assert torch.equal(found.float(), expected.float()), (folder, kind, name)
            last = info.shape[0] - 1
            assert torch.equal(theirs.read(name, slice(last, last + 1)), found[last:])
        biases = [name for name in direction.source.infos() if "e_score" in name]
        assert list(theirs.frozen) == (biases if kind == "master" else [])
    assert MegatronReader(saved / "training").common()["iteration"] == 7
