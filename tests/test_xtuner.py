"""XTuner's state dicts, merged as its code merges them, against the tensors they were made of."""

import pickle
from dataclasses import replace

import pytest
import small_checkpoints
import torch
from safetensors.torch import save_file
from small_checkpoints import WIDE

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.xtuner import XTunerSource

CONFIG, ALL = small_checkpoints.bf16_tensors(**WIDE)
ARCH = Architecture.from_hf(CONFIG)
# XTuner has no MTP layer and keeps everything in one type.
PLAIN = {n: t.bfloat16() for n, t in ALL.items() if not n.startswith("model.layers.3.")}
COUNT = 4


def merged(tensors):
    """Experts stacked: `cat([stack(gate), stack(up)], dim=1)` is w1w3, `stack(down)` is w2."""
    found = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts."
        for shard in range(16 // COUNT):
            experts = range(shard * COUNT, shard * COUNT + COUNT)
            gate, up, down = (
                torch.stack([tensors[f"{stem}{e}.{part}_proj.weight"] for e in experts])
                for part in ("gate", "up", "down")
            )
            found[f"{stem}{shard}.w1w3"] = torch.cat([gate, up], dim=1)
            found[f"{stem}{shard}.w2"] = down
    return found


def prefixed(tensors):
    return {f"llm.{name}": tensor for name, tensor in tensors.items()}


FORMS = {
    "plain.pth": PLAIN,
    "merged.pth": merged(PLAIN),
    "wrapped.bin": {"state_dict": prefixed(merged(PLAIN))},
    "module.pt": {"module": PLAIN},
    "merged.safetensors": merged(PLAIN),
    "rotary.pth": PLAIN | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("file", FORMS)
def test_every_form_gives_the_tensors_it_was_made_of(file, tmp_path):
    path = tmp_path / file
    if path.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in FORMS[file].items()}, path)
    else:
        torch.save(FORMS[file], path)
    source = pickle.loads(pickle.dumps(XTunerSource(path, ARCH)))
    assert source.arch == replace(ARCH, num_mtp_layers=0)
    assert source.infos().keys() == PLAIN.keys()
    for name, info in source.infos().items():
        assert (info.dtype, info.shape) == (torch.bfloat16, tuple(PLAIN[name].shape)), name
        assert torch.equal(source.read(name), PLAIN[name]), name
    name = "model.layers.2.mlp.experts.6.up_proj.weight"
    assert torch.equal(source.read(name, slice(5, 9)), PLAIN[name][5:9])
    out = torch.empty(4, 192)
    assert torch.equal(source.read(name, slice(5, 9), out=out), PLAIN[name][5:9].float())


def test_a_file_with_mtp_keeps_it(tmp_path):
    torch.save(ALL, tmp_path / "a.pth")
    source = XTunerSource(tmp_path / "a.pth", ARCH)
    assert source.arch.num_mtp_layers == 1
    assert source.infos().keys() == ALL.keys()


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


FIRST = "model.layers.1.mlp.experts."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (merged(PLAIN) | {f"{FIRST}0.up_proj.weight": torch.ones(1)}, "both merged and one by one"),
        (without(merged(PLAIN), f"{FIRST}2.w2"), rf"{FIRST}2.w2 expected .*4, 192, 144.* got \[\]"),
        (without(merged(PLAIN), f"{FIRST}3.w2", f"{FIRST}3.w1w3"), "3 merged modules .* 16 exp"),
        (merged(PLAIN) | {f"{FIRST}0.w1w3": torch.ones(4, 192, 288)}, r"got \[4, 192, 288\]"),
        (merged(PLAIN) | {f"{FIRST}0.w2": torch.ones(4 * 192, 144)}, r"got \[768, 144\]"),
        (PLAIN | {"llm.lm_head.weight": torch.ones(1)}, "are two tensors of one name"),
        (
            PLAIN | {"lm_head.weight": torch.ones(1).int()},
            "unexpected type: lm_head.weight .*int",
        ),
        (PLAIN | {"epoch": 3}, "1 entries are no tensors: epoch"),
        ({"module": PLAIN, "state_dict": PLAIN}, "two state dicts"),
        ([1, 2], "expected a state dict, got list"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        XTunerSource(tmp_path / "a.pth", ARCH)


class Dangerous:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_run(zipped, tmp_path):
    trap = tmp_path / "trap"
    content = {"state_dict": PLAIN, "extra": Dangerous(trap)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pth: "):
        XTunerSource(tmp_path / "a.pth", ARCH)
    assert not trap.exists()


def test_damaged_files_and_folders_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(PLAIN, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"a\.pth: truncated, damaged"):
        XTunerSource(path, ARCH)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pth: truncated, damaged"):
        XTunerSource(path, ARCH)
    with pytest.raises(ValueError, match="expected a file with one whole state dict"):
        XTunerSource(tmp_path, ARCH)
