"""The public surface: whatever is wrong gets one line that names the argument, and unusual right
values simply work."""

import dataclasses
import fractions
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec import arguments
from jspec.drafts import find, known
from jspec.speculate.arguments import check, in_32_bits
from tests.speculate import tiny

POLICY = tiny.policy(11, hidden=32)
CONFIG = POLICY.config
READY = POLICY.replace(weights=POLICY.weights | {"layers": ({},)})  # what tells a rollout layout
BATCH = jspec.PromptBatch.from_tokens([[1, 2], [3]], group_size=2, seed=0, buckets=(8,))
NGRAM, MTP = jspec.drafts.ngram(POLICY), jspec.Draft({}, {}, find("mtp").Config(CONFIG),
                                                     find("mtp"))


def rollout(policy=POLICY, draft=None, batch=BATCH, speculation=None, **sampling):
    return jspec.rollout(policy, draft, batch,
                         sampling=jspec.Sampling(**{"max_new_tokens": 4, **sampling}),
                         speculation=speculation)


def batch_of(prompts=((1, 2), (3,)), **options):
    return jspec.PromptBatch.from_tokens(prompts, **{"group_size": 2, "seed": 0, **options})


def rope(**options):
    return jspec.RopeConfig(**options)


def model(**options):
    return dataclasses.replace(CONFIG, **options)


def weights(**changed):
    return POLICY.replace(weights=POLICY.weights | changed)


class Odd:
    """What no check may trust."""

    __hash__ = None

    def __index__(self):
        raise RuntimeError("two\nlines")

    __len__ = __iter__ = __index__

    def __repr__(self):
        return "two\nlines"


WRONG = {
    # the batch
    "a list": (lambda: rollout(batch=[[1, 2], [3]]), "batch is a list: give a batch,"),
    "tokens float": (lambda: rollout(batch=BATCH.replace(tokens=jnp.ones((2, 8)))),
                     "batch.tokens is an array of float32, shape (2, 8), and must be int32 [2, 8]"),
    "tokens flat": (lambda: rollout(batch=BATCH.replace(tokens=jnp.ones(8, int))),
                    "shape (8,), and must be int32"),
    "tokens none": (lambda: rollout(batch=BATCH.replace(tokens=jnp.ones((0, 8), int))),
                    "at least one of each"),
    "lengths shape": (lambda: rollout(batch=BATCH.replace(lengths=jnp.ones(3, int))),
                      "must be int32 [2]"),
    "length 0": (lambda: rollout(batch=BATCH.replace(lengths=jnp.array([2, 0]))),
                 "batch.lengths holds 0; a prompt"),
    "length 9": (lambda: rollout(batch=BATCH.replace(lengths=np.array([9, 1]))),
                 "holds 9; a prompt has at least one token, and at most the 8"),
    "ids wide": (lambda: rollout(batch=BATCH.replace(sequence_ids=np.array([7, 7 + 2**32, 1, 2]))),
                 "batch.sequence_ids holds 4294967303; they must be whole numbers from 0 to "
                 "2147483647"),
    "ids twice": (lambda: rollout(batch=BATCH.replace(sequence_ids=jnp.array([7, 7, 1, 2]))),
                  "would get the same"),
    "key a seed": (lambda: rollout(batch=BATCH.replace(key=0)),
                   "batch.key = 0 must be a typed key,"),
    "key raw": (lambda: rollout(batch=BATCH.replace(key=jax.random.PRNGKey(0))),
                "jax.random.wrap_key_data makes"),
    "two keys": (lambda: rollout(batch=BATCH.replace(key=jax.random.split(BATCH.key))),
                 "is 2 keys of shape (2,)"),
    "prompts text": (lambda: batch_of("1 2 3"),
                     "prompts = '1 2 3' must be lists of token ids, such as [[1, 2,"),
    "prompts None": (lambda: batch_of(None), "prompts = None must be lists of token ids"),
    "prompts flat": (lambda: batch_of([1, 2]),
                     "prompt 0 is the number 1, and must be a list of token ids; a"),
    "prompts encoded": (lambda: batch_of({"input_ids": [[1]]}), "give its [\"input_ids\"]"),
    "ids float": (lambda: batch_of([[1], [1.0, 2.5]]),
                  "prompt 1 must be a list of token ids, whole numbers, and not"),
    "ids bool": (lambda: batch_of([[True]]),
                 "prompt 0 must be a list of token ids, whole numbers, and not bool"),
    "ids nested": (lambda: batch_of([[[1]]]), "not int64 of shape (1, 1)"),
    "ids of 33 bits": (lambda: batch_of([[2**32 + 1]]), "prompt 0 holds what is no token id"),
    "ids None": (lambda: batch_of([[None]]), "prompt 0 holds what is no token id"),
    "ids ragged": (lambda: batch_of([[[1], [2, 3]]]),
                   "prompt 0 is a list, and must be a list of token ids"),
    "ids odd": (lambda: batch_of([Odd()]), "prompt 0 is a Odd, and must be"),
    "prompts masked": (lambda: batch_of(np.ma.array([[1, 2]], mask=[[0, 1]])),
                       "prompts is a masked array of int64, shape (1, 2), and must be an array "
                       "without a mask, such as its .compressed()"),
    "a prompt masked": (lambda: batch_of([[1], np.ma.array([1, 2])]), "prompt 1 is a masked array"),
    "ids masked": (lambda: batch_of(sequence_ids=np.ma.array([1, 2, 3, 4], mask=[0, 1, 0, 0])),
                   "a masked array"),
    "tokens masked": (lambda: rollout(batch=BATCH.replace(tokens=np.ma.ones((2, 8), int))),
                      "batch.tokens is a masked"),
    "temperature masked": (lambda: rollout(temperature=np.ma.ones(4)),
                           "sampling temperature is a masked array"),
    "ids of time": (lambda: batch_of([np.ones(2, "timedelta64[s]")]),
                    "prompt 0 must be a list of token ids"),
    "lengths of time": (lambda: rollout(batch=BATCH.replace(lengths=np.ones(2, "timedelta64[s]"))),
                        "batch.lengths is"),
    "a flag of NumPy": (lambda: batch_of([[2, np.True_]]), "prompt 0 holds what is no token id"),
    "group text": (lambda: batch_of(group_size="2"),
                   "group_size = '2' must be a whole number of at least 1"),
    "group bool": (lambda: batch_of(group_size=True), "group_size = True must be a whole number"),
    "group traced": (lambda: jax.jit(lambda n: batch_of(group_size=n))(2),
                     "group_size is a traced int32 of shape (), and must be a whole number of at "
                     "least 1; under jax.jit keep it static"),
    "seed wide": (lambda: batch_of(seed=2**64),
                  "seed = 18446744073709551616 must be a seed, a whole number from 0"),
    "seed negative": (lambda: batch_of(seed=-1), "seed = -1 must be a seed"),
    "seed float": (lambda: batch_of(seed=0.5), "seed = 0.5 must be a seed"),
    "seed text": (lambda: batch_of(seed="0"), "seed = '0' must be a seed"),
    "seed bool": (lambda: batch_of(seed=True), "seed = True must be a seed"),
    "seed endless": (lambda: batch_of(seed=10**6000),
                     "seed is a number of 19932 bits, and must be a seed"),
    "sequence ids wide": (lambda: batch_of(sequence_ids=[7, 7 + 2**32, 1, 2]),
                          "an entry of sequence_ids = 4294967303 must be at most 2147483647"),
    "sequence ids float": (lambda: batch_of(sequence_ids=np.ones(4)),
                           "an entry of sequence_ids = 1.0 must be a"),
    "buckets down": (lambda: batch_of(buckets=(8, 4)),
                     "buckets must be lengths to pad to, ascending"),
    "buckets a number": (lambda: batch_of(buckets=8),
                         "buckets = 8 must be a list of whole numbers"),
    "pad negative": (lambda: batch_of(pad_token=-1), "pad_token = -1 must be at least 0"),
    # sampling and speculation
    "sampling a dict": (lambda: jspec.rollout(POLICY, None, BATCH, sampling={}),
                        "sampling is a dict: give"),
    "speculation": (lambda: rollout(speculation=3),
                    "speculation is a int: give jspec.Speculation(...) or None"),
    "cap float": (lambda: rollout(max_new_tokens=4.0),
                  "sampling max_new_tokens = 4.0 must be a whole number"),
    "cap text": (lambda: rollout(max_new_tokens="4"),
                 "sampling max_new_tokens = '4' must be a whole number"),
    "min text": (lambda: rollout(min_new_tokens=None),
                 "sampling min_new_tokens = None must be a whole number"),
    "top_k": (lambda: rollout(top_k=2.5),
              "sampling top_k = 2.5 must be a whole number of at least 0; 0 turns it"),
    "stop a number": (lambda: rollout(stop_tokens=2),
                      "stop_tokens = 2 must be a list of whole numbers of at least"),
    "stop text": (lambda: rollout(stop_tokens="</s>"),
                  "sampling stop_tokens = '</s>' must be a list of whole"),
    "stop float": (lambda: rollout(stop_tokens=[1.5]),
                   "an entry of sampling stop_tokens = 1.5 must be a whole"),
    "temperature text": (lambda: rollout(temperature="hot"),
                         "sampling temperature = 'hot' must be a number, or one"),
    "temperature None": (lambda: rollout(temperature=None),
                         "sampling temperature = None must be a number"),
    "temperature bool": (lambda: rollout(temperature=True),
                         "sampling temperature = True must be a number"),
    "a flag among ids": (lambda: batch_of([[2, True]]), "prompt 0 holds what is no token id"),
    "temperature huge": (lambda: rollout(temperature=1e39),
                         "sampling temperature must be finite and at least 0; got"),
    "temperature row": (lambda: rollout(temperature=np.array([1, 1, math.nan, 1])),
                        "at least 0; got nan"),
    "top_p over 1": (lambda: rollout(top_p=1.5),
                     "sampling top_p must be finite and at least 0 and at most 1; got"),
    "top_p bool": (lambda: rollout(top_p=True), "sampling top_p = True must be a number"),
    "k text": (lambda: jspec.Speculation(k="3"),
               "speculation k = '3' must be a whole number of at least 0; 0 turns"),
    "k auto": (lambda: jspec.Speculation(k="auto"),
               "is for configurations; give what jspec.choose_k(params, "),
    "k unrolled": (lambda: rollout(weights_of_1024(), speculation=jspec.Speculation(k=100)),
                   "must be at most 64:"),
    "rule": (lambda: jspec.Speculation(rule="coupld"),
             "rule 'coupld' is unknown; known: rejection, block, coupled; did you mean coupled?"),
    "kernels": (lambda: rollout(speculation=jspec.Speculation(kernels=np.ones(2))),
                "speculation kernels is an array"),
    "depths": (lambda: rollout(speculation=jspec.Speculation(depths=(2,))),
               "holds 2; the model has 1"),
    "slots 0": (lambda: jspec.Batching(slots=0), "batching slots = 0 must be at least 1"),
    "groups 0": (lambda: jspec.Batching(groups=0), "batching groups = 0 must be at least 1"),
    "groups many": (
        lambda: jspec.rollout(POLICY, None, BATCH, sampling=jspec.Sampling(max_new_tokens=4),
                              batching=jspec.Batching(groups=3)),
        "batching groups = 3 is more than the 2 prompts there are"),
    "kv_tokens": (lambda: jspec.Batching(kv_tokens=1.5),
                  "batching kv_tokens = 1.5 must be a whole number"),
    "kv_tokens few": (
        lambda: jspec.rollout(POLICY, None, BATCH, sampling=jspec.Sampling(max_new_tokens=4),
                              batching=jspec.Batching(kv_tokens=47)), "kv_tokens = 47 are 2 blocks "
        "of 16 positions, and the prompts take 2 and one sequence at its cap 1: give at least 48"),
    "expected many": (lambda: batch_of(expected_lengths=[1]),
                      "one number for each of the 2 prompts; got 1"),
    "expected text": (lambda: batch_of(expected_lengths="ab"), "expected_lengths"),
    "expected shape": (lambda: jspec.rollout(POLICY, None, BATCH.replace(
        expected_lengths=jnp.zeros(3, jnp.int32))), "batch.expected_lengths"),
    # policies
    "policy empty": (lambda: rollout(policy=POLICY.replace(weights=None)),
                     "weight embed of params is missing; its"),
    "policy of text": (lambda: rollout(policy=weights(embed=np.full((11, 32), "a"))),
                       "weight embed of params is an array of <U1, shape (11, 32), and must be of "
                       "floating-point numbers"),
    "policy of ids": (lambda: rollout(policy=weights(embed=jnp.ones((11, 32), int))),
                      "must be of floating-point"),
    "policy masked": (lambda: rollout(policy=weights(embed=np.ma.ones((11, 32)))),
                      "embed of params is a masked array"),
    "policy config": (lambda: rollout(policy=POLICY.replace(config=None)),
                      "the config of params is a NoneType: give"),
    "policy kernels": (lambda: rollout(policy=POLICY.replace(kernels="auto")),
                       "kernels of params is a str: give what"),
    "policy shape": (lambda: rollout(policy=weights(embed=jnp.ones((3, 32)))),
                     "weight embed of params has shape [3, 32]; its config says [11, 32]"),
    "policy layers": (lambda: rollout(policy=weights(layers=())),
                      "params has 0 layers; its config says 1"),
    "reshard None": (lambda: jspec.reshard(None),
                     "policy is a NoneType: give a policy, such as jspec.load("),
    "reshard layout": (lambda: jspec.reshard(POLICY, "rolout"),
                       "'rolout' is unknown; known: rollout, rollout_wide;"),
    "init config": (lambda: jspec.init_policy({}, 0), "config is a dict: give a jspec.ModelConfig"),
    "init key": (lambda: jspec.init_policy(CONFIG, "0"),
                 "key = '0' must be a seed, a whole number from 0 to 2**64 -"),
    "init dtype": (lambda: jspec.init_policy(CONFIG, 0, "float16"),
                   "dtype 'float16' is not supported; supported:"),
    "export None": (lambda: jspec.export(None, "x"),
                    "the policy of an export is a NoneType: give a policy"),
    "export tokenizer": (lambda: jspec.export(POLICY, "x", "name"),
                         "tokenizer is a str: give a tokenizer of"),
    "export where": (lambda: jspec.export(POLICY, None),
                     "directory = None must be a name or a path"),
    "load None": (lambda: jspec.load(None),
                  "model = None must be a name or a path, one line of text or a"),
    "load empty": (lambda: jspec.load(""), "model = '' must be a name or a path"),
    "load long": (lambda: jspec.load("x" * 5000), "cannot be looked at: File name too long"),
    "load nobody": (lambda: jspec.load("~nobody-here/x"),
                    "model '~nobody-here/x' cannot be looked at: Could not"),
    "load dtype": (lambda: jspec.load("nowhere", dtype=jnp.int8),
                   "dtype 'int8' is not supported; supported: float32,"),
    "load mesh": (lambda: jspec.load("nowhere", mesh=2),
                  "mesh is a int: give a mesh, such as jspec.make_mesh()"),
    "tokenizer": (lambda: jspec.load_tokenizer(3), "model = 3 must be a name or a path"),
    "fetch": (lambda: jspec.fetch(b"x"), "model = b'x' must be a name or a path"),
    "mesh text": (lambda: jspec.make_mesh("2"), "mesh data = '2' must be a whole number"),
    "mesh devices": (lambda: jspec.make_mesh(devices=4),
                     "devices = 4 must be a list of devices, at least"),
    # drafts
    "draft of None": (lambda: jspec.drafts.ngram(None),
                      "the policy of jspec.drafts.ngram is a NoneType: give a"),
    "draft ready": (lambda: jspec.drafts.mtp(READY, 0),
                    "the policy of an mtp draft must be in the training"),
    "no key": (lambda: jspec.drafts.mtp(POLICY), "mtp draft: its weights are drawn at random; give "
               "a seed or a key, such as jspec.drafts.mtp(policy, 0)"),
    "key text": (lambda: jspec.drafts.eagle3(POLICY, "a"),
                 "eagle3 draft: key = 'a' must be a seed"),
    "typo": (lambda: jspec.drafts.mtp(POLICY, 0, block=2),
             "mtp draft: it has no option 'block'; did you mean"),
    "no such option": (lambda: jspec.drafts.ngram(POLICY, zzz=2),
                       "ngram draft: it has no option 'zzz'; options:"),
    "depths text": (lambda: jspec.drafts.mtp(POLICY, 0, depths="2"),
                    "mtp draft: depths = '2' must be a whole number"),
    "depths many": (lambda: jspec.drafts.mtp(POLICY, 0, depths=100),
                    "mtp draft: depths = 100 must be at most 32"),
    "blocks float": (lambda: jspec.drafts.mtp(POLICY, 0, blocks=1.0),
                     "mtp draft: blocks = 1.0 must be a whole"),
    "vocab float": (lambda: jspec.drafts.mtp(POLICY, 0, vocab=[1.5]),
                    "an entry of mtp draft: vocab = 1.5 must be a"),
    "vocab text": (lambda: jspec.drafts.self(POLICY, vocab="1"),
                   "self draft: vocab = '1' must be a list of whole"),
    "vocab empty": (lambda: jspec.drafts.self(POLICY, vocab=[]),
                    "vocab must be a list of token ids, and is empty"),
    "aux": (lambda: jspec.drafts.eagle3(POLICY, 0, aux_depths=1),
            "eagle3 draft: aux_depths = 1 must be a list of"),
    "flag": (lambda: jspec.drafts.eagle3(POLICY, 0, fc_norm="no"),
             "eagle3 draft: fc_norm = 'no' must be True or"),
    "bits bool": (lambda: jspec.drafts.self(POLICY, bits=[8]),
                  "self draft: bits is a list, and must be one of 8,"),
    "ngram text": (lambda: jspec.drafts.ngram(POLICY, max_ngram="3"),
                   "ngram draft: max_ngram = '3' must be a whole"),
    "history": (lambda: jspec.drafts.suffix(POLICY, history_prompts=10**9),
                "is more than memory has room for"),
    "suffix None": (lambda: jspec.drafts.suffix(POLICY, siblings=None),
                    "suffix draft: siblings = None must be a"),
    "draft bare": (lambda: rollout(draft=jspec.Draft({}, {}, None, find("mtp"))),
                   "this draft's config is a NoneType without the"),
    "draft empty": (lambda: rollout(draft=MTP), "weight blocks.0.embed_norm of this mtp draft is "
                    "missing"),
    "drafter": (lambda: rollout(draft=NGRAM.replace(drafter="../../x")),
                "drafter of this draft is no drafter, but"),
    "load_draft policy": (lambda: jspec.load_draft(None, "x"),
                          "policy is a NoneType: give a policy"),
    "load_draft source": (lambda: jspec.load_draft(POLICY, None),
                          "draft = None must be a name or a path"),
    # configs: what makes NaN, or nonsense
    "theta 0": (lambda: rope(theta=0), "rope theta = 0 must be a finite number and at least 1"),
    "theta text": (lambda: rope(theta="10000"), "rope theta = '10000' must be a finite number"),
    "theta bool": (lambda: rope(theta=True), "rope theta = True must be a finite number"),
    "theta inf": (lambda: rope(theta=math.inf), "rope theta = inf must be a finite number"),
    "theta 1": (lambda: rope(theta=1, scaling="yarn", original_max_position=8),
                "theta = 1.0 must be above 1 for"),
    "factor 0": (lambda: rope(scaling="linear", factor=0.0),
                 "rope factor = 0.0 must be a finite number and at least"),
    "no original": (lambda: rope(scaling="yarn", factor=2.0),
                    "rope scaling yarn needs original_max_position"),
    "frequencies": (lambda: rope(scaling="llama3", original_max_position=8, low_freq_factor=4),
                    "low_freq_factor = 4.0 must be below high_freq_factor = 4.0"),
    "beta 0": (lambda: rope(beta_fast=0),
               "rope beta_fast = 0 must be a finite number and at least 1e-06"),
    "betas": (lambda: rope(scaling="yarn", original_max_position=8, beta_fast=0.5),
              "must be at least beta_slow = 1.0"),
    "tokenless": (lambda: model(tokenless="ab"),
                  "tokenless must be ranges [start, stop) of ids, not 'ab'"),
    "attention nan": (lambda: rope(attention_factor=math.nan),
                      "rope attention_factor = nan must be a finite"),
    "scaling": (lambda: rope(scaling="yarnn"), "rope scaling 'yarnn' is unknown; known: default, "
                "linear, llama3, yarn; did you mean yarn?"),
    "heads bool": (lambda: model(num_heads=True),
                   "num_heads = True must be a whole number of at least 1"),
    "head_dim inf": (lambda: model(head_dim=math.inf),
                     "head_dim = inf must be a whole number of at least 1"),
    "head_dim odd": (lambda: model(head_dim=15),
                     "head_dim 15 is odd; rotary embedding needs an even one"),
    "layers huge": (lambda: model(num_layers=10**30),
                    "num_layers is a number of 100 bits, and must be at most"),
    "eps 0": (lambda: model(rms_norm_eps=0.0),
              "rms_norm_eps = 0.0 must be a finite number and at least 1e-30"),
    "range": (lambda: model(initializer_range=-1),
              "initializer_range = -1 must be a finite number and at least 0"),
    "tie text": (lambda: model(tie_embeddings="false"),
                 "tie_embeddings = 'false' must be True or False"),
    "rope a dict": (lambda: model(rope={"theta": 1e4}), "rope is a dict: give a jspec.RopeConfig"),
    "stop outside": (lambda: model(stop_tokens=(11,)),
                     "stop token 11 is not an id of the vocabulary of 11"),
    "pad outside": (lambda: model(pad_token=11),
                    "pad token 11 is not an id of the vocabulary of 11; name one that is"),
    "pad text": (lambda: model(pad_token="0"), "pad_token = '0' must be a whole number"),
    "family": (lambda: model(family=["llama"]),
               "family is a list, and must be one of llama, qwen2, qwen3"),
}


def weights_of_1024():
    return POLICY.replace(config=model(max_position_embeddings=1024))


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_in_one_line(name):
    call, words = WRONG[name]
    with pytest.raises(jspec.InputError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_drafters_name_is_never_imported():
    for name in ("base", "parts", "parts.lookup", "../../x", "", None, "os"):
        with pytest.raises(jspec.InputError, match="is unknown; known: dflash, .*mtp,"):
            find(name)
    with pytest.raises(jspec.InputError, match="is unknown; known: dflash, .*mtp,"):
        known("os.py:path")  # what a file may not name, though there is no such file
    assert find("ngram").init is jspec.drafts.ngram.__wrapped__


@pytest.mark.parametrize("ids", [[1, 3], (3, 1, 3), {3, 1}, frozenset([1, 3]), range(1, 4, 2),
                                 np.array([1, 3]), jnp.array([1, 3]), np.uint8([1, 3]),
                                 [np.int64(1), jnp.int32(3)], {1: 0, 3: 0}.keys()])
def test_ids_may_come_in_any_collection(ids):
    sampling = jspec.Sampling(stop_tokens=ids)
    assert set(sampling.stop_tokens) == {1, 3} and {type(i) for i in sampling.stop_tokens} == {int}
    hash(sampling.stop_tokens)
    assert model(stop_tokens=ids).stop_tokens == sampling.stop_tokens


@pytest.mark.parametrize("prompts", [
    [[1, 2], [3, 4]], ((1, 2), (3, 4)), np.array([[1, 2], [3, 4]]), jnp.array([[1, 2], [3, 4]]),
    [range(1, 3), [3, 4]], [np.uint8([1, 2]), jnp.array([3, 4])], ([i, i + 1] for i in (1, 3)),
    [[np.int64(1), 2], np.int16([3, 4])]])
def test_prompts_may_come_in_any_form(prompts):
    batch = jspec.PromptBatch.from_tokens(prompts, group_size=np.int64(2), seed=np.uint32(0),
                                          buckets=np.array([2, 8]),
                                          sequence_ids=np.arange(4), pad_token=np.int8(0))
    assert (batch.tokens.tolist() == [[1, 2], [3, 4]] and batch.group_size
            == 2 and type(batch.group_size) is int)
    assert (jax.random.key_data(batch.key) == jax.random.key_data(jax.random.key(0))).all()


@pytest.mark.parametrize("seed", [7, np.int32(7), np.uint64(7), jnp.uint32(7), jax.random.key(7)])
def test_a_seed_is_a_key(seed):
    key = arguments.random_key("key", seed)
    assert ((jax.random.key_data(key) == jax.random.key_data(jax.random.key(7))).all() and key.shape
            == ())


def test_seeds_of_64_bits_are_used_whole():
    keys = [jax.random.key_data(batch_of(seed=seed).key).tolist()
            for seed in (5, 5 + 2**32, 2**64 - 1)]
    assert keys == [[0, 5], [1, 5], [2**32 - 1, 2**32 - 1]]


def test_numbers_of_numpy_become_pythons():
    spec = jspec.Speculation(k=np.int64(3), depths=np.array([0, 1]))
    cap = jspec.Sampling(max_new_tokens=np.int32(8), min_new_tokens=np.uint8(1), top_k=jnp.int32(2),
                         top_p=np.float32(1))
    assert (spec.k, spec.depths) == (3, (0, 1))
    assert (cap.max_new_tokens, cap.min_new_tokens, cap.top_k, cap.top_p) == (8, 1, 2, None)
    turned = jspec.RopeConfig(theta=np.float32(500), factor=np.int64(2), truncate=np.bool_(True))
    assert (turned == jspec.RopeConfig(theta=500, factor=2.0) and hash(turned)
            == hash(jspec.RopeConfig(500.0, factor=2)))
    made = model(num_layers=np.int64(1), rms_norm_eps=fractions.Fraction(1, 100000), rope=turned)
    json.dumps(dataclasses.asdict(made))
    draft = jspec.drafts.mtp(POLICY, np.int64(0), depths=np.int32(2), vocab={3, 1})
    json.dumps(dataclasses.asdict(draft.config))
    assert draft.state["vocab"].tolist() == [1, 3] and draft.config.vocab_size == 2


def test_models_may_be_named_by_a_path(model):
    path = pathlib.Path(model)
    assert jspec.load(path, dtype=jnp.bfloat16).dtype == "bfloat16" and jspec.fetch(path) == path
    assert len(jspec.load_tokenizer(path)) == len(jspec.load_tokenizer(model))


def test_a_seed_makes_what_its_key_makes():
    by_seed, by_key = jspec.init_policy(CONFIG, 5), jspec.init_policy(CONFIG, jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, by_seed, by_key)


def answers(batch, temperature):
    """What is generated where all of it is traced."""
    return jspec.rollout(POLICY, NGRAM, batch,
                         sampling=jspec.Sampling(max_new_tokens=4, temperature=temperature,
                                                 stop_tokens=()))


@pytest.mark.filterwarnings("error")
def test_temperatures_may_be_a_list():
    sampling = jspec.Sampling(max_new_tokens=4, temperature=[1, 0.5, 0, 1], top_p=(0.5, 1, 1, 1))
    check(POLICY, None, BATCH, sampling, jspec.Speculation(), jspec.Batching())
    made = in_32_bits(BATCH, sampling)[1]
    assert ((made.temperature.dtype, made.temperature.tolist(), made.top_p.shape)
            == (np.float32, [1, 0.5, 0, 1], (4,)))


def test_python_names_a_drafter_that_it_refuses_to_call():
    with pytest.raises(TypeError, match=r"^mtp\(\) takes"):
        jspec.drafts.mtp(POLICY, 0, 2)


def test_a_row_without_an_answer_comes_back_empty_where_values_are_traced():
    """Nothing can be refused inside a caller's jit, and nothing may be learned from a prompt of 0
    tokens."""
    tokens = jnp.array([[1, 2, 0], [3, 0, 0], [4, 5, 0], [6, 11, 0], [8, 11, 0]])
    batch = jspec.PromptBatch(tokens, jnp.array([2, 0, 4, 2, 1]), jnp.arange(10), jax.random.key(0),
                              2)
    heat = jnp.ones(10).at[1].set(math.nan)
    run = jax.jit(answers)
    out = run(batch, heat)
    assert out.lengths.tolist() == [4, 0, 0, 0, 0, 0, 0, 0, 4, 4]
    assert out.mask.sum(1).tolist() == out.lengths.tolist() and not out.finished.any()
    assert jnp.isfinite(out.logprobs).all() and out.stats.cycles.tolist()[1:8] == [0] * 7
    right = run(batch.replace(tokens=jnp.minimum(tokens, 10), lengths=jnp.array([2, 1, 3, 2, 1])),
                jnp.ones(10))
    assert right.lengths.tolist() == [4] * 10
    for row in (0, 8, 9):
        assert out.tokens[row].tolist() == right.tokens[row].tolist()
        assert out.logprobs[row].tolist() == right.logprobs[row].tolist()
