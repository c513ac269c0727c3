"""The report: what it gathers from runs, that nothing in it can become markup, and the server that follows a run."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import switchkd
from reports import HOSTILE, log_events, rollout_line, write_json_lines, write_report_run
from sockets import running
from switchkd.errors import UserError
from switchkd.report.curves import charts
from switchkd.report.page import page
from switchkd.report.tables import csv_table, evaluation_table, values_table
from switchkd.run.follow import FollowServer
from switchkd.run.gathered import ReportData, files_read, gather, sources_of

SOURCE = Path(switchkd.__file__).parent


def gathered(*paths: Path, most_rollouts: int = 200) -> ReportData:
    return gather(sources_of(paths), most_rollouts=most_rollouts, version="0")


class Elements(HTMLParser):
    """The page's elements as a browser finds them, each with its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.is_open = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))
        self.is_open = True

    def handle_endtag(self, tag: str) -> None:
        self.is_open = False

    def handle_data(self, data: str) -> None:
        if self.is_open:
            tag, attributes, before = self.found[-1]
            self.found[-1] = tag, attributes, before + data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


# ------------------------------------------------------------------------------------------------------------- the page


def test_nothing_that_a_model_or_a_file_wrote_becomes_markup(tmp_path: Path) -> None:
    hostile = rollout_line(words=[HOSTILE], prompt=HOSTILE, stage=HOSTILE, finish_reason=HOSTILE)
    folder = write_report_run(tmp_path / "a<b>&'", [hostile], stage=HOSTILE, student=HOSTILE, seed=HOSTILE)
    (folder / "study.csv").write_text(f'method,score\n"{HOSTILE}",1\n')
    text = page(gathered(folder))
    elements = Elements(text)
    plain = Elements(page(gathered(write_report_run(tmp_path / "plain", [rollout_line()]))))
    assert [tag for tag, *_ in elements.found] == [tag for tag, *_ in plain.found]
    (_, data), (_, script) = elements.of("script")
    assert HOSTILE not in script
    read = json.loads(data)
    assert read["strings"][read["rollouts"][0]["texts"][0]] == HOSTILE
    assert read["rollouts"][0]["prompt"] == read["rollouts"][0]["stage"] == HOSTILE
    assert [HOSTILE, "1"] in read["scores"][0]["rows"]
    assert elements.of("title")[0][1].startswith("a<b>&' ")


def test_the_policy_allows_the_pages_own_script_and_style_alone(tmp_path: Path) -> None:
    data = gathered(write_report_run(tmp_path / "run", [rollout_line()]))
    for follow in (False, True):
        elements = Elements(page({**data, "follow": follow}))
        (content,) = [a["content"] for a, _ in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        rules = dict(rule.split(" ", 1) for rule in str(content).split("; "))
        _, (_, script) = elements.of("script")
        ((_, style),) = elements.of("style")
        for kind, text in (("script-src", script), ("style-src", style)):
            assert rules[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["connect-src"] == ("'self'" if follow else "'none'")
        # An attribute with a style or a listener would need the rule to be loosened.
        assert not [name for _, each, _ in elements.found for name in each if name == "style" or name.startswith("on")]
        links = [each[name] for _, each, _ in elements.found for name in ("src", "href") if name in each]
        assert all(str(link).startswith("#") for link in links)


def test_the_pages_script_makes_no_markup_of_text() -> None:
    own = "".join(path.read_text() for path in (SOURCE / "assets" / "report").glob("*.js"))
    assert len(own) > 10_000
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", own)
    assert {path.name for path in (SOURCE / "assets" / "report" / "uplot").iterdir()} >= {"LICENSE", "README"}


# -------------------------------------------------------------------------------------------------------- what it shows


def test_a_run_is_gathered(tmp_path: Path) -> None:
    lines = [
        rollout_line(seed=seed, step=1 + 5 * (seed // 2), prompt_id=seed % 2, prompt=f"prompt {seed % 2}")
        for seed in range(6)
    ]
    folder = write_report_run(tmp_path / "run", lines)
    data = gathered(folder)
    facts = dict(data["runs"][0]["facts"])
    assert (facts["method"], facts["steps"], facts["evaluation loss"]) == ("switch", "12", "0.4000")
    assert not data["runs"][0]["finished"]
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:3] == ["Loss", "Evaluation loss", "Teacher's share of the tokens"]
    assert [line["name"] for line in data["charts"][-1]["lines"]] == ["tokens 0-31", "tokens 32-63"]
    assert data["scores"][0]["rows"][0] == [
        "run",
        "world:test",
        "8",
        "31.25 ± 0.50",
        "12.50 ± 12.50",
        "20.00 ± 20.00",
        "0.90 ± 0.90",
    ]
    chosen, defaults, environment = data["settings"]
    assert ["threshold", "0.3"] in chosen["rows"]
    assert defaults["rows"] == [["weight_decay", "0"]]
    assert environment["rows"] == [["torch", "2.9"], ["git_commit", "none"]]
    first = data["rollouts"][0]
    assert [data["strings"][place] for place in first["texts"]] == lines[0]["texts"]
    assert first["by_teacher"] == "".join(str(int(each)) for each in lines[0]["written_by_teacher"])
    assert [each["prompt_key"] for each in data["rollouts"]] == [0, 1, 0, 1, 0, 1]
    favorites = first["teacher_favorites"][0]
    assert data["strings"][favorites[0]] == lines[0]["texts"][0]
    assert sum(favorites[1::2]) == pytest.approx(10_000, abs=3)


def test_a_report_needs_nothing_but_a_file_of_rollouts_and_reads_earlier_ones(tmp_path: Path) -> None:
    earlier = {
        key: value for key, value in rollout_line().items() if "favorites" not in key and key not in ("texts", "step")
    }
    nobody = rollout_line(divergence=[None] * 6, threshold=[None] * 6, teacher_logp=[None] * 6)
    broken: list[Any] = [{"response": "no tokens"}, rollout_line(texts=["too few"], step=2), {}]
    broken.append(rollout_line(divergence="x", step=3))
    path = write_json_lines(tmp_path / "rollouts.jsonl", [earlier, nobody, *broken])
    with path.open("a") as file:
        file.write('{"cut off by a cra')
    data = gathered(path)
    assert (len(data["rollouts"]), data["lines_left_out"]) == (2, 4)
    assert data["rollouts"][0]["student_favorites"] == []
    assert data["rollouts"][0]["step"] is None
    assert data["rollouts"][1]["divergence"] == data["rollouts"][1]["threshold"] == []
    assert (data["charts"], data["scores"], data["settings"]) == ([], [], [])
    assert "<html" in page(data)


def test_where_a_resumed_run_wrote_a_step_again_the_later_rollout_stands_for_it(tmp_path: Path) -> None:
    lines = [rollout_line(step=step, seed=seed, sample_id=step) for seed, step in enumerate((1, 6, 6, 11))]
    data = gathered(write_json_lines(tmp_path / "rollouts.jsonl", lines))
    assert [each["step"] for each in data["rollouts"]] == [1, 6, 11]
    assert [data["strings"][place] for place in data["rollouts"][1]["texts"]] == lines[2]["texts"]
    assert data["rollouts_beyond"] == 0
    nameless = [{key: value for key, value in each.items() if key != "prompt_id"} for each in lines]
    assert len(gathered(write_json_lines(tmp_path / "nameless.jsonl", nameless))["rollouts"]) == 4


def test_of_many_rollouts_an_even_share_is_taken(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "many.jsonl", [rollout_line(step=step) for step in range(1, 102)])
    data = gathered(path, most_rollouts=5)
    assert [each["step"] for each in data["rollouts"]] == [1, 26, 51, 76, 101]
    assert data["rollouts_beyond"] == 96
    assert gathered(path, most_rollouts=0)["rollouts"] == []


def test_runs_are_compared(tmp_path: Path) -> None:
    ours = write_report_run(tmp_path / "switch", [rollout_line()])
    theirs = write_report_run(tmp_path / "gkd", [rollout_line()], method="gkd")
    for data in (gathered(ours, theirs), gathered(tmp_path)):
        assert {each["name"] for each in data["runs"]} == {"switch", "gkd"}
        assert {line["name"] for line in data["charts"][0]["lines"]} == {"switch", "gkd"}
        (chosen, *_) = data["settings"]
        assert [chosen["rows"][index][0] for index in chosen["marked"]] == ["method"]
        assert {each["run"] for each in data["rollouts"]} == {0, 1}
        assert len({each["prompt_key"] for each in data["rollouts"]}) == 1
    again = write_report_run(tmp_path / "old" / "switch")
    assert [each.name for each in sources_of([ours, again, ours])] == [f"{tmp_path.name}/switch", "old/switch"]


def test_a_study_shows_its_table_and_a_few_of_its_runs(tmp_path: Path) -> None:
    (tmp_path / "study.csv").write_text("method,score\nswitch,1\n")
    for count in range(1, 10):
        write_report_run(tmp_path / "runs" / f"switch-{count}" / "run")
        data = gathered(tmp_path)
        assert [table["title"] for table in data["scores"]][:1] == [f"Study: {tmp_path.name}"]
        names = [f"switch-{number}" for number in range(1, count + 1)] if count <= 8 else []
        assert [each["name"] for each in data["runs"]] == [tmp_path.name, *names]


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run's folder and no \.jsonl file"):
        sources_of([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"nothing to report in .*: no run.yaml"):
        sources_of([tmp_path])
    (tmp_path / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        gathered(tmp_path)


def test_curves_are_thinned_and_leave_out_what_is_no_number() -> None:
    events = [*log_events(3000), {"stage": "", "step": 3001, "loss": float("nan")}, {"step": "x", "loss": 1.0}]
    line = charts({"run": events})[0]["lines"][0]
    assert len(line["steps"]) == 600
    assert line["steps"][-1] == 3000
    # The mean of the first five losses, 1, 1/2, ... 1/5, to five digits.
    assert line["values"][0] == pytest.approx(sum(1 / step for step in range(1, 6)) / 5, rel=1e-4)
    resumed = charts({"run": [*log_events(4), {"stage": "", "step": 2, "loss": 9.0}]})[0]["lines"][0]
    assert resumed["steps"] == [1, 2, 3, 4]
    assert resumed["values"][1] == 9.0


def test_tables() -> None:
    table = csv_table("study", "method,share,score\nswitch,,0.123456\ngkd,0.5,12\n\n")
    assert table["numeric"] == [1, 2]
    assert table["rows"] == [["switch", "", "0.12346"], ["gkd", "0.5", "12"]]
    assert csv_table("empty", "")["rows"] == []
    assert csv_table("long", "a\n" + "1\n" * 600)["note"] == "The first 500 of 600 rows."
    values = values_table("", {"a": {"x": {"k": [1, 2]}, "y": True}, "b": {"y": True, "z": 1e-3, "n": 1}})
    assert values["rows"] == [["x", "{k: [1, 2]}", "–"], ["y", "true", "true"], ["z", "–", "0.001"], ["n", "–", "1"]]
    assert values["marked"] == [0, 2, 3]


def test_scores_of_ones_own_are_shown_and_what_could_not_be_scored_is_a_dash() -> None:
    ours = {"rouge_l": None, "exact_match": None, "response_tokens": 5.0, "ended_share": 1.0}
    prompts = {
        "rows": 2,
        "mean": {**ours, "own": {"words": 3.0, "odd": None}},
        "deviation": {**ours, "own": {"words": 0.5}},
    }
    plain = {"rows": 1, "mean": {**ours, "rouge_l": 12.0}, "deviation": None}
    table = evaluation_table(
        {
            "a": {"sets": {"x": {"overall": prompts, "by_bucket": ["no mapping"]}, "y": {"overall": {"mean": 3}}}},
            "b": {"sets": {"x": {"overall": plain, "by_bucket": {"long": None}}}},
        }
    )
    assert table["columns"][3:] == ["ROUGE-L", "exact match", "tokens", "ended", "words", "odd"]
    assert table["numeric"] == [*range(2, 9)]
    assert table["rows"] == [
        ["a", "x", "2", "–", "–", "5.00 ± 5.00", "1.00 ± 1.00", "3.00 ± 0.50", "–"],
        ["b", "x", "1", "12.00", "–", "5.00", "1.00", "–", "–"],
    ]


# -------------------------------------------------------------------------------------------------- following a run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[FollowServer, Path]]:
    folder = write_report_run(tmp_path / "run", [rollout_line()])

    def data() -> dict[str, Any]:
        return {**gather(sources_of([folder]), most_rollouts=9, version="0", follow=True)}

    with running(FollowServer(0, data, lambda: files_read(sources_of([folder])))) as server:
        yield server, folder


def ask(server: FollowServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_a_followed_page_asks_for_news_and_gets_them(served: tuple[FollowServer, Path]) -> None:
    server, folder = served
    assert server.server_address[0] == "127.0.0.1"
    answer, body = ask(server, "/")
    assert answer.status == 200
    assert b"connect-src 'self'" in body
    assert "frame-ancestors 'none'" in str(answer.headers["Content-Security-Policy"])
    answer, body = ask(server, "/data.json", Host=f"localhost:{server.port}")
    assert len(json.loads(body)["rollouts"]) == 1
    state = str(answer.headers["ETag"])
    assert ask(server, "/data.json", If_None_Match=state)[0].status == 304
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(rollout_line(step=6)) + "\n")
    answer, body = ask(server, "/data.json", If_None_Match=state)
    assert answer.status == 200
    assert len(json.loads(body)["rollouts"]) == 2


def test_a_followed_page_is_for_this_machine_and_to_be_read(served: tuple[FollowServer, Path]) -> None:
    server, _ = served
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
        answer, body = ask(server, "/data.json", method)
        assert (answer.status, answer.headers["Allow"], body) == (405, "GET", b"")
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1",
        f"127.0.0.1:{server.port}.evil.example",
        "",
    ):
        answer, body = ask(server, "/data.json", Host=host)
        assert (answer.status, body) == (421, b""), host
    for path in ("/run.yaml", "/../run.yaml", "/data.json/x"):
        assert ask(server, path)[0].status == 404
    with pytest.raises(UserError, match=f"port {server.port} cannot be had"):
        FollowServer(server.port, dict, list)


# ------------------------------------------------------------------------------------------------------------- its colors


def luminance(color: str) -> float:
    """Of WCAG 2.2, from #rrggbb."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_every_color_is_told_from_its_ground() -> None:
    """WCAG AA: 4.5 for text, 3 for lines and bars."""
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    sheet = (SOURCE / "assets" / "report" / "page.css").read_text()
    colors = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", sheet)}
    shades = [name for name in colors if re.fullmatch(r"(student|teacher)-\d", name)]
    lines = [name for name in colors if name.endswith("-strong") or name.startswith("line-")]
    assert (len(shades), len(lines)) == (10, 8)
    for scheme in (0, 1):
        shown = {name: pair[scheme] for name, pair in colors.items()}
        for ground in ("page", "surface", *shades):
            assert contrast(shown["text"], shown[ground]) >= 4.5, (scheme, ground)
        for ground in ("page", "surface"):
            assert contrast(shown["muted"], shown[ground]) >= 4.5, (scheme, ground)
            assert contrast(shown["accent"], shown[ground]) >= 4.5, (scheme, ground)
            for name in lines:
                assert contrast(shown[name], shown[ground]) >= 3, (scheme, name)
