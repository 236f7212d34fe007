"""`jspec fit`."""

from __future__ import annotations

import argparse
import json

from jspec.config import Config, load_config
from jspec.errors import InputError
from jspec.output import open_output, table_screen
from jspec.prepare import make_speculation
from jspec.scale.fit import fit
from jspec.scale.published import subject
from jspec.scale.report import as_json, show, svg
from jspec.scale.topologies import devices, topology
from jspec.speculate.schedule import WITH_MANY


def answer(arguments: argparse.Namespace) -> int:
    """Prints the answer, and writes it where it is asked for. Returns 0 if the step fits, 1 if
    not."""
    config = load_config(arguments.config, arguments.overrides)
    machine = topology(arguments.on)
    check(config, arguments)
    written = open_output(None if arguments.json == "-" else arguments.json, "--json")
    drawn = open_output(arguments.plot, "--plot")
    config, model = subject(config, arguments.model)
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
    show(found, table_screen(stderr=arguments.json == "-"))
    if written is not None:
        written.write(json.dumps(as_json(found), indent=1) + "\n")
    if drawn is not None:
        drawn.write(svg(found))
    return 0 if found.left >= 0 else 1


def check(config: Config, arguments: argparse.Namespace) -> None:
    """Raises InputError for options that say what cannot be, before anything is compiled."""
    cap, layers = config.sampling.max_new_tokens, arguments.layers
    if (arguments.length or 0) > cap:
        raise InputError(f"--length {arguments.length} is more than sampling.max_new_tokens = "
                         f"{cap}; raise that, or lower --length")
    most = 1 + (0 if config.draft.name == "none" else make_speculation(config, WITH_MANY).most)
    if arguments.accepted > most:
        raise InputError(f"--accepted {arguments.accepted:g}: a cycle of this config yields "
                         f"{most} at most, its drafts (speculation.k) and one; lower --accepted")
    if layers and layers[0] >= layers[1]:
        raise InputError(f"--layers {layers[0]} {layers[1]}: a line goes through two depths; name "
                         "the smaller one and then a larger one")
