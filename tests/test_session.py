"""What every command opens, and the mesh that it takes."""

import logging

import jax
import pytest

import jspec
from jspec import session, sharding

TINY = jspec.ModelConfig(family="llama", vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=8,
                         num_kv_heads=8, head_dim=8, initializer_range=0.2, stop_tokens=(1,))


def sizes(mesh):
    return tuple(mesh.shape.values())


@pytest.mark.parametrize(("rows", "expected"), [(8, (1, 8, 1)), (1, (1, 1, 8)), (6, (1, 2, 4)), (4, (1, 4, 2))])
def test_the_mesh_of_so_many_rows(rows, expected, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda *sizes: (*sizes[:3], len(sizes[3])))
    assert sharding.mesh_of_rows(TINY, rows, list(range(8))) == (*expected, 8)


def test_devices_that_neither_rows_nor_heads_can_use_are_named(monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    session.mesh_for(TINY, 3, "--samples")
    assert ("3 row(s) and this model's 8 heads can be split over 1 of 8 devices; --samples 8 uses them all"
            in capsys.readouterr().err)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jspec.InputError, match="1 of 8 devices"):
        session.mesh_for(TINY, 3, "--samples")


def test_rows_are_filled_up():
    assert sharding.filled([1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert sharding.filled([1, 2, 3], 8, rows=4) == [1, 2, 3, 1]
    assert sharding.filled([1, 2, 3], 1) == sharding.filled([1, 2, 3], 3) == [1, 2, 3]


def test_a_session_logs_where_it_is_told_to_and_gives_signals_back(capsys):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with session.session("info") as opened:
        mesh = opened.use(sharding.mesh_of_weights(TINY))
        logging.getLogger("jspec.anything").info("told")
        assert jax.sharding.get_mesh() == mesh and signal.getsignal(signal.SIGTERM) != before
    assert jax.sharding.get_mesh().empty and signal.getsignal(signal.SIGTERM) == before
    assert "told" in capsys.readouterr().err
