"""Our writer against the safetensors library, and what it refuses."""

import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_dsv3.convert.safetensors_file import (
    SafetensorsWriter,
    TensorInfo,
    info_of,
    read_header,
)

# Odd sizes of narrow types before wider ones: unaligned, if written in this order.
TENSORS = {
    "byte": torch.randn(3).to(torch.float8_e4m3fn),
    "half": torch.randn(5, 3).half(),
    "brain": torch.randn(7).bfloat16(),
    "float": torch.randn(2, 3, 4),
    "number": torch.tensor(3.0),
    "view": torch.randn(6, 8)[1:4, ::2],
}
LAYOUT = {name: info_of(tensor) for name, tensor in TENSORS.items()}


def write(path, names):
    with SafetensorsWriter(path, LAYOUT) as writer:
        for name in names:
            writer.write(name, TENSORS[name])
    return path


def test_the_library_reads_what_was_written_in_any_order(tmp_path):
    path = write(tmp_path / "a.safetensors", TENSORS)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float()), name
    backwards = write(tmp_path / "b.safetensors", reversed(TENSORS))
    assert backwards.read_bytes() == path.read_bytes()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    for tensor in load_file(write(tmp_path / "a.safetensors", TENSORS)).values():
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0


def test_headers_of_the_library_are_read(tmp_path):
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors") == LAYOUT
    assert LAYOUT["view"].nbytes == 3 * 4 * 4


def test_types_that_no_checkpoint_has_are_refused(tmp_path):
    save_file({"ids": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"a\.safetensors: expected tensors of .*BF16.* got ids I64"
    ):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("cut", [slice(0), slice(7), slice(100), slice(-1), slice(None)])
def test_a_file_of_the_wrong_size_is_refused(cut, tmp_path):
    path = write(tmp_path / "a.safetensors", TENSORS)
    path.write_bytes(path.read_bytes()[cut] + (b"x" if cut == slice(None) else b""))
    with pytest.raises(ValueError, match=r"a\.safetensors: truncated or damaged .*fetch it again"):
        read_header(path)


def test_a_flipped_byte_in_the_header_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", TENSORS)
    path.write_bytes(path.read_bytes().replace(b"[5,3]", b"[5,2]"))
    with pytest.raises(ValueError, match=r"a\.safetensors: truncated or damaged"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("other", torch.zeros(7), "other: not in the layout"),
        ("float", torch.zeros(2, 3, 5), r"float: expected torch.float32 \[2, 3, 4\], got .*5\]"),
        ("brain", torch.zeros(7), r"brain: expected torch.bfloat16 \[7\], got torch.float32 \[7\]"),
        ("byte", TENSORS["byte"], "byte: written before"),
    ],
)
def test_what_the_layout_does_not_promise_is_not_written(name, tensor, message, tmp_path):
    path = tmp_path / "a.safetensors"
    writer = SafetensorsWriter(path, LAYOUT)
    writer.write("byte", TENSORS["byte"])
    with pytest.raises(ValueError, match=message):
        writer.write(name, tensor)


def test_a_file_that_lacks_a_tensor_does_not_pass_as_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.safetensors: never written: brain, view"):
        write(tmp_path / "a.safetensors", ["byte", "half", "float", "number"])


def test_an_error_of_the_caller_is_not_hidden_by_missing_tensors(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        SafetensorsWriter(tmp_path / "a.safetensors", LAYOUT) as writer,
    ):
        writer.write("byte", torch.zeros(1 // 0))


@pytest.fixture
def small_disk():
    """Files of this process may not pass 1 MiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
def test_no_room_is_an_error_that_names_the_file(tmp_path):
    layout = {"a": TensorInfo(torch.float32, (1 << 20,))}
    with pytest.raises(ValueError, match=r"a\.safetensors: cannot be written .*free space"):
        SafetensorsWriter(tmp_path / "a.safetensors", layout)


def test_rows_of_several_tensors_may_alternate(tmp_path):
    names = ["half", "float", "byte"]
    with SafetensorsWriter(tmp_path / "a.safetensors", {n: LAYOUT[n] for n in names}) as writer:
        writer.append("half", TENSORS["half"][:2])
        writer.append("float", TENSORS["float"][:1])
        writer.append("half", TENSORS["half"][2:5])
        writer.write("byte", TENSORS["byte"])
        writer.append("float", TENSORS["float"][1:])
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[n].float(), TENSORS[n].float()) for n in names)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(6, 3).half(), "half: expected rows of .*, 30 bytes of it, got .*6, 3"),
        (torch.zeros(2, 4).half(), r"half: expected rows .* got torch.float16 \[2, 4\]"),
        (torch.zeros(2, 3), "half: expected rows .* got torch.float32"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message, tmp_path):
    layout = {"half": LAYOUT["half"]}
    with (
        pytest.raises(ValueError, match=message),
        SafetensorsWriter(tmp_path / "a.safetensors", layout) as writer,
    ):
        writer.append("half", rows)


def test_rows_that_never_came_are_named(tmp_path):
    with (
        pytest.raises(ValueError, match="never written: half"),
        SafetensorsWriter(tmp_path / "a.safetensors", {"half": LAYOUT["half"]}) as writer,
    ):
        writer.append("half", TENSORS["half"][:4])
