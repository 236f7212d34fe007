"""Checks of what a caller gives: every refusal is one line with the argument's name, what it is and
what it must be.

A check is a function (label, value) -> value, which returns the value in the one form that the
program uses (a NumPy number as Python's, ids as a tuple, a seed as a key) and raises `InputError`
where there is none. So it can be an entry of a table: `settle` goes through the fields of a frozen
dataclass with one.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspec.choices import DTYPES
from jspec.errors import InputError
from pallas_kernels.noise import seed_key

Check = Callable[[str, Any], Any]

INT32 = 2**31 - 1
"""The largest id, size or position: all of them are int32 on a device."""
SEEDS = "a whole number from 0 to 2**64 - 1"
_LONG = 60  # characters of a value that are shown
_MOST = 2**24  # ids in one argument


def show(value: Any) -> str:
    """In at most a few words, on one line, what a value is."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced {value.dtype} of shape {value.shape}"
    if isinstance(value, np.ma.MaskedArray):
        return f"a masked array of {value.dtype}, shape {value.shape}"
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of {value.dtype}, shape {value.shape}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and abs(value) > 10**20:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        text = repr(value)
        return text if len(text) <= _LONG else f"{text[:_LONG]}..."
    return f"a {type(value).__name__}"


def wrong(label: str, value: Any, expected: str, traceable: bool = False) -> InputError:
    """The error for a value that is not `expected`; `traceable`: it may be traced."""
    shown = show(value)
    plain = not shown.startswith(("a ", "an "))
    static = ("; under jax.jit keep it static"
              if isinstance(value, jax.core.Tracer) and not traceable else "")
    return InputError(f"{label} {'=' if plain else 'is'} {shown}{'' if plain else ', and'} must be "
                      f"{expected}{static}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A question to end an error with: "; did you mean NAME?", or nothing where no known name is
    like the word."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def whole(low: int = 0, high: int = INT32, hint: str = "") -> Check:
    """A whole number from low to high, of Python's, NumPy's or a concrete array's, as an int; a
    bool is none."""
    def check(label: str, value: Any) -> int:
        # which have an index too
        is_flag = isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"
        try:
            number = None if is_flag else operator.index(value)
        except Exception:  # no number, one that is traced, or what an object's own __index__ raises
            number = None
        if number is None:
            raise wrong(label, value, f"a whole number of at least {low}{hint}")
        if number < low:
            raise wrong(label, number, f"at least {low}{hint}")
        if number > high:
            raise wrong(label, number, f"at most {high}{hint}")
        return number

    return check


def real(low: float, high: float = math.inf) -> Check:
    """A finite number from low to high, as a float; a bool is none."""
    def check(label: str, value: Any) -> float:
        expected = (f"a finite number and at least {low}"
                    + (f" and at most {high}" if high < math.inf else ""))
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise wrong(label, value, expected)
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond any float
            number = math.nan
        if not math.isfinite(number) or not low <= number <= high:
            raise wrong(label, value, expected)
        return number

    return check


def flag(label: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise wrong(label, value, "True or False")
    return bool(value)


def optional(check: Check) -> Check:
    """None, or what `check` takes."""
    return lambda label, value: None if value is None else check(label, value)


def one_of(choices: Iterable[str]) -> Check:
    """One of a few names."""
    choices = tuple(choices)

    def check(label: str, value: Any) -> str:
        if not isinstance(value, str):
            raise wrong(label, value, f"one of {', '.join(choices)}")
        if value not in choices:
            raise InputError(f"{label} {show(value)} is unknown; known: "
                             f"{', '.join(choices)}{nearest(value, choices)}")
        return value

    return check


def instance(kind: type, example: str) -> Check:
    """An object of a type; `example` says how one is made."""
    def check(label: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise InputError(f"{label} is a {type(value).__name__}: give {example}")
        return value

    return check


def whole_numbers(label: str, value: Any) -> tuple[int, ...]:
    """Whole numbers of at least 0 in any collection (a list, tuple, set, range or array of one
    dimension), as a tuple; those of a set ascending."""
    expected = "a list of whole numbers of at least 0, such as (1, 2)"
    if isinstance(value, jax.core.Tracer | str | bytes | Mapping):
        raise wrong(label, value, expected)
    try:
        entries = list(value) if len(value) <= _MOST else None
    except Exception:  # no collection, or one of a caller's own that fails
        entries = None
    if entries is None or getattr(value, "ndim", 1) != 1:
        raise wrong(label, value, expected)
    check = whole()
    ids = tuple(check(f"an entry of {label}", entry) for entry in entries)
    return tuple(sorted(ids)) if isinstance(value, set | frozenset) else ids


def unmasked(label: str, value: Any) -> Any:
    """Anything but a masked array of NumPy's: JAX has none, and what is masked would count as if it
    were not."""
    if isinstance(value, np.ma.MaskedArray):
        raise wrong(label, value,
                    "an array without a mask, such as its .compressed() or .filled(...)")
    return value


def is_whole(dtype: Any) -> bool:
    """Whether a dtype is of whole numbers. Spans of time count as such to NumPy, and are none."""
    return jnp.issubdtype(dtype, jnp.integer) and not jnp.issubdtype(dtype, np.timedelta64)


def random_key(label: str, value: Any) -> jax.Array:
    """A typed key, or a seed, as a typed key []. The key may be traced; a seed may not."""
    expected = f"a seed, {SEEDS}, or a typed key, jax.random.key(seed)"
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if value.shape:
            raise InputError(f"{label} is {value.size} keys of shape {value.shape}, and must be "
                             "one; take one of them")
        return value
    if getattr(value, "shape", ()):
        raw = dtype == np.uint32 and value.shape == (2,)
        raise wrong(label, value,
                    expected + ("; jax.random.wrap_key_data makes one of this" if raw else ""))
    try:
        return seed_key(whole(0, 2**64 - 1)(label, value))
    except InputError:
        raise wrong(label, value, expected) from None


def name(label: str, value: Any) -> str:
    """A name or a path, of str or os.PathLike, as a str."""
    try:
        text = os.fspath(value)
    except Exception:  # no path, or one whose own method fails
        text = None
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        raise wrong(label, value, "a name or a path, one line of text or a pathlib.Path")
    return text


def path(label: str, value: Any) -> Path:
    """A path, `~` expanded, that the file system can be asked about, whether there is anything or
    not."""
    text = name(label, value)
    try:
        found = Path(text).expanduser()
        found.exists()
    except (OSError, RuntimeError) as error:
        # too long, not ours to look into, or the home of nobody
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"{label} {show(text)} cannot be looked at: {reason}") from None
    return found


def compute_dtype(label: str, value: Any) -> str:
    """One of `DTYPES` by its name or as a dtype (`jnp.bfloat16`), as its name."""
    try:
        known = value if isinstance(value, str) else jnp.dtype(value).name
    except Exception:  # jnp.dtype raises several kinds
        known = None
    if isinstance(value, jax.Array | np.ndarray | np.generic):  # which have a dtype, and are none
        known = None
    if value is None or known not in DTYPES:
        shown = repr(known) if known and value is not None else show(value)
        raise InputError(f"{label} {shown} is not supported; supported: {', '.join(DTYPES)}")
    return known


def settle(arguments: Any, label: str, **checks: Check) -> None:
    """Replace each named field of a frozen dataclass by what its check makes of it; `label` begins
    every error."""
    for field, check in checks.items():
        object.__setattr__(arguments, field, check(f"{label}{field}", getattr(arguments, field)))
