"""Runs under vLLM's own Python: what vLLM makes of the prompts of a reference, as JSON.

python vllm_worker.py HF_DIR REFERENCE.json OUT.json DTYPE MTP(0|1)
"""

import json
import sys

from vllm import LLM, SamplingParams

MLA_ON_CPU = "CPU_MLA"


def main() -> None:
    hf_dir, reference, out, dtype, mtp = sys.argv[1:]
    with open(reference) as file:
        prompts = json.load(file)
    options = {}
    if int(mtp):
        options["speculative_config"] = {
            "method": "mtp",
            "num_speculative_tokens": 1,
            "attention_backend": MLA_ON_CPU,
        }
    engine = LLM(
        model=hf_dir,
        dtype=dtype,
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
    with open(out, "w") as file:
        json.dump({"answers": answers, "counters": counters}, file)


if __name__ == "__main__":
    main()
