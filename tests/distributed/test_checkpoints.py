"""Four processes: exact in the same layout, equal in others, both ways with stock code.

Weights, fp32 masters and moments are compared bit for bit; in another layout sums have another
order, so losses are compared. Megatron-Core's own save and load are the outside reference.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_reference
import pytest
from distributed.checkpoint_worker import OTHERS, SAME, SAVED_AFTER

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.sources import MegatronSource

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("checkpoints")
    hf_dir = hf_reference.build(num_hidden_layers=3, num_mtp_layers=1).save(out / "hf")
    worker = Path(__file__).with_name("checkpoint_worker.py")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=4", str(worker), str(hf_dir), str(out)]
    tests = str(worker.parents[1])
    environment = os.environ | {"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((out / "results.json").read_text()) | {"directory": out}


@pytest.mark.parametrize("layout", SAME)
def test_a_continued_run_is_the_same_run_bit_for_bit(results, layout):
    result = results[f"same {layout}"]
    assert result["again"] == result["losses"][SAVED_AFTER:]
    assert result["unequal"] == []
    assert "iter_0000003" in result["told"][0]


@pytest.mark.parametrize("layout", ["tp2_ep2", "pp2_vpp2_ep2"])
def test_the_converter_reads_masters_that_ranks_share(results, layout):
    """In fp32 they are the weights, which are whole in the files."""
    directory = results["directory"] / layout / "iter_0000003"
    arch = Architecture.from_hf(results["directory"] / "hf")
    masters = MegatronSource.open(directory, arch, source="master")
    weights = MegatronSource.open(directory, arch, source="weights")
    names = list(masters.infos())
    assert len(names) > 100
    assert [name for name in names if not masters.read(name).equal(weights.read(name))] == []


@pytest.mark.parametrize("layout", OTHERS)
def test_another_layout_goes_on_with_the_same_losses(results, layout):
    result = results[f"other {layout}"]
    expected = results["same tp2_ep2"]["losses"][SAVED_AFTER:]
    assert result["again"] == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert not result["exact_rng"]


@pytest.mark.parametrize("who", ["ours loads stock", "stock loads ours"])
def test_stock_megatron_core_and_this_program_load_each_others(results, who):
    expected = {
        "ours loads stock": results["stock saves"],
        "stock loads ours": results["same tp2_ep2"]["losses"][SAVED_AFTER:],
    }
    assert results[who] == pytest.approx(expected[who], rel=0, abs=TOLERANCE)
