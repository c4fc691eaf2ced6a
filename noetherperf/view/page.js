"use strict";

// The page's script: asks a source for numbers, and draws them. The source is the server, or the file itself.
//
// Names come from records, and records from anybody. They enter the page as text only: as textContent, or through
// `plain` where Plotly would read a few tags.

const element = (id) => document.getElementById(id);
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length <= 30 ? text : `${text.slice(0, 14)}…${text.slice(-15)}`);

function make(tag, content = "", attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...[content].flat());
  return made;
}

// ---- numbers ---------------------------------------------------------------------------------------------------------

async function fromServer(question) {
  const answer = await fetch(`/data/${question}`);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

/** A source that holds all answers, but for single units: these are rows of their symmetry's. */
async function fromFile(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const answers = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  return async (question) => {
    if (question in answers) return answers[question];
    const [whole, unit] = question.split("&unit=");
    const answer = answers[whole];
    if (answer.missing) return answer;
    const row = answer.units.indexOf(Number(unit));
    if (row < 0) return { missing: `this file holds ${answer.units.length} of these units, and not unit ${unit}` };
    return { ...answer, units: [Number(unit)], row };
  };
}

/** Rows of numbers, as the server packs them. */
function rows({ shape: [n, width], float32 }) {
  const numbers = new Float32Array(Uint8Array.from(atob(float32), (c) => c.charCodeAt(0)).buffer);
  return Array.from({ length: n }, (_, i) => Array.from(numbers.subarray(i * width, (i + 1) * width)));
}

// This script comes before Plotly's.
const drawable = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve));

let ask;
let state; // what there is: the answer to "state"
const chosen = { quantity: "charge", symmetry: null, unit: 0 };

const quantityOf = (name) => state.quantities.find((quantity) => quantity.name === name);
const names = () => [...new Set(state.runs.flatMap((run) => run.symmetries.map((symmetry) => symmetry.name)))];
const indexIn = (run) => run.symmetries.findIndex((symmetry) => symmetry.name === chosen.symmetry);
const forRuns = (question) => Promise.all(state.runs.map((run, i) => question(run, i)));
const absent = (run) => ({ missing: `${run.label} has no symmetry of this name` });

// ---- pictures --------------------------------------------------------------------------------------------------------

const COLORS = ["#1b3a6b", "#c8553d", "#5aa17f", "#8a5fb0", "#b8860b", "#0f8ea6", "#b4467a", "#555555"];
const PARTS = { decay: "#1b3a6b", growth: "#d9a441", defect: "#c8553d", rounding: "#7a7a7a" };
// Curves of a unit: title, dash, width, colour where there is one run.
const LAWS = {
  charge: ["measured", "solid", 3, "#1b3a6b"],
  discrete: ["discrete law", "dash", 1.6, "#c8553d"],
  flow: ["flow law", "dot", 1.6, "#2f8f63"],
};
const ERRORS = {
  residual: ["discrete law", "dash", 1.4, "#c8553d"],
  flow_error: ["flow law", "dot", 1.4, "#2f8f63"],
  rounding: ["rounding", "solid", 1.4, "#7a7a7a"],
};
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: "hover" };
CONFIG.modeBarButtons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]; // none that leads to the network
const color = (i) => COLORS[i % COLORS.length];

function layout(changes) {
  const { xaxis, yaxis, ...others } = changes;
  return {
    margin: { l: 64, r: 12, t: 24, b: 38 },
    font: { family: "system-ui, sans-serif", size: 12, color: "#1f2733" },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    hovermode: "closest",
    modebar: { bgcolor: "transparent", color: "#98a2b3", activecolor: "#1b3a6b" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { title: { text: "step", standoff: 6 }, gridcolor: "#eceef1", zeroline: false, automargin: true, ...xaxis },
    yaxis: { gridcolor: "#eceef1", zerolinecolor: "#b9c0ca", exponentformat: "power", automargin: true, ...yaxis },
    ...others,
  };
}

/** Draw into a place, or say there why not. A place keeps its zoom while the key stays the same. */
function draw(place, traces, options, key) {
  if (typeof traces === "string") {
    Plotly.purge(place);
    place.replaceChildren(make("p", traces, { className: "note" }));
    return null;
  }
  if (place.querySelector(".note")) place.replaceChildren();
  place.style.height = `${options.height}px`;
  return Plotly.react(place, traces, layout({ ...options, uirevision: key }), CONFIG);
}

/** One place for each run, with the run's label if there are several. */
function places(id) {
  const parent = element(id);
  while (parent.children.length > state.runs.length) parent.lastChild.remove();
  while (parent.children.length < state.runs.length) {
    const label = make("h3", "", { hidden: state.runs.length === 1 });
    parent.append(make("div", [label, make("div", "", { className: "picture" })]));
  }
  return state.runs.map((run, i) => {
    parent.children[i].firstChild.textContent = run.label;
    parent.children[i].firstChild.style.color = color(i);
    return parent.children[i].lastChild;
  });
}

/** How numbers become colours, the same in all pictures side by side: signed, by size, or by decades. */
function coloring(pictures) {
  let low = Infinity;
  let high = -Infinity;
  let least = Infinity; // of the positive ones
  for (const row of pictures.flat()) {
    for (const x of row) {
      if (!Number.isFinite(x)) continue;
      low = Math.min(low, x);
      high = Math.max(high, x);
      if (x > 0) least = Math.min(least, x);
    }
  }
  if (!Number.isFinite(low)) return null;
  const bar = { thickness: 12, outlinewidth: 0, len: 1, exponentformat: "power" };
  if (low < 0) {
    const most = Math.max(-low, high);
    return { of: (x) => x, options: { colorscale: "RdBu", zmin: -most, zmax: most, colorbar: bar } };
  }
  if (!(high > 10 * least)) {
    return { of: (x) => x, options: { colorscale: "Viridis", zmin: low, zmax: high, colorbar: bar } };
  }
  const [from, to] = [Math.log10(least), Math.log10(high)];
  const pace = Math.max(1, Math.ceil((to - from) / 8));
  const decades = [];
  for (let d = Math.ceil(from); d <= to; d += pace) decades.push(d);
  return {
    of: (x) => (x === 0 ? from : Math.log10(x)), // zero is as dark as the least
    options: {
      colorscale: "Viridis", zmin: from, zmax: to,
      colorbar: { ...bar, tickvals: decades, ticktext: decades.map((d) => `10<sup>${d}</sup>`) },
    },
  };
}

/** How many steps a heat map shows: not the last one where it alone is at another distance, which takes 5 times as long. */
function evenly(steps) {
  const [gap, before, last] = [steps[1] - steps[0], steps.at(-2) - steps.at(-3), steps.at(-1) - steps.at(-2)];
  return steps.length > 2 && before === gap && last !== gap ? steps.length - 1 : steps.length;
}

/** Heat maps side by side. `labels(i)`: of the rows in the map of run i. */
function drawMaps(id, answers, labels, noun, onClick) {
  const pictures = answers.map((answer) =>
    answer.missing ? [] : rows(answer.values).map((row) => row.slice(0, evenly(answer.steps))));
  const scale = coloring(pictures);
  const tallest = Math.max(...pictures.map((picture) => picture.length), 1);
  const height = Math.round(Math.min(620, Math.max(200, 70 + 17 * tallest)));
  return Promise.all(places(id).map((place, i) => {
    const picture = pictures[i];
    if (answers[i].missing) return draw(place, answers[i].missing);
    if (!picture.some((row) => row.some(Number.isFinite))) return draw(place, "nothing finite to show");
    const texts = labels(i);
    const every = Math.ceil(texts.length / ((height - 50) / 15));
    const ticks = texts.map(plain).filter((_, row) => row % every === 0);
    const trace = {
      type: "heatmap", x: answers[i].steps.slice(0, evenly(answers[i].steps)), y: texts.map(plain), z: picture.map((row) => row.map(scale.of)),
      customdata: picture, hoverongaps: false, ...scale.options,
      hovertemplate: `${noun}%{y}<br>step %{x}<br>%{customdata:.4g}<extra></extra>`,
    };
    const shown = { type: "category", autorange: "reversed", showgrid: false, tickvals: ticks };
    shown.ticktext = texts.map((text) => plain(short(text))).filter((_, row) => row % every === 0);
    const drawn = draw(place, [trace], { height, yaxis: shown, xaxis: { showgrid: false } }, `${id}${i}${chosen.quantity}`);
    drawn?.then(() => {
      place.removeAllListeners?.("plotly_click");
      place.on("plotly_click", ({ points: [point] }) => onClick(texts.map(plain).indexOf(String(point.y)), i));
    });
    return drawn;
  }));
}

async function drawLayers() {
  const answers = await forRuns((_, i) => ask(`layers?run=${i}&quantity=${chosen.quantity}`));
  const labels = (i) => state.runs[i].symmetries.map((symmetry) => symmetry.name);
  await drawMaps("layers", answers, labels, "", (row, i) => choose({ symmetry: labels(i)[row], unit: 0 }));
  element("meaning").textContent = quantityOf(chosen.quantity).meaning;
}

function drawLoss() {
  const found = state.runs.flatMap((run, i) => {
    const name = Object.keys(run.probes).find((probe) => probe === "loss");
    if (!name) return [];
    return [{ x: run.steps, y: rows(run.probes[name])[0], name: plain(run.label), mode: "lines", line: { color: color(i), width: 1.2 } }];
  });
  element("loss").hidden = found.length === 0;
  const positive = found.every((trace) => trace.y.every((y) => !(y <= 0)));
  if (found.length === 0) return null;
  const yaxis = { title: { text: "loss", standoff: 12 }, type: positive ? "log" : "linear", nticks: 4 };
  return draw(element("loss"), found, { height: 150, yaxis, showlegend: state.runs.length > 1 }, "loss");
}

async function drawUnits() {
  const answers = await forRuns((run, i) =>
    indexIn(run) < 0 ? absent(run) : ask(`series?run=${i}&symmetry=${indexIn(run)}&name=${chosen.quantity}`));
  const labels = (i) => answers[i].units.map(String);
  await drawMaps("units", answers, labels, "unit ", (row, i) => choose({ unit: answers[i].units[row] }));
  const laws = state.runs.filter((run) => indexIn(run) >= 0).map((run) => run.symmetries[indexIn(run)]);
  const { kind, units } = laws[0];
  const open = laws.filter((law) => !law.closed).map((law) => law.reason);
  element("unit").max = Math.max(...laws.map((law) => law.units)) - 1;
  const some = answers[0].units && answers[0].units.length < units ? `, ${answers[0].units.length} of them shown` : "";
  element("symmetry-meaning").textContent = [
    `${kind}, ${units} unit${units === 1 ? "" : "s"}${some}`,
    ...(open.length ? [`its law is open: ${[...new Set(open)].join("; ")}`] : []),
  ].join("; ");
}

async function drawCurves() {
  const ofUnit = (name) => forRuns((run, i) => {
    const index = indexIn(run);
    if (index < 0) return absent(run);
    if (chosen.unit >= run.symmetries[index].units) return { missing: `there is no unit ${chosen.unit}` };
    return ask(`series?run=${i}&symmetry=${index}&name=${name}&unit=${chosen.unit}`);
  });
  const all = { ...LAWS, ...ERRORS };
  const answers = Object.fromEntries(await Promise.all(Object.keys(all).map(async (name) => [name, await ofUnit(name)])));
  const several = state.runs.length > 1;
  const curve = (name, i, [title, dash, width, tint], axis) => {
    const answer = answers[name][i];
    if (answer.missing) return [];
    return [{
      x: answer.steps, y: rows(answer.values)[answer.row ?? 0], yaxis: axis, mode: "lines",
      name: plain(several ? `${state.runs[i].label}: ${title}` : title),
      line: { color: several ? color(i) : tint, dash, width },
      legendgroup: `${title}${i}`, showlegend: axis === "y" || name === "rounding",
    }];
  };
  const draws = state.runs.flatMap((_, i) => [
    ...Object.entries(LAWS).flatMap(([name, style]) => curve(name, i, style, "y")),
    ...Object.entries(ERRORS).flatMap(([name, style]) => curve(name, i, style, "y2")),
  ]);
  if (draws.length === 0) return draw(element("curves"), answers.charge[0].missing ?? "nothing is recorded of this unit");
  return draw(element("curves"), draws, {
    height: 400,
    xaxis: { anchor: "y2" },
    yaxis: { title: { text: "charge", standoff: 12 }, domain: [0.42, 1] },
    yaxis2: { title: { text: "relative error", standoff: 12 }, domain: [0, 0.34], type: "log", gridcolor: "#eceef1", exponentformat: "power",
      automargin: true, nticks: 5 },
  }, `curves${chosen.symmetry}/${chosen.unit}`);
}

async function drawBudget() {
  const answers = await forRuns((run, i) =>
    indexIn(run) < 0 ? absent(run) : ask(`budget?run=${i}&symmetry=${indexIn(run)}`));
  const terms = answers.map((answer) => (answer.missing ? {} : Object.fromEntries(
    Object.entries(answer.terms).map(([name, values]) => [name, rows(values)[0]]))));
  await Promise.all(places("budget").map((place, i) => {
    if (answers[i].missing) return draw(place, answers[i].missing);
    const x = answers[i].steps;
    const areas = Object.entries(PARTS).filter(([name]) => terms[i][name]).flatMap(([name, tint]) =>
      [["up", (y) => Math.max(y, 0)], ["down", (y) => Math.min(y, 0)]].map(([side, part]) => ({
        x, y: terms[i][name].map(part), name, stackgroup: side, mode: "lines", fillcolor: `${tint}b0`,
        line: { width: 0, color: tint }, legendgroup: name, showlegend: side === "up", hoverinfo: "skip",
      })));
    const change = { x, y: terms[i].change, name: "measured change", mode: "lines", line: { color: "#111", width: 2 } };
    return draw(place, [...areas, change], { height: 400, yaxis: { title: { text: "change of the charge" } } },
      `budget${i}${chosen.symmetry}`);
  }));
}

// ---- tables ----------------------------------------------------------------------------------------------------------

function table(headings, body, isNumber = () => false) {
  const cell = (tag, text, i) => make(tag, text, { className: isNumber(headings[i]) ? "number" : "" });
  const head = make("tr", headings.map((heading, i) => cell("th", heading, i)));
  return make("table", [make("thead", head), make("tbody", body.map(({ cells, ...attributes }) =>
    make("tr", cells.map((text, i) => cell("td", text, i)), attributes)))]);
}

async function drawTable() {
  const answers = await forRuns((_, i) => ask(`table?run=${i}`));
  const known = answers.filter((answer) => !answer.missing);
  if (known.length === 0) {
    element("table").replaceChildren(make("p", answers[0]?.missing ?? "", { className: "note" }));
    return;
  }
  const several = state.runs.length > 1;
  const body = answers.flatMap((answer, i) => (answer.rows ?? []).map((row) => ({
    cells: several ? [state.runs[i].label, ...row.cells] : row.cells,
    className: "choice",
    onclick: () => choose({ symmetry: row.name, unit: 0 }),
    symmetry: row.name,
  })));
  const { headings, texts } = known[0];
  const shown = several ? ["run", ...headings] : headings;
  element("table").replaceChildren(table(shown, body, (heading) => heading !== "run" && !texts.includes(heading)));
  markChosen();
}

/** Mark the rows of the chosen symmetry. */
function markChosen() {
  for (const row of element("table").querySelectorAll("tr.choice")) row.classList.toggle("chosen", row.symmetry === chosen.symmetry);
}

function drawSettings() {
  const keys = [...new Set(state.runs.flatMap((run) => Object.keys(run.settings)))];
  const several = state.runs.length > 1;
  const body = keys.map((key) => {
    const values = state.runs.map((run) => run.settings[key] ?? "–");
    return { cells: [key, ...values], className: new Set(values).size > 1 ? "differs" : "" };
  });
  body.sort((a, b) => (a.className === "") - (b.className === "")); // differences first
  element("settings").replaceChildren(table(["setting", ...state.runs.map((run) => run.label)], body));
  element("settings-meaning").textContent = several ? "those that differ first" : "";
}

/** What a menu offers; one that a user has opened is not disturbed while nothing changes. */
function offer(id, list, now) {
  const menu = element(id);
  const texts = JSON.stringify(list);
  if (menu.dataset.texts !== texts) menu.replaceChildren(...list.map(([value, text]) => make("option", text, { value })));
  menu.dataset.texts = texts;
  menu.value = now;
}

function drawState() {
  if (!names().includes(chosen.symmetry)) Object.assign(chosen, { symmetry: names()[0] ?? null, unit: 0 });
  element("runs").replaceChildren(...state.runs.map((run, i) => {
    const [n, last] = [run.rows, run.steps.at(-1) ?? 0].map((count) => count.toLocaleString("en"));
    const item = make("li", `${run.label}: ${n} row${run.rows === 1 ? "" : "s"}, to step ${last}`);
    item.style.setProperty("--run", color(i));
    return item;
  }));
  document.body.classList.toggle("several", state.runs.length > 1);
  tell(state.runs.flatMap((run) => run.faults));
  const mapped = state.quantities.filter((quantity) => quantity.mapped);
  offer("quantity", mapped.map(({ name, title }) => [name, title]), chosen.quantity);
  offer("symmetry", names().map((name) => [name, name]), chosen.symmetry);
  element("unit").value = chosen.unit;
  drawSettings();
}

function tell(faults) {
  element("faults").hidden = faults.length === 0;
  element("faults").textContent = faults.join("\n");
}

// ---- what happens ----------------------------------------------------------------------------------------------------

// Documents say how far they are: data-drawn counts whole redraws, data-first is when the first picture stood, in ms.
const said = document.documentElement.dataset;
let turn = Promise.resolve();
let waiting = 0;

/** Run drawing one after the other: a picture is never drawn over by an older one. */
function inTurn(work) {
  said.busy = "true";
  waiting += 1;
  turn = turn.then(work).catch((error) => tell([String(error.message ?? error)])).then(() => {
    said.drawn = Number(said.drawn ?? 0) + 1;
    waiting -= 1;
    if (waiting === 0) delete said.busy;
  });
  return turn;
}

const drawChosen = () => Promise.all([drawUnits(), drawCurves(), drawBudget()]);

async function drawAll() {
  drawState();
  await Promise.all([drawLayers(), drawLoss()]);
  said.first ??= String(performance.now());
  if (chosen.symmetry !== null) await drawChosen();
  await drawTable();
}

function choose(changes) {
  const before = { ...chosen };
  Object.assign(chosen, changes);
  element("quantity").value = chosen.quantity;
  element("symmetry").value = chosen.symmetry;
  element("unit").value = chosen.unit;
  return inTurn(async () => {
    if (before.quantity !== chosen.quantity) await drawLayers();
    if (chosen.symmetry === null) return;
    markChosen();
    if (before.symmetry !== chosen.symmetry) await drawChosen();
    else if (before.quantity !== chosen.quantity) await drawUnits();
    else await drawCurves();
  });
}

/** Every second: what is new? A server that has stopped leaves the page as it is. */
async function follow(versions) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    try {
      const now = JSON.stringify((await ask("versions")).versions);
      element("status").textContent = "live";
      if (now !== versions) await inTurn(async () => { state = await ask("state"); await drawAll(); });
      versions = now;
    } catch {
      element("status").textContent = "the server has stopped; this is what it said last";
      versions = "";
    }
  }
}

async function begin() {
  const held = element("data");
  ask = held ? await fromFile(held.textContent) : fromServer;
  state = await ask("state");
  forRuns((_, i) => ask(`layers?run=${i}&quantity=${chosen.quantity}`)).catch(() => null); // read while Plotly is compiled
  await drawable;
  element("quantity").onchange = (event) => choose({ quantity: event.target.value });
  element("symmetry").onchange = (event) => choose({ symmetry: event.target.value, unit: 0 });
  element("unit").onchange = (event) => choose({ unit: Math.max(0, Number(event.target.value) || 0) });
  element("status").textContent = state.live ? "live" : "saved in one file";
  await inTurn(drawAll);
  if (state.live) follow(JSON.stringify(state.runs.map((run) => run.version)));
}

begin().catch((error) => tell([String(error.message ?? error)]));
