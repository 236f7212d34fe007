"""Fixtures that more than one folder of tests needs."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """The embedded SmolLM2-135M-Instruct: float32, training layout. Fetched into the user's cache the first time."""
    import jspec.hub

    return jspec.hub.load("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    import jspec.hub

    return jspec.hub.load_tokenizer("smollm2-135m-instruct")
