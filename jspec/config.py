"""Typed configuration: frozen dataclasses, read from YAML and dotted overrides.

Every field carries its meaning and its bounds, so that `jspec train --help` can print the one and `load_config` can
check the other. Anything wrong is an `InputError` that names the key and where it came from.
"""

import dataclasses
import difflib
import math
import pkgutil
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jspec.errors import InputError


def setting(default: Any, help: str, *, low: float | None = None, above: float | None = None,
            high: float | None = None, choices: tuple[str, ...] = (), filled: bool = False) -> Any:
    """A dataclass field with its meaning and bounds: low <= value <= high, value > above, one of choices. Those of a
    list are each entry's; `filled`: it has one at least."""
    bounds = {"help": help, "low": low, "above": above, "high": high, "choices": choices, "filled": filled}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=bounds)
    return dataclasses.field(default=default, metadata=bounds)


# Every file in drafts/ is a drafter; listed without importing them, for they import JAX.
_DRAFT_FILES = pkgutil.iter_modules([str(Path(__file__).parent / "drafts")])
DRAFTERS = tuple(sorted(m.name for m in _DRAFT_FILES if m.name != "base" and not m.ispkg))
# of `speculate.cycle.RULES`, for the same reason
RULES = ("rejection", "block", "coupled")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The policy."""

    name: str = setting("smollm2-135m-instruct", "short name, hub id, safetensors directory, .gguf file, or 'random'")
    dtype: str = setting("auto", "what is computed in; auto: bfloat16 on accelerators, float32 on the CPU",
                         choices=("auto", "float32", "bfloat16"))
    remat: bool = setting(False, "recompute each layer's activations in the backward pass: slower, far less memory")
    architecture: dict | None = setting(None, "ModelConfig fields of a policy drawn at random; only with name 'random'")
    tokenizer: str | None = setting(None, "another model's tokenizer, or 'chars:ALPHABET'; null: the model's own")


@dataclasses.dataclass(frozen=True)
class DraftLearningSection:
    """The drafter, and how it learns."""

    name: str = setting("mtp", "the drafter", choices=DRAFTERS)
    path: str | None = setting(None, "a trained draft to start from: a model whose draft ships with jspec, a directory "
                               "of a published draft, or the output_dir of `jspec draft train` or of a run; null: a "
                               "fresh one")
    loss: str = setting("kl", "kl: forward KL from the policy; tv: total variation, 1 - overlap; overlap: -log of the "
                        "overlap, the likelihood of acceptance", choices=("kl", "tv", "overlap"))
    optimizer: str = setting("adamw", "the draft's own; muon: orthogonal updates of matrices, AdamW for the rest",
                             choices=("adamw", "muon"))
    learning_rate: float = setting(1e-3, "peak learning rate of the draft's own optimizer", low=0)
    clip: float = setting(1.0, "global-norm clip of the draft's gradient", above=0)
    options: dict = setting({}, "further arguments of the drafter, such as ngram's longest match; a trained draft at "
                            "draft.path has its own")


@dataclasses.dataclass(frozen=True)
class DraftSection(DraftLearningSection):
    """The drafter that makes rollouts fast; it never changes what they are distributed as."""

    name: str = setting("mtp", "the drafter; none: plain autoregressive rollouts", choices=(*DRAFTERS, "none"))
    train: bool = setting(True, "train the draft in the update step (where it has weights)")
    every_n_steps: int = setting(1, "train the draft at every n-th step", low=1)
    features: str = setting("update", "whose states of the policy the draft learns from. update: the update's own "
                            "forward; rollout: the verifier's, kept by the rollout, so that the draft learns while "
                            "rewards are computed, once a rollout", choices=("update", "rollout"))


@dataclasses.dataclass(frozen=True)
class SpeculationSection:
    """How drafts are judged."""

    k: int = setting(3, "tokens drafted per cycle; draft.name=none turns speculation off", low=1, high=64)
    rule: str = setting("rejection", "rejection: exact in distribution, each draft judged by itself; block: exact in "
                        "distribution, the drafts judged together, which accepts no fewer on average; coupled: token "
                        "for token what autoregressive decoding with the same seed gives", choices=RULES)
    kernels: str = setting("auto", "auto: the chip's own (TPU, Hopper GPU) where they take the shapes; reference: "
                           "plain JAX; pallas: the kernels or an error (a CPU interprets them, for checks). Top-k and "
                           "top-p are always the reference's",
                           choices=("auto", "reference", "pallas"))


@dataclasses.dataclass(frozen=True)
class SamplingSection:
    """What the policy is sampled with."""

    max_new_tokens: int = setting(64, "longest answer, in tokens", low=1)
    min_new_tokens: int = setting(0, "end tokens are banned before this many tokens", low=0)
    temperature: float = setting(1.0, "divides the logits; 0: greedy", low=0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", low=0)
    top_p: float = setting(1.0, "keep the smallest set of likeliest tokens with this much probability", above=0, high=1)
    stop_tokens: tuple[int, ...] | None = setting(None, "token ids that end an answer; null: the checkpoint's own")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The prompts."""

    source: str = setting("arithmetic", "'arithmetic', a .jsonl file of {prompt, answer}, or 'reasoning_gym:TASK'")
    prompts_per_step: int = setting(4, "different prompts a step, over all processes", low=1)
    group_size: int = setting(4, "answers sampled for each prompt", low=1)
    max_prompt_tokens: int = setting(128, "a longer prompt is an error", low=1)
    system_prompt: str | None = setting(None, "first message of the chat; null: what the chat template does by itself")
    chat_template: bool = setting(True, "wrap prompts in the tokenizer's chat template")
    shuffle: bool = setting(True, "shuffle the prompts, anew at every epoch, by the run's seed")
    options: dict = setting({}, "further arguments of the task, such as reasoning_gym's parameters")


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """How answers are graded, on the host, by a pool of processes."""

    function: str = setting("math_verify", "'math_verify', 'reasoning_gym', or your own as 'path/to/file.py:function'")
    workers: int = setting(2, "grading processes", low=1)
    timeout_s: float = setting(10.0, "seconds after which an answer's grading is killed and scores 0", above=0)


@dataclasses.dataclass(frozen=True)
class GrpoSection:
    """The policy's objective and optimizer."""

    advantage: str = setting("group", "group: (reward - mean) / deviation in the group; dr_grpo: reward - mean",
                             choices=("group", "dr_grpo"))
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", low=0, high=1)
    clip_high: float = setting(0.28, "the ratio is clipped above 1 + clip_high", low=0)
    kl_weight: float = setting(0.0, "weight of the k3 KL to the frozen first policy; 0: no reference is kept", low=0)
    updates_per_rollout: int = setting(1, "optimizer steps on each rollout", low=1)
    micro_batch: int = setting(0, "rows per forward and backward, for memory, best whole groups; 0: all rows", low=0)
    learning_rate: float = setting(1e-6, "peak learning rate of the policy's AdamW", low=0)
    clip: float = setting(1.0, "global-norm clip of the policy's gradient", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0)
    warmup_steps: int = setting(0, "steps over which the learning rate rises linearly", low=0)
    max_skipped: int = setting(5, "stop after this many updates in a row with a non-finite loss or gradient", low=1)


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """How the devices are laid out; one axis may be -1: whatever is left."""

    data: int = setting(-1, "replicas of the policy that split the rows", low=-1)
    fsdp: int = setting(1, "ways the weights are split in training, rows too", low=-1)
    tensor: int = setting(1, "ways heads, hidden layers and vocabulary are split", low=-1)
    rollout_tensor: str = setting("tensor", "axes that split the weights during rollouts",
                                  choices=("tensor", "fsdp_tensor"))


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """Checkpoints, under output_dir/checkpoints."""

    every: int = setting(1, "steps between checkpoints; the last step always has one", low=1)
    keep: int = setting(2, "how many are kept", low=1)
    resume: bool = setting(True, "go on from output_dir's last checkpoint; false: refuse a directory that has one")


@dataclasses.dataclass(frozen=True)
class ProfileSection:
    """Traces that XProf and Perfetto open."""

    trace_step: int = setting(-1, "the step of `jspec train` that is traced into output_dir/trace; -1: none", low=-1)
    repeats: int = setting(2, "`jspec profile`: how many times the step (or draft.every_n_steps of them) is timed, "
                           "after one warm-up", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of `jspec train`."""

    seed: int = setting(0, "of everything drawn: fresh weights, prompts' order, sampling noise", low=0)
    steps: int = setting(6, "GRPO steps in all, those before a resume included", low=1)
    output_dir: str = setting("runs/quickstart", "metrics, checkpoints and traces; the same one again resumes")
    log_level: str = setting("info", "how much is told", choices=("debug", "info", "warning", "error"))
    model: ModelSection = ModelSection()
    draft: DraftSection = DraftSection()
    speculation: SpeculationSection = SpeculationSection()
    sampling: SamplingSection = SamplingSection()
    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    grpo: GrpoSection = GrpoSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    profile: ProfileSection = ProfileSection()


@dataclasses.dataclass(frozen=True)
class SamplesSection:
    """The policy's own answers, which a draft learns from."""

    sources: tuple[str, ...] = setting(("self", "arithmetic"), "where prompts come from, taken in turn: 'self' "
                                       "(instructions that the policy writes itself), and whatever data.source may "
                                       "be; one that is named twice has two turns", filled=True)
    count: int = setting(4096, "answers in all", low=1)
    batch: int = setting(32, "answers decoded together; also the rows of one file of samples", low=1)
    temperatures: tuple[float, ...] = setting((), "of one file of samples after the other, in turn; none named: all at "
                                              "sampling.temperature", low=0)
    max_prompt_tokens: int = setting(256, "longer prompts are left out", low=1)
    system_prompt: str | None = setting(None, "first message of the chat; null: what the chat template does by itself")
    chat_template: bool = setting(True, "wrap prompts in the tokenizer's chat template")


@dataclasses.dataclass(frozen=True)
class TrainingSection:
    """How the draft is trained on the samples."""

    vocab_size: int = setting(0, "tokens that can be drafted, the most frequent of the samples; 0: all", low=0)
    state_steps: int = setting(300, "steps on the policy's next states, before distributions are compared: cheap",
                               low=0)
    steps: int = setting(1000, "steps on draft.loss", low=1)
    rows: int = setting(8, "answers of a step", low=1)
    warmup_steps: int = setting(10, "over which the learning rate rises, in either stage; then it falls by a cosine",
                                low=0)
    checkpoint_every: int = setting(100, "steps between checkpoints", low=1)


@dataclasses.dataclass(frozen=True)
class ReportSection:
    """Acceptance on prompts that training never saw."""

    prompts: str | None = setting(None, "a .jsonl file of {prompt}; null: prompts of the sources that were left out")
    count: int = setting(32, "how many of them", low=1)
    k: int = setting(3, "tokens drafted a cycle", low=1, high=64)
    temperatures: tuple[float, ...] = setting((0.0, 1.0), "of the rollouts that are measured", low=0, filled=True)
    rules: tuple[str, ...] = setting(("rejection", "coupled"), "how drafts are judged in them", choices=RULES,
                                     filled=True)


@dataclasses.dataclass(frozen=True)
class DraftTrainingConfig:
    """One run of `jspec draft train`."""

    seed: int = setting(0, "of everything drawn", low=0)
    output_dir: str = setting("runs/draft", "samples, checkpoints, report and the draft; the same one again resumes")
    log_level: str = setting("info", "how much is told", choices=("debug", "info", "warning", "error"))
    model: ModelSection = ModelSection()
    draft: DraftLearningSection = DraftLearningSection()
    sampling: SamplingSection = SamplingSection(max_new_tokens=128)
    samples: SamplesSection = SamplesSection()
    training: TrainingSection = TrainingSection()
    report: ReportSection = ReportSection()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), kind: type = Config) -> Any:
    """Reads a YAML file (None: all defaults), then `section.key=value` overrides, later ones winning, as a `kind`.

    Raises InputError for a missing or malformed file, an unknown key (with the nearest known one), a wrong type and a
    value out of range, each with the key and where it was set.
    """
    layers = [] if path is None else [(str(path), _read_file(Path(path)))]
    layers += [(f"override '{text}'", _parse_override(text)) for text in overrides]
    origin: dict[str, str] = {}
    for source, layer in layers:
        _check_keys(kind, OmegaConf.to_container(layer, resolve=False), (), source, origin)
    try:
        merged = OmegaConf.merge(_plain(dataclasses.asdict(kind())), *(layer for _, layer in layers))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise InputError(f"{origin.get(key, path)}: '{key}': {_first_line(error)}") from None
    config = _build(kind, values, (), origin)
    _check_together(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def refuse_changes(directory: str | Path, before: Any, after: Any, free: tuple[str, ...],
                   remedy: str = "give that value to go on with it, or choose another output_dir") -> None:
    """Raise InputError, naming the key, if two configurations differ in more than the keys and sections in `free`."""
    old = dict(_flat(before))
    for key, value in _flat(after):
        if value != old[key] and not any(f"{key}.".startswith(f"{name}.") for name in free):
            was, now = (x if isinstance(x, str) else _show(x) for x in (old[key], value))
            raise InputError(f"{directory} holds a run with {key}={was}, not {now}; {remedy}")


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field; mappings are whole, for their keys are not the configuration's."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{field.name}.")
        else:
            yield prefix + field.name, value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def describe(kind: type = Config) -> list[tuple[str, str, str, str]]:
    """Rows (dotted key, type, default, meaning) of every field, in order; a section's row has only key and meaning."""
    rows = []
    for prefix, section in _sections(kind):
        if prefix:
            rows.append((prefix[0], "", "", (section.__doc__ or "").strip()))
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                continue
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            meaning = field.metadata["help"]
            choices = " | ".join(field.metadata["choices"])
            kind = f"a list of {choices}" if choices and isinstance(default, tuple) else choices
            rows.append((".".join((*prefix, field.name)), kind or _type_name(field.type), _show(default), meaning))
    return rows


def _sections(kind: type) -> Iterator[tuple[tuple[str, ...], type]]:
    yield (), kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield (field.name,), field.type


def _read_file(path: Path):
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"config file {path} does not exist{hint}")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {_where(error)}{_first_line(error)}") from None
    except OSError:  # also what OmegaConf says of a document that is one number
        loaded = None
    if not OmegaConf.is_dict(loaded):
        raise InputError(f"{path} must hold key: value pairs, such as 'steps: 10'")
    return loaded


def _parse_override(text: str):
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override '{text}' must be key=value, such as grpo.learning_rate=1e-6")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"override '{text}': {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).strip().splitlines()[0]


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _check_keys(section: type, values: Any, path: tuple[str, ...], source: str, origin: dict[str, str],
                kind: type | None = None) -> None:
    kind = kind or section
    known = {field.name: field for field in dataclasses.fields(section)}
    for key, value in values.items():
        here = (*path, str(key))
        dotted = ".".join(here)
        if key not in known:
            raise InputError(f"{source}: unknown key '{dotted}'; did you mean '{_nearest(here, kind)}'?")
        origin[dotted] = source
        if not dataclasses.is_dataclass(known[key].type):
            continue
        if not isinstance(value, dict):
            example = f"{dotted}.{dataclasses.fields(known[key].type)[0].name}"
            raise InputError(f"{source}: '{dotted}' is a section, not a value; set its keys, such as '{example}'")
        _check_keys(known[key].type, value, here, source, origin, kind)


def _nearest(path: tuple[str, ...], kind: type) -> str:
    """The known dotted key most like `path`, by spelling of the whole and of the name; `lr` is learning_rate."""
    known = [".".join((*prefix, field.name)) for prefix, section in _sections(kind)
             for field in dataclasses.fields(section)]
    wanted = ".".join(path)

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        name = candidate.split(".")[-1]
        is_initials = "_" in name and path[-1] == "".join(word[0] for word in name.split("_"))
        return whole + max(is_initials, difflib.SequenceMatcher(None, path[-1], name).ratio())

    return max(known, key=likeness)


def _build(section: type, values: dict[str, Any], path: tuple[str, ...], origin: dict[str, str]):
    made = {}
    for field in dataclasses.fields(section):
        here = (*path, field.name)
        if dataclasses.is_dataclass(field.type):
            made[field.name] = _build(field.type, values[field.name], here, origin)
        else:
            made[field.name] = _checked(field, values[field.name], ".".join(here), origin)
    return section(**made)


def _checked(field: dataclasses.Field, value: Any, dotted: str, origin: dict[str, str]) -> Any:
    def wrong(expected: str) -> InputError:
        return InputError(f"{origin[dotted]}: '{dotted}' must be {expected}, not {_show(value)}")

    fitted = _fit(value, field.type)
    if fitted is _MISFIT:
        raise wrong(_type_name(field.type))
    bounds, is_list = field.metadata, isinstance(fitted, tuple)
    entries, each = fitted if is_list else (fitted,), "a list with each entry " if is_list else ""
    if bounds["filled"] and not fitted:
        raise wrong(f"{_type_name(field.type)} with one entry at least")
    if bounds["choices"] and not set(entries) <= set(bounds["choices"]):
        raise wrong(f"{each}one of {', '.join(bounds['choices'])}")
    if bounds["low"] is not None and any(entry < bounds["low"] for entry in entries):
        raise wrong(f"{each}at least {bounds['low']}")
    if bounds["above"] is not None and any(entry <= bounds["above"] for entry in entries):
        raise wrong(f"{each}above {bounds['above']}")
    if bounds["high"] is not None and any(entry > bounds["high"] for entry in entries):
        raise wrong(f"{each}at most {bounds['high']}")
    return fitted


_MISFIT = object()


def _fit(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or _MISFIT. Only lossless conversions: int to float, list to tuple."""
    if isinstance(kind, types.UnionType):
        fits = (_fit(value, option) for option in typing.get_args(kind))
        return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)
    if typing.get_origin(kind) is tuple:
        items = [_fit(item, typing.get_args(kind)[0]) for item in value] if isinstance(value, list) else [_MISFIT]
        return _MISFIT if any(item is _MISFIT for item in items) else tuple(items)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _MISFIT
    if kind is types.NoneType:
        return None if value is None else _MISFIT
    exact = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return value if exact else _MISFIT


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(kind))
    return _TYPE_NAMES[kind]


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping",
               tuple[int, ...]: "a list of whole numbers",
               tuple[float, ...]: "a list of numbers", tuple[str, ...]: "a list of texts", types.NoneType: "null"}


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, str) else str(value)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _check_together(config: Config | DraftTrainingConfig) -> None:
    """What no field can know by itself."""
    sampling, model = config.sampling, config.model
    _demand(sampling.min_new_tokens <= sampling.max_new_tokens,
            f"sampling.min_new_tokens ({sampling.min_new_tokens}) is above "
            f"sampling.max_new_tokens ({sampling.max_new_tokens})")
    _demand((model.name == "random") == (model.architecture is not None),
            f"model.name is '{model.name}' and model.architecture is {'not ' if model.architecture is None else ''}"
            "set: an architecture goes with the name 'random', which needs one")
    _demand(model.name != "random" or model.tokenizer is not None,
            "model.name 'random' needs model.tokenizer, such as 'chars:0123456789+=' or a model's name")
    if isinstance(config, Config):
        _check_grpo(config)
    else:
        _demand(sampling.max_new_tokens > 1, "sampling.max_new_tokens must be at least 2, not 1: nothing is drafted "
                "after an answer's first token if that is its last")


def _check_grpo(config: Config) -> None:
    data, grpo = config.data, config.grpo
    rows = data.prompts_per_step * data.group_size
    _demand(data.group_size > 1, f"data.group_size must be at least 2, not {data.group_size}: "
            "an answer's advantage is measured against the others of its group")
    _demand(not grpo.micro_batch or rows % grpo.micro_batch == 0,
            f"grpo.micro_batch ({grpo.micro_batch}) must divide the rows of a step, "
            f"data.prompts_per_step x data.group_size = {rows}")
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _demand(0 not in axes and axes.count(-1) <= 1,
            f"mesh.data, mesh.fsdp and mesh.tensor are {axes}: each at least 1, and one of them at most may be -1")
