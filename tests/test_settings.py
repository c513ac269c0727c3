"""The list of settings: every one of ours, in its group, and the page that is held to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import switchkd
from switchkd.report.settings_page import GROUPS, LAST_GROUP, grouped, settings_page
from switchkd.run.file import HINTS, OUR_FIELDS, OWN_HINTS, SWITCH_FIELDS


def test_the_page_in_docs_is_the_one_that_is_printed() -> None:
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text() == settings_page(OUR_FIELDS, HINTS), "switchkd settings --markdown > docs/settings.md"


def test_every_setting_of_ours_stands_once_with_its_sentence() -> None:
    groups = grouped(OUR_FIELDS)
    placed = [key for keys in groups.values() for key in keys]
    assert sorted(placed) == sorted({*OWN_HINTS, *SWITCH_FIELDS, "stages"})
    assert all(each.metadata["help"] for each in OUR_FIELDS.values())
    # A new setting is found in the last group until it has a better one.
    assert not set(groups[LAST_GROUP]) & {key for keys in GROUPS.values() for key in keys}


def test_the_list_shows_type_and_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert switchkd("settings") == 0
    lines = capsys.readouterr().out.splitlines()
    (adapter,) = [line for line in lines if line.startswith("adapter ")]
    assert "(one of merge, keep; default merge)" in adapter
    (student,) = [line for line in lines if line.startswith("student ")]
    assert "required" in student
    assert set(OUR_FIELDS) <= {line.split()[0] for line in lines if line}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rollout_rows", "default 64"),
        # A part says what it can be, and what each takes.
        ("weight", "weight: by_writer"),
        ("policy.keep_top_k", "of policy interleave"),
        ("keep_top_k", "default 25"),
        ("threshold", "threshold.teacher_share"),
        ("max_steps", "of transformers.TrainingArguments"),
    ],
)
def test_one_setting_is_shown_in_full(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("settings", name) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_wrong_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("settings", "rolout_rows") == 2
    assert "did you mean 'rollout_rows'?" in capsys.readouterr().err
