"""The optimizer's update in host memory, by threads, beside adding as many numbers in place.

    python benchmarks/host_update.py [--millions 500] [--threads 1 2 4 8] [--repeats 5]

Torch's fused AdamW on fp32 masters, gradients and moments, as `optimizer.offload_fraction` lets
Megatron-Core run it: 16 bytes of a parameter are read and 12 written. Adding one tensor to another
in place with as many threads (8 and 4 bytes) shows what the memory gives.
"""

import argparse

import torch
from fp8_blocks import seconds

UPDATE_BYTES, ADD_BYTES = 28, 12
"""Read and written of a parameter, and of a sum."""
TENSORS = 40


def main() -> None:
    """Prints one line for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=500.0, help="of parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    size = int(arguments.millions * 1e6) // TENSORS
    masters = [torch.randn(size) for _ in range(TENSORS)]
    for master in masters:
        master.grad = torch.zeros(size)
    optimizers = [torch.optim.AdamW([master], lr=1e-6, fused=True) for master in masters]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        update = seconds(lambda: [optimizer.step() for optimizer in optimizers], arguments.repeats)
        add = seconds(lambda: [m.grad.add_(m) for m in masters], arguments.repeats)
        updated = size * TENSORS
        rate, limit = updated * UPDATE_BYTES / update / 1e9, updated * ADD_BYTES / add / 1e9
        print(
            f"{threads:4} threads: {updated / update / 1e9:6.2f} e9 parameters/s, {rate:6.1f} GB/s,"
            f" {rate / limit:.2f} of adding ({limit:.1f} GB/s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
