"""The model card: metadata that the hub reads, escaped text, and scores that come later."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from switchkd.evaluation.score import Evaluation, Scores, SetResult, Summary
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.training.card import Origins, model_card, with_scores
from trainers import make_trainer


def evaluation(name: str = "dolly", value: float = 21.5) -> Evaluation:
    scores = Scores(value, 3.25, 40.0, 0.9)
    summary = Summary(500, scores, Scores(0.5, 0.25, 1.0, 0.0), {10: scores, 20: scores})
    return Evaluation("x", "2026-11-28T00:00:00+00:00", Sampling(64), (10, 20), 256, {name: SetResult(summary, {}, [])})


def test_the_card_of_the_trainer_takes_the_place_of_transformers(llama_pair: ModelPair, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "mine", llama_pair, method="gkd", threshold=None)
    trainer.origins = Origins(
        "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", ["dolly", "owner/name:train", f"{tmp_path}/x.jsonl:y"]
    )
    trainer.create_model_card(model_name="Q", license="mit", tags="mine", tasks="ignored")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["MiniLLM/dolly", "owner/name"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["switchkd", "knowledge-distillation", "mine"],
    }
    assert card.text.strip().startswith("# Q\n")
    assert "| teacher | `Qwen/Qwen2.5-7B` |" in card.text
    assert "| method | `gkd`: on-policy distillation" in card.text
    assert "arXiv 2306.13649" in card.text
    settings = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["method"] == "gkd"
    assert settings["max_new_tokens"] == 10
    assert settings["learning_rate"] == 1e-3


def test_a_push_sends_our_card(llama_pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    class Hub:
        def upload_folder(self, *, folder_path: str, **ignored: object) -> None:
            sent.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr("switchkd.training.pushing_trainer.HfApi", Hub)
    trainer = make_trainer(tmp_path / "mine", llama_pair, hub_model_id="me/mine")
    trainer.hub_model_id = "me/mine"
    trainer.push_to_hub()
    (card,) = sent
    assert "# mine\n\nDistilled with switchkd." in card
    assert 'name = "me/mine"' in card


def test_a_card_says_nothing_of_this_machine_and_is_not_fooled_by_names(llama_pair: ModelPair, tmp_path: Path) -> None:
    folder = tmp_path / "a`b | <script>"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    trainer = make_trainer(tmp_path / "# out\n---", llama_pair, model_init_kwargs={"token": "hf_secret"})
    text = model_card(Origins(str(folder), str(tmp_path / "gone"), str(tmp_path)), trainer.args, 3)
    assert str(tmp_path) not in text
    assert "| teacher | `gone` |" in text
    assert "hf_secret" not in text
    # A code span with two marks, since the name holds one; the bar would end a cell of the table.
    assert "| base model | `` a`b \\| <script> `` |" in text
    card = ModelCard(text)
    assert "base_model" not in card.data.to_dict()
    assert card.text.strip().splitlines()[0] == "# \\# out ---"
    assert "koo-etal-2025-switch" in text


def test_scores_come_into_text_and_metadata_and_replace_older_ones(llama_pair: ModelPair, tmp_path: Path) -> None:
    args = make_trainer(tmp_path / "run", llama_pair).args
    card = model_card(Origins("world:student"), args, 3)
    owners = card.replace("## License", "## My own words\n\nStay.\n\n## License")
    assert "Not evaluated yet" in card
    once = with_scores(owners, evaluation(value=11.0))
    assert once is not None
    twice = with_scores(once, evaluation())
    assert twice is not None
    assert "| `dolly` | 500 | 21.50 ± 0.50 | 3.25 ± 0.25 |" in twice
    assert "11.0" not in twice
    assert "Not evaluated yet" not in twice
    assert "My own words\n\nStay." in twice
    (rouge, exact) = ModelCard(twice).data.eval_results
    assert (rouge.dataset_type, rouge.metric_type, rouge.metric_value) == ("MiniLLM/dolly", "rouge", 21.5)
    assert (exact.metric_type, exact.metric_value) == ("exact_match", 3.25)
    # What was measured elsewhere stays, and a name is written as it is.
    parsed = ModelCard(twice.replace("# run", "# my\\_run"))
    other = EvalResult("text-generation", "mmlu", "MMLU", "acc", 0.5, metric_name="accuracy")
    parsed.data.eval_results.append(other)
    again = with_scores(str(parsed), evaluation(value=11.0))
    assert again is not None
    data = ModelCard(again).data
    assert [each.metric_name for each in data.eval_results] == ["accuracy", "ROUGE-L", "exact match"]
    assert data.model_name == "my_run"
    # Whoever has written a card of their own keeps it.
    assert with_scores("# Mine", evaluation()) is None


@pytest.mark.parametrize("is_adapter", [True, False])
def test_an_adapter_is_loaded_by_peft(llama_pair: ModelPair, tmp_path: Path, is_adapter: bool) -> None:
    args = make_trainer(tmp_path / "run", llama_pair).args
    library = ModelCard(model_card(Origins("x/y"), args, 3, is_adapter=is_adapter)).data.library_name
    assert library == ("peft" if is_adapter else "transformers")
