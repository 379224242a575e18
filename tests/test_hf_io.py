"""Checkpoint directories: slices read, strangers refused, and files that transformers loads."""

import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import hf_reference
import numpy as np
import pytest
import torch
from hf_shards import FP8, INDEX, SCALE_INV, SECOND, SHARDS, save_shards
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.convert.fp8 import dequantize, scale_shape
from megatron_dsv3.convert.hf_io import HFReader, check_target, copy_tokenizer_files, write_hf
from megatron_dsv3.convert.mapping import expand, exported_copies
from megatron_dsv3.convert.safetensors_file import SafetensorsWriter, TensorInfo


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_shards(tmp_path, SHARDS)


def test_names_shapes_and_types_are_known_without_scales(checkpoint):
    reader = HFReader(checkpoint)
    assert sorted(reader.names()) == ["bias", "norm", "proj.weight", "w"]
    assert reader.shape("proj.weight") == (300, 200)
    types = {name: reader.dtype(name) for name in reader.names()}
    assert types == {
        "bias": torch.float32,
        "norm": torch.bfloat16,
        "proj.weight": torch.bfloat16,
        "w": torch.float32,
    }
    assert [name for name in types if reader.is_fp8(name)] == ["proj.weight"]


def test_what_is_not_fp8_is_read_as_it_is_stored(checkpoint):
    reader = HFReader(checkpoint)
    for name, tensor in SHARDS[SECOND].items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    out = torch.zeros(3, 2, dtype=torch.float64)
    assert reader.read("w", [slice(2, 5), slice(1, 3)], out=out) is out
    assert torch.equal(out, SHARDS[SECOND]["w"][2:5, 1:3].double())


@pytest.mark.parametrize(
    "slices",
    [
        None,
        (slice(128, 256),),
        (slice(100, 300), slice(7, 190)),
        (slice(None), slice(150, 200)),
    ],
)
def test_fp8_is_dequantised_on_the_way_wherever_the_slice_is(checkpoint, slices):
    scales = SCALE_INV.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    whole = (FP8.float() * scales).bfloat16()
    got = HFReader(checkpoint).read("proj.weight", slices)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, whole[slices or ...])


def test_fp8_can_be_had_as_it_is_stored(checkpoint):
    weight, scale_inv = HFReader(checkpoint).read_fp8("proj.weight")
    assert torch.equal(weight.view(torch.uint8), FP8.view(torch.uint8))
    assert torch.equal(scale_inv, SCALE_INV)
    with pytest.raises(ValueError, match=r"w: expected torch\.float8_e4m3fn, got torch\.float32"):
        HFReader(checkpoint).read_fp8("w")


@pytest.mark.parametrize(
    "slices",
    [[slice(0, 9)], [slice(-1, 8)], [slice(0, 8, 2)], [slice(3, 3)], [slice(0, 8), slice(4, 5)]],
)
def test_a_slice_outside_of_the_tensor_is_refused(checkpoint, slices):
    with pytest.raises(ValueError, match=r"w: slice\(.*is not a part of a dim of \[8, 4\]"):
        HFReader(checkpoint).read("w", slices)


def test_unknown_names_are_refused(checkpoint):
    for name in ("v", "proj.weight_scale"):
        with pytest.raises(ValueError, match=f"has no tensor {name}"):
            HFReader(checkpoint).read(name)


def test_files_are_mapped_a_few_at_a_time(tmp_path):
    shards = {
        f"model-{i:05}-of-00012.safetensors": {f"w{i}": torch.full((4,), i)} for i in range(12)
    }
    shards = {file: {n: t.float() for n, t in s.items()} for file, s in shards.items()}
    reader = HFReader(save_shards(tmp_path, shards), max_open=2)
    for i in range(12):
        assert reader.read(f"w{i}").tolist() == [i] * 4
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert len({line for line in maps.read_text().splitlines() if str(tmp_path) in line}) == 2


def test_threads_and_forked_processes_can_read(checkpoint):
    reader = HFReader(checkpoint, max_open=1)
    expected = SHARDS[SECOND] | {"proj.weight": dequantize(FP8, SCALE_INV)}
    with ThreadPoolExecutor(8) as pool:
        names = reader.names() * 50
        for name, tensor in zip(names, pool.map(reader.read, names), strict=True):
            assert torch.equal(tensor, expected[name])
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(reader.read("w"), SHARDS[SECOND]["w"]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


SMALL = {
    "the V3 shape": {},
    "full-rank queries": {"q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "two MTP": {"num_mtp_layers": 2},
}


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def small(request, tmp_path) -> tuple[Path, Architecture, dict[str, Tensor]]:
    """A directory, what is in config.json, and all its tensors."""
    reference = hf_reference.build(**request.param)
    directory = reference.save(tmp_path / "small")
    return directory, Architecture.from_hf(directory), load_file(directory / "model.safetensors")


def test_a_checkpoint_of_its_architecture_passes_with_and_without_copies(small, tmp_path):
    directory, arch, tensors = small
    HFReader(directory).check_against(arch)
    for name in exported_copies(arch):
        del tensors[name]
    save_file(tensors, directory / "model.safetensors")
    HFReader(directory).check_against(arch)


def test_every_missing_surplus_or_wrongly_shaped_tensor_is_listed(small):
    directory, arch, tensors = small
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.1.mlp.experts.16.up_proj.weight"] = torch.zeros(32, 64)
    tensors["model.norm.weight"] = torch.zeros(63)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="not those that config") as error:
        HFReader(directory).check_against(arch)
    for part in (
        "1 missing: model.layers.1.mlp.experts.3.up_proj.weight",
        "1 surplus: model.layers.1.mlp.experts.16.up_proj.weight",
        "1 of the wrong shape: model.norm.weight expected [64] got [63]",
        "take config.json and weights from the same checkpoint",
    ):
        assert part in str(error.value)


def test_a_copy_of_the_wrong_shape_is_refused(small):
    directory, arch, tensors = small
    [copy, *_] = exported_copies(arch)
    tensors[copy] = torch.zeros(3, 64)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 of the wrong shape: {copy}"):
        HFReader(directory).check_against(arch)


def test_a_dropped_mtp_layer_is_explained(small):
    directory, arch, tensors = small
    mtp = f"model.layers.{arch.num_layers + arch.num_mtp_layers - 1}."
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(mtp)}
    save_file(kept, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing.*set num_nextn_predict_layers to 0"):
        HFReader(directory).check_against(arch)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus.*raise num_nextn_predict_layers"):
        HFReader(directory).check_against(replace(arch, num_mtp_layers=arch.num_mtp_layers - 1))


def test_copies_that_differ_are_listed(small):
    directory, arch, tensors = small
    HFReader(directory).check_copies(arch)
    [copy, original] = next(iter(exported_copies(arch).items()))
    tensors[copy] = tensors[copy] + 1
    save_file(tensors, directory / "model.safetensors")
    HFReader(directory).check_against(arch)
    with pytest.raises(ValueError, match=f"1 copies differ: {copy} from {original}; .*remove"):
        HFReader(directory).check_copies(arch)


def test_a_tied_head_may_be_stored(tmp_path):
    reference = hf_reference.build(tie_word_embeddings=True)
    arch = Architecture.from_hf(reference.save(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    HFReader(tmp_path).check_against(arch)
    HFReader(tmp_path).check_copies(arch)


def v3_shards(num_files: int) -> dict[str, dict[str, TensorInfo]]:
    """The 91,991 tensors of DeepSeek's FP8 release, spread over files; no numbers."""
    infos: dict[str, TensorInfo] = {}
    for param in expand(DEEPSEEK_V3):
        for name in param.hf:
            plain = torch.float32 if param.is_buffer else torch.bfloat16
            infos[name] = TensorInfo(
                torch.float8_e4m3fn if param.quantised else plain, param.hf_shape
            )
            if param.quantised:
                shape = scale_shape(param.hf_shape)
                infos[f"{name}_scale_inv"] = TensorInfo(torch.float32, shape)
    copies = exported_copies(DEEPSEEK_V3).items()
    infos |= {copy: infos[original] for copy, original in copies}
    shards: dict[str, dict[str, TensorInfo]] = {}
    for i, (name, info) in enumerate(infos.items()):
        file = f"model-{i * num_files // len(infos) + 1:05}-of-{num_files:06}.safetensors"
        shards.setdefault(file, {})[name] = info
    return shards


def test_the_full_v3_is_opened_and_checked_without_its_numbers(tmp_path):
    shards = v3_shards(163)
    assert sum(map(len, shards.values())) == 91_991
    for file, layout in shards.items():
        # Files of full size, of which the file system stores the header: the rest is never written.
        with (
            pytest.raises(ValueError, match="never written"),
            SafetensorsWriter(tmp_path / file, layout),
        ):
            pass
    index = {name: file for file, layout in shards.items() for name in layout}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    reader = HFReader(tmp_path)
    assert len(reader.names()) == 46_183
    reader.check_against(DEEPSEEK_V3)
    wanted = "model.layers.61.mlp.experts.255.down_proj.weight"
    part = reader.read(wanted, (slice(100, 110), slice(1000, 1100)))
    assert torch.equal(part, torch.zeros(10, 100).bfloat16())
    with pytest.raises(ValueError, match=r"788 surplus: .*; if that is an MTP layer"):
        reader.check_against(replace(DEEPSEEK_V3, num_mtp_layers=0))


CONFIG = {"architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 128}
STREAM = list((SHARDS[SECOND] | {"v": torch.randn(100)}).items())


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
@pytest.mark.parametrize("changes", SMALL.values(), ids=SMALL.keys())
def test_transformers_loads_what_was_written(changes, shard_bytes, tmp_path):
    reference = hf_reference.build(**changes)
    config = json.loads(reference.model.config.to_json_string(use_diff=False))
    stream = reference.tensors().items()
    write_hf(stream, tmp_path / "out", config=config, shard_bytes=shard_bytes)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = reference.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    HFReader(tmp_path / "out").check_against(Architecture.from_hf(tmp_path / "out"))


def test_shards_keep_to_their_size_and_the_index_to_its_form(tmp_path):
    stream = [(f"w{i}", torch.full((i + 1, 25), float(i))) for i in range(8)]
    write_hf(stream, tmp_path / "out", config=CONFIG, shard_bytes=1100)
    files = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(os.listdir(tmp_path / "out")) == [*("config.json", *files, INDEX)]
    loaded = [load_file(tmp_path / "out" / file) for file in files]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in loaded]
    assert sizes == [1000, 1100, 700, 800]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert index["weight_map"] == {n: f for f, t in zip(files, loaded, strict=True) for n in t}
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    assert torch.equal(HFReader(tmp_path / "out").read("w7"), torch.full((8, 25), 7.0))


def test_a_single_shard_has_transformers_name_and_no_index(tmp_path):
    write_hf(STREAM, tmp_path / "out", config=CONFIG)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.glob("*.tmp"))


def test_reading_and_writing_again_gives_the_same_bytes(checkpoint, tmp_path):
    reader = HFReader(checkpoint)
    for target in ("a", "b"):
        stream = ((name, reader.read(name)) for name in reader.names())
        write_hf(stream, tmp_path / target, config=CONFIG)
        reader = HFReader(tmp_path / target)
    [a, b] = [(tmp_path / t / "model.safetensors").read_bytes() for t in ("a", "b")]
    assert a == b
    assert torch.equal(reader.read("proj.weight"), dequantize(FP8, SCALE_INV))


def test_one_shard_at_a_time_is_in_memory(tmp_path):
    alive: set[int] = set()
    most = 0

    def stream():
        nonlocal most
        for i in range(40):
            # numpy's array is the owner: it lives as long as any view of the memory.
            owner = np.zeros(250, dtype=np.float32)
            alive.add(i)
            weakref.finalize(owner, alive.discard, i)
            yield f"w{i}", torch.from_numpy(owner)
            del owner
            most = max(most, len(alive))

    write_hf(stream(), tmp_path / "out", config=CONFIG, shard_bytes=10_000)
    assert len(HFReader(tmp_path / "out").names()) == 40
    assert 10 <= most <= 11


def broken_stream():
    yield from STREAM
    raise ZeroDivisionError


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_hf(broken_stream(), tmp_path / "out", config=CONFIG, shard_bytes=100)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_replaced(tmp_path):
    if (child := os.fork()) == 0:
        stream = (os._exit(0) if name == "v" else (name, tensor) for name, tensor in STREAM)
        write_hf(stream, tmp_path / "out", config=CONFIG, shard_bytes=1)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == ["out.tmp"]
    assert (tmp_path / "out.tmp/model-00001.safetensors").exists()
    write_hf(STREAM, tmp_path / "out", config=CONFIG, shard_bytes=120)
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(HFReader(tmp_path / "out").names()) == sorted(name for name, _ in STREAM)


def never():
    raise AssertionError("the stream must not be touched")
    yield


def occupy(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: occupy(root / "out"), "out: exists and is not an empty directory"),
        (lambda root: (root / "out").write_text("mine"), "out: exists and is not an empty dir"),
        (lambda root: occupy(root / "out.tmp"), r"out\.tmp: is needed as a temporary name"),
    ],
)
def test_what_is_not_ours_is_not_overwritten(prepare, message, tmp_path):
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        write_hf(never(), tmp_path / "out", config=CONFIG)
    with pytest.raises(ValueError, match=message):
        check_target(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_point_is_refused_before_any_work():
    with pytest.raises(ValueError, match="/proc: is a mount point"):
        write_hf(never(), Path("/proc"), config=CONFIG)


def test_an_unwritable_place_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"/proc/out\.tmp: cannot be written"):
        write_hf(never(), Path("/proc/out"), config=CONFIG)


def test_an_empty_directory_and_a_link_to_one_are_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_hf(STREAM, tmp_path / "link", config=CONFIG)
    assert (tmp_path / "real/model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_tensor_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bias: came twice"):
        write_hf([*STREAM, STREAM[0]], tmp_path / "out", config=CONFIG, shard_bytes=1)
    assert not list(tmp_path.iterdir())


def test_a_stream_without_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="out: there is no tensor to write"):
        write_hf([], tmp_path / "out", config=CONFIG)


COMPANIONS = {
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja", "modeling_deepseek.py", "vocab.json"),
    *("merges.txt", "added_tokens.json"),
}


@pytest.fixture
def template(tmp_path) -> Path:
    folder = tmp_path / "template"
    folder.mkdir()
    for name in (*COMPANIONS, "config.json", "model.safetensors", INDEX, "README.md", "x.bin"):
        (folder / name).write_text(name)
    (folder / "tokenizer_backup").mkdir()
    return folder


def test_what_belongs_to_a_model_besides_weights_goes_along(template, tmp_path):
    write_hf(STREAM, tmp_path / "out", config=CONFIG, template=template)
    names = set(os.listdir(tmp_path / "out"))
    assert names == COMPANIONS | {"config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == name for name in COMPANIONS)
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    assert copy_tokenizer_files(template, tmp_path) == sorted(COMPANIONS)


def test_a_template_that_is_not_there_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        write_hf(never(), tmp_path / "out", config=CONFIG, template=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
