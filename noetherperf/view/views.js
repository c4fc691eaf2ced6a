"use strict";

// The page's pictures and tables, each from the answer to a question.

async function drawLayers() {
  const answers = await forRuns((_, i) => askSteps(`layers?run=${i}&quantity=${chosen.quantity}`));
  const labels = (i) => state.runs[i].symmetries.map((symmetry) => symmetry.name);
  const chooseRow = (row, i) => choose({ symmetry: state.runs[i].symmetries[row].key, unit: 0 });
  await drawMaps("layers", answers, labels, "", chooseRow);
  element("meaning").textContent = quantityOf(chosen.quantity).meaning;
}

function drawLoss() {
  const found = state.runs.flatMap((run, i) => {
    const name = Object.keys(run.probes).find((probe) => probe === "loss");
    if (!name) return [];
    const line = { color: color(i), width: 1.2 };
    const y = rows(run.probes[name])[0]; // NaN in rows between which none was logged
    const mode = y.filter(Number.isFinite).length < 3 ? "lines+markers" : "lines";
    return [{ x: run.steps, y, name: plain(run.label), mode, connectgaps: true, line }];
  });
  element("loss").hidden = found.length === 0;
  const positive = found.every((trace) => trace.y.every((y) => !(y <= 0)));
  if (found.length === 0) return null;
  const yaxis = { title: { text: "loss", standoff: 12 }, type: positive ? "log" : "linear", nticks: 4 };
  return draw(element("loss"), found, { height: 150, yaxis, showlegend: state.runs.length > 1 }, "loss");
}

async function drawUnits() {
  const answers = await forChosen((at) => askSteps(`series?${at}&name=${chosen.quantity}`));
  const labels = (i) => answers[i].texts ?? answers[i].units.map(String);
  const noun = !isBalance() ? "unit " : chosen.quantity === "charge" ? "block: eigenvalue " : "block ";
  const chooseRow = (row, i) => choose({ unit: (answers[i].blocks ?? answers[i].units)[row] });
  await drawMaps("units", answers, labels, noun, chooseRow);
}

/** What is said about the chosen symmetry, and which of its units there are. */
function describeChosen() {
  const laws = state.runs.map(chosenIn).filter(Boolean);
  const [{ kind, units, blocks }] = laws;
  const open = laws.filter((law) => !law.closed).map((law) => law.reason);
  element("unit").max = Math.max(...laws.map(countIn)) - 1;
  element("unit-noun").textContent = isBalance() ? "Block" : "Unit";
  const shown = isBalance() ? "eigenvalues of its matrix, and of the law's" : "measured charge and both laws";
  element("unit-meaning").textContent = `${shown}; below, how far the laws are off, relative to their terms`;
  element("budget-title").textContent = isBalance() ? "Matrix" : "Budget";
  element("budget-meaning").textContent = isBalance()
    ? "the charge, what the law predicts, and the difference"
    : "why the charge has changed since the start, mean over units: the sources add up to the change";
  const some = units > state.most_units ? `, ${state.most_units} of them shown` : "";
  const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  element("symmetry-meaning").textContent = [
    isBalance()
      ? `${kind}, ${count(blocks, "block")} of ${count(units / blocks, "unit")}${some}`
      : `${kind}, ${count(units, "unit")}${some}`,
    ...(open.length ? [`its law is open: ${[...new Set(open)].join("; ")}`] : []),
  ].join("; ");
}

async function drawCurves() {
  if (isBalance()) return drawSpectra();
  const ofUnit = (name) => forChosen((at, law) =>
    chosen.unit >= law.units
      ? { missing: `there is no unit ${chosen.unit}` }
      : askSteps(`series?${at}&name=${name}&unit=${chosen.unit}`));
  const wanted = Object.keys({ ...LAWS, ...ERRORS });
  const answers = Object.fromEntries(await Promise.all(wanted.map(async (name) => [name, await ofUnit(name)])));
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
  const place = element("curves");
  if (draws.length === 0) return draw(place, answers.charge[0].missing ?? "nothing is recorded of this unit");
  return drawTwice(place, draws, "charge");
}

/** Curves above, and on a logarithmic axis below how far they are off. */
function drawTwice(place, traces, title) {
  return draw(place, traces, {
    height: 400,
    xaxis: { anchor: "y2" },
    yaxis: { title: { text: title, standoff: 12 }, domain: [0.42, 1] },
    yaxis2: {
      title: { text: "relative error", standoff: 12 }, domain: [0, 0.34], type: "log", nticks: 5,
      gridcolor: "#eceef1", exponentformat: "power", automargin: true,
    },
  }, `curves${chosen.symmetry}/${chosen.unit}`);
}

async function drawBudget() {
  if (isBalance()) return drawMatrices();
  element("row-field").hidden = true;
  const answers = await forChosen((at) => askSteps(`budget?${at}`));
  const terms = answers.map((answer) => (answer.missing ? {} : Object.fromEntries(
    Object.entries(answer.terms).map(([name, values]) => [name, rows(values)[0]]))));
  const range = state.runs.length > 1 ? reach(terms) : null; // the same in all pictures
  await Promise.all(places("budget").map((place, i) => {
    if (answers[i].missing) return draw(place, answers[i].missing);
    const x = answers[i].steps;
    const areas = Object.entries(PARTS).filter(([name]) => terms[i][name]).flatMap(([name, tint]) =>
      [["up", (y) => Math.max(y, 0)], ["down", (y) => Math.min(y, 0)]].map(([side, part]) => ({
        x, y: terms[i][name].map(part), name, stackgroup: side, mode: "lines", fillcolor: `${tint}b0`,
        line: { width: 0, color: tint }, legendgroup: name, showlegend: side === "up", hoverinfo: "skip",
      })));
    const change = { x, y: terms[i].change, name: "measured change", mode: "lines", line: { color: "#111", width: 2 } };
    const yaxis = { title: { text: "change of the charge" }, ...(range ? { range, autorange: false } : {}) };
    return draw(place, [...areas, change], { height: 400, yaxis }, `budget${i}${chosen.symmetry}${range}`);
  }));
}

/** From the lowest to the highest that stacked terms reach, in all runs. */
function reach(terms) {
  let [low, high] = [0, 0];
  for (const run of terms.filter((one) => one.change)) {
    const parts = Object.keys(PARTS).filter((name) => run[name]).map((name) => run[name]);
    run.change.forEach((change, step) => {
      const at = parts.map((part) => part[step]).filter(Number.isFinite);
      const [down, up] = [Math.min, Math.max].map((side) => at.reduce((sum, x) => sum + side(x, 0), 0));
      const ends = [down, up, change].filter(Number.isFinite);
      [low, high] = [Math.min(low, ...ends), Math.max(high, ...ends)];
    });
  }
  const space = 0.05 * (high - low);
  return high > low ? [low - space, high + space] : null;
}

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
    onclick: () => choose({ symmetry: row.key, unit: 0 }),
    onkeydown: (event) => {
      if (event.key === "Enter") choose({ symmetry: row.key, unit: 0 });
    },
    tabIndex: 0,
    symmetry: row.key,
  })));
  if (body.length === 0) {
    const why = keys().length ? "no row is recorded yet" : "no symmetry is measured";
    element("table").replaceChildren(make("p", why, { className: "note" }));
    return;
  }
  const { headings, texts } = known[0];
  const shown = several ? ["run", ...headings] : headings;
  element("table").replaceChildren(table(shown, body, (heading) => heading !== "run" && !texts.includes(heading)));
  markChosen();
}

/** Mark the rows of the chosen symmetry. */
function markChosen() {
  for (const row of element("table").querySelectorAll("tr.choice")) {
    row.classList.toggle("chosen", row.symmetry === chosen.symmetry);
  }
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
  if (menu.dataset.texts !== texts) {
    menu.replaceChildren(...list.map(([value, text]) => make("option", text, { value })));
    menu.dataset.texts = texts;
  }
  menu.value = now;
}

function drawState() {
  if (!keys().includes(chosen.symmetry)) Object.assign(chosen, { symmetry: keys()[0] ?? null, unit: 0 });
  element("runs").replaceChildren(...state.runs.map((run, i) => {
    const [n, last] = [run.rows, run.steps.at(-1) ?? 0].map((count) => count.toLocaleString("en"));
    const item = make("li", `${run.label}: ${n} row${run.rows === 1 ? "" : "s"}, to step ${last}`);
    item.style.setProperty("--run", color(i));
    return item;
  }));
  document.body.classList.toggle("several", state.runs.length > 1);
  const mapped = state.quantities.filter((quantity) => quantity.mapped);
  offer("quantity", mapped.map(({ name, title }) => [name, title]), chosen.quantity);
  offer("symmetry", keys().map((key) => [key, nameOf(key)]), chosen.symmetry);
  element("unit").value = chosen.unit;
  drawSettings();
}
