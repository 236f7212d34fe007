import pytest

from jspec.errors import InputError
from jspec.scale.chips import CHIPS, chip
from jspec.scale.topologies import GPUS, SLICES, topology


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("v5p-1024", (8, 8, 8), 512),
        ("v5p-64", (2, 4, 4), 32),
        ("v5e-16", (4, 4), 16),
        ("v6e-64", (8, 8), 64),
        ("tpu7x-128", (4, 4, 4), 128),
        ("v5litepod-16", (4, 4), 16),
        ("2xv5p-64", (2, 4, 4), 64),
        ("sm_90", (), 1),
        ("h100", (), 1),
        ("SM_90", (), 1),
    ],
)
def test_vendors_names_count_cores_chips_or_devices(name, shape, count):
    found = topology(name)
    assert (found.shape, found.count) == (shape, count)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "v5p-1000",
            "topology 'v5p-1000' does not exist; v5p has v5p-512 (4x8x8), v5p-1024 (8x8x8), "
            "v5p-2048 (8x8x16)",
        ),
        (
            "v5e-512",
            "topology 'v5e-512' does not exist; v5e has v5e-64 (8x8), v5e-128 (8x16), "
            "v5e-256 (16x16)",
        ),
        (
            "v5e-x",
            "topology 'v5e-x' does not exist; v5e has v5e-4 (2x2), v5e-8 (2x4), v5e-16 (4x4), "
            "v5e-32 (4x8), v5e-64 (8x8), v5e-128 (8x16), v5e-256 (16x16)",
        ),
        (
            "2xh100",
            "topology '2xh100' does not exist; known: v5e-N, v6e-N, v5p-N, tpu7x-N, and one GPU: "
            "sm_90, h100, h200",
        ),
        (
            "v9-8",
            "topology 'v9-8' does not exist; known: v5e-N, v6e-N, v5p-N, tpu7x-N, and one GPU: "
            "sm_90, h100, h200",
        ),
    ],
)
def test_what_does_not_exist_is_told_with_what_is_near(name, message):
    with pytest.raises(InputError) as error:
        topology(name)
    assert str(error.value) == message


def test_ends_are_connected_in_whole_cubes_and_whole_pods():
    wrapped = {name: topology(name).wraps for name in ("v5p-64", "v5p-128", "v6e-64", "v5e-256")}
    assert wrapped == {
        "v5p-64": (False,) * 3,
        "v5p-128": (True,) * 3,
        "v6e-64": (False,) * 2,
        "v5e-256": (True,) * 2,
    }


def test_every_machine_has_a_chip_and_every_chip_a_source():
    assert {*SLICES, *GPUS.values()} <= CHIPS.keys()
    assert all(one.source and one.granted_bytes <= one.hbm_bytes for one in CHIPS.values())
    assert (
        chip("v5e").rate("int8") == 2 * chip("v5e").rate("bfloat16") == 2 * chip("v5e").rate("fp8")
    )
    with pytest.raises(InputError, match="chip 'v5' is not known; did you mean v5p"):
        chip("v5")
