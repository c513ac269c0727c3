// Charts of lines by uPlot. Lines differ in color and in dashes; each chart can be read as a table, too.

const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2]];
const CHART_HEIGHT = 200;
const drawnCharts = [];

function lineStyle(index) {
  return { color: color(`--line-${(index % 6) + 1}`), dash: DASHES[(index + Math.floor(index / 6)) % 6] };
}

function axes(xLabel, format, splits) {
  const common = {
    stroke: color("--muted"),
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    grid: { stroke: color("--rule"), width: 1 },
    ticks: { stroke: color("--rule"), width: 1, size: 4 },
  };
  return [
    { ...common, label: xLabel, labelSize: 18, size: 28, grid: { show: false } },
    { ...common, size: 52, ...(splits ? { splits } : {}), values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))) },
  ];
}

function keepWidth(holder, plot) {
  const observer = new ResizeObserver(() => {
    const width = Math.floor(holder.clientWidth);
    if (width > 0 && width !== plot.width) plot.setSize({ width, height: plot.height });
  });
  observer.observe(holder);
  return observer;
}

// What a chart needs to be drawn: all steps in order, and for each line its value at each of them, or null.
function joinedLines(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const columns = lines.map((line) => {
    const at = new Map(line.steps.map((step, index) => [step, line.values[index]]));
    return steps.map((step) => (at.has(step) ? at.get(step) : null));
  });
  return [steps, ...columns];
}

function swatch(style) {
  const line = svg("line", {
    x1: 1, y1: 5, x2: 25, y2: 5, stroke: style.color, "stroke-width": 2.5, "stroke-dasharray": style.dash.join(" "),
  });
  return svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, line);
}

function chartFigure(chart) {
  const format = chart.unit === "share" ? (value) => percent(value) : (value) => number(value);
  const unit = chart.unit === "share" ? "" : chart.unit;
  const holder = h("div", { class: "plot", role: "img", "aria-label": chartSummary(chart, format) });
  const values = chart.lines.map(() => h("span", { class: "value" }));
  const legend = h("ul", { class: "legend" }, chart.lines.map((line, index) =>
    h("li", {}, swatch(lineStyle(index)), h("span", {}, chart.lines.length > 1 ? line.name : "at the last step"), values[index])));
  const figure = h("figure", { class: "card chart" },
    h("figcaption", {}, h("h3", {}, chart.title), h("span", { class: "muted" }, unit)),
    holder, legend, tableOnDemand(chart, format));
  drawnCharts.push({ draw: () => drawLines(chart, holder, values, format), holder });
  return figure;
}

function chartSummary(chart, format) {
  const lines = chart.lines.map((line) => {
    const last = line.values.length - 1;
    return `${line.name} from ${format(line.values[0])} at step ${line.steps[0]} to ${format(line.values[last])} at step ${line.steps[last]}`;
  });
  return `${chart.title}: ${lines.join("; ")}.`;
}

function tableOnDemand(chart, format) {
  const details = h("details", { class: "as-table" }, h("summary", {}, `${chart.title} as a table`));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const [steps, ...columns] = joinedLines(chart.lines);
    const rows = steps.map((step, row) => [String(step), ...columns.map((column) => (column[row] === null ? "–" : format(column[row])))]);
    const columnNames = ["step", ...chart.lines.map((line) => line.name)];
    details.append(scrollingTable({ title: chart.title, columns: columnNames, numeric: columnNames.map((_, i) => i), rows, marked: [], note: "" }));
  });
  return details;
}

function drawLines(chart, holder, values, format) {
  const data = joinedLines(chart.lines);
  const few = data[0].length < 30;
  const latest = (at) => chart.lines.forEach((line, index) => {
    const value = at === null || at === undefined ? line.values[line.values.length - 1] : data[index + 1][at];
    values[index].textContent = value === null ? "–" : format(value);
  });
  const plot = new uPlot({
    width: Math.max(200, Math.floor(holder.clientWidth)),
    height: CHART_HEIGHT,
    legend: { show: false },
    scales: { x: { time: false }, y: { range: (_, low, high) => yRange(low, high, chart.unit === "share" ? 1 : Infinity) } },
    axes: axes("step", format),
    cursor: { y: false, drag: { x: false, y: false } },
    series: [{}, ...chart.lines.map((_, index) => {
      const style = lineStyle(index);
      return { stroke: style.color, dash: style.dash, width: 2, spanGaps: true, points: { show: few, size: 5, fill: style.color } };
    })],
    hooks: { setCursor: [(u) => latest(u.cursor.idx)] },
  }, data, holder);
  latest(null);
  const observer = keepWidth(holder, plot);
  return () => {
    observer.disconnect();
    plot.destroy();
  };
}

// A little more than the values take, but neither below 0 nor beyond what they can be.
function yRange(low, high, most) {
  if (low === null || high === null) return [0, 1];
  const pad = 0.08 * (high - low) || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, Math.min(high + pad, Math.max(most, high))];
}

function drawCharts() {
  for (const each of drawnCharts) {
    if (each.remove) each.remove();
    each.remove = each.draw();
  }
}

function renderCharts(charts) {
  for (const each of drawnCharts.splice(0)) if (each.remove) each.remove();
  const place = byId("charts");
  const open = new Set([...place.querySelectorAll("details[open] summary")].map((each) => each.textContent));
  place.replaceChildren(...(charts.length ? charts.map(chartFigure) : [empty("No step has been logged yet.")]));
  for (const summary of place.querySelectorAll("summary")) summary.parentElement.open = open.has(summary.textContent);
  drawCharts();
}
