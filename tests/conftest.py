"""What every test runs under: one thread, no network, this checkout; `gpu` tests where they can.

Set before the first import of torch or transformers, which read these once. A value from outside
wins; child processes (torchrun) inherit them.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    # Two pytest processes on two cores; torch would start a thread per core in each.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Compiling costs more than the tiny models that it would speed up: start-up halves without.
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    # Transformer Engine would multiply fp32 in TF32, and cuBLAS with it.
    "NVIDIA_TF32_OVERRIDE": "0",
    # Megatron-Core demands it for TP with sequence parallelism on GPUs before Blackwell.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
)


@functools.cache
def missing_for_gpu() -> str | None:
    """Why `gpu` tests can't run here; None where they can."""
    import torch  # here, as most runs have no gpu test and need no torch for that

    if not torch.cuda.is_available():
        return "needs a CUDA device, torch.cuda.is_available() is False"
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine: pip install --no-build-isolation -e .[gpu]"
    return None


@pytest.fixture(scope="module")
def groups(request):
    """This process alone, on a GPU in modules marked `gpu`."""
    from megatron_dsv3.config.parallel import Parallel
    from megatron_dsv3.model import cpu
    from megatron_dsv3.model.groups import device_of, start, stop

    on_gpu = request.node.get_closest_marker("gpu") is not None
    if not on_gpu:
        cpu.enable()
    yield start(Parallel(), device_of("cuda" if on_gpu else "cpu"))
    stop()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: exit code, standard output, standard error."""
    from megatron_dsv3 import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megatron-dsv3", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := missing_for_gpu()):
        pytest.skip(reason)
    # Set by the first backward pass of a process, to one shape inside a training step and to
    # another outside; a second of the other kind fails then.
    if (moe_utils := sys.modules.get("megatron.core.transformer.moe.moe_utils")) is not None:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if item.get_closest_marker("gpu"):
        # Megatron-Core fixes a process's first choice of attention in these.
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name, None)
