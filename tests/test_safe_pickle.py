"""A pickle in a checkpoint names a function: it is refused and never called."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch
from megatron_dirs import save_with_torch

from megatron_dsv3.convert.megatron_io import MegatronReader
from megatron_dsv3.convert.safe_pickle import StoredTensor, load_archive, load_index


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_payload_in_the_index_is_named_and_not_run(tmp_path):
    directory = save_with_torch({"w": torch.ones(3)}, tmp_path / "ckpt")
    (directory / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    with pytest.raises(ValueError, match=r"\.metadata: a pickle names posix\.mkdir"):
        MegatronReader(directory)
    assert not (tmp_path / "proof").exists()
    pickle.loads((directory / ".metadata").read_bytes())
    assert (tmp_path / "proof").exists(), "the payload does nothing: this test shows nothing"


def test_a_payload_in_the_common_state_is_named_and_not_run(tmp_path):
    directory = save_with_torch({"w": torch.ones(3)}, tmp_path / "ckpt")
    torch.save({"iteration": 3, "args": Payload(tmp_path / "proof")}, directory / "common.pt")
    with pytest.raises(ValueError, match=r"common\.pt: a pickle names posix\.mkdir"):
        MegatronReader(directory).common()
    assert not (tmp_path / "proof").exists()


def test_a_payload_in_place_of_a_tensor_is_named_and_not_run(tmp_path):
    directory = save_with_torch({"w": torch.ones(3)}, tmp_path / "ckpt")
    torch.save(Payload(tmp_path / "proof"), directory / "__0_0.distcp")
    with open(directory / "__0_0.distcp", "ab") as file:
        file.write(b"\0" * 4096)  # the index knows a longer file
    with pytest.raises(ValueError, match=r"distcp: (a pickle names|truncated or damaged)"):
        MegatronReader(directory).read("w")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_a_truncated_index_is_refused(tmp_path, size):
    directory = save_with_torch({"w": torch.ones(3)}, tmp_path / "ckpt")
    content = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"\.metadata: truncated or damaged"):
        load_index(directory / ".metadata")


def test_a_pickle_that_is_no_index_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="expected the index of a checkpoint, got dict"):
        load_index(tmp_path / "x")


@pytest.mark.parametrize("crc", [True, False])
def test_what_torch_saved_is_read_with_tensors_as_places(tmp_path, crc):
    wide = torch.arange(12).view(3, 4)
    content = {"args": argparse.Namespace(lr=0.1), "wide": wide, "part": wide[1:, 1:]}
    torch.serialization.set_crc32_options(crc)
    torch.save(content, tmp_path / "common.pt")
    torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "common.pt") as archive:
        found = load_archive(archive, "here")
    assert found["args"] == content["args"]
    assert found["wide"] == StoredTensor("data/0", torch.int64, (3, 4), (4, 1), 0)
    assert found["part"] == StoredTensor("data/0", torch.int64, (2, 3), (4, 1), 5)
    assert found["wide"].is_contiguous
    assert not found["part"].is_contiguous
