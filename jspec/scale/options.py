"""What `jspec fit` is asked with. Free of JAX, for it is read before anything starts."""

from __future__ import annotations

from jspec.parsing import Parser, add_config, number


def add_fit(made: Parser) -> None:
    """The arguments of `jspec fit`."""
    add_config(made)
    made.add_argument(
        "--on",
        metavar="NAME",
        required=True,
        help="the machine, by its vendor's "
        "name: v5e-16, v6e-64 (chips), v5p-1024 (cores), tpu7x-128 (devices), sm_90 "
        "(one H100)",
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
    made.add_argument("--plot", metavar="FILE", help="draw the memory, as an SVG")
