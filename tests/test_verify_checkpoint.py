"""`verify`: every kind of damage to a real checkpoint is named, and nothing is executed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import hf_reference
import pytest
import torch
from tiny_engine import make_engine, make_job, train_step

from megatron_dsv3.checkpoint.headers import header_problems, read_metadata, stored_items
from megatron_dsv3.checkpoint.manifest import MANIFEST, without_files
from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.commands.verify_checkpoint import is_checkpoint, run, verify_checkpoint
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import CheckpointSection
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import start, stop


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("original")
    hf_dir = hf_reference.build(num_hidden_layers=2, num_mtp_layers=0).save(place / "hf")
    cpu.enable()
    groups = start(Parallel(), torch.device("cpu"))
    engine = make_engine(make_job(hf_dir), groups)
    train_step(engine, 0)
    saver = Saver(engine.trainee, place / "c", CheckpointSection(), lambda _: None)
    saver.save(1, {}, wait=True)
    saver.finish()
    stop()
    return place / "c"


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "c"))


@pytest.fixture
def checkpoint(folder) -> Path:
    return folder / "iter_0000001"


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_a_whole_one_is_counted(folder, checkpoint):
    told: list[str] = []
    run(folder, told.append)
    run(checkpoint, told.append)
    assert told[0] == told[1]
    assert f"{checkpoint}: whole; 4 files" in told[0]
    assert told[0].endswith("with the optimizer")
    assert is_checkpoint(folder)
    assert is_checkpoint(checkpoint)
    assert not is_checkpoint(folder.parent)


@pytest.mark.parametrize("name", ["__0_0.distcp", "optimizer__0_1.distcp", "metadata.json"])
def test_a_flipped_byte_is_found_in_every_file(checkpoint, name):
    _flip(checkpoint / name, (checkpoint / name).stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"not whole: {name} is damaged: hash"):
        verify_checkpoint(checkpoint)


def test_a_short_and_a_missing_file_are_named(checkpoint):
    with (checkpoint / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    (checkpoint / "optimizer__0_1.distcp").unlink()
    with pytest.raises(ValueError, match="not whole") as raised:
        verify_checkpoint(checkpoint)
    assert "__0_0.distcp has 1000 bytes, expected" in str(raised.value)
    assert "optimizer__0_1.distcp cannot be found: No such file" in str(raised.value)


def test_a_surplus_file_and_a_missing_manifest_are_named(checkpoint):
    (checkpoint / "__9_0.distcp").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"__9_0\.distcp is not in the manifest"):
        verify_checkpoint(checkpoint)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match="the checkpoint was not finished"):
        verify_checkpoint(checkpoint)


def test_a_damaged_tensor_is_named_even_where_the_manifest_fits(checkpoint):
    metadata = read_metadata(checkpoint)
    items = [i for i in stored_items(metadata) if i.file == "__0_0.distcp" and i.num_bytes]
    tail = items[3].offset + items[3].length - 22  # where an archive says that it is one
    _flip(checkpoint / "__0_0.distcp", tail)
    without_files(checkpoint, [], ["__0_0.distcp"])
    [problem] = header_problems(checkpoint, metadata)
    assert problem.startswith(f"{items[3].key} in __0_0.distcp: not what torch.save writes")


def test_a_tensor_of_another_size_or_without_bytes_is_named(checkpoint):
    metadata = read_metadata(checkpoint)
    key = "decoder.final_layernorm.weight"
    chunk = metadata.state_dict_metadata[key].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] * 2])
    [problem] = header_problems(checkpoint, metadata)
    assert problem.startswith(f"{key} in __0_0.distcp: holds ")
    metadata = read_metadata(checkpoint)
    [index] = [index for index in metadata.storage_data if index.fqn == key]
    del metadata.storage_data[index]
    assert list(header_problems(checkpoint, metadata)) == [f"{key}: 0 of 1 shards are stored"]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


FOREIGN = {
    "code": pickle.dumps(_Evil()),
    "empty": b"",
    "garbage": b"garbage",
    "a list": pickle.dumps([1]),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_metadata_is_refused_and_not_executed(checkpoint, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata: (not the metadata|expected Metadata)"):
        read_metadata(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_the_manifest_is_plain_json(checkpoint):
    content = json.loads((checkpoint / MANIFEST).read_text())
    assert set(content["files"]["metadata.json"]) == {"size", "xxh3_128"}
