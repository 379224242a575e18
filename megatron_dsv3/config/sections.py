"""The sections of a job: every setting with its unit, default and effect.

The docstring under a field is its description, in error messages and in the documentation.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_dsv3.config.section import Section, Unit


def _expand_home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


# Not strict: a path is text in YAML, and a tuple a list.
UserPath = Annotated[Path, Field(strict=False), AfterValidator(_expand_home)]
UserPaths = Annotated[tuple[UserPath, ...], Field(strict=False)]
TemplateName = Literal[
    "deepseek_v3", "deepseek_v3_0324", "deepseek_r1", "deepseek_v3_1", "tokenizer"
]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Share that a running mean keeps at each step."""
Steps = Annotated[Count, Unit("steps")]
"""Of the optimizer."""
Rows = Annotated[Count, Unit("rows")]
Tokens = Annotated[Count, Unit("tokens")]
Layers = Annotated[int, Field(ge=0), Unit("layers")]
Seconds = Annotated[float, Field(gt=0), Unit("s")]


RecomputeModule = Literal[
    "core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"
]
OffloadModule = Literal[
    "attn_norm", "attn_proj", "core_attn", "expert_fc1", "mlp_norm", "moe_act", "qkv_linear"
]


class ModelSection(Section):
    """The model to start from."""

    hf_dir: UserPath
    """Hugging Face directory: config.json, safetensors (BF16, or DeepSeek's FP8), tokenizer."""


class DataSection(Section):
    """What to learn from."""

    store: UserPath | None = None
    """Directory that `megatron-dsv3 prepare` wrote; or give `paths`."""
    paths: UserPaths = ()
    """Chat files, directories of them or patterns, as `megatron-dsv3 prepare` takes them; they are
    prepared into `cache_dir` when training starts."""
    cache_dir: UserPath | None = None
    """Where stores of `paths` are kept, for the next run too; all nodes must see it. null:
    <log.dir>/data."""
    template: TemplateName | None = None
    """How messages become tokens; take the one that the model was trained with. tokenizer: the chat
    template in the model's own tokenizer. null: that of the store; for `paths`, deepseek_v3."""
    seq_length: Tokens = 32768
    """Tokens of a row. Memory for activations grows with it."""
    packed: bool = True
    """Conversations share a row, none is split, and none sees another. false: one a row, and the
    rest is padding."""
    document_multiple: Tokens | None = None
    """In a packed row each conversation takes up a multiple of this. null: 2 * cp_size, or 1
    without context parallelism. Give a larger one to be able to go on later with a larger
    cp_size."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What becomes of a conversation of more than `seq_length` tokens; both of the first two are
    counted and reported."""
    history_reasoning: Literal["strip", "keep", "expand"] | None = None
    """Whether reasoning of earlier turns stays in the context; inference strips it. expand: every
    turn becomes a sample of its own, with what it will see when served. null: as in the store; for
    `paths`, strip."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a row of `paths` that cannot be read; skipped ones are counted."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.store is None) == (not self.paths):
            given = "neither" if self.store is None else "both"
            raise ValueError(
                f"give one of store (what `megatron-dsv3 prepare` wrote) and paths (chat files), "
                f"got {given}"
            )
        return self


class OptimizerSection(Section):
    """AdamW, its states spread over the data-parallel ranks."""

    lr: Annotated[float, Field(gt=0)] = 2e-7
    """Learning rate after warm-up, the largest of the run."""
    beta1: Decay = 0.9
    """Decay of the running mean of gradients, per step."""
    beta2: Decay = 0.999
    """Decay of the running mean of squared gradients, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: NotNegative = 0.0
    """Share of a weight that a step takes away, times the learning rate. Norms, the 1-D weights,
    are spared."""
    clip_grad: NotNegative = 1.0
    """Largest norm of the whole gradient, which is scaled down to it; 0: no limit."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Of the two running means. bf16 halves their 8 bytes a parameter (spread over the
    data-parallel ranks) and rounds them to 8 bits; needs a GPU."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Of the sum over micro-batches and ranks. bf16 halves 4 bytes a parameter of every rank and
    loses what is 256 times smaller than the sum; with fp32 moments the optimizer copies its share
    of them to fp32 first, so on few data-parallel ranks it saves nothing."""
    offload_fraction: Fraction = 0.0
    """Share of masters and moments that live, and are updated, in host memory: 12 bytes a parameter
    off the GPU for about 10 times the time of the update; needs a GPU. Changes numbers by rounding
    only: host and GPU add in other orders."""
    overlap_grad_reduce: bool = False
    """Reduce gradients among data-parallel ranks while backward still runs. Changes no numbers."""
    overlap_param_gather: bool = False
    """Gather updated weights while forward already runs. Changes no numbers; needs
    overlap_grad_reduce."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather needs overlap_grad_reduce; set both to true")
        if self.moments == "bf16" and self.offload_fraction > 0:
            raise ValueError(
                "moments=bf16 and offload_fraction exclude each other: the optimizer that is split "
                "between GPU and host keeps fp32 moments; use one of them"
            )
        return self


class ScheduleSection(Section):
    """Learning rate over the run: linear warm-up, then decay to `min_lr`."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up; constant stays at the optimizer's lr."""
    warmup_fraction: Fraction | None = 0.03
    """Share of all steps spent on warm-up; null where warmup_steps is given."""
    warmup_steps: Annotated[int, Field(ge=0), Unit("steps")] | None = None
    """Optimizer steps of warm-up, instead of warmup_fraction."""
    min_lr: NotNegative = 0.0
    """Where the decay ends: after the last step, which is itself taken a little above it. At 0 a
    step there would change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_fraction(cls, values: Any) -> Any:
        # Only a fraction that the user wrote can contradict the steps.
        if isinstance(values, dict) and values.get("warmup_steps") is not None:
            return {"warmup_fraction": None, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.warmup_fraction is None) == (self.warmup_steps is None):
            raise ValueError(
                f"give one of warmup_fraction and warmup_steps, got {self.warmup_fraction} and "
                f"{self.warmup_steps}"
            )
        return self


class TrainSection(Section):
    """How much, how long, on what."""

    global_batch_size: Rows
    """Rows per optimizer step, over all processes; a row holds as many conversations as fit it, or
    one where data.packed is false."""
    micro_batch_size: Rows = 1
    """Rows per forward and backward of one data-parallel rank. More fill the GPU better and take
    memory for activations in proportion."""
    num_epochs: Annotated[Count, Unit("epochs")] = 1
    """Passes over the data; training ends after them."""
    num_steps: Steps | None = None
    """Optimizer steps after which training ends, where the epochs are not over before; null: no
    limit."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """For the packing and the order of rows, and for whatever else is random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on GPUs where there are any."""
    verify_first: bool = False
    """Before the first step compare the model with transformers' layers, one at a time from the
    files, and stop where they differ. Takes rank 0 one layer of memory in fp32 (46 GB for the
    671B) and the time to read the files once."""
    hang_timeout_s: Seconds | None = 1800.0
    """Seconds without a finished step after which a process writes down where it stands
    (<log.dir>/stacks) and ends; null: never. Longer than the longest step, validation and save."""


class ValidationSection(Section):
    """Loss on conversations that are not trained on."""

    store: UserPath | None = None
    """As data.store."""
    paths: UserPaths = ()
    """As data.paths, and made into samples and rows as data says; neither: no validation."""
    every_steps: Steps = 100
    """Optimizer steps between two validations; there is one after the last step too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.store is not None and self.paths:
            raise ValueError("give one of store and paths, got both")
        return self


class SpikesSection(Section):
    """What happens when a step's loss is not finite, or far above those before it."""

    action: Literal["stop", "skip"] = "stop"
    """stop: end the run before the update. skip: leave the update out, count it and go on."""
    factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above this many times the median of the last `window` steps is a spike; null: only one
    that is not finite."""
    window: Annotated[int, Field(ge=2), Unit("steps")] = 32
    """Steps that the median is taken of; until so many are done nothing is a spike."""
    max_skipped: Steps = 10
    """Skipped steps in a row after which the run ends anyway."""


class PrecisionSection(Section):
    """Number formats."""

    compute: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations. The optimizer keeps fp32 copies of bf16 weights; router, expert
    bias and loss are fp32 either way."""
    fp8: Literal["off", "blockwise", "tensorwise", "mxfp8"] = "off"
    """Format of the layers' matrix products, forward and backward; router, norms, attention's core,
    embedding and head stay as `compute` says. blockwise: e4m3 with a scale for 1x128 values of
    activations and 128x128 of weights, as DeepSeek-V3 was trained (paper section 3.3.2); Hopper and
    later. tensorwise: a scale a tensor, e5m2 gradients. mxfp8: a scale for 32 values; Blackwell."""
    fp8_params: bool = False
    """Keep the layers' weights in FP8 alone beside the optimizer's fp32 copies: half the traffic of
    their gathering, and no second copy of them for the products."""
    bf16_first_layers: Layers = 0
    """Decoder layers at the beginning that stay out of FP8."""
    bf16_last_layers: Layers = 0
    """Decoder layers at the end that stay out of FP8."""

    @property
    def row_multiple(self) -> int:
        """Tokens that a rank's part of a row must be a multiple of."""
        return {"off": 1, "blockwise": 16, "tensorwise": 16, "mxfp8": 32}[self.fp8]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fp8 != "off" and self.compute != "bf16":
            raise ValueError(f"fp8 {self.fp8} needs compute bf16, got {self.compute}")
        extras = ("fp8_params", "bf16_first_layers", "bf16_last_layers")
        given = [name for name in extras if getattr(self, name)]
        if given and self.fp8 == "off":
            raise ValueError(f"{', '.join(given)} without fp8; choose one, such as fp8: blockwise")
        return self


class MemorySection(Section):
    """What is computed twice, or kept elsewhere, to save memory for activations."""

    recompute: Literal["none", "selective", "full"] = "none"
    """full: keep only each layer's input and compute the layer again in backward, a third more
    compute. selective: the same for `recompute_modules` alone. Changes no numbers."""
    recompute_modules: Annotated[tuple[RecomputeModule, ...], Field(strict=False)] = (
        "mla_up_proj",
        "layernorm",
        "moe_act",
    )
    """What `recompute: selective` computes again: mla_up_proj, layernorm and moe_act (cheap),
    core_attn, mlp, shared_experts, moe (the whole expert layer, its communication too)."""
    offload_activations: Annotated[tuple[OffloadModule, ...], Field(strict=False)] = ()
    """Modules whose saved inputs wait in host memory for backward: attn_norm, qkv_linear,
    core_attn, attn_proj, mlp_norm, expert_fc1, moe_act. Costs traffic to the host; needs a GPU.
    Changes no numbers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        offloaded, recomputed = set(self.offload_activations), set(self.recompute_modules)
        if "attn_proj" in offloaded and "core_attn" not in offloaded:
            raise ValueError(
                "offload_activations: attn_proj needs core_attn, whose output it takes; add it"
            )
        if offloaded and self.recompute == "full":
            raise ValueError(
                "offload_activations has nothing to offload where recompute is full; use selective"
            )
        inside = offloaded & {"expert_fc1", "moe_act"}
        if inside and self.recompute == "selective" and "moe" in recomputed:
            raise ValueError(
                f"offload_activations: {', '.join(sorted(inside))} would be computed again with "
                "recompute_modules: moe; leave one out"
            )
        return self


class MtpSection(Section):
    """Multi-token prediction."""

    mode: Literal["train", "freeze", "off"] = "train"
    """freeze: the MTP layers' weights stay as loaded, their loss still trains the rest; off: they
    are not computed, and their weights are written as loaded."""
    loss_weight: NotNegative = 0.1
    """Weight of the MTP layers' loss, averaged over them, beside the main loss (paper section
    2.2)."""


class ExpertsSection(Section):
    """Balance of the routed experts."""

    aux_loss_coefficient: NotNegative = 1e-4
    """Weight of the sequence-wise balance loss (alpha of paper eq. 17). Not read from config.json;
    the default is what DeepSeek-V3 was trained with, 0 switches it off."""
    bias: Literal["freeze", "update", "decay"] = "freeze"
    """freeze: the experts' biases stay as loaded, as fine-tuning wants it. update: each moves by
    `bias_update_rate` per step towards balance. decay: the same, at a rate that falls with the
    learning rate."""
    bias_update_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Change of a bias per step (gamma of paper section 2.1.2), where `bias` is not freeze."""
    z_loss_coefficient: NotNegative = 0.0
    """Weight of the squared log-sum of the router's logits (arXiv:2202.08906), which keeps them
    small."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts' ranks: alltoall sends each token where it goes; allgather
    sends all to all, which pays only for few ranks. Changes no numbers."""
    overlap_all_to_all: bool = False
    """Send the tokens of one micro-batch while another one is computed (Megatron-Core's combined
    1F1B), in all layers but MTP's. Takes the activations of one more micro-batch; needs ep_size > 1
    and, with pp_size > 1, vpp_size > 1. Changes no numbers."""


class OutputSection(Section):
    """The Hugging Face directory written at the end."""

    dir: UserPath
    """Where to; must not hold anything yet."""
    dtype: Literal["bf16", "fp8", "fp32"] = "bf16"
    """Of the weights; the expert bias is fp32 in each. fp8: in blocks as DeepSeek's own files,
    rounded anew by rank 0, a minute for 45 GB of BF16; `tools/checkpoint/convert.py` does the same
    in many processes, and keeps the bytes of blocks that were not trained."""
    shard_size_gb: Annotated[float, Field(gt=0), Unit("GB")] = 5.0
    """Largest size of a safetensors file, in GB of 10^9 bytes; a larger tensor has its own."""


class CheckpointSection(Section):
    """What a run goes on from after it was stopped, by whatever."""

    dir: UserPath | None = None
    """Folder of the checkpoints, seen by all nodes; null: beside the output, as
    <output.dir>-checkpoints. A run starts from the newest whole checkpoint that it finds there."""
    every_steps: Steps | None = 100
    """Optimizer steps between two checkpoints; there is one after the last step too. null: none."""
    keep_last: Annotated[Count, Unit("checkpoints")] = 2
    """Full checkpoints that stay; older ones are dropped."""
    keep_weights_every: Steps | None = None
    """Of a dropped checkpoint whose step is a multiple of this, the weights stay; null: of none."""
    asynchronous: bool = True
    """Write while training goes on: it stands still for a copy to host memory alone. Takes host
    memory for that copy."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """What follows a save that failed (full disk, vanished mount): continue says so and goes on;
    either keeps the older checkpoints."""
    verify_on_resume: Literal["hashes", "sizes"] = "hashes"
    """How a checkpoint is checked before a run goes on from it: hashes reads all its files, each
    process a share; sizes reads none."""
    export_hf_every_steps: Steps | None = None
    """Optimizer steps between two Hugging Face directories, <output.dir>-step<n>, besides the one
    at the end; null: none."""


class LogSection(Section):
    """What is seen of a run."""

    dir: UserPath | None = None
    """Where TensorBoard's files go; null: beside the output, as <output.dir>-log."""
    every_steps: Steps = 1
    """Optimizer steps between two lines."""
    expert_load_every_steps: Steps = 50
    """Optimizer steps between two records of every expert's load (heat map)."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well; needs `pip install wandb`."""
    mlflow_experiment: str | None = None
    """MLflow experiment to log to as well; needs `pip install mlflow`."""
