import os
import subprocess
import sys

import jax
import pytest

from jspec.compile_cache import forget, keep_compiled, kind_of_machine


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """A user who has set no cache; after the test JAX has the settings from before."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("JSPEC_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_where_the_user_set_nothing(unset):
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(unset / kind_of_machine())
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    # and nobody else may write there
    assert [path.name for path in unset.rglob("*")] == [kind_of_machine()]
    assert (unset / kind_of_machine()).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", ["", "/elsewhere"])
def test_the_users_own_setting_stays(unset, monkeypatch, value):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None and not unset.exists()


def test_several_processes_on_gpus_keep_none(unset, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_a_warning(unset, capsys):
    unset.parent.write_text("a file")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert (capsys.readouterr().err == (
        f"jspec: warning: {unset / kind_of_machine()} cannot be used (Not a directory): compiled "
        "programs are not kept; name another folder with JSPEC_CACHE\n"))


def test_a_home_of_nobody_is_a_warning(unset, monkeypatch, capsys):
    monkeypatch.setenv("JSPEC_CACHE", "~nobody-/cache")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert (capsys.readouterr().err
            == ("jspec: warning: JSPEC_CACHE '~nobody-/cache' cannot be looked at: Could not "
                "determine home directory: compiled programs are not kept\n"))


def test_a_folder_that_others_may_write_to_is_a_warning(unset, capsys):
    (unset / kind_of_machine()).mkdir(parents=True)
    (unset / kind_of_machine()).chmod(0o777)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert "cannot be used (others than you may write to it)" in capsys.readouterr().err


def test_another_processor_has_another_folder(monkeypatch):
    here = kind_of_machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(1000))
    assert kind_of_machine() != here


def test_what_was_longest_out_of_use_is_forgotten(tmp_path):
    for age, name in enumerate("dcba"):
        path = tmp_path / "kind" / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (1e9 - age, 1e9 - age))
    forget(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.rglob("*-cache")) == ["c-cache", "d-cache"]


PROGRAM = """
import jax, sys
from jspec.compile_cache import keep_compiled
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
keep_compiled()
for _ in range(2):
    print(jax.jit(lambda x: x * 3)(14.0), len(hits))
    jax.clear_caches()  # as in a new process
"""


def test_what_was_compiled_is_read_back(tmp_path):
    clean = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment = clean | {"JSPEC_CACHE": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True)
    assert said.splitlines() == ["42.0 0", "42.0 1"]
