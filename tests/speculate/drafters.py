"""Every drafter, tiny: what each rule is tested with. A drafter that `jspec.drafts` lists is
tested, and once more with a reduced vocabulary if its `init` takes one."""

import dataclasses
import inspect

import jax

import jspec
from tests.compiling import quickly
from tests.speculate import tiny

# further ways to make a drafter: name -> (drafter, options)
VARIANTS = {"mtp-blocks": ("mtp", {"blocks": 2}), "mtp-steps": ("mtp", {}),
            "eagle3-layers": ("eagle3", {"layers": 2, "window": (0, 3), "qk_norm": True,
                                         "fc_norm": True, "norm_output": True,
                                         "norm_before_residual": True}),
            "mixed-reduced": ("mixed", {"vocab": None}),
            "peagle-layers": ("peagle", {"layers": 2, "window": (0, 3), "norm_before_fc": True}),
            **{f"{name}-reduced": (name, {"vocab": None}) for name in jspec.drafts.DRAFTERS
               if "vocab" in inspect.signature(getattr(jspec.drafts, name)).parameters}}
# conventions of published heads, which no option sets: of the speculators library's
CONVENTIONS = {"mtp-steps": {"blocks": 2, "shared": True, "first": 1, "normed_trunk": False}}
NAMES = (*jspec.drafts.DRAFTERS, *VARIANTS)
HISTORIC = tuple(name for name in NAMES
                 if jspec.drafts.find(VARIANTS.get(name, (name,))[0]).remember is not None)
"""Those that draft what has been before."""
TABLES = {"table": {}, "fixed": {"sampled": False}, "sharp": {"spread": 2.0}}
MODEL = {"num_layers": 2, "hidden_size": 8, "intermediate_size": 24, "num_heads": 2,
         "num_kv_heads": 2, "head_dim": 4, "family": "llama", "experts": None}
"""Fields of a draft model that is unlike the policy in depth, width and heads."""
PADDING = 2
"""Ids that it has beyond the policy's."""
HISTORY = {"history_prompts": 2, "history_rows": 2, "history_tokens": 3}
LAYERS = {"eagle3": 3, "peagle": 3}  # they fuse the states of three depths


OF_EXPERTS = "+experts"
"""Ends a drafter's name where the policy that it drafts for is to be sparse."""
SPARSE = tuple(name + OF_EXPERTS for name in NAMES)


def policy(name, *args, **options):
    """A `tiny.policy` with the layers that the drafter asks for."""
    options = {**tiny.SPARSE, **options} if name.endswith(OF_EXPERTS) else options
    name = name.removesuffix(OF_EXPERTS)
    return tiny.policy(*args,
                       **{"layers": LAYERS.get(VARIANTS.get(name, (name,))[0], 1), **options})


@quickly()
def make(name, policy, seed=0, scale=0.4):
    """A draft of tiny `policy`, weights shaken by `scale`: one of NAMES, or a `tiny.table_draft`,
    one of TABLES. A reduced vocabulary is every second id, from 0 on."""
    name = name.removesuffix(OF_EXPERTS)
    if name in TABLES:
        return tiny.table_draft(policy, seed=seed, **TABLES[name])
    drafter, options = VARIANTS.get(name, (name, {}))
    if "vocab" in options:
        options = {"vocab": range(0, policy.config.vocab_size, 2)}
    if drafter == "draft_model":
        options = {"model": {**MODEL, "vocab_size": policy.config.vocab_size + PADDING}}
    elif drafter == "suffix":
        options = HISTORY
    elif drafter == "mixed":
        options = {"options": options, "suffix": HISTORY, "certainty": 0.5}
    made = getattr(jspec.drafts, drafter)(policy, jax.random.key(seed), **options)
    config = dataclasses.replace(made.config, **CONVENTIONS.get(name, {}))
    return _with_history(tiny.shaken(made.replace(config=config), seed=seed, scale=scale))


def mixed_around(name, policy, **how):
    """A mixed draft around what `make` gives."""
    made = make(name, policy, **how)
    return _with_history(jspec.drafts.mixed(policy, draft=made, suffix=HISTORY, certainty=0.5))


def _with_history(made):
    if made.drafter.remember is None:
        return made
    return made.drafter.remember(made, *tiny.finished([[1, 0, 1, 0]], [[[1, 2, 0], [1, 0, 2]]]))
