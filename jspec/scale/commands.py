"""`jspec fit`."""

from __future__ import annotations

import argparse
import json
import sys

from jspec.config import load_config
from jspec.output import open_output, screen
from jspec.scale.fit import fit
from jspec.scale.published import shape_of
from jspec.scale.report import as_json, show, svg
from jspec.scale.topologies import devices, topology


def answer(arguments: argparse.Namespace) -> int:
    """Prints the answer, and writes it where it is asked for. Returns 0 if the step fits, 1 if
    not."""
    config = load_config(arguments.config, arguments.overrides)
    machine = topology(arguments.on)
    written = open_output(None if arguments.json == "-" else arguments.json, "--json")
    drawn = open_output(arguments.plot, "--plot")
    model = shape_of(config.model, arguments.model)
    found = fit(
        config,
        model,
        machine,
        devices(machine),
        length=arguments.length,
        accepted=arguments.accepted,
        layers=arguments.layers or (),
    )
    if arguments.json == "-":
        print(json.dumps(as_json(found)))
    wide = None if sys.stdout.isatty() else 120  # of a pipe or a file nobody knows how wide it is
    show(found, screen(stderr=arguments.json == "-", width=wide))
    if written is not None:
        written.write(json.dumps(as_json(found), indent=1) + "\n")
    if drawn is not None:
        drawn.write(svg(found))
    return 0 if found.left >= 0 else 1
