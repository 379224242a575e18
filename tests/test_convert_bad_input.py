"""Bad input to the converter: one message, exit code 2, nothing that looks finished left behind."""

import functools
import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small_checkpoints
import torch
from megatron_dirs import edit_index, write_all
from safetensors.torch import load_file, save_file
from small_checkpoints import WIDE
from test_safe_pickle import Payload

from megatron_dsv3.convert import megatron_layout, megatron_write, sources
from megatron_dsv3.convert.megatron_write import ToMegatron

TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint" / "convert.py"
CONFIG, BF16 = small_checkpoints.bf16_tensors(**WIDE)
FP8 = small_checkpoints.fp8_tensors(CONFIG, BF16)
SCALE = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
Damage = Callable[[Path], object]
Convert = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def _one_layout():
    """The layout of a model is asked of a process of its own, which starts for 8 s."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(megatron_layout.layouts)
        for module in (sources, megatron_write):
            patch.setattr(module, "layouts", cached)
        yield


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(tool, monkeypatch, capsys, tmp_path) -> Convert:
    """Converts what must be refused and gives the message; checks all that is alike."""

    def call(*arguments: object) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        command = [str(TOOL), *map(str, arguments), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            tool.main()
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1, "one message"
        assert {path.name for path in tmp_path.iterdir()} - before <= {"out.tmp"}
        unfinished = {path.suffix for path in (tmp_path / "out.tmp").glob("[!.]*")}
        assert not unfinished
        return error

    return call


@pytest.fixture
def hf_dir(tmp_path) -> Path:
    """Two shards and their index."""
    directory = small_checkpoints.save(tmp_path / "in", CONFIG, FP8)
    small_checkpoints.in_two_shards(directory)
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    return write_all(
        ToMegatron.open(small_checkpoints.save(folder / "hf", CONFIG, BF16)), folder / "m"
    )


@pytest.fixture
def mcore_dir(converted, tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for file in converted.iterdir():
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "in"


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"


def cut(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def flip(name: str, position: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 0x10
        (folder / name).write_bytes(content)

    return damage


def drop(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edit_json(name: str, change: Callable[[dict], dict]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return damage


def reindex(change: Callable[[dict[str, str]], dict[str, str]]) -> Damage:
    return edit_json(INDEX, lambda content: {"weight_map": change(content["weight_map"])})


def resave(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """Other tensors, the index in order."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / FIRST) | load_file(folder / SECOND)
        for file in (FIRST, SECOND, INDEX):
            (folder / file).unlink()
        save_file(change({n: t.clone() for n, t in tensors.items()}), folder / "model.safetensors")

    return damage


def copy_file(name: str, other: str) -> Damage:
    return lambda folder: (folder / other).write_bytes((folder / name).read_bytes())


HF_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a shard is truncated": (cut(SECOND), f"{SECOND}: truncated or damaged"),
    "a byte of a header is flipped": (flip(SECOND, 9), f"{SECOND}: truncated or damaged"),
    "a byte of a header's size is flipped": (flip(SECOND, 1), f"{SECOND}: truncated or damaged"),
    "the index has a tensor too few": (
        reindex(lambda index: {n: f for n, f in index.items() if n != SCALE}),
        f"1 tensors are in a file where the index does not have them: {SCALE}",
    ),
    "the index has a tensor too many": (
        reindex(lambda index: index | {"ghost": FIRST}),
        "1 tensors of the index are not in their file: ghost",
    ),
    "a scale is missing": (
        resave(lambda tensors: {n: t for n, t in tensors.items() if n != SCALE}),
        f"1 FP8 tensors have no _scale_inv: {SCALE.removesuffix('_scale_inv')}",
    ),
    "a scale has a wrong shape": (
        resave(lambda tensors: tensors | {SCALE: torch.ones(2, 3)}),
        "1 _scale_inv are of the wrong kind",
    ),
    "a shard stands under two names": (copy_file(FIRST, SECOND), "are not in their file"),
    "a shard too many": (
        copy_file(FIRST, "model-00003-of-00003.safetensors"),
        "1 files are not in the index: model-00003-of-00003.safetensors",
    ),
    "writing did not end": (drop(SECOND), f"1 files of the index are missing: {SECOND}"),
    "a path leads away": (
        reindex(lambda index: index | {SCALE: f"../{FIRST}"}),
        f"1 files of the index lie outside of the directory: ../{FIRST}",
    ),
    "a tensor is missing": (
        resave(lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}),
        "1 missing: lm_head.weight",
    ),
    "config.json is another model's": (
        edit_json("config.json", lambda config: config | {"vocab_size": 256}),
        "lm_head.weight expected [256, 192] got [128, 192]",
    ),
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: not valid JSON",
    ),
}


@pytest.mark.parametrize("to", ["megatron", "hf"])
@pytest.mark.parametrize(("damage", "message"), HF_DAMAGES.values(), ids=HF_DAMAGES.keys())
def test_a_damaged_hugging_face_directory_is_refused(convert, hf_dir, damage, message, to):
    damage(hf_dir)
    assert message in convert("--to", to, "--from", hf_dir)


def payload(name: str) -> Damage:
    """Makes a directory when it is unpickled."""
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Payload(folder / "proof")))


def edited(change: Callable) -> Damage:
    return lambda folder: edit_index(folder, change)


def _version(index) -> None:
    index.version = "2.0.0"


def _outside(index) -> None:
    next(iter(index.storage_data.values())).relative_path = "../elsewhere.distcp"


def _hole(index) -> None:
    index.state_dict_metadata["output_layer.weight"].chunks[0].sizes = torch.Size([100, 192])


MCORE_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a file is truncated": (cut("__1_0.distcp"), "1 files are shorter than the index says"),
    "a file is missing": (drop("__1_0.distcp"), "1 files of the index are missing: __1_0.distcp"),
    "writing did not end": (drop(".metadata"), "or one whose writing did not end"),
    "the index is truncated": (cut(".metadata"), ".metadata: truncated or damaged"),
    "the index is a program": (
        payload(".metadata"),
        "a pickle names posix.mkdir",
    ),
    "the index is of a later version": (edited(_version), "expected version 1.0.0, got 2.0.0"),
    "the format is of a later version": (
        edit_json("metadata.json", lambda content: content | {"sharded_backend_version": 2}),
        "metadata.json: expected",
    ),
    "the index leads away": (edited(_outside), "lie outside of the directory: ../elsewhere.distcp"),
    "the index has a hole": (edited(_hole), "tensors have holes or parts that are stored twice"),
    "config.json is another model's": (
        edit_json("config.json", lambda config: config | {"num_hidden_layers": 4}),
        "the tensors are not those that config.json promises",
    ),
    "config.json is missing": (drop("config.json"), "give --hf-template"),
}


@pytest.mark.parametrize(("damage", "message"), MCORE_DAMAGES.values(), ids=MCORE_DAMAGES.keys())
def test_a_damaged_megatron_checkpoint_is_refused(convert, mcore_dir, damage, message):
    damage(mcore_dir)
    assert message in convert("--to", "hf", "--from", mcore_dir)
    assert not (mcore_dir / "proof").exists()


def program_in_place_of_numbers(folder: Path) -> None:
    size = (folder / "__1_0.distcp").stat().st_size
    torch.save(Payload(folder / "proof"), folder / "__1_0.distcp")
    os.truncate(folder / "__1_0.distcp", size)


def other_type(folder: Path) -> None:
    """One byte of the description that stands before the numbers."""
    content = (folder / "__1_0.distcp").read_bytes()
    flip("__1_0.distcp", content.index(b"BFloat16Storage"))(folder)


IN_THE_FILES: dict[str, tuple[Damage, str]] = {
    "a program in place of numbers": (program_in_place_of_numbers, "__1_0.distcp: "),
    "a byte before the numbers is flipped": (other_type, "__1_0.distcp: truncated or damaged"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message"), IN_THE_FILES.values(), ids=IN_THE_FILES.keys())
def test_what_only_reading_shows_ends_without_a_file(convert, mcore_dir, damage, message):
    damage(mcore_dir)
    assert message in convert("--to", "hf", "--from", mcore_dir, "--workers", 1)
    assert not (mcore_dir / "proof").exists()


def test_a_program_in_xtuners_file_is_refused_and_not_run(convert, tmp_path):
    small_checkpoints.save(tmp_path / "in", CONFIG, BF16)
    torch.save({"state_dict": BF16, "x": Payload(tmp_path / "in" / "proof")}, tmp_path / "a.pth")
    error = convert(
        "--to", "hf", "--from-xtuner", tmp_path / "a.pth", "--hf-template", tmp_path / "in"
    )
    assert "a.pth: holds more than tensors, and what it holds was not run" in error
    assert not (tmp_path / "in" / "proof").exists()


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_what_is_not_there_is_named(convert, tmp_path, to):
    assert f"{tmp_path / 'nowhere'}" in convert("--to", to, "--from", tmp_path / "nowhere")
