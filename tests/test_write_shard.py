"""Shards of a Hugging Face directory against the tensors that they were written from."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import small_checkpoints
import torch
from safetensors.torch import load_file
from small_checkpoints import WIDE
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert import write_shard as module
from megatron_dsv3.convert.error_report import ErrorReport, TensorError, to_rows
from megatron_dsv3.convert.fp8 import dequantize
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.hf_plan import plan_shards
from megatron_dsv3.convert.sources import HFSource, Source
from megatron_dsv3.convert.write_shard import check_original, write_shard

CONFIG, BF16 = small_checkpoints.bf16_tensors(**WIDE)
FP8 = small_checkpoints.fp8_tensors(CONFIG, BF16)
ARCH = Architecture.from_hf(CONFIG)


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch) -> None:
    """Tensors of tests are small: they are cut as large ones are."""
    monkeypatch.setattr(module, "_ELEMENTS", 128 * 192)


def export(
    source: Source, directory: Path, *, precision="bf16", original: HFReader | None = None
) -> tuple[dict[str, Tensor], list[TensorError]]:
    directory.mkdir()
    written: dict[str, Tensor] = {}
    errors = []
    for shard in plan_shards(ARCH, precision=precision, shard_bytes=400_000):
        errors += write_shard(shard, source, directory / shard.file, original=original).errors
        written |= load_file(directory / shard.file)
    return written, errors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


def test_bf16_comes_out_bit_for_bit_with_mtps_copies(tmp_path):
    source = small_checkpoints.without_copies(CONFIG, BF16)
    written, errors = export(source, tmp_path / "out")
    assert same(written, BF16)
    assert "model.layers.3.embed_tokens.weight" in written
    assert not any(tensor.error.relative for tensor in errors)


def test_pieces_are_worked_at_two_ahead_and_come_in_order():
    begun = [threading.Event() for _ in range(6)]

    def work(number: int) -> int:
        begun[number].set()
        if number == 4:
            raise ValueError("no piece 4")
        # The second of a pair is done first.
        return 10 * number if number % 2 or begun[number + 1].wait(timeout=60) else -1

    done = module._ahead(work, range(6))
    for number in range(4):
        assert next(done) == 10 * number
        assert not any(event.is_set() for event in begun[number + 3 :]), "too many are held"
    with pytest.raises(ValueError, match="no piece 4"):
        next(done)


def test_untouched_weights_come_back_byte_for_byte_with_the_original_scales(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, FP8)
    source = HFSource(hf, ARCH)
    written, errors = export(source, tmp_path / "a", precision="fp8", original=HFReader(hf))
    assert same(written, FP8)
    assert not any(tensor.error.relative for tensor in errors)
    written, errors = export(source, tmp_path / "b", precision="fp8")
    assert written.keys() == FP8.keys()
    assert not same(written, FP8), "the scales of the test must not be those that we would choose"
    assert all(0.0 < t.error.relative < 0.05 for t in errors if t.error.num_blocks)


def test_only_blocks_that_training_moved_are_new(tmp_path):
    hf = small_checkpoints.save(tmp_path / "hf", CONFIG, FP8)
    reader = HFReader(hf)
    trained = {name: reader.read(name).clone() for name in reader.names()}
    name = "model.layers.1.mlp.experts.5.gate_proj.weight"
    trained[name][130, 140] += 1
    source = small_checkpoints.InMemory(trained)
    written, errors = export(source, tmp_path / "out", precision="fp8", original=reader)
    rest = {n: t for n, t in FP8.items() if not n.startswith(name)}
    assert same({n: written[n] for n in rest}, rest)
    assert torch.equal(written[name][:128].view(torch.uint8), FP8[name][:128].view(torch.uint8))
    assert written[f"{name}_scale_inv"][1, 1] != FP8[f"{name}_scale_inv"][1, 1]
    (moved,) = [tensor for tensor in errors if tensor.error.relative]
    assert (moved.name, moved.error.num_blocks, moved.error.num_kept) == (name, 4, 3)
    back = dequantize(written[name], written[f"{name}_scale_inv"], dtype=torch.float32)
    difference = (back - trained[name])[128:, 128:]
    expected = difference.norm() / trained[name].float().norm()
    assert moved.error.relative == pytest.approx(expected.item(), rel=1e-4)


def test_the_reported_error_is_that_of_the_written_file(tmp_path):
    masters = {name: tensor.float() * 1.003 for name, tensor in BF16.items()}
    source = small_checkpoints.without_copies(CONFIG, masters)
    for precision in ("bf16", "fp8"):
        written, errors = export(source, tmp_path / precision, precision=precision)
        for tensor in errors:
            scales = written.get(f"{tensor.name}_scale_inv")
            back = written[tensor.name]
            # The product itself, which its reader rounds to bf16 yet.
            back = back if scales is None else dequantize(back, scales, dtype=torch.float32)
            before = masters[tensor.name]
            expected = ((back.float() - before).norm() / before.norm()).item()
            assert tensor.error.relative == pytest.approx(expected, rel=1e-4, abs=1e-9), tensor.name
        kinds = ErrorReport(tuple(errors)).kinds()
        assert kinds["mlp.gate.e_score_correction_bias"].relative == 0


def test_a_report_has_kinds_and_the_worst_tensors_of_all_shards(tmp_path):
    source = small_checkpoints.without_copies(CONFIG, BF16)
    _, errors = export(source, tmp_path / "out", precision="fp8")
    shards = [to_rows(errors[:100]), to_rows(errors[100:])]
    report = ErrorReport.merged(shards)
    assert report == ErrorReport(tuple(errors))
    down = [t for t in errors if t.kind == "mlp.experts.*.down_proj.weight"]
    squares, norm = (sum(getattr(t.error, f) for t in down) for f in ("squares", "norm"))
    content = report.to_json()
    row = content["kinds"]["mlp.experts.*.down_proj.weight"]
    assert row["relative_error"] == pytest.approx((squares / norm) ** 0.5)
    assert row["blocks"] == 3 * 16 * 4
    assert len(content["worst"]) == 10
    assert content["worst"][0]["relative_error"] == max(t.error.relative for t in errors)


def test_nan_is_named_with_its_tensor(tmp_path):
    name = "model.layers.2.self_attn.o_proj.weight"
    broken = BF16 | {name: BF16[name].clone()}
    broken[name][150, 10] = float("nan")
    source = small_checkpoints.without_copies(CONFIG, broken)
    with pytest.raises(ValueError, match=f"{name}: the block at .* holds NaN"):
        export(source, tmp_path / "out", precision="fp8")


def test_an_original_must_have_every_tensor_in_fp8_and_in_shape(tmp_path):
    shards = plan_shards(ARCH, precision="fp8")
    check_original(HFReader(small_checkpoints.save(tmp_path / "good", CONFIG, FP8)), shards)
    plain = HFReader(small_checkpoints.save(tmp_path / "bf16", CONFIG, BF16))
    with pytest.raises(ValueError, match=r"gate_proj.weight expected .*e4m3.* got torch.bfloat"):
        check_original(plain, shards)
    gone = "model.layers.0.mlp.up_proj.weight"
    less = {name: tensor for name, tensor in FP8.items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match=f"1 tensors .*: {gone} expected .* got nothing"):
        check_original(HFReader(small_checkpoints.save(tmp_path / "less", CONFIG, less)), shards)
    wider = plan_shards(replace(ARCH, moe_ffn_hidden_size=160), precision="fp8")
    with pytest.raises(ValueError, match=r"expected .*\[160, 192\] got .*\[144, 192\]"):
        check_original(HFReader(tmp_path / "good"), wider)
