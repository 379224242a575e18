"""What can be wrong with a checkpoint directory, each by damaging a good one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_shards import FIRST, FP8, INDEX, SCALE_INV, SECOND, SHARDS, save_shards
from safetensors.torch import save_file
from torch import Tensor

from megatron_dsv3.convert.hf_index import stored_tensors
from megatron_dsv3.convert.safetensors_file import info_of


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_shards(tmp_path, SHARDS)


def rewrite(file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
    """Replaces the tensors of one shard, not the index."""
    return lambda folder: save_file(change(dict(SHARDS[file])), folder / file)


def reindex(change: Callable[[dict[str, str]], dict[str, str]]):
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        (folder / INDEX).write_text(json.dumps({"weight_map": change(index)}))

    return damage


def without(name: str):
    return lambda content: {key: value for key, value in content.items() if key != name}


def resave(changes: dict[str, Tensor]):
    """A consistent checkpoint of other tensors."""
    return lambda folder: save_shards(
        folder, {f: {n: changes.get(n, t) for n, t in s.items()} for f, s in SHARDS.items()}
    )


def drop(name: str):
    return lambda folder: save_shards(folder, {f: without(name)(s) for f, s in SHARDS.items()})


DAMAGES = {
    "a shard is missing": (
        lambda folder: (folder / SECOND).unlink(),
        f"1 files of the index are missing: {SECOND}",
    ),
    "a shard is truncated": (
        lambda folder: os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1),
        f"{SECOND}: truncated or damaged",
    ),
    "a shard of another checkpoint is there": (
        lambda folder: save_file(
            {"x": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors"
        ),
        "1 files are not in the index: model-00003-of-00003.safetensors",
    ),
    "a whole model is there, too": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"),
        "1 files are not in the index: model.safetensors",
    ),
    "a shard has two names": (
        lambda folder: (folder / FIRST).replace(folder / SECOND),
        "files of the index are missing: " + FIRST,
    ),
    "a shard is a copy of another": (
        lambda folder: (folder / SECOND).write_bytes((folder / FIRST).read_bytes()),
        rf"3 tensors of the index are not in their file: bias \({SECOND}\).*"
        rf"2 tensors are in a file where the index does not have them: proj.weight \({SECOND}\)",
    ),
    "a tensor is in two files": (
        rewrite(SECOND, lambda tensors: tensors | SHARDS[FIRST]),
        "2 tensors are in a file where the index does not have them",
    ),
    "a tensor is not in its file": (
        rewrite(SECOND, without("norm")),
        rf"1 tensors of the index are not in their file: norm \({SECOND}\)",
    ),
    "a tensor is not in the index": (
        reindex(without("norm")),
        rf"1 tensors are in a file where the index does not have them: norm \({SECOND}\)",
    ),
    "a path leads up": (
        reindex(lambda index: index | {"w": "../w.safetensors"}),
        r"1 files of the index lie outside of the directory: \.\./w\.safetensors",
    ),
    "a path leads away": (
        reindex(lambda index: index | {"w": "/etc/w.safetensors"}),
        "1 files of the index lie outside of the directory: /etc/w.safetensors",
    ),
    "the index is empty": (reindex(lambda index: {}), "expected weight_map to give a file"),
    "the index is not JSON": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {'),
        r"index\.json: not an index of safetensors .*line 1 column 17",
    ),
    "the index has no map": (
        lambda folder: (folder / INDEX).write_text("{}"),
        "not an index of safetensors .*weight_map",
    ),
    "the index names a tensor twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"w": "a", "w": "b"}}'),
        "not an index of safetensors .*1 named twice: w",
    ),
    "nothing is there": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        f"expected a checkpoint with {INDEX} or model.safetensors",
    ),
    "a scale is missing": (
        drop("proj.weight_scale_inv"),
        "1 FP8 tensors have no _scale_inv: proj.weight",
    ),
    "a scale has no tensor": (
        drop("proj.weight"),
        "1 _scale_inv have no FP8 tensor: proj.weight",
    ),
    "a scale's tensor is not FP8": (
        resave({"proj.weight": torch.zeros(300, 200)}),
        "1 _scale_inv have no FP8 tensor: proj.weight",
    ),
    "a scale is transposed": (
        resave({"proj.weight_scale_inv": SCALE_INV.T.contiguous()}),
        r"1 _scale_inv are of the wrong kind: proj.weight expected .* \[3, 2\] got .* \[2, 3\]",
    ),
    "a scale is bf16": (
        resave({"proj.weight_scale_inv": SCALE_INV.bfloat16()}),
        r"1 _scale_inv are of the wrong kind: proj.weight .* got torch\.bfloat16",
    ),
    "an FP8 tensor is a vector": (
        resave({"proj.weight": FP8[0].clone()}),
        "1 FP8 tensors are not matrices: proj.weight",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, message):
    stored_tensors(checkpoint)
    damage(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        stored_tensors(checkpoint)
    assert "\n" not in str(error.value)
    assert str(checkpoint) in str(error.value)


def test_all_problems_of_a_kind_are_counted_and_twenty_named(tmp_path):
    tensors = {f"w{i:02}": FP8[:2, :2].clone() for i in range(30)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"30 FP8 .* w00, w01, .*, w19, \.\.\.; fetch"):
        stored_tensors(tmp_path)


def test_links_to_files_elsewhere_are_followed_as_in_hugging_faces_cache(checkpoint, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (FIRST, SECOND, INDEX):
        (snapshot / file).symlink_to(f"../{file}")
    assert stored_tensors(snapshot)["w"] == (snapshot / SECOND, info_of(SHARDS[SECOND]["w"]))
