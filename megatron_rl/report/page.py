"""The report's HTML: what `report` found, written down.

Every text that comes from a run is escaped: prompts and completions are written by a model, and a model may write
`<script>`. Behind that stands a content security policy, which lets the page's own script and style run, by their hash,
and nothing else, and lets it load nothing.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from megatron_rl import __version__
from megatron_rl.report.charts import MAX_POINTS
from megatron_rl.report.style import CSS, SCRIPT

MAX_TEXT = 8_000
"""Characters of a prompt or completion that the page holds; the file holds all."""
MAX_PEEK = 160
"""Characters of a completion beside its reward."""


@dataclass(frozen=True)
class Headline:
    """First and last value of a number that matters, each with its step."""

    title: str
    first: tuple[int, float]
    last: tuple[int, float]
    percent: bool


@dataclass(frozen=True)
class Page:
    """What the report says."""

    name: str
    facts: Mapping[str, str]
    headlines: Sequence[Headline]
    notes: Sequence[str]
    charts: Mapping[str, Sequence[str]]
    """HTML of the charts, by section."""
    table: Mapping[str, tuple[float | None, float | None]]
    """First and last value by metric."""
    samples: Mapping[int, Sequence[Mapping[str, Any]]]
    """Rollout records by step."""
    config_text: str


def page_html(page: Page) -> str:
    """The whole page."""
    policy = f"default-src 'none'; style-src '{_hash(CSS)}'; script-src '{_hash(SCRIPT)}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.name)}</title><style>{CSS}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(page.name)}</h1>{_facts(page.facts)}</header>\n"
        f"{_headlines(page.headlines)}"
        + "".join(f'<p class="note">{escape(note)}</p>\n' for note in page.notes)
        + _charts(page.charts)
        + _table(page.table)
        + _samples(page.samples)
        + '<section><h2>Configuration</h2><details class="config"><summary>config.yaml</summary>'
        + f"<pre>{escape(page.config_text)}</pre></details></section>\n"
        + f"<footer>megatron_rl {escape(__version__)}</footer>\n"
        + f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def number(value: float | None) -> str:
    """Four digits, for reading: '0.5123', '12,350', '1.2e-06'; a missing one is '–'."""
    if value is None:
        return "\u2013"
    if isinstance(value, int) or (abs(value) >= 1e4 and value < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(facts: Mapping[str, str]) -> str:
    items = (
        f"<div{' class=wide' if label == 'Versions' else ''}><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in facts.items()
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _headlines(headlines: Sequence[Headline]) -> str:
    return f'<div class="headlines">{"".join(map(_headline, headlines))}</div>\n' if headlines else ""


def _headline(headline: Headline) -> str:
    (first_step, first), (last_step, last) = headline.first, headline.last
    show = (lambda value: f"{100 * value:.1f}%") if headline.percent else number
    if first_step == last_step:
        values, when = f"<span>{show(last)}</span>", f"step {last_step:,}"
    else:
        values = f'<span class="before">{show(first)} →</span> <span class="after">{show(last)}</span>'
        change = f"{100 * (last - first):+.1f} points" if headline.percent else f"{last - first:+.4g}"
        when = f"{change}, step {first_step:,} to {last_step:,}"
    return (
        f'<div class="card"><p class="what">{escape(headline.title)}</p>'
        f'<p class="values">{values}</p><p class="when">{when}</p></div>'
    )


def _charts(sections: Mapping[str, Sequence[str]]) -> str:
    parts = [
        f'<section><h2>{escape(section)}</h2><div class="charts">{"".join(charts)}</div></section>\n'
        for section, charts in sections.items()
    ]
    hint = (
        f'<p class="hint">All curves are over training steps. In runs of more than {MAX_POINTS} logged steps a line is '
        "the mean of neighbouring steps, and its band reaches from their lowest to their highest value.</p>"
    )
    return "".join(parts) + hint if parts else ""


def _table(table: Mapping[str, tuple[float | None, float | None]]) -> str:
    """First and last values, one small table for each room of names ('reward/...')."""
    if not table:
        return ""
    groups: dict[str, list[str]] = {}
    for name, (first, last) in table.items():
        group, _, rest = name.rpartition("/")
        # Long names may break after an underscore.
        row = f"<tr><td>{escape(rest).replace('_', '_<wbr>')}</td><td>{number(first)}</td><td>{number(last)}</td></tr>"
        groups.setdefault(group, []).append(row)
    tables = "".join(
        f"<table><thead><tr><th>{escape(group) or 'other'}</th><th>first</th><th>last</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        for group, rows in groups.items()
    )
    return f'<section><h2>First and last step</h2><div class="table">{tables}</div></section>\n'


def _samples(samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for step, records in samples.items():
        # The first one is open: it shows what is in the others.
        cards = "".join(_sample(record, opened=index == 0) for index, record in enumerate(records))
        parts.append(f'<h3 class="step">Step {step:,}</h3><div class="samples">{cards}</div>')
    return f'<section class="rollouts"><h2>Sample rollouts</h2>{"".join(parts)}</section>\n' if parts else ""


def _sample(record: Mapping[str, Any], *, opened: bool) -> str:
    completion = str(record.get("completion", ""))
    ending = {"stop": "ended", "length": "cut at the limit"}.get(str(record.get("finish_reason")), "")
    end = ", ".join(filter(None, [ending, f"{number(record.get('num_tokens'))} tokens"]))
    details = {
        "Reference answer": record.get("answer"),
        "Reward terms": ", ".join(
            f"{name} {number(value)}" for name, value in (record.get("reward_terms") or {}).items()
        ),
        "Advantage": number(record.get("advantage")),
        "Weight version": number(record.get("weight_version")),
        "Source": record.get("source"),
    }
    return (
        f'<details class="sample"{" open" if opened else ""}><summary>'
        f'<span class="reward">reward {number(record.get("reward"))}</span>'
        f'<span class="peek">{escape(" ".join(completion[:MAX_PEEK].split()))}</span>'
        f'<span class="end">{escape(end)}</span>'
        f'</summary><div class="body"><h4>Prompt</h4><pre>{_text(str(record.get("prompt", "")))}</pre>'
        f"<h4>Completion</h4><pre>{_text(completion)}</pre>"
        f"<h4>Score</h4>{_facts({label: str(value) for label, value in details.items() if value not in (None, '')})}"
        "</div></details>"
    )


def _text(text: str) -> str:
    """Escaped, and cut where a page would grow without end. A newline first, because HTML drops one after <pre>."""
    cut = f"\n\u2026 {len(text) - MAX_TEXT:,} more characters" if len(text) > MAX_TEXT else ""
    return "\n" + escape(text[:MAX_TEXT] + cut)
