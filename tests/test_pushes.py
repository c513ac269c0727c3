"""What goes to the hub, by a stand-in for its client: a model's own files, and nothing that only the run should hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from runs import switchkd, write_run
from switchkd.training.pushing_trainer import _MODEL_FILES, _STATE_FILES, files_among
from switchkd.training.replay import FILE_NAME

Uploads = list[dict[str, Any]]
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    """What was uploaded, with the files that the patterns let through."""
    sent: Uploads = []

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, *, folder_path: str, allow_patterns: list[str], **given: Any) -> Any:
            there = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            sent.append({**given, "files": set(filter_repo_objects(there, allow_patterns=allow_patterns))})
            done = SimpleNamespace(done=lambda: True)
            return done if given.get("run_as_future") else None

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("switchkd.training.pushing_trainer.HfApi", Hub)
    monkeypatch.setattr("switchkd.run.launch.offline_at_once", lambda: False)
    return sent


def test_a_run_pushes_its_checkpoints_and_its_model_and_nothing_else(
    models: Path, tmp_path: Path, uploads: Uploads
) -> None:
    pytest.importorskip("peft")
    pushing = {
        "push_to_hub": True,
        "hub_model_id": "me/mine",
        "hub_token": "hf_secret",
        "hub_strategy": "all_checkpoints",
    }
    adapter = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    folder = tmp_path / "out"
    path = write_run(
        models, tmp_path, **pushing, peft=adapter, max_steps=2, teacher_offload="disk", show_rollouts_every=1
    )
    assert switchkd("train", path) == 0
    assert (folder / "rollouts.jsonl").is_file()
    model, state, final = uploads
    assert model["files"] == {"README.md", *ADAPTER, *TOKENIZER}
    assert state["path_in_repo"] == "checkpoint-2"
    assert state["files"] - model["files"] == {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"}
    assert final["files"] == MODEL | TOKENIZER
    # Whoever loads the merged model would get the adapter onto it.
    assert set(final["delete_patterns"]) == ADAPTER
    assert not ADAPTER & {path.name for path in folder.iterdir()}
    assert {each["repo_id"] for each in uploads} == {"me/mine"}
    assert {each["token"] for each in uploads} == {"hf_secret"}
    assert "hf_secret" not in (folder / "run.yaml").read_text()


def test_a_model_that_the_hub_does_not_take_is_whole_and_the_message_pushes_it(
    models: Path, tmp_path: Path, uploads: Uploads, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr("switchkd.training.pushing_trainer.HfApi.upload_folder", refuse)
    pushing = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_strategy": "end"}
    assert switchkd("train", write_run(models, tmp_path, **pushing, max_steps=1)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"is whole in {tmp_path / 'out'}, but was not pushed to me/mine (gone)" in said
    assert "--include model.safetensors" in said
    assert "rollouts" not in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_no_list_takes_in_texts_settings_or_a_teacher(tmp_path: Path) -> None:
    private = ["run.yaml", "log.jsonl", "rollouts.jsonl", "teacher_text.jsonl", "training_args.bin", FILE_NAME]
    for name in [*private, "model-00001-of-00002.safetensors", "tokenizer.model", "vocab.json"]:
        (tmp_path / name).touch()
    (tmp_path / "_teacher-x").mkdir()
    (tmp_path / "_teacher-x" / "weights.safetensors").touch()
    shared = ["model-00001-of-00002.safetensors", "tokenizer.model", "vocab.json"]
    assert files_among(tmp_path, (*_MODEL_FILES, *_STATE_FILES)) == shared
