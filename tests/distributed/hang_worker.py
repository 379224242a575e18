"""Trains under a watchdog; rank 1 stops for good after a step, or gets a signal.

torchrun --nproc-per-node 2 hang_worker.py hang|signal JOB
"""

import os
import signal
import sys
import time

from megatron_dsv3 import cli
from megatron_dsv3.commands import train as command
from megatron_dsv3.train.loop import train

AFTER_STEP = 2


def falls_asleep() -> None:
    time.sleep(1000)


def main() -> None:
    what, job = sys.argv[1:]

    def with_mishap(run, batches):
        def mishap(record, _):
            if os.environ["RANK"] == "1" and record.step == AFTER_STEP:
                if what == "hang":
                    falls_asleep()
                os.kill(os.getpid(), signal.SIGUSR1)

        run = type(run)(**{name: getattr(run, name) for name in run.__slots__} | {
            "on_step": [mishap, *run.on_step]
        })  # fmt: skip
        return train(run, batches)

    command.train = with_mishap
    sys.argv = ["megatron-dsv3", "train", job]
    cli.main()


if __name__ == "__main__":
    main()
