"""Which files of a repository on the Hub are weights, over a stand-in for the Hub."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preprocessing.errors import UserError
from trainer import hub
from trainer.weights_cache import WeightsCache

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}", "README.md": b"read me"}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub with one repository me/it, whose commit and files a test may change."""
    import huggingface_hub

    state = SimpleNamespace(commit="c1", files=dict(FILES), fetched=[])

    class Api:
        def model_info(self, name: str, revision: str | None = None, timeout: float | None = None) -> Any:
            if name != "me/it":
                raise OSError(f"no {name} at https://me:pw@hub/?token=s3cret")
            return SimpleNamespace(sha=state.commit, siblings=[SimpleNamespace(rfilename=one) for one in state.files])

    def fetch(repository: str, name: str, revision: str, local_dir: str) -> str:
        assert (repository, revision) == ("me/it", state.commit)
        state.fetched.append(name)
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(state.files[name])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return state


@pytest.mark.parametrize(
    ("source", "names", "expected"),
    [
        ("me/it", ["trained_model.tar", "other.safetensors"], ["trained_model.tar"]),
        ("me/it", ["README.md", "mine.safetensors"], ["mine.safetensors"]),
        ("me/it", ["a.safetensors", "pytorch_lora_weights.safetensors"], ["pytorch_lora_weights.safetensors"]),
        ("me/it", ["x/deep.safetensors", "a.safetensors", "embeddings.pti"], ["a.safetensors", "embeddings.pti"]),
        (
            "me/it",
            ["pytorch_lora_weights.safetensors", "embeddings.safetensors"],
            ["pytorch_lora_weights.safetensors", "embeddings.safetensors"],
        ),
        ("me/it", ["embeddings.safetensors"], ["embeddings.safetensors"]),
        ("me/it/x/deep.safetensors", ["x/deep.safetensors"], ["x/deep.safetensors"]),
    ],
)
def test_what_is_fetched(source: str, names: list[str], expected: list[str]) -> None:
    assert hub.wanted(source, names) == expected


@pytest.mark.parametrize(
    ("source", "names", "told"),
    [
        ("me/it", ["pytorch_lora_weights.bin"], "pickles are never read"),
        ("me/it", ["model_index.json", "unet.safetensors"], "give it as base_model"),
        ("me/it/model.bin", ["model.bin"], "has no weights model.bin"),
        ("me/it/gone.safetensors", ["a.safetensors"], "has no weights gone.safetensors"),
    ],
)
def test_what_is_refused(source: str, names: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        hub.wanted(source, names)


def test_a_commit_is_downloaded_once(fake_hub: SimpleNamespace, tmp_path: Path) -> None:
    cache = WeightsCache(tmp_path, 10**6)
    with cache.held("me/it") as held:
        first = held.key
        with tarfile.open(held.path) as tar:
            assert tar.getnames() == ["adapter_model.safetensors", "adapter_config.json"]
    with cache.held("me/it") as held:
        assert held.key == first
    assert fake_hub.fetched == ["adapter_model.safetensors", "adapter_config.json"]
    fake_hub.commit = "c2"
    fake_hub.files["adapter_model.safetensors"] = b"newer"
    with cache.held("me/it") as held:
        assert held.key != first


def test_one_file_comes_as_it_is(fake_hub: SimpleNamespace, tmp_path: Path) -> None:
    with WeightsCache(tmp_path, 10**6).held("me/it/adapter_model.safetensors") as held:
        assert held.path.read_bytes() == b"weights"


def test_a_repository_that_is_not_there(fake_hub: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error, WeightsCache(tmp_path, 10**6).held("nobody/nothing"):
        pass
    assert "nobody/nothing" in str(error.value) and "s3cret" not in str(error.value)
