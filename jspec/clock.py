"""Seconds of a step by phase, and those that went into compiling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

PHASES = ("data", "reshard", "moments", "choose", "rollout", "reward", "draft", "remember",
          "update", "checkpoint")
"""The phases of a step, each of which is timed; inside their programs `profiling.SCOPES` are told
apart."""


class CompileSeconds:
    """The seconds in which JAX has compiled programs, or read compiled ones, since it was entered:
    call it to ask. `programs` counts them."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.total, self.programs = 0.0, 0

    def __call__(self) -> float:
        return self.total

    def hear(self, event: str, seconds: float, **_: Any) -> None:
        if event == self.EVENT:
            self.total += seconds
            self.programs += 1

    def __enter__(self) -> CompileSeconds:
        jax.monitoring.register_event_duration_secs_listener(self.hear)
        return self

    def __exit__(self, *exception) -> None:
        jax.monitoring.unregister_event_duration_listener(self.hear)


class Clock:
    """Seconds of each phase of a step, and those of them that went into compiling."""

    def __init__(self, compile_seconds: CompileSeconds | None = None) -> None:
        """None: nothing is known of compiling."""
        compile_seconds = compile_seconds or CompileSeconds()
        self.seconds: dict[str, float] = {}
        self.compiling: dict[str, float] = {}
        self.compile_seconds, self.compiled_before = compile_seconds, compile_seconds()
        self.programs_before = compile_seconds.programs
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, compiled = time.perf_counter(), self.compile_seconds()
        with jax.profiler.TraceAnnotation(phase):  # what a trace of the host shows
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.compiling[phase] = self.compiling.get(phase, 0.0) + self.compile_seconds() - compiled

    def compilations(self) -> int:
        """Programs that were compiled, or read compiled, since the step began."""
        return self.compile_seconds.programs - self.programs_before

    def record(self) -> dict[str, float]:
        """Fields `seconds/PHASE`, `seconds/compile`, and `seconds/step`, all that has passed since
        the step began."""
        fields = {f"seconds/{phase}": round(value, 4) for phase, value in self.seconds.items()}
        return {**fields,
                "seconds/compile": round(self.compile_seconds() - self.compiled_before, 4),
                "seconds/step": round(time.perf_counter() - self.start, 4)}
