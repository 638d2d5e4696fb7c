"""The report in a real browser: it draws, fits, obeys its own security policy and answers the pointer.

Skipped where there is no Chromium. Nothing else on the page can be tested without one: a page whose HTML is well-formed
may still overflow, break its policy or fail in its script.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from megatron_rl.report.report import merge_steps, write_report
from megatron_rl.runs.logs import read_metrics
from tests.unit.report.synthetic_run import make_rl_run, make_sft_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")

# Runs in the page, moves the pointer over each chart, and leaves what it sees in an attribute for --dump-dom to show.
PROBE = """
const box = element => element.getBoundingClientRect();
const charts = [...document.querySelectorAll(".chart")].map(chart => {
  const svg = chart.querySelector("svg"), at = box(svg);
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: at.left + at.width * 0.6, clientY: at.top + 20}));
  const tip = chart.querySelector(".tip"), outer = box(chart);
  const drawn = [...svg.querySelectorAll(".line, .bar")].map(path => box(path)).filter(b => b.width > 10);
  const inside = b => b.left >= outer.left && b.right <= outer.right + 0.5;
  return {
    title: chart.querySelector("h3").textContent, width: at.width, curves: drawn.length, tip: tip.innerText,
    inside: [...svg.querySelectorAll("text, path"), tip].map(box).filter(b => b.width > 0).every(inside),
    cursor: getComputedStyle(chart.querySelector(".cursor")).visibility,
  };
});
const root = document.documentElement;
root.dataset.seen = JSON.stringify({
  charts, overflow: root.scrollWidth - root.clientWidth, background: getComputedStyle(document.body).backgroundColor,
});
"""


def browse(page: Path, profile: Path, *arguments: str, width: int = 1400) -> subprocess.CompletedProcess[str]:
    """Open the page without a screen; its console goes to stderr."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},1600", *arguments]
    result = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def console(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def seen(page: Path, profile: Path, *arguments: str, width: int = 1400) -> dict:
    """What the probe sees in the page. Its policy lets no foreign script run, so the probe's copy goes without one."""
    html = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    probed = page.with_name("probed.html")
    probed.write_text(html.replace("</body>", f"<script>{{{PROBE}}}</script></body>"))
    result = browse(probed, profile, "--dump-dom", *arguments, width=width)
    assert console(result) == []
    return json.loads(unescape(re.search('data-seen="([^"]*)"', result.stdout).group(1)))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(make_rl_run(tmp_path_factory.mktemp("rl"), 300).path)


def test_the_page_as_it_is_runs_without_a_word_on_the_console(page, tmp_path):
    result = browse(page, tmp_path, "--dump-dom")
    assert console(result) == []
    # The policy is in force: with one more byte the script is refused, and the console says so.
    changed = page.with_name("changed.html")
    changed.write_text(page.read_text().replace('"use strict";', '"use strict"; '))
    assert any("Content Security Policy" in line for line in console(browse(changed, tmp_path, "--dump-dom")))


@pytest.mark.parametrize("width", [1400, 500])
def test_every_chart_is_drawn_inside_its_card_and_answers_the_pointer(page, tmp_path, width):
    view = seen(page, tmp_path, width=width)
    assert view["overflow"] == 0
    assert len(view["charts"]) == 19
    for chart in view["charts"]:
        assert chart["curves"] >= 1, chart
        assert chart["inside"], chart
        assert chart["cursor"] == "visible", chart
        assert re.match(r"step \d+(–\d+)?\n\S", chart["tip"]), chart  # noqa: RUF001
        assert 300 < chart["width"] < 480, chart


def test_the_pointer_shows_the_numbers_of_the_nearest_step(page, tmp_path):
    charts = {chart["title"]: chart["tip"] for chart in seen(page, tmp_path)["charts"]}
    # Evaluations are at 0, 30, ..., 300; the axis is from 54 to 422 of 440 units, so 0.6 * 440 = 264 is step 171.2.
    row = merge_steps(read_metrics(page.with_name("metrics.jsonl")))[180]
    accuracy, pass_at_k = (f"{100 * row[f'eval/heldout/{name}']:.1f}%" for name in ("accuracy", "pass_at_k"))
    assert charts["Held-out accuracy: heldout"] == f"step 180\n{accuracy} accuracy\n{pass_at_k} pass@k"


def test_dark_and_light_follow_the_reader(tmp_path):
    page = write_report(make_sft_run(tmp_path / "sft", 30).path)
    light = seen(page, tmp_path, "--blink-settings=preferredColorScheme=1")["background"]
    dark = seen(page, tmp_path, "--blink-settings=preferredColorScheme=0")["background"]
    assert (light, dark) == ("rgb(247, 247, 245)", "rgb(19, 20, 23)")


def test_a_screenshot_is_not_blank(page, tmp_path):
    from PIL import Image

    picture = tmp_path / "page.png"
    browse(page, tmp_path, "--hide-scrollbars", f"--screenshot={picture}")
    colors = Image.open(picture).convert("RGB").getcolors(1 << 24)
    # Text with smoothed edges alone has a hundred shades; a blank page has one.
    assert len(colors) > 100
