"""Finding models and telling them apart."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mooncake.core.errors import ModelError
from mooncake.engine import models
from mooncake.engine.models import fingerprint, model_config, resolve_model
from tests.engine.tiny_models import SUPPORTED, save_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(SUPPORTED["llama"], tmp_path / "a-model")


def test_a_folder_is_taken_as_it_is(model: Path) -> None:
    found = resolve_model(str(model))
    assert (found.path, found.name) == (model.resolve(), "a-model")


@pytest.mark.parametrize("place", ["/no/such/folder", "./no-such", "~/no-such"])
def test_a_missing_folder_is_not_looked_for_elsewhere(place: str) -> None:
    with pytest.raises(ModelError, match=f"model '{place}': there is no such folder"):
        resolve_model(place)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_the_shipped_model_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(models, "_SHIPPED", {models.DEFAULT_MODEL: ("no_such_package", "no-such-package", "x.gguf")})
    with pytest.raises(ModelError, match="install the package no-such-package"):
        resolve_model(models.DEFAULT_MODEL)


def test_a_model_is_made_once_and_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    made: list[bool] = []

    def make() -> None:
        with models._building(target) as draft:
            made.append(draft is not None)
            if draft is not None:
                assert not target.exists()
                time.sleep(0.02)
                (draft / "config.json").write_text("{}")

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, False, True]
    assert (target / "config.json").is_file()
    with pytest.raises(ZeroDivisionError), models._building(tmp_path / "broken"):
        1 / 0  # noqa: B018
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")) == ["made"]


def test_the_fingerprint_is_of_what_matters(model: Path, tmp_path: Path) -> None:
    first = fingerprint(model, "float32")
    assert first == fingerprint(save_model(SUPPORTED["llama"], tmp_path / "a-copy"), "float32")
    assert first != fingerprint(model, "bfloat16")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "x", "transformers_version": "9"}))
    assert fingerprint(model, "float32") == first
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fingerprint(model, "float32") != first


def test_the_fingerprint_sees_other_weights_and_another_revision(model: Path, tmp_path: Path) -> None:
    first = fingerprint(model, "float32")
    snapshots = tmp_path / "snapshots"
    snapshots.mkdir()
    model = model.rename(snapshots / "abc")
    second = fingerprint(model, "float32")
    model = model.rename(snapshots / "def")
    third = fingerprint(model, "float32")
    with (model / "model.safetensors").open("ab") as weights:
        weights.write(b"more")
    assert len({first, second, third, fingerprint(model, "float32")}) == 4


def test_the_fingerprint_sees_weights_of_the_same_shapes(model: Path, tmp_path: Path) -> None:
    other = save_model(SUPPORTED["llama"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = max(weights)
    weights[name] = weights[name] * 1.001
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(other, "float32") != fingerprint(model, "float32")


def test_a_folder_without_weights_has_no_fingerprint(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"a-model: it has no \*\.safetensors file"):
        fingerprint(model, "float32")


def test_a_broken_folder_is_a_model_error(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="model folder"):
        fingerprint(model, "float32")
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match="model folder"):
        model_config(model)
