"""A rollout inside a `jax.jit` of your own: the README's example.

    python examples/own_jit.py
"""

import jax

import jspec

# or a hub id, a directory of safetensors, a .gguf file
params = jspec.load("smollm2-135m-instruct")
tokenizer = jspec.load_tokenizer("smollm2-135m-instruct")
draft = jspec.drafts.ngram(params)  # or jspec.load_draft(params, "smollm2-135m-instruct"), or None
prompts = tokenizer(["17+25=", "3+4="])["input_ids"]
batch = jspec.PromptBatch.from_tokens(prompts, group_size=4, seed=0)


@jax.jit  # jspec.rollout is pure: it may be a part of a program of yours
def sample(params, draft, batch):
    out = jspec.rollout(params, draft, batch, sampling=jspec.Sampling(max_new_tokens=16),
                        speculation=jspec.Speculation(k=3, rule="rejection"))
    return out, out.logprobs.sum() / out.mask.sum()


out, mean_logprob = sample(params, draft, batch)
rows = zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)
texts = [tokenizer.decode(tokens[:length]) for tokens, length in rows]

print(f"{float(mean_logprob):.2f} nats a token", texts)
