import json
import math
import re
import time
from html.parser import HTMLParser

import pytest

from megatron_rl.report.metric_charts import chart_sections
from megatron_rl.report.page import number
from megatron_rl.report.report import duration, first_and_last, merge_steps, notes, write_report
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.logs import write_rollouts
from tests.unit.report.synthetic_run import make_rl_run, make_sft_run

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Outline(HTMLParser):
    """Checks that tags are closed in order, and collects attributes that could load something, and texts by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.loading: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loading += [
            (name, value) for name, value in attributes if name in ("src", "href", "srcset", "data", "style")
        ]
        self.loading += [(name, value) for name, value in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def titles(page: str) -> list[str]:
    return [re.sub("<[^>]*>", "", title).strip() for title in re.findall("<h3>(.*?)</h3>", page)]


@pytest.fixture(scope="module")
def rl_page(tmp_path_factory) -> str:
    return write_report(make_rl_run(tmp_path_factory.mktemp("rl"), 40).path).read_text()


def test_the_page_is_well_formed_and_loads_nothing(rl_page):
    outline = Outline(rl_page)
    assert outline.loading == []
    assert (outline.tags.count("script"), outline.tags.count("style")) == (1, 1)
    assert "url(" not in rl_page
    assert "@import" not in rl_page
    assert not re.search(r"https?://", rl_page)


def test_what_the_convergence_monitor_says_is_shown(tmp_path):
    run = make_rl_run(tmp_path, 10)
    with run.metrics_file.open("a") as file:
        for step in range(1, 11):
            monitored = {"loss_variance": 1e-5, "policy_change": 1e-4, "converged": float(step == 10)}
            row = {"step": step} | {f"convergence/{name}": value for name, value in monitored.items()}
            file.write(json.dumps(row | {"policy/loss_policy": 0.1, "policy/loss_value": 0.2}) + "\n")
    page = write_report(run.path).read_text()
    assert "Convergence" in Outline(page).texts["h2"]
    shown = titles(page)
    for title in ("Variance of the policy loss", "Policy change", "Converged"):
        assert any(one.startswith(title) for one in shown), shown


def test_the_headline_is_the_first_and_the_last_evaluation(tmp_path):
    run = make_sft_run(tmp_path, 1)
    run.metrics_file.write_text(
        '{"step": 0, "eval/gsm8k/accuracy": 0.25, "eval/gsm8k/pass_at_k": 0.5}\n'
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.9}\n{"step": 2, "eval/gsm8k/accuracy": 0.375}\n'
    )
    cards = re.findall('<div class="card">(.*?)</div>', write_report(run.path).read_text())
    assert [re.sub("(<[^>]*>)+", "|", card) for card in cards] == [
        "|Held-out accuracy, gsm8k|25.0% →| |37.5%|+12.5 points, step 0 to 2|",
        "|Held-out pass@4, gsm8k|50.0%|step 0|",
        "|Mean reward|0.5 →| |0.9|+0.4, step 1 to 2|",
    ]


def test_a_reinforcement_run_has_all_its_charts(rl_page):
    assert titles(rl_page) == [
        "Held-out accuracy: heldout",
        "Reward",
        "Response length tokens",
        "Truncated responses of responses",
        "Entropy nats per token",
        "KL divergence nats per token",
        "Clipped tokens of tokens",
        "Probability ratio",
        "Policy loss",
        "Gradient norm before clipping, log scale",
        "Learning rate",
        "Log-prob difference nats, log scale",
        "KL of the mismatch nats per token, log scale",
        "Token probability error mean factor",
        "Throughput tokens per second",
        "Throughput of one GPU tokens per second",
        "Model FLOPs utilisation of the peak",
        "Packing efficiency of positions",
        "Time of a step seconds",
    ]


def test_a_supervised_run_has_only_what_it_measured(tmp_path):
    page = write_report(make_sft_run(tmp_path, 20).path).read_text()
    assert titles(page) == [
        "Loss nats per token",
        "Gradient norm before clipping",
        "Learning rate",
        "Throughput tokens per second",
    ]
    assert "Sample rollouts" not in page
    assert "supervised fine-tuning" in page


def test_a_metric_that_the_page_does_not_know_is_drawn_if_it_varies():
    rows = merge_steps([{"step": step, "reward/style": step / 3, "a/constant": 2.0} for step in (1, 2)])
    assert list(chart_sections(rows)) == ["More metrics"]
    assert titles("".join(chart_sections(rows)["More metrics"])) == ["reward/style"]


def test_the_band_of_the_reward_is_its_standard_deviation():
    (chart,) = chart_sections(merge_steps([{"step": 1, "reward/mean": 1.0, "reward/std": 0.25}]))["Learning"]
    # 0.75 to 1.25 in fourths is 0.125, so ticks of 0.2 from 0.6 to 1.4; the plot is 188 high from 8 to 196:
    # 1.25 is 0.8125 up and 0.75 is 0.1875 up.
    upper, lower = re.search('class="band c0" d="M238.0 (.*)L238.0 (.*?)z"', chart).groups()
    # 196 - 0.8125 * 188 = 43.25 and 196 - 0.1875 * 188 = 160.75, written with one decimal.
    assert (float(upper), float(lower)) == pytest.approx((43.25, 160.75), abs=0.0501)


def test_the_part_of_a_step_that_no_phase_accounts_for_is_shown():
    row = {"step": 1, "timing_s/step": 10.0, "timing_s/train": 3.0, "timing_s/generate": 5.0}
    (chart,) = chart_sections(merge_steps([row]))["Speed"]
    assert re.findall('class="key[^"]*">(.*?)<', chart) == ["generate 50%", "train 30%", "other 20%"]


def test_text_of_a_model_is_shown_and_not_run(tmp_path):
    run = make_sft_run(tmp_path, 2)
    evil = "\n\n  <script>alert(1)</script>\n</pre><img src=x onerror=alert(2)>"
    record = {"prompt": evil, "completion": evil, "answer": evil, "source": evil, "reward": 1.0, "advantage": None}
    write_rollouts(run, 1, [record | {"reward_terms": {evil: 1.0}, "finish_reason": evil}])
    run.config_file.write_text(run.config_file.read_text().replace("gsm8k-sft", "'<img src=x>'"))
    outline = Outline(write_report(run.path).read_text())
    assert outline.tags.count("script") == 1
    assert "img" not in outline.tags
    assert outline.loading == []
    assert outline.texts["h1"] == ["<img src=x>"]
    # HTML drops the first newline of a <pre>; all others stay.
    assert [text.removeprefix("\n") for text in outline.texts["pre"][:2]] == [evil, evil]


def test_the_security_policy_names_exactly_the_script_and_style_of_the_page(rl_page):
    from base64 import b64encode
    from hashlib import sha256

    script, style = (re.search(f"<{tag}>(.*?)</{tag}>", rl_page, re.S).group(1) for tag in ("script", "style"))
    hashes = [f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in (style, script)]
    policy = re.search('Content-Security-Policy" content="(.*?)"', rl_page).group(1)
    assert policy == f"default-src 'none'; style-src {hashes[0]}; script-src {hashes[1]}"


def test_samples_are_of_the_first_the_middle_and_the_last_step(tmp_path):
    run = make_sft_run(tmp_path, 2)
    for step in (1, 5, 9, 13):
        write_rollouts(run, step, [{"completion": f"of step {step}", "reward": 0.5}] * 6)
    page = write_report(run.path).read_text()
    assert re.findall('<h3 class="step">(.*?)</h3>', page) == ["Step 1", "Step 9", "Step 13"]
    assert page.count('<details class="sample"') == 3 * 4


def test_a_long_completion_is_cut_and_says_so(tmp_path):
    run = make_sft_run(tmp_path, 2)
    write_rollouts(run, 1, [{"completion": "x" * 10_500}])
    page = write_report(run.path).read_text()
    assert "x" * 8_000 + "\n… 2,500 more characters" in page
    assert "x" * 8_001 not in page


def test_a_run_that_died_at_its_start_has_a_page(tmp_path):
    run = RunDirectory(tmp_path)
    run.config_file.write_text("name: early\nrecipe: rl\nmodel:\n  hf_path: ???\n")
    assert "No step has been logged yet." in write_report(run.path).read_text()
    run.metrics_file.write_text('{"step": 1, "rewa')
    assert "No step has been logged yet." in write_report(run.path).read_text()


def test_a_run_that_is_going_on_shows_how_far_it_is(tmp_path):
    run = make_rl_run(tmp_path, 40, done=17)
    with run.metrics_file.open("a") as torn:
        torn.write('{"step": 18, "reward/me')
    assert "<dd>17 of 40</dd>" in write_report(run.path).read_text()


def test_a_folder_without_a_run_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}: not a run's folder: it has no config.yaml$"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_non_finite_numbers_are_named(rl_page):
    # The made-up run has one, at half of its 40 steps.
    assert "Not finite, and marked by a cross in the charts: policy/loss at step 20." in rl_page
    rows = merge_steps([{"step": step, "policy/loss": math.nan} for step in range(8)])
    assert notes(rows)[0].endswith("policy/loss at step 5 and 2 more.")


def test_rows_of_one_step_are_merged_in_order_of_steps():
    rows = merge_steps([{"step": 2, "a": 1.0}, {"step": 2, "b": 2.0}, {"step": 1, "a": 3.0}])
    assert list(rows.items()) == [(1, {"a": 3.0}), (2, {"a": 1.0, "b": 2.0})]


def test_the_table_has_the_last_training_step_beside_the_first_value_of_each_metric():
    rows = merge_steps([{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}, {"step": 3, "eval/x/accuracy": 1.0}])
    assert first_and_last(rows) == {"a": (1.0, 2.0), "b": (5.0, 5.0)}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.52, "0.52 s"),
        (45.4, "45 s"),
        (725, "12 min 5 s"),
        (3600, "1 h"),
        (12_000, "3 h 20 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_durations_have_two_units(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.51234, "0.5123"), (12_345.6, "12,346"), (1.2e-6, "1.2e-06"), (7, "7"), (None, "–"), (math.nan, "nan")],  # noqa: RUF001
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_two_thousand_steps_take_less_than_two_seconds_and_a_megabyte(tmp_path):
    run = make_rl_run(tmp_path, 2000)
    # Time of this process: a busy machine is not the report's fault.
    start = time.process_time()
    file = write_report(run.path)
    assert time.process_time() - start < 2.0
    assert file.stat().st_size < 1_000_000


def test_numbers_near_the_largest_float_are_drawn_as_no_numbers(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: run\nrecipe: sft\n")
    lines = [{"step": i, "sft/loss": value} for i, value in enumerate((1e308, -1e308, 0.5), start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(run).is_file()
