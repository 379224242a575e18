"""Runs under vLLM's own Python: what vLLM makes of the prompts of a reference, as JSON.

python vllm_worker.py HF_DIR REFERENCE.json OUT.json [--dtype float32] [--mtp] [--fp8-in-torch]
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams

MLA_ON_CPU = "CPU_MLA"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("hf_dir", "reference", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--fp8-in-torch", action="store_true")
    arguments = parser.parse_args()
    if arguments.fp8_in_torch:
        import fp8_in_torch

        fp8_in_torch.install()
    prompts = json.loads(arguments.reference.read_text())
    options = {}
    if arguments.mtp:
        options["speculative_config"] = {
            "method": "mtp",
            "num_speculative_tokens": 1,
            "attention_backend": MLA_ON_CPU,
        }
    engine = LLM(
        model=str(arguments.hf_dir),
        dtype=arguments.dtype,
        max_model_len=128,
        enforce_eager=True,
        seed=0,
        attention_backend=MLA_ON_CPU,
        disable_log_stats=False,
        **options,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=len(prompts[0]["tokens"]), ignore_eos=True, prompt_logprobs=1
    )
    outputs = engine.generate([{"prompt_token_ids": p["prompt"]} for p in prompts], sampling)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                chosen[token].logprob
                for chosen, token in zip(
                    output.prompt_logprobs[1:], prompt["prompt"][1:], strict=True
                )
            ],
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    counters = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
        for metric in engine.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }
    arguments.out.write_text(json.dumps({"answers": answers, "counters": counters}))


if __name__ == "__main__":
    main()
