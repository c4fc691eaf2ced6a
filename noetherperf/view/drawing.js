"use strict";

// How pictures are drawn, by Plotly.
//
// Names come from records, and records from anybody. They enter the page as text only: as textContent, or through
// `plain` where Plotly would read a few tags.

const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length <= 30 ? text : `${text.slice(0, 14)}…${text.slice(-15)}`);

function make(tag, content = "", attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...[content].flat());
  return made;
}

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
const CONFIG = { doubleClick: "autosize", responsive: true, displaylogo: false, displayModeBar: "hover" };
CONFIG.modeBarButtons = [["toImage", "zoom2d", "pan2d", "autoScale2d"]]; // none that leads to the network
const color = (i) => COLORS[i % COLORS.length];

function layout(changes) {
  const { xaxis, yaxis, steps = true, ...others } = changes;
  const range = steps && chosen.range ? { range: chosen.range, autorange: false } : { autorange: true };
  return {
    margin: { l: 64, r: 12, t: 24, b: 38 },
    font: { family: "system-ui, sans-serif", size: 12, color: "#1f2733" },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    hovermode: "closest",
    modebar: { bgcolor: "transparent", color: "#98a2b3", activecolor: "#1b3a6b" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: {
      title: { text: "step", standoff: 6 }, gridcolor: "#eceef1", zeroline: false, automargin: true,
      ...range, ...xaxis,
    },
    yaxis: { gridcolor: "#eceef1", zerolinecolor: "#b9c0ca", exponentformat: "power", automargin: true, ...yaxis },
    ...others,
  };
}

/** Draw into a place, or say there why not. A place keeps its zoom while the key stays the same. */
function draw(place, traces, options, key) {
  if (typeof traces === "string") {
    Plotly.purge(place);
    place.zooms = false;
    place.replaceChildren(make("p", traces, { className: "note" }));
    return null;
  }
  if (place.querySelector(".note")) place.replaceChildren();
  place.style.height = `${options.height}px`;
  const drawn = Plotly.react(place, traces, layout({ ...options, uirevision: `${key} ${chosen.range}` }), CONFIG);
  if (!place.zooms && options.steps !== false) {
    place.on("plotly_relayout", zoom);
    place.zooms = true;
  }
  return drawn;
}

/** Names as the categories of an axis, which merges those that are equal. */
function categories(texts) {
  const seen = new Set();
  return texts.map(plain).map((text, i) => {
    const own = seen.has(text) ? `${text} (${i})` : text;
    seen.add(own);
    return own;
  });
}

/** A user zooms one picture along the steps: all show these steps, and finer rows of them. */
function zoom(change) {
  const [first, last] = [change["xaxis.range[0]"], change["xaxis.range[1]"]].map(Number);
  if (Number.isFinite(first) && Number.isFinite(last)) choose({ range: [Math.floor(first), Math.ceil(last)] });
  else if (change["xaxis.autorange"] && chosen.range) choose({ range: null });
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

/** How many steps a heat map shows: without the last one where it alone is at another distance, for that takes 5 times
 *  as long to draw. */
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
    const rowsOf = categories(texts);
    const every = Math.ceil(texts.length / ((height - 50) / 15));
    const ticks = rowsOf.filter((_, row) => row % every === 0);
    const trace = {
      type: "heatmap", x: answers[i].steps.slice(0, evenly(answers[i].steps)), y: rowsOf,
      z: picture.map((row) => row.map(scale.of)),
      customdata: picture, hoverongaps: false, ...scale.options,
      hovertemplate: `${noun}%{y}<br>step %{x}<br>%{customdata:.4g}<extra></extra>`,
    };
    const shown = { type: "category", autorange: "reversed", showgrid: false, tickvals: ticks };
    shown.ticktext = texts.map((text) => plain(short(text))).filter((_, row) => row % every === 0);
    const options = { height, yaxis: shown, xaxis: { showgrid: false } };
    const drawn = draw(place, [trace], options, `${id}${i}${chosen.quantity}`);
    drawn?.then(() => {
      place.removeAllListeners?.("plotly_click");
      place.on("plotly_click", ({ points: [point] }) => onClick(rowsOf.indexOf(String(point.y)), i));
    });
    return drawn;
  }));
}
