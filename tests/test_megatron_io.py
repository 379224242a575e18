"""Reading `torch_dist` checkpoints, against torch's own writer, and damaged in every way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_dirs import METADATA, edit_index, save_with_torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_dsv3.convert.megatron_io import Chunk, MegatronReader, Place, _tiles

TENSORS = {
    "vector": torch.randn(7),
    "matrix": torch.randn(6, 5).bfloat16(),
    "experts": torch.randn(4, 6, 3),
    "halves": torch.randn(3, 2).half(),
    "count": torch.tensor(5),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dcp") / "ckpt"
    return MegatronReader(save_with_torch(TENSORS, directory))


@pytest.fixture
def directory(tmp_path):
    return save_with_torch(TENSORS, tmp_path / "ckpt")


def test_every_tensor_is_what_torch_saved(reader):
    assert reader.infos().keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        info = reader.infos()[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(reader.read(name), tensor)


@given(st.sampled_from(["vector", "matrix", "experts"]), st.data())
@settings(max_examples=60, deadline=None)
def test_any_rectangle_is_that_of_the_whole(reader, name, data):
    cut = []
    for size in TENSORS[name].shape:
        start = data.draw(st.integers(0, size - 1))
        cut.append(slice(start, data.draw(st.integers(start + 1, size))))
    expected = TENSORS[name][tuple(cut)]
    assert torch.equal(reader.read(name, cut), expected)
    out = torch.empty(expected.shape, dtype=torch.float64)
    assert torch.equal(reader.read(name, cut, out=out), expected.double())


def test_a_tensor_that_is_not_there_is_named(reader):
    with pytest.raises(ValueError, match="has no tensor surprise"):
        reader.read("surprise")


def _drop_file(directory):
    (directory / "__0_0.distcp").unlink()


def _truncate(directory):
    path = directory / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def _half_written(directory):
    (directory / ".metadata").unlink()


def _other_backend(directory):
    (directory / "metadata.json").write_text(METADATA.replace("torch_dist", "zarr"))


def _later_backend(directory):
    (directory / "metadata.json").write_text(METADATA.replace("1", "2"))


def _damaged_backend(directory):
    (directory / "metadata.json").write_text("{")


def _version(index):
    index.version = "2.0.0"


def _outside(index):
    where = MetadataIndex("matrix", (0, 0))
    index.storage_data[where].relative_path = "../elsewhere.distcp"


def _absolute(index):
    where = MetadataIndex("matrix", (0, 0))
    index.storage_data[where].relative_path = "/etc/passwd"


def _twice(index):
    index.state_dict_metadata["matrix"].chunks *= 2


def _hole(index):
    index.state_dict_metadata["matrix"].chunks[0].sizes = torch.Size([5, 5])


def _too_far(index):
    index.state_dict_metadata["matrix"].size = torch.Size([6, 4])


def _lost(index):
    del index.storage_data[MetadataIndex("matrix", (0, 0))]


def _transformed(index):
    index.storage_data[MetadataIndex("matrix", (0, 0))].transform_descriptors = ["zstd"]


DAMAGED_FILES = {
    "a file is missing": (_drop_file, "1 files of the index are missing: __0_0.distcp"),
    "a file is cut": (_truncate, "1 files are shorter than the index says: __0_0.distcp"),
    "writing did not end": (_half_written, ".metadata missing; .* whose writing did not end"),
    "another backend": (_other_backend, "expected .*torch_dist.*, got .*zarr"),
    "a later backend": (_later_backend, "expected .*, got .*'sharded_backend_version': 2"),
    "no JSON": (_damaged_backend, "metadata.json: damaged"),
}
DAMAGED_INDEX = {
    "a later version": (_version, "expected version 1.0.0, got 2.0.0"),
    "a path that goes up": (_outside, "lie outside of the directory: ../elsewhere.distcp"),
    "an absolute path": (_absolute, "lie outside of the directory: /etc/passwd"),
    "a part stored twice": (_twice, "holes or parts that are stored twice: matrix"),
    "a hole": (_hole, "holes or parts that are stored twice: matrix"),
    "a part beyond the end": (_too_far, "holes or parts that are stored twice: matrix"),
    "a part stored nowhere": (_lost, r"1 entries are stored nowhere: matrix"),
    "a transformed part": (_transformed, "1 entries are transformed: matrix"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_FILES.values(), ids=DAMAGED_FILES.keys())
def test_a_damaged_directory_is_refused_before_anything_is_read(directory, damage, message):
    damage(directory)
    with pytest.raises(ValueError, match=message):
        MegatronReader(directory)


@pytest.mark.parametrize(("damage", "message"), DAMAGED_INDEX.values(), ids=DAMAGED_INDEX.keys())
def test_an_index_that_cannot_be_true_is_refused(directory, damage, message):
    edit_index(directory, damage)
    with pytest.raises(ValueError, match=message):
        MegatronReader(directory)


def test_something_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        MegatronReader(tmp_path / "nothing")


def test_an_index_of_another_checkpoint_is_noticed_when_a_tensor_is_read(directory):
    def change(index):
        index.state_dict_metadata["vector"].properties.dtype = torch.bfloat16

    edit_index(directory, change)
    with pytest.raises(ValueError, match="index and files are of two checkpoints"):
        MegatronReader(directory).read("vector")


def test_every_byte_of_an_archive_around_the_numbers_is_guarded(directory):
    """A flipped byte gives the same numbers or an error, never other numbers or another error."""
    reader = MegatronReader(directory)
    place = reader._tensors["vector"][1][0].place
    whole = place.file.read_bytes()
    numbers = whole.index(TENSORS["vector"].numpy().tobytes(), place.offset)
    inside = range(numbers, numbers + TENSORS["vector"].nbytes)
    refused = 0
    for position in range(place.offset, place.offset + place.length):
        if position in inside:
            continue
        flipped = bytearray(whole)
        flipped[position] ^= 0x41
        place.file.write_bytes(flipped)
        reader._numbers.cache_clear()
        try:
            assert torch.equal(reader.read("vector"), TENSORS["vector"])
        except ValueError:
            refused += 1
    assert refused > 100


def _chunk(offsets, sizes):
    return Chunk(offsets, sizes, Place(None, 0, 0))


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([((0, 0), (2, 2)), ((0, 2), (2, 1)), ((2, 0), (1, 3))], True),
        ([((0, 0), (2, 2)), ((0, 2), (3, 1)), ((2, 0), (1, 3))], False),
        ([((0, 0), (2, 2)), ((0, 2), (1, 1)), ((2, 0), (1, 3))], False),
        ([((0, 0), (3, 2)), ((0, 1), (3, 1))], False),
        ([], False),
        ([((0, 0), (3, 4))], False),
    ],
)
def test_chunks_tile_a_tensor_or_they_do_not(boxes, expected):
    assert _tiles([_chunk(*box) for box in boxes], (3, 3)) is expected
