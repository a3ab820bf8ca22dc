"""Run a file in llama.cpp, in a process of its own, which an assertion of llama.cpp ends: `python gguf_run.py FILE IDS`.

Printed is one JSON list of [token, {token: log-probability}] of the greedy continuation. Bytes that are half a character
are not taken: the server leaves those out of its list.
"""

import json
import sys

import xllamacpp

NUM_NEW, NUM_LIKELIEST = 8, 20


def main() -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, 1
    parameters.cpuparams.n_threads = 2
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    ids, halves = json.loads(sys.argv[2]), json.loads(sys.argv[3])
    asked = {
        "prompt": ids, "n_predict": NUM_NEW, "temperature": 0, "n_probs": NUM_LIKELIEST, "ignore_eos": True,
        "logit_bias": {str(token): -100 for token in halves},
    }  # fmt: skip
    steps = xllamacpp.Server(parameters).handle_completions(asked)["choices"][0]["logprobs"]["content"]
    print(json.dumps([[s["id"], {entry["id"]: entry["logprob"] for entry in s["top_logprobs"]}] for s in steps]))


if __name__ == "__main__":
    main()
