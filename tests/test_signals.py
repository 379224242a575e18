"""Signals are noted, agreed on and given back."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import start, stop
from megatron_dsv3.train.signals import Requeue, stop_request


@pytest.fixture(autouse=True)
def _joined():
    cpu.enable()
    start(Parallel(), torch.device("cpu"))
    yield
    stop()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_noted_and_the_process_goes_on(number):
    before = signal.getsignal(number)
    with stop_request(torch.device("cpu")) as request:
        assert not request.agreed()
        os.kill(os.getpid(), number)
        assert request.agreed()
        assert request.received == number.name
    assert signal.getsignal(number) == before


def test_the_first_signal_is_the_one_that_is_named():
    with stop_request(torch.device("cpu")) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.received == "SIGUSR1"


def test_any_ranks_signal_counts(monkeypatch):
    def all_reduce(flag, op):
        assert op == dist.ReduceOp.MAX
        flag.fill_(1)  # another rank's

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with stop_request(torch.device("cpu")) as request:
        assert request.agreed()
        assert request.received is None


def test_the_exit_code_is_75():
    with pytest.raises(SystemExit) as ended:
        raise Requeue
    assert ended.value.code == 75
