"use strict";

// Balances: their spectra over time, and their matrices at one step.

/** The spectrum of a block over time, with the law over it. */
async function drawSpectra() {
  const answers = await forChosen((at, law) =>
    chosen.unit >= law.blocks
      ? { missing: `there is no block ${chosen.unit}` }
      : askSteps(`spectrum?${at}&block=${chosen.unit}`));
  const several = state.runs.length > 1;
  const styles = { measured: LAWS.charge, law: LAWS.discrete, residual: ERRORS.residual, rounding: ERRORS.rounding };
  const draws = answers.flatMap((answer, i) => Object.entries(styles).flatMap(([name, [title, dash, width, tint]]) => {
    if (!answer.lines?.[name]) return [];
    const lines = rows(answer.lines[name]);
    const [above, some] = [name in { measured: 0, law: 0 }, lines.length < answer.of];
    const shown = name === "measured" && some ? `${title} (${lines.length} of ${answer.of})` : title;
    return [{ // one trace: its lines are separated by gaps
      x: lines.flatMap(() => [...answer.steps, null]), y: lines.flatMap((line) => [...line, null]),
      yaxis: above ? "y" : "y2", mode: "lines", line: { color: several ? color(i) : tint, dash, width: above ? 1.4 : width },
      name: plain(several ? `${state.runs[i].label}: ${shown}` : shown),
      legendgroup: `${title}${i}`, showlegend: above || name === "rounding",
    }];
  }));
  if (draws.length === 0) return draw(element("curves"), answers[0].missing);
  return drawTwice(element("curves"), draws, "eigenvalues");
}

/** The steps that have matrices of the chosen Balance, in the first run that has any. */
function matrixSteps() {
  const run = state.runs.find((one) => chosenIn(one)?.matrices !== undefined);
  return run ? (chosenIn(run).matrices ?? [...run.steps.keys()]).map((row) => run.steps[row]) : [];
}

/** A block's matrices at one step: charge, law and residual. */
async function drawMatrices() {
  const steps = matrixSteps();
  const step = chosen.step ?? steps.at(-1);
  const near = (values) => values.reduce((best, x, i) =>
    (Math.abs(x - step) < Math.abs(values[best] - step) ? i : best), 0);
  element("row-field").hidden = steps.length < 2;
  element("row").max = Math.max(steps.length - 1, 0);
  element("row").value = steps.length ? near(steps) : 0;
  const answers = await forChosen((at, law) => {
    const run = state.runs[Number(/run=(\d+)/.exec(at)[1])];
    const known = law.matrices ?? [...run.steps.keys()];
    if (chosen.unit >= law.blocks) return { missing: `there is no block ${chosen.unit}` };
    if (known.length === 0) return { missing: law.why };
    return ask(`matrix?${at}&block=${chosen.unit}&row=${known[near(known.map((row) => run.steps[row]))]}`);
  });
  element("row-step").value = answers.find((answer) => !answer.missing)?.step ?? "";
  const pictures = answers.map(({ matrices = {} }) =>
    Object.fromEntries(Object.entries(matrices).map(([name, values]) => [name, rows(values)])));
  const most = (names) => pictures.flatMap((of) => names.flatMap((name) => of[name] ?? [])).flat()
    .reduce((size, x) => (Number.isFinite(x) ? Math.max(size, Math.abs(x)) : size), 0) || 1;
  const scale = (size, x) => ({
    cmin: -size, cmax: size, colorscale: "RdBu",
    colorbar: {
      thickness: 10, outlinewidth: 0, exponentformat: "power", nticks: 4, tickangle: 0, orientation: "h", len: 0.45, x,
      y: 0, yanchor: "top",
    },
  });
  return Promise.all(places("budget").map((place, i) => {
    if (answers[i].missing) return draw(place, answers[i].missing);
    const found = Object.entries(pictures[i]);
    const share = 1 / found.length;
    const hidden = { showticklabels: false, showgrid: false, zeroline: false, ticks: "", constrain: "domain" };
    const options = { height: 340, steps: false, margin: { l: 12, r: 12, t: 30, b: 12 } };
    const traces = found.map(([name, z], n) => {
      const axis = n ? n + 1 : "";
      const domain = [n * share + 0.01, (n + 1) * share - 0.01];
      const title = { text: name, standoff: 4 };
      options[`xaxis${axis}`] = { ...hidden, domain, anchor: `y${axis}`, side: "top", title };
      options[`yaxis${axis}`] = { ...hidden, autorange: "reversed", scaleanchor: `x${axis}`, anchor: `x${axis}` };
      return {
        type: "heatmap", z, xaxis: `x${axis}`, yaxis: `y${axis}`, coloraxis: name === "residual" ? "coloraxis2" : "coloraxis",
        hovertemplate: `${name}<br>units %{y}, %{x}<br>%{z:.4g}<extra></extra>`,
      };
    });
    options.coloraxis = scale(most(["charge", "law"]), 0.25);
    if (pictures[i].residual) options.coloraxis2 = scale(most(["residual"]), 0.78);
    return draw(place, traces, options, `matrix${i}${chosen.symmetry}`);
  }));
}
