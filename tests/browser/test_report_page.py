"""The report's page in Chromium: what it draws, how it is used, and that it can be read by everyone."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from reports import HOSTILE, rollout_line, write_json_lines, write_report_run
from sockets import running
from switchkd.report.page import page
from switchkd.run.follow import FollowServer
from switchkd.run.gathered import files_read, gather, sources_of

pytestmark = pytest.mark.browser

Open = Callable[..., Any]
MIB = 1 << 20


def written(folder: Path, *paths: Path) -> Path:
    path = folder / "report.html"
    path.write_text(page(gather(sources_of(paths), most_rollouts=200, version="0")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: the first with eight rollouts of two prompts in four steps, the second with one of the first prompt."""
    folder = tmp_path_factory.mktemp("report")
    lines = [
        rollout_line(seed=n, step=1 + 5 * (n // 2), prompt_id=n % 2, prompt=f"Prompt {n % 2}?", tokens=30 + n)
        for n in range(8)
    ]
    lines[3]["finish_reason"] = "length"
    ours = write_report_run(folder / "switch", lines)
    theirs = write_report_run(folder / "gkd", [rollout_line(seed=9, prompt="Prompt 0?", tokens=20)], method="gkd")
    return written(folder, ours, theirs)


def all_of(page: Any, selector: str) -> list[Any]:
    return page.find_elements(By.CSS_SELECTOR, selector)  # type: ignore[no-any-return]


def one(page: Any, selector: str) -> Any:
    (found,) = all_of(page, selector)
    return found


def look_at(page: Any, index: int) -> None:
    """Click a token, from where it can be seen."""
    token = all_of(page, ".tokens .token")[index]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    token.click()


def complaints(page: Any) -> list[Any]:
    """What the browser has said, such as a script's error or what the policy has blocked."""
    return page.get_log("browser")  # type: ignore[no-any-return]


def test_it_draws_everything_without_a_complaint(opened: Open, report: Path) -> None:
    page = opened(report)
    assert one(page, "h1").text == "switch, gkd"
    # Loss, evaluation loss, share, length, ended, speed, and the divergence of each run.
    assert len(all_of(page, ".chart canvas")) == 8
    assert len(all_of(page, ".rollout-list button")) == 9
    assert len(all_of(page, ".tokens .token")) == 30
    assert len(all_of(page, ".curve canvas")) == 1
    values = "new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    drawn = page.execute_script(f"return [...document.querySelectorAll('canvas')].map(c => {values})")
    # A canvas that nobody painted has one value alone.
    assert min(drawn) > 10
    cells = [each.text for each in all_of(page, "#score-tables tbody tr:first-child td")]
    assert cells == ["world:test", "8", "31.25 ± 0.50", "12.50 ± 12.50", "20.00 ± 20.00", "0.90 ± 0.90"]
    assert "≠" in one(page, "#settings-tables tr.differs th").text
    one(page, ".chart:first-child summary").click()
    assert len(all_of(page, ".chart:first-child tbody tr")) == 12
    assert complaints(page) == []


def test_filters(opened: Open, report: Path) -> None:
    page = opened(report)

    def shown() -> int:
        return len(all_of(page, ".rollout-list button"))

    def fill(name: str, value: str) -> None:
        field = page.find_element(By.NAME, name)
        field.clear()
        field.send_keys(value)

    for name, choice, left in (("run", "gkd", 1), ("step", "6", 2), ("ended", "by its length", 1)):
        Select(page.find_element(By.NAME, name)).select_by_visible_text(choice)
        assert shown() == left, name
        one(page, ".filters button").click()
        WebDriverWait(page, 5).until(lambda _: shown() == 9)
    fill("lengthFrom", "35")
    assert shown() == 3
    fill("lengthTo", "36")
    assert shown() == 2
    assert one(page, "#rollout-count").text == "2 of 9 rollouts"
    fill("shareFrom", "101")
    assert (shown(), one(page, ".rollout-list").text) == (0, "No rollout fits these filters.")
    one(page, ".filters button").click()
    WebDriverWait(page, 5).until(lambda _: shown() == 9)
    fill("divergenceFrom", "0.12")
    kept = shown()
    fill("divergenceFrom", "")
    fill("divergenceTo", "0.12")
    assert 0 < kept < 9
    assert kept + shown() == 9
    assert complaints(page) == []


def test_a_token_is_looked_at_by_pointer_tap_and_keyboard(opened: Open, report: Path) -> None:
    page = opened(report)
    tokens = all_of(page, ".tokens .token")
    line = rollout_line(seed=0, tokens=30)

    def inspected() -> str:
        return str(one(page, ".inspector").text)

    assert "Point at a token" in inspected()
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[3])
    ActionChains(page).move_to_element(tokens[3]).perform()
    assert "position 3 " in inspected()
    assert len(all_of(page, ".inspector tbody tr")) == 10
    assert f"divergence {line['divergence'][3]:.3g}"[:15] in inspected()
    assert f"written by the {'teacher' if line['written_by_teacher'][3] else 'student'}" in inspected()
    look_at(page, 5)
    assert "position 5 " in inspected()
    listbox = one(page, ".tokens")
    assert page.switch_to.active_element == listbox
    listbox.send_keys(Keys.ARROW_RIGHT)
    assert "position 6 " in inspected()
    assert listbox.get_attribute("aria-activedescendant") == tokens[6].get_attribute("id")
    listbox.send_keys(Keys.HOME, Keys.ARROW_DOWN)
    below = page.execute_script("return document.querySelector('.token.active').getBoundingClientRect().top")
    assert (
        below > page.execute_script("return document.querySelector('.tokens .token').getBoundingClientRect().top") + 10
    )
    listbox.send_keys(Keys.HOME)
    by_teacher = [index for index, each in enumerate(line["written_by_teacher"]) if each and index > 0]
    listbox.send_keys("t", "t")
    assert f"position {by_teacher[1]} " in inspected()
    listbox.send_keys("T")
    assert f"position {by_teacher[0]} " in inspected()
    listbox.send_keys(Keys.END)
    assert "position 29 " in inspected()
    listbox.send_keys(Keys.ESCAPE)
    assert not all_of(page, ".token.active")
    # Not by color alone.
    marks = page.execute_script(
        "return ['teacher', 'student'].map(w => getComputedStyle(document.querySelector('.tokens .' + w)).borderBottomColor)"
    )
    assert marks[1].replace(" ", "") == "rgba(0,0,0,0)" != marks[0]
    assert complaints(page) == []


def test_one_prompt_side_by_side(opened: Open, report: Path) -> None:
    page = opened(report)
    beside = Select(one(page, "#beside"))
    assert [option.text for option in beside.options[1:]] == [
        "switch · step 6 · prompt 0",
        "switch · step 11 · prompt 0",
        "switch · step 16 · prompt 0",
        "gkd · step 1 · prompt 0",
    ]
    beside.select_by_visible_text("gkd · step 1 · prompt 0")
    left, right = all_of(page, ".panel")
    assert right.find_element(By.TAG_NAME, "h3").text == "gkd · step 1 · prompt 0"
    assert abs(left.location["y"] - right.location["y"]) < 5
    assert len(all_of(right, ".tokens .token")) == 20
    # It stays beside another rollout of the prompt, and goes with another prompt.
    all_of(page, ".rollout-list button")[2].click()
    assert [each.text for each in all_of(page, ".panel h3")] == [
        "switch · step 6 · prompt 0",
        "gkd · step 1 · prompt 0",
    ]
    all_of(page, ".rollout-list button")[1].click()
    assert [each.text for each in all_of(page, ".panel h3")] == ["switch · step 1 · prompt 1"]
    assert complaints(page) == []


def test_on_a_phone_nothing_is_cut_off(opened: Open, report: Path) -> None:
    page = opened(report, 360)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    Select(one(page, "#beside")).select_by_index(1)
    left, right = all_of(page, ".panel")
    assert right.location["y"] > left.location["y"] + 100
    look_at(page, 4)
    assert "position 4 " in one(page, ".inspector").text
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    assert complaints(page) == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_axe_finds_nothing(opened: Open, report: Path, width: int, dark: bool) -> None:
    """The rules of WCAG 2.2 A and AA, contrast among them, and axe's own best practices."""
    spec = find_spec("axe_playwright_python")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("axe-core is not installed: make test-browser")
    page = opened(report, width, dark=dark)
    Select(one(page, "#beside")).select_by_index(1)
    page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    look_at(page, 4)
    page.execute_script((Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8"))
    found = page.execute_async_script("const done = arguments[0]; axe.run().then(done)")
    assert len(found["passes"]) > 20
    assert [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in found["violations"]] == []


def test_dark_is_dark_and_can_be_chosen(opened: Open, report: Path) -> None:
    def background(page: Any) -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light, dark = background(opened(report)), background(page := opened(report, dark=True))
    assert light != dark
    one(page, "#theme").click()
    assert background(page) == light
    one(page, "#theme").click()
    assert background(page) == dark
    assert complaints(page) == []
    one(page, "#theme").click()


def test_what_a_model_wrote_stays_text(opened: Open, tmp_path: Path) -> None:
    line = rollout_line(words=[HOSTILE], prompt=HOSTILE, stage=HOSTILE, finish_reason=HOSTILE, tokens=8)
    page = opened(written(tmp_path, write_report_run(tmp_path / "<b>run", [line], stage=HOSTILE, student=HOSTILE)))
    assert page.title == "<b>run · switchkd report"
    assert "<script>document.title='owned'</script>" in all_of(page, ".tokens .token")[0].text
    assert HOSTILE[:60] in one(page, ".prompt-text").text
    look_at(page, 0)
    assert "</script><script>" in one(page, ".inspector").text
    assert not all_of(page, "main script, main img")
    assert complaints(page) == []


def test_states_without_data(opened: Open, tmp_path: Path) -> None:
    page = opened(written(tmp_path, write_report_run(tmp_path / "run", steps=0)))
    assert "No rollout has been kept yet" in one(page, "#reader").text
    nobody = rollout_line(divergence=[None] * 6, threshold=[], teacher_logp=[None] * 6, student_favorites=None)
    page = opened(written(tmp_path, write_json_lines(tmp_path / "rollouts.jsonl", [nobody])))
    assert "No step has been logged yet" in one(page, "#charts").text
    assert "No evaluation yet" in one(page, "#score-tables").text
    assert "No teacher took part" in one(page, ".panel").text
    look_at(page, 0)
    assert "Its alternatives were not kept" in one(page, ".inspector").text
    assert complaints(page) == []


def test_many_rollouts_open_soon(opened: Open, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """200 rollouts of 256 tokens over a vocabulary of 20,000: below 8 MiB, and drawn within 2 seconds."""
    words = [f" {number:x}" for number in range(40_000, 60_000)]
    lines = [rollout_line(tokens=256, seed=seed, step=seed, words=words) for seed in range(200)]
    path = written(tmp_path, write_report_run(tmp_path / "run", lines))
    # The script stands at the end of the page and draws it before this time. The best of three: others may be at work as well.
    ended = "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    milliseconds = min((page := opened(path)).execute_script(ended) for _ in range(3))
    record_property("milliseconds", milliseconds)
    print(f"opened in {milliseconds:.0f} ms, {path.stat().st_size / MIB:.2f} MiB")
    assert len(all_of(page, ".rollout-list button")) == 200
    assert path.stat().st_size < 8 * MIB
    assert milliseconds < 2000


def test_the_page_follows_a_run(opened: Open, tmp_path: Path) -> None:
    folder = write_report_run(tmp_path / "run", [rollout_line(tokens=12)])

    def data() -> dict[str, Any]:
        return {**gather(sources_of([folder]), most_rollouts=9, version="0", follow=True)}

    with running(FollowServer(0, data, lambda: files_read(sources_of([folder])))) as server:
        page = opened(f"http://127.0.0.1:{server.port}/")
        look_at(page, 4)
        write_json_lines(folder / "rollouts.jsonl", [rollout_line(tokens=12), rollout_line(seed=1, step=6)])
        WebDriverWait(page, 15).until(lambda _: len(all_of(page, ".rollout-list button")) == 2)
        # What the reader was looking at is still there.
        assert "position 4 " in one(page, ".inspector").text
        assert one(page, "#live").text == "● following"
        # A browser asks every site for an icon, and this one has no icon.
        assert [each for each in complaints(page) if "favicon" not in each["message"]] == []
