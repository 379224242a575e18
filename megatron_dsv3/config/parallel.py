"""How the model is spread over processes: a size for each kind of parallelism, and its rules."""

import math
from typing import Annotated

from pydantic import Field

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.section import Section, Unit

Size = Annotated[int, Field(ge=1), Unit("ranks")]


class Parallel(Section):
    """The grid of processes: world = tp * pp * cp * dp, and for experts etp * ep * pp * edp."""

    tp_size: Size = 1
    """Tensor parallelism: ranks that share each layer outside the experts, by heads and widths.
    Two or more also share the sequence between these layers."""
    pp_size: Annotated[int, Field(ge=1), Unit("stages")] = 1
    """Pipeline parallelism: stages that hold the layers one after another."""
    vpp_size: Annotated[int, Field(ge=1), Unit("chunks")] = 1
    """Model chunks per pipeline stage. More make the pipeline's bubble smaller and its traffic
    larger; needs pp_size > 1."""
    ep_size: Size = 1
    """Expert parallelism: ranks among which the routed experts of a layer are dealt out."""
    etp_size: Size = 1
    """Tensor parallelism inside each routed expert."""
    cp_size: Size = 1
    """Context parallelism: ranks that share each sequence outside and inside attention."""
    stages: str | None = None
    """Which layers live on which pipeline stage, as in `Et*7|t*8|...|t*7mL` (config/placement.py
    says how to read it); null: balanced by cost."""
    num_optimizer_instances: Annotated[int, Field(ge=1), Unit("groups")] = 1
    """Groups of data-parallel ranks that each hold all optimizer states between them. More need
    more memory and send less between groups. Divides dp * cp and edp."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between tensor-parallel layers are cut along the sequence."""
        return self.tp_size > 1

    @property
    def num_chunks(self) -> int:
        """Pieces that the model is cut into along its depth."""
        return self.pp_size * self.vpp_size

    def dp_size(self, world_size: int) -> int:
        """Copies of the model outside the experts.

        Raises:
            ValueError: The sizes do not divide the world.
        """
        return self._quotient(world_size, "dp", ("tp_size", "pp_size", "cp_size"))

    def edp_size(self, world_size: int) -> int:
        """Copies of each expert.

        Raises:
            ValueError: The sizes do not divide the world.
        """
        return self._quotient(world_size, "edp", ("etp_size", "ep_size", "pp_size"))

    def problems(self, arch: Architecture, world_size: int) -> list[str]:
        """Why this model cannot be spread so over this many processes; empty where it can."""
        problems = []
        for size in (self.dp_size, self.edp_size):
            try:
                size(world_size)
            except ValueError as error:
                problems.append(str(error))
        problems += self._instance_problems(world_size)
        return problems + self._width_problems(arch) + self.depth_problems(arch)

    def depth_problems(self, arch: Architecture) -> list[str]:
        """Why the layers do not go on these stages."""
        problems = []
        if self.vpp_size > 1 and self.pp_size == 1:
            problems.append(f"vpp_size({self.vpp_size}) needs pp_size > 1; set vpp_size to 1")
        if self.stages is None and self.num_chunks > arch.num_layers + 1:
            problems.append(
                f"pp_size({self.pp_size}) * vpp_size({self.vpp_size}) = {self.num_chunks} chunks, "
                f"but the model has {arch.num_layers} layers and the loss; use fewer, or place "
                f"empty chunks with stages"
            )
        return problems

    def _instance_problems(self, world_size: int) -> list[str]:
        instances = self.num_optimizer_instances
        try:
            dp_size, edp_size = self.dp_size(world_size), self.edp_size(world_size)
        except ValueError:
            return []  # which is a problem of its own
        copies = dp_size * self.cp_size
        if copies % instances == 0 and edp_size % instances == 0:
            return []
        # Of the weights outside the experts there is a copy on every context-parallel rank, too.
        common = math.gcd(copies, edp_size)
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        return [
            f"num_optimizer_instances {instances} must divide both dp({dp_size}) * "
            f"cp({self.cp_size}) = {copies} and edp({edp_size}); use one of {fitting}"
        ]

    def _quotient(self, world_size: int, copies: str, names: tuple[str, ...]) -> int:
        sizes: dict[str, int] = {name: getattr(self, name) for name in names}
        product = math.prod(sizes.values())
        if world_size % product:
            factors = " * ".join(f"{name}({size})" for name, size in sizes.items())
            raise ValueError(
                f"world size {world_size} is not {factors} * {copies}; start a multiple of "
                f"{product} processes or change a size"
            )
        return world_size // product

    def _width_problems(self, arch: Architecture) -> list[str]:
        shared = arch.moe_ffn_hidden_size * arch.num_shared_experts
        # The latents and the rotary key are whole on every tensor-parallel rank: no rule for them.
        rules = (
            ("num_attention_heads", arch.num_heads, "tp_size"),
            ("intermediate_size", arch.ffn_hidden_size, "tp_size"),
            ("moe_intermediate_size * n_shared_experts", shared, "tp_size"),
            ("vocab_size", arch.vocab_size, "tp_size"),
            ("n_routed_experts", arch.num_experts, "ep_size"),
            ("moe_intermediate_size", arch.moe_ffn_hidden_size, "etp_size"),
        )
        return [
            f"{name} {width} is not divisible by {size}({getattr(self, size)}); "
            + _way_out(name, width, getattr(self, size))
            for name, width, size in rules
            if width % getattr(self, size)
        ]


def _way_out(name: str, width: int, size: int) -> str:
    largest = max(n for n in range(1, size) if width % n == 0)
    smaller = f"the next smaller size that fits is {largest}"
    if name != "vocab_size":
        return smaller
    padded = math.ceil(width / size) * size
    return f"{smaller}, or pad embed_tokens and lm_head to {padded} rows and set vocab_size to that"
