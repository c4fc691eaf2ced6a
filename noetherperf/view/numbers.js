"use strict";

// Where the page's numbers come from: it asks a source, which is the server, or the file itself.

const element = (id) => document.getElementById(id);

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
