"""Communication by latency and bandwidth of each link, for Megatron-Core's order of ranks.

Ranks of a stage follow each other as tp, cp, dp outside the experts and as etp, ep, edp inside;
nodes take them as they come. So tensor parallelism has the nearest ranks, the pipeline the
farthest.
"""

from dataclasses import dataclass

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.plan.records import Cluster

EXCHANGE_REACHED = 0.7
"""Share of the network's large-message rate that an all-to-all of many small ones gets. Assumed."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate: how many, and how far each is from the next."""

    size: int
    stride: int

    def on_node(self, gpus_per_node: int) -> int:
        """Of its ranks, those on one node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


@dataclass(frozen=True, slots=True)
class Links:
    """The groups of a layout on a cluster."""

    cluster: Cluster
    parallel: Parallel
    world_size: int

    @property
    def tp(self) -> Group:
        """Ranks that share each layer."""
        return Group(self.parallel.tp_size, 1)

    @property
    def cp(self) -> Group:
        """Ranks that share each sequence."""
        return Group(self.parallel.cp_size, self.parallel.tp_size)

    @property
    def etp(self) -> Group:
        """Ranks that share each expert."""
        return Group(self.parallel.etp_size, 1)

    @property
    def ep(self) -> Group:
        """Ranks among which experts are dealt out."""
        return Group(self.parallel.ep_size, self.parallel.etp_size)

    @property
    def dp(self) -> Group:
        """Copies of weights outside the experts, of one optimizer instance."""
        parallel = self.parallel
        copies = parallel.dp_size(self.world_size) * parallel.cp_size
        return Group(copies // parallel.num_optimizer_instances, parallel.tp_size)

    @property
    def edp(self) -> Group:
        """Copies of experts, of one optimizer instance."""
        parallel = self.parallel
        copies = parallel.edp_size(self.world_size)
        stride = parallel.etp_size * parallel.ep_size
        return Group(copies // parallel.num_optimizer_instances, stride)

    def gather(self, group: Group, num_bytes: float) -> float:
        """Seconds to gather or reduce-scatter `num_bytes`, the size when whole, in a ring."""
        if group.size == 1:
            return 0.0
        card, on_node = self.cluster.card, group.on_node(self.cluster.gpus_per_node)
        share = num_bytes * (group.size - 1) / group.size
        if on_node == group.size:
            return share / (card.nvlink_gb_s * 1e9) + group.size * card.nvlink_latency_s
        # A ring leaves a node once, through the adapters of all of its GPUs that are in the group.
        bandwidth = min(card.nvlink_gb_s, card.network_gb_s * on_node) * 1e9
        return share / bandwidth + group.size * card.network_latency_s

    def exchange(self, group: Group, num_bytes: float) -> float:
        """Seconds of an all-to-all in which each rank sends `num_bytes`, evenly."""
        if group.size == 1:
            return 0.0
        card, on_node = self.cluster.card, group.on_node(self.cluster.gpus_per_node)
        near = num_bytes * (on_node - 1) / group.size / (card.nvlink_gb_s * 1e9)
        far = num_bytes * (group.size - on_node) / group.size
        far /= EXCHANGE_REACHED * card.network_gb_s * 1e9
        latency = card.nvlink_latency_s if on_node == group.size else card.network_latency_s
        # Both kinds of links work at once.
        return max(near, far) + 2 * latency

    def ring_step(self, group: Group, num_bytes: float) -> float:
        """Seconds to pass `num_bytes` on to the next rank."""
        if group.size == 1:
            return 0.0
        card = self.cluster.card
        if group.on_node(self.cluster.gpus_per_node) == group.size:
            return num_bytes / (card.nvlink_gb_s * 1e9) + card.nvlink_latency_s
        return num_bytes / (card.network_gb_s * 1e9) + card.network_latency_s

    def hop(self, num_bytes: float) -> float:
        """Seconds to send `num_bytes` to the next pipeline stage."""
        parallel = self.parallel
        stride = self.world_size // parallel.pp_size
        return self.ring_step(Group(parallel.pp_size, stride), num_bytes)
