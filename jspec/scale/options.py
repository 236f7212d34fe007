"""What `jspec fit` and `jspec project` are asked with. Free of JAX, for it is read before anything
starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from jspec.choices import ENGINES, PRECISIONS
from jspec.parsing import Parser, add_config, listed, number


def add_fit(made: Parser) -> None:
    """The arguments of `jspec fit`."""
    add_config(made)
    made.add_argument(
        "--on",
        metavar="NAME",
        required=True,
        help="the machine, by its vendor's "
        "name: v5e-16, v6e-64 (chips), v5p-1024 (cores), tpu7x-128 (devices), 2xv5p-64 "
        "(two slices), sm_90 (one H100)",
    )
    made.add_argument(
        "--model",
        metavar="FILE",
        help="a config.json that says the model's shape, "
        "where its name is not known without a network",
    )
    made.add_argument(
        "--length",
        type=number(int, 1),
        metavar="N",
        help="tokens of every answer, for the floors (default: sampling.max_new_tokens)",
    )
    made.add_argument(
        "--accepted",
        type=number(float, 1, 65),
        default=1.0,
        metavar="A",
        help="tokens a cycle, for the floors (default: 1, nothing drafted is kept)",
    )
    made.add_argument(
        "--layers",
        type=number(int, 1),
        nargs=2,
        metavar="N",
        help="the two depths at which the rollout is compiled (default: 2 4)",
    )
    made.add_argument("--json", metavar="FILE", help="write the answer as JSON, '-' for stdout")
    made.add_argument(
        "--plot", type=svg_name, metavar="FILE.svg", help="draw the memory, as an SVG"
    )


def add_project(made: Parser) -> None:
    """The arguments of `jspec project`."""
    add_config(made)
    made.add_argument("--on", required=True, type=listed(str), metavar="NAME,...", help="machines "
                      "by the vendor's name, as in v5p-1024; of GPUs any number, as in gb200-512")
    made.add_argument("--model", metavar="FILE", help="a config.json with the policy's shape, "
                      "where nothing here knows it")
    made.add_argument("--k", type=listed(number(int, 1, 64)), default=list(range(1, 9)),
                      metavar="N,...", help="tokens drafted a cycle (default: 1 to 8)")
    level = made.add_mutually_exclusive_group()
    level.add_argument("--acceptance", type=listed(number(float, 0, 1)), metavar="A,...",
                       default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], help="of a draft if all before "
                       "it were accepted, the same at each position (default: 0.3 to 0.9)")
    level.add_argument("--tokens", type=listed(number(float, 1, 65)), metavar="T,...",
                       help="tokens that a cycle yields, instead")
    made.add_argument("--lengths", default="tail", metavar="WHAT", help="of answers: "
                      "tail[:MEDIAN[:SIGMA]], lognormal and cut at sampling.max_new_tokens; "
                      "constant[:TOKENS]; or a file of lengths (default: tail, its median a "
                      "quarter of the cap)")
    cost = made.add_mutually_exclusive_group()
    cost.add_argument("--draft-cost", type=number(float, 0), metavar="SHARE", help="what a drafted "
                      "token takes, of a plain cycle (default: the floor of the config's draft)")
    cost.add_argument("--costs", metavar="FILE", help="what cycles were measured to cost, drafts "
                      "included: of `jspec bench cost --json`, or published (docs/scale.md)")
    rest = made.add_mutually_exclusive_group()
    rest.add_argument("--generation-share", type=number(float, 1e-6, 1), metavar="SHARE",
                      help="of generation in a step without a draft (default: from both floors)")
    rest.add_argument("--rest", type=number(float, 0), metavar="SECONDS",
                      help="of a step but for generation, as measured")
    made.add_argument("--lag", type=number(int, 0, 1024), default=0, metavar="STEPS", help="by "
                      "which the policy that generates may be behind; above 0 generation and the "
                      "rest run at the same time, on as many devices each (default: 0)")
    made.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="of the "
                      "rollout's weights; jspec's own is bfloat16 (default)")
    made.add_argument("--engine", choices=ENGINES, default="jspec", help="what decodes: jspec "
                      "(default), or a server as other systems have one, with all-to-all between "
                      "experts and as many rows a cycle as are live")
    made.add_argument("--json", metavar="FILE", help="write the result as JSON, '-' for stdout")
    made.add_argument("--plot", type=svg_name, metavar="FILE.svg",
                      help="draw the first machine's there")


def svg_name(text: str) -> str:
    """A parser of names of pictures."""
    if Path(text).suffix != ".svg":
        raise argparse.ArgumentTypeError(f"must end in .svg, not {text!r}")
    return text
