"""The report's stylesheet and script, as text: the page holds them both and loads nothing.

The palette is that of Okabe and Ito (jfly.uni-koeln.de/color), which the colour-blind can tell apart, darkened on white
and lightened on black until thin lines are legible.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --edge: #e3e3df; --grid: #ececea; --text: #1c1d20; --muted: #63656b;
  --p0: #0072b2; --p1: #d55e00; --p2: #00845f; --p3: #b0508f; --p4: #c08000; --p5: #2d94d4; --p6: #8b8d93;
  --good: #00734f; --bad: #b84a00; --warn: #fdf3e3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1b1d21; --edge: #2c2f35; --grid: #292c32; --text: #e7e8ea; --muted: #9b9ea6;
    --p0: #56b4e9; --p1: #f0813f; --p2: #2fc79b; --p3: #e08fc0; --p4: #eebb45; --p5: #8fa8ff; --p6: #7d8088;
    --good: #2fc79b; --bad: #f0813f; --warn: #33291a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums;
}
main { max-width: 1320px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 40px 0 14px; }
h3 { font-size: 14px; margin: 0; }
h4 { font-size: 12px; font-weight: 600; color: var(--muted); margin: 14px 0 4px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 0; }
.facts div { min-width: 0; }
.facts .wide { flex-basis: 100%; }
dt { font-size: 12px; color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide dd { font-size: 13px; color: var(--muted); }
.headlines {
  display: grid;
  gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr));
  margin-top: 26px;
}
.card, .chart, .sample, .table, .config {
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px; min-width: 0;
}
.card { padding: 14px 18px 16px; }
.card p { margin: 0; }
.card .what, .card .when { font-size: 13px; color: var(--muted); }
.card .values { font-size: 28px; line-height: 1.35; font-weight: 600; letter-spacing: -0.02em; white-space: nowrap; }
.card .before { color: var(--muted); font-weight: 400; }
.note { background: var(--warn); border-radius: 8px; padding: 9px 14px; margin: 20px 0 0; font-size: 14px; }
.hint { color: var(--muted); font-size: 13px; margin: 14px 0 0; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 390px), 1fr)); }
.chart { margin: 0; padding: 13px 14px 8px; display: flex; flex-direction: column; justify-content: space-between; }
.chart h3 { overflow-wrap: anywhere; }
.unit { font-weight: 400; color: var(--muted); font-size: 13px; }
.legend {
  display: flex;
  flex-wrap: wrap;
  gap: 1px 14px;
  min-height: 20px;
  margin: 1px 0 5px;
  font-size: 12px;
  color: var(--muted);
}
.key::before {
  content: "";
  display: inline-block;
  width: 10px;
  height: 10px;
  border-radius: 3px;
  margin-right: 5px;
  background: var(--c);
}
.plot { position: relative; }
svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.step { margin: 22px 0 8px; }
.c0 { --c: var(--p0); } .c1 { --c: var(--p1); } .c2 { --c: var(--p2); } .c3 { --c: var(--p3); }
.c4 { --c: var(--p4); } .c5 { --c: var(--p5); } .c6 { --c: var(--p6); }
.grid { stroke: var(--grid); }
.tick { font-size: 11px; fill: var(--muted); }
.line { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1.1; }
.dot, .bar { fill: var(--c); }
.band { fill: var(--c); opacity: 0.17; }
.broken { stroke: var(--bad); stroke-width: 1.6; fill: none; }
.cursor { stroke: var(--muted); stroke-dasharray: 2 3; visibility: hidden; }
.tip {
  position: absolute; top: 4px; padding: 6px 10px; border: 1px solid var(--edge); border-radius: 7px; font-size: 12px;
  line-height: 1.5; background: var(--card); box-shadow: 0 3px 12px rgb(0 0 0 / 0.16); pointer-events: none;
  white-space: nowrap; z-index: 1;
}
.tip b { font-weight: 600; }
.table { padding: 14px 18px; columns: 3 360px; column-gap: 36px; font-size: 13px; }
.table table { width: 100%; border-collapse: collapse; break-inside: avoid; margin-bottom: 10px; table-layout: fixed; }
.table th { text-align: right; font-weight: 500; color: var(--muted); padding: 3px 0; width: 27%; }
.table th:first-child { text-align: left; width: 46%; color: var(--text); font-weight: 600; }
.table td { padding: 3px 0; border-top: 1px solid var(--grid); text-align: right; overflow-wrap: anywhere; }
.table td:first-child { text-align: left; }
.samples { display: grid; gap: 10px; }
.sample summary, .config summary {
  cursor: pointer;
  padding: 10px 16px;
  display: flex;
  gap: 4px 12px;
  align-items: baseline;
}
.sample summary::before, .config summary::before { content: "▸"; color: var(--muted); }
[open] > summary::before { content: "▾"; }
summary::-webkit-details-marker { display: none; }
.sample .peek {
  flex: 1;
  min-width: 0;
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
  color: var(--muted);
}
.sample .reward { font-weight: 600; min-width: 92px; }
.sample .end { font-size: 13px; color: var(--muted); white-space: nowrap; }
.body { padding: 0 16px 16px; }
pre {
  margin: 0; padding: 10px 12px; border-radius: 7px; background: var(--page); white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 460px; overflow-y: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
.config pre { margin: 0 16px 16px; max-height: none; }
footer { margin-top: 44px; color: var(--muted); font-size: 13px; }
@media (max-width: 600px) {
  main { padding: 22px 14px 40px; }
  .sample summary { flex-wrap: wrap; }
  .sample .peek { flex-basis: 100%; order: 1; }
}
"""

SCRIPT = """
"use strict";
const shown = (value, unit) => {
  if (typeof value === "string") return value;
  if (unit === "percent") return (100 * value).toPrecision(3) + "%";
  return Math.abs(value) >= 1e4 ? value.toLocaleString("en") : String(value);
};
for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.dataset.points);
  const svg = chart.querySelector("svg"), tip = chart.querySelector(".tip"), cursor = chart.querySelector(".cursor");
  const line = (words, bold) => {
    const row = document.createElement("div");
    row.appendChild(document.createElement(bold ? "b" : "span")).textContent = words;
    tip.appendChild(row);
    return row;
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let near = 0;
    data.x.forEach((other, i) => { if (Math.abs(other - x) < Math.abs(data.x[near] - x)) near = i; });
    cursor.setAttribute("x1", data.x[near]);
    cursor.setAttribute("x2", data.x[near]);
    cursor.style.visibility = "visible";
    tip.replaceChildren();
    line("step " + data.steps[near], true);
    for (const series of data.series) {
      const value = series.values[near];
      if (value === null) continue;
      const row = line(shown(value, data.unit) + (series.label ? " " + series.label : ""), false);
      row.classList.add("key", "c" + series.color);
    }
    tip.hidden = false;
    const at = data.x[near] / svg.viewBox.baseVal.width * box.width;
    const left = at > box.width / 2 ? at - tip.offsetWidth - 10 : at + 10;
    tip.style.left = Math.max(0, Math.min(left, box.width - tip.offsetWidth)) + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.visibility = "hidden"; });
}
"""
