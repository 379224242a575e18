"""Cards and networks as data: rates on paper and reached, memory, links, and where each is from."""

import functools
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from megatron_dsv3.config.devices import PEAK_BF16_TFLOPS
from megatron_dsv3.config.section import Section, problem_lines
from megatron_dsv3.config.yaml_file import read_yaml
from megatron_dsv3.plan.records import Card, Cluster

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Sources = Annotated[tuple[str, ...], Field(strict=False)]
YAML = (".yaml", ".yml")


class NetworkSettings(Section):
    """What joins the nodes."""

    gb_per_s: Rate
    """On paper, of one GPU in one direction, in 10^9 bytes a second."""
    reached: Share
    """Share of it that large messages get."""
    latency_us: Rate
    """Of a message, in microseconds."""
    sources: Sources
    """Where the numbers are from."""


class CardSettings(Section):
    """One kind of GPU and the machine around it."""

    device: str | None = None
    """Its name in config/devices.py, which has the bf16 rate on paper; null: own `bf16_tflops`."""
    bf16_tflops: Rate | None = None
    """On paper, dense, in 10^12 FLOPs a second, for a card that config/devices.py does not have."""
    bf16_reached_tflops: Rate
    """Of large square products."""
    fp8_tflops: Rate | None = None
    """On paper, dense; null: no FP8."""
    fp8_reached_tflops: Rate | None = None
    """Of large square products."""
    memory_gib: Rate
    """What CUDA gives to a process, in GiB."""
    hbm_gb_per_s: Rate
    """Memory bandwidth on paper, in 10^9 bytes a second."""
    hbm_reached: Share
    """Share of it that long kernels get."""
    nvlink_gb_per_s: Rate
    """Between GPUs of a node, on paper, one direction, in 10^9 bytes a second."""
    nvlink_reached: Share
    """Share of it that large messages get."""
    nvlink_latency_us: Rate = 6.0
    """Of a message, in microseconds."""
    host_gb_per_s: Rate
    """Between a GPU and host memory, reached, one direction, in 10^9 bytes a second."""
    network: str
    """Name of the network between nodes."""
    measured: bool = False
    """Whether the kernel table was measured on this card; else its efficiencies are transferred."""
    sources: Sources
    """Where the numbers are from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.device is not None and self.device not in PEAK_BF16_TFLOPS:
            known = ", ".join(PEAK_BF16_TFLOPS)
            raise ValueError(
                f"device {self.device!r} is not in config/devices.py, which knows {known}; leave "
                "device out and give bf16_tflops"
            )
        if (self.device is None) == (self.bf16_tflops is None):
            given = "neither" if self.device is None else "both"
            raise ValueError(f"give one of device and bf16_tflops, got {given}")
        if (self.fp8_tflops is None) != (self.fp8_reached_tflops is None):
            raise ValueError("give both of fp8_tflops and fp8_reached_tflops, or neither")
        pairs = (
            ("bf16_reached_tflops", self.bf16_reached_tflops, self.paper_bf16_tflops),
            ("fp8_reached_tflops", self.fp8_reached_tflops or 0.0, self.fp8_tflops or 0.0),
        )
        if wrong := [f"{n} {r:g} exceeds the paper's {p:g}" for n, r, p in pairs if r > p]:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def paper_bf16_tflops(self) -> float:
        """The maker's dense rate, against which MFU is taken."""
        if self.bf16_tflops is not None:
            return self.bf16_tflops
        assert self.device is not None
        return PEAK_BF16_TFLOPS[self.device]


def cluster_of(
    gpu: str,
    *,
    network: str | None = None,
    gpus_per_node: int = 8,
    host_memory_gib: float = 2000.0,
) -> Cluster:
    """Machines of one kind of card.

    Args:
        gpu: Name of a card, or a user's YAML file.
        network: Name or file of a network; None: the card's usual one.
        gpus_per_node: GPUs that NVLink joins.
        host_memory_gib: Of a node.

    Raises:
        ValueError: As `load_card`.
    """
    card = load_card(gpu)
    between = load_network(network or card.network)
    return Cluster(
        card=Card(
            name=gpu,
            memory_gib=card.memory_gib,
            bf16_tflops=card.paper_bf16_tflops,
            bf16_tflops_reached=card.bf16_reached_tflops,
            fp8_tflops=card.fp8_tflops,
            fp8_tflops_reached=card.fp8_reached_tflops,
            hbm_gb_s=card.hbm_gb_per_s * card.hbm_reached,
            nvlink_gb_s=card.nvlink_gb_per_s * card.nvlink_reached,
            network_gb_s=between.gb_per_s * between.reached,
            host_gb_s=card.host_gb_per_s,
            nvlink_latency_s=card.nvlink_latency_us * 1e-6,
            network_latency_s=between.latency_us * 1e-6,
            measured=card.measured,
            sources={gpu: "; ".join(card.sources), "network": "; ".join(between.sources)},
        ),
        gpus_per_node=gpus_per_node,
        host_memory_gib=host_memory_gib,
    )


def load_card(name: str) -> CardSettings:
    """A card by its name, or from a user's YAML file.

    A file holds the settings of one card; with `based_on: NAME` it needs only what differs.

    Raises:
        ValueError: No such card or file, or settings that are missing, unknown or out of range.
    """
    if not name.endswith(YAML):
        return _named("cards", name, CardSettings)
    content = read_yaml(Path(name))
    base = content.pop("based_on", None)
    if base is not None:
        content = _changed(_raw("cards", base, f"{name}: based_on: "), content)
    return _validated(content, CardSettings, name)


def load_network(name: str) -> NetworkSettings:
    """A network by its name, or from a user's YAML file.

    Raises:
        ValueError: As `load_card`.
    """
    if not name.endswith(YAML):
        return _named("networks", name, NetworkSettings)
    return _validated(read_yaml(Path(name)), NetworkSettings, name)


def names(kind: str) -> list[str]:
    """Of all `cards` or `networks` that come with the package."""
    return list(_shipped()[kind])


def _changed(base: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, "measured": False, **content}
    # The two ways to say the rate on paper exclude each other: the file's replaces the base's.
    if "bf16_tflops" in content and "device" not in content:
        merged.pop("device", None)
    return merged


def _named[T: Section](kind: str, name: str, section: type[T]) -> T:
    return _validated(_raw(kind, name, ""), section, name)


def _raw(kind: str, name: Any, where: str) -> dict[str, Any]:
    known = _shipped()[kind]
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where}no {kind.removesuffix('s')} {name!r}; known are {', '.join(known)}, or give a "
            f"file ({', '.join(YAML)})"
        )
    content: dict[str, Any] = known[name]
    return content


def _validated[T: Section](content: Mapping[str, Any], section: type[T], where: str) -> T:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        lines = [
            f"{where}: {name}: {text}" if name else f"{where}: {text}"
            for name, text in problem_lines(error, section)
        ]
        raise ValueError("\n".join(lines)) from None


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    with as_file(files(__package__) / "cards.yaml") as path:
        return read_yaml(path)
