"""Comparison of checkpoints: planted differences, and mistakes that a conversion could make."""

import math
import shutil
from pathlib import Path

import pytest
import small_checkpoints
import torch
from small_checkpoints import WIDE, InMemory

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert import compare as module
from megatron_dsv3.convert.compare import WholeHF, WithCopies, compare
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import exported_copies

CONFIG, BF16 = small_checkpoints.bf16_tensors(**WIDE)
FP8 = small_checkpoints.fp8_tensors(CONFIG, BF16)
ARCH = Architecture.from_hf(CONFIG)


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 1000)


def changed(name: str):
    """A copy of all tensors and, in it, the tensor to be changed."""
    tensors = {n: t.clone() for n, t in BF16.items()}
    return tensors, tensors[name]


@pytest.mark.parametrize("workers", [1, 3])
def test_equal_checkpoints_are_equal_and_counted(workers):
    done = []
    found = compare(InMemory(BF16), InMemory(dict(BF16)), workers=workers, progress=done.append)
    assert found.is_equal
    assert found.is_within(0.0)
    assert found.num_tensors == len(BF16)
    assert found.numel == sum(done) == sum(t.numel() for t in BF16.values())
    assert found.worst is None


def test_a_difference_is_given_with_place_values_count_and_relative_error():
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    tensors, tensor = changed(name)
    before = tensor[100, 3].item()
    tensor[100, 3] = 5.0
    tensor[191, 0] = 7.0
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    found = compare(InMemory(BF16), InMemory(tensors))
    assert not found.is_equal
    by_name = {difference.name: difference for difference in found.differences}
    assert by_name.keys() == {name, "model.norm.weight"}
    assert by_name[name].num_different == 2
    assert by_name[name].first == module.Element((100, 3), before, 5.0)
    expected = (tensor.float() - BF16[name].float()).norm() / BF16[name].float().norm()
    assert found.worst is by_name[name]
    assert found.worst.relative_error == pytest.approx(expected.item(), rel=1e-5)
    assert not found.is_within(0.02)
    assert found.is_within(found.worst.relative_error)


def test_a_tensor_in_a_wider_type_is_equal_if_its_numbers_are():
    wide = {name: tensor.float() for name, tensor in BF16.items()}
    assert compare(InMemory(BF16), InMemory(wide)).is_equal
    wide["model.norm.weight"][3] *= 1 + 1e-6
    found = compare(InMemory(BF16), InMemory(wide))
    assert [d.name for d in found.differences] == ["model.norm.weight"]


def test_zero_and_minus_zero_differ_and_nan_is_itself():
    a, b = torch.tensor([0.0, math.nan, 2.0]), torch.tensor([-0.0, math.nan, 2.0])
    assert compare(InMemory({"w": a}), InMemory({"w": a.clone()})).is_equal
    found = compare(InMemory({"w": a}), InMemory({"w": b})).differences[0]
    assert (found.num_different, found.first.index) == (1, (0,))
    b[2] = math.nan
    assert compare(InMemory({"w": a}), InMemory({"w": b})).differences[0].relative_error == math.inf


def test_tensors_of_one_side_and_of_two_shapes_are_listed():
    a = {"both": torch.ones(2), "a": torch.ones(1), "shape": torch.ones(2, 3)}
    b = {"both": torch.ones(2), "b": torch.ones(1), "shape": torch.ones(3, 2)}
    found = compare(InMemory(a), InMemory(b))
    assert (found.only_a, found.only_b) == (["a"], ["b"])
    assert found.shapes == ["shape [2, 3] against [3, 2]"]
    assert not found.is_within(math.inf)


def test_what_repeats_another_tensor_is_given_for_a_format_without_copies():
    source = small_checkpoints.without_copies(CONFIG, BF16)
    assert compare(InMemory(BF16), WithCopies(source, exported_copies(ARCH))).is_equal
    copy = "model.layers.3.embed_tokens.weight"
    tensors, tensor = changed(copy)
    tensor[5, 5] += 1
    found = compare(InMemory(tensors), WithCopies(source, exported_copies(ARCH)))
    assert [d.name for d in found.differences] == [copy]


def swapped_gate_and_up(t) -> None:
    stem = "model.layers.0.mlp."
    gate, up = f"{stem}gate_proj.weight", f"{stem}up_proj.weight"
    t[gate], t[up] = t[up], t[gate]


def expert_off_by_one(t) -> None:
    names = [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(16)]
    shifted = [t[names[(e + 1) % 16]] for e in range(16)]
    t.update(zip(names, shifted, strict=True))


def bias_through_bf16(t) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    t[name] = t[name].bfloat16().float()


def transposed_scale(t) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    assert t[name].shape == (2, 2)
    t[name] = t[name].T.contiguous()


def dropped_copy(t) -> None:
    del t["model.layers.3.shared_head.head.weight"]


def layers_swapped(t) -> None:
    name = "model.layers.{}.self_attn.o_proj.weight"
    t[name.format(0)], t[name.format(1)] = t[name.format(1)], t[name.format(0)]


@pytest.mark.parametrize(
    ("mistake", "num_tensors"),
    [
        (swapped_gate_and_up, 2),
        (expert_off_by_one, 16),
        (bias_through_bf16, 1),
        (transposed_scale, 1),
        (layers_swapped, 2),
    ],
)
def test_mistakes_of_a_conversion_are_found(mistake, num_tensors, tmp_path):
    wrong = dict(FP8)
    mistake(wrong)
    a = small_checkpoints.save(tmp_path / "a", CONFIG, FP8)
    b = small_checkpoints.save(tmp_path / "b", CONFIG, wrong)
    found = compare(WholeHF(a), WholeHF(b))
    assert len(found.differences) == num_tensors
    assert found.num_tensors == len(BF16)
    assert not found.is_within(1e-4)


def test_a_dropped_copy_is_found(tmp_path):
    wrong = dict(FP8)
    dropped_copy(wrong)
    a = small_checkpoints.save(tmp_path / "a", CONFIG, FP8)
    b = small_checkpoints.save(tmp_path / "b", CONFIG, wrong)
    found = compare(WholeHF(a), WholeHF(b))
    assert found.only_a == ["model.layers.3.shared_head.head.weight"]
    assert not found.is_within(math.inf)


def twice(first: Path, second: Path) -> None:
    shutil.copyfile(first, second)


def another_name(first: Path, second: Path) -> None:
    shutil.copyfile(first, first.with_name("model-00003-of-00003.safetensors"))


def cut(first: Path, second: Path) -> None:
    second.write_bytes(second.read_bytes()[:-1])


def flipped(first: Path, second: Path) -> None:
    content = bytearray(second.read_bytes())
    content[9] ^= 0x10
    second.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (twice, "are not in their file.*are in a file where the index does not have them"),
        (another_name, r"1 files are not in the index: model-00003-of-00003\.safetensors"),
        (cut, r"model-00002-of-00002\.safetensors: truncated or damaged"),
        (flipped, r"model-00002-of-00002\.safetensors: truncated or damaged"),
    ],
)
def test_damaged_shards_are_refused(damage, message, tmp_path):
    directory = small_checkpoints.save(tmp_path / "hf", CONFIG, FP8)
    shards = small_checkpoints.in_two_shards(directory)
    assert compare(WholeHF(directory), WholeHF(directory)).is_equal
    damage(*shards)
    with pytest.raises(ValueError, match=message):
        HFReader(directory)
