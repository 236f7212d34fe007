"""Time vLLM's CPU backend where answers end when the model ends them: several to each of some
prompts, under a cap.

    python vllm_tail.py MODEL_DIR PROMPTS.jsonl --prompts 8 --samples 4 --new-tokens 512

PROMPTS.jsonl has a {"prompt": ...} a line; the first --prompts of them are timed, the ones after
them warm up. Prints one JSON line per round: {"round", "seconds", "tokens", "tok_per_s", "mean",
"median", "largest", "threads"}; lengths hold the end tokens. Every round finds the prefix cache
empty. Sampling at temperature 1 with log-probabilities, as an RL rollout asks for. All cores that
the process may use compute; `VLLM_CPU_OMP_THREADS_BIND` names others.
"""
import argparse
import json
import os
import statistics
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM keeps a core for its scheduler unless it is told: on two cores that is half the machine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND",
                      ",".join(map(str, sorted(os.sched_getaffinity(0)))))
from vllm import LLM, SamplingParams

WARM_UP_TOKENS = 64

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts_file")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # one seed for the engine: with one for each request, vLLM would draw row by row
    llm = LLM(args.model, dtype="float32", max_model_len=1024,
              max_num_seqs=args.prompts * args.samples, seed=args.seed)
    render = llm.get_tokenizer().apply_chat_template
    with open(args.prompts_file) as file:
        texts = [json.loads(line)["prompt"] for line in file][:2 * args.prompts]
    prompts = [render([dict(role="user", content=text)], add_generation_prompt=True, tokenize=False)
               for text in texts]

    def lengths_of(prompts, new_tokens):
        sampling = SamplingParams(n=args.samples, temperature=1.0, max_tokens=new_tokens,
                                  logprobs=0)
        requests = llm.generate(prompts, sampling, use_tqdm=False)
        return [len(answer.token_ids) for request in requests for answer in request.outputs]

    lengths_of(prompts[args.prompts:], min(WARM_UP_TOKENS, args.new_tokens))
    for number in range(args.rounds):
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        lengths = lengths_of(prompts[:args.prompts], args.new_tokens)
        seconds = time.perf_counter() - begin
        print(json.dumps(dict(round=number, seconds=round(seconds, 2), tokens=sum(lengths),
                              tok_per_s=round(sum(lengths) / seconds, 1), mean=statistics.mean(
                                  lengths), median=statistics.median(lengths), largest=max(lengths),
                              threads=len(os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")))),
              flush=True)
