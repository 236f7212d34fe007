"""Greedy answers by vLLM's CPU backend, with a draft or without one, and what became of the draft
in every cycle.

    python vllm_served.py MODEL_DIR PROMPTS.jsonl --new-tokens 64 --speculative '{"method": ...}'

PROMPTS.jsonl has {"tokens": [...]} a line; --speculative is a `speculative_config` of vLLM. Prints
one JSON line per prompt: {"tokens", "drafted", "accepted"}, the last two by cycle, as vLLM counts
them: what it accepts behind an end token or the cap is counted, and the first token, which comes of
the prefill, and passes that had no draft are no cycles. All cores that the process may use compute;
`VLLM_CPU_OMP_THREADS_BIND` names others.
"""
import argparse
import json
import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM keeps a core for its scheduler unless it is told: on two cores that is half the machine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND",
                      ",".join(map(str, sorted(os.sched_getaffinity(0)))))
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts_file")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="answers in flight")
    parser.add_argument("--speculative", type=json.loads, default=None)
    args = parser.parse_args()
    drafting = (dict(speculative_config=args.speculative,
                     per_request_spec_decode_metrics="detailed") if args.speculative else {})
    # nothing is timed, so nothing is worth compiling
    llm = LLM(args.model, dtype="float32", max_model_len=1024, max_num_seqs=args.rows,
              enforce_eager=True, **drafting)
    with open(args.prompts_file) as file:
        prompts = [dict(prompt_token_ids=json.loads(line)["tokens"]) for line in file]
    sampling = SamplingParams(temperature=0.0, max_tokens=args.new_tokens)
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        answer, = output.outputs
        counted = answer.spec_decode_metrics
        print(json.dumps(dict(tokens=list(answer.token_ids),
                              drafted=counted.per_step_drafted if counted else [],
                              accepted=counted.per_step_accepted if counted else [])), flush=True)
