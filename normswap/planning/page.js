"use strict";
const $ = (id) => document.getElementById(id);
const body = $("table").tBodies[0], rows = [...body.rows], heads = [...$("table").tHead.rows[0].cells];

function value(row, column) {
  const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
  return heads[column].classList.contains("number") ? (text === "" ? null : Number(text)) : text;
}

function sort(column, down) {
  const order = new Intl.Collator("en", { numeric: true });
  const sign = down ? -1 : 1;
  rows.sort((a, b) => {
    const x = value(a, column), y = value(b, column);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "number" ? x - y : order.compare(x, y)) || value(a, 0) - value(b, 0);
  });
  body.append(...rows);
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
  $("sort").value = `${column}${down ? "-" : "+"}`;
}

function filter() {
  const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean), kind = $("show").value;
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word)) || (kind !== "" && !row.dataset.is.split(" ").includes(kind));
    shown += !row.hidden;
  }
  $("count").textContent = `${shown} of ${rows.length} layers`;
  $("none").hidden = shown > 0;
}

function clear() {
  $("find").value = $("show").value = "";
  filter();
}

heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const now = head.getAttribute("aria-sort");
  sort(column, now === "none" ? head.dataset.first === "down" : now === "ascending");
}));
$("sort").addEventListener("change", (event) => sort(parseInt(event.target.value), event.target.value.endsWith("-")));
$("find").addEventListener("input", filter);
$("show").addEventListener("change", filter);
$("clear").addEventListener("click", () => { clear(); $("find").focus(); });
sort(0, false);
filter();

const chart = $("chart");
if (chart) draw();

function draw() {
  const points = rows.filter((row) => row.dataset.drift !== undefined).map((row) => ({
    row, name: row.cells[1].textContent, becomes: row.cells[3].textContent, after: Number(row.dataset.drift),
    before: row.dataset.before === undefined ? null : Number(row.dataset.before),
  }));
  const SVG = "http://www.w3.org/2000/svg", left = 44, right = 12, top = 12, bottom = 34, height = 300;
  const highest = Math.max(...points.map((point) => Math.max(point.after, point.before ?? 0)), 1e-9);
  const rough = highest / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ceiling = highest * 1.05;
  const y = (drift) => height - bottom - (drift / ceiling) * (height - top - bottom);
  let x, cursor, chosen = -1;

  function add(name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    chart.append(element);
    return element;
  }

  function paint() {
    const width = chart.clientWidth;
    if (!width) return;
    chart.replaceChildren();
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const gap = (width - left - right) / points.length;
    x = (i) => left + gap * (i + 0.5);
    for (let drift = 0; drift <= ceiling; drift += step) {
      add("line", { class: "grid", x1: left, x2: width - right, y1: y(drift), y2: y(drift) });
      add("text", { x: left - 6, y: y(drift) + 4, "text-anchor": "end" }, String(Number(drift.toPrecision(3))));
    }
    if (ceiling >= 1) add("line", { class: "one", x1: left, x2: width - right, y1: y(1), y2: y(1) });
    add("text", { x: left, y: height - 10 }, "first norm");
    add("text", { x: width - right, y: height - 10, "text-anchor": "end" }, "last norm");
    const radius = Math.max(1.5, Math.min(4.5, gap / 2.5));
    points.forEach((point, i) => {
      if (point.before !== null) {
        add("line", { class: "link", x1: x(i), x2: x(i), y1: y(point.before), y2: y(point.after) });
        add("circle", { class: "before", cx: x(i), cy: y(point.before), r: Math.max(1.2, radius - 0.7) });
      }
      add("circle", { class: "after", cx: x(i), cy: y(point.after), r: radius });
    });
    cursor = add("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    if (chosen >= 0) tell(chosen);
  }

  function tell(i) {
    chosen = Math.max(0, Math.min(points.length - 1, i));
    const { name, becomes, after, before } = points[chosen];
    cursor.setAttribute("x1", x(chosen));
    cursor.setAttribute("x2", x(chosen));
    cursor.setAttribute("visibility", "visible");
    const drift = before === null ? after.toFixed(2) : `${before.toFixed(2)} before, ${after.toFixed(2)} after`;
    $("told").textContent = `${name} – ${becomes}, drift ${drift} (norm ${chosen + 1} of ${points.length})`;
  }

  function go() {
    const row = points[chosen].row;
    if (row.hidden) clear();
    row.tabIndex = -1;
    row.scrollIntoView({ block: "center" });
    row.focus();
  }

  function nearest(event) {
    const at = event.clientX - chart.getBoundingClientRect().left;
    return Math.round(((at - left) / (chart.clientWidth - left - right)) * points.length - 0.5);
  }

  chart.addEventListener("pointermove", (event) => tell(nearest(event)));
  chart.addEventListener("click", (event) => { tell(nearest(event)); go(); });
  chart.addEventListener("keydown", (event) => {
    const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, PageDown: chosen + 10, PageUp: chosen - 10, Home: 0,
      End: points.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); tell(to); }
    if (event.key === "Enter" && chosen >= 0) go();
  });
  new ResizeObserver(paint).observe(chart);
  paint();
}
