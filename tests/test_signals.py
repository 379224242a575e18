"""Signals are noted and given back; that all ranks agree on them is test_step's and survival's."""

import os
import signal

import pytest

from megatron_dsv3.train.signals import Requeue, StopRequest, noted


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_noted_and_the_process_goes_on(number):
    before, request = signal.getsignal(number), StopRequest()
    with noted(request):
        assert request.received is None
        os.kill(os.getpid(), number)
        assert request.received == number.name
        assert not request.agreed
    assert signal.getsignal(number) == before


def test_the_first_signal_is_the_one_that_is_named():
    request = StopRequest()
    with noted(request):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.received == "SIGUSR1"


def test_the_exit_code_is_75():
    with pytest.raises(SystemExit) as ended:
        raise Requeue
    assert ended.value.code == 75
