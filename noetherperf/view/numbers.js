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
// What a user has chosen. `symmetry` is its name as recorded; `step` is that of the matrices, `range` the steps that all
// pictures show; null: the last, and all.
const chosen = { quantity: "charge", symmetry: null, unit: 0, step: null, range: null };

const quantityOf = (name) => state.quantities.find((quantity) => quantity.name === name);
const keys = () => [...new Set(state.runs.flatMap((run) => run.symmetries.map((symmetry) => symmetry.key)))];
const nameOf = (key) => state.runs.flatMap((run) => run.symmetries).find((symmetry) => symmetry.key === key).name;
const indexIn = (run) => run.symmetries.findIndex((symmetry) => symmetry.key === chosen.symmetry);
const chosenIn = (run) => run.symmetries[indexIn(run)];
const isBalance = () => state.runs.map(chosenIn).find(Boolean)?.kind === "balance";
/** Of a unit, or of a block of a Balance. */
const countIn = (law) => (law.kind === "balance" ? law.blocks : law.units);
const forRuns = (question) => Promise.all(state.runs.map((run, i) => question(run, i)));

/** The answer to a question on rows of steps, which a server has more of where the pictures are zoomed. */
const askSteps = (question) =>
  ask(chosen.range && state.live ? `${question}&first=${chosen.range[0]}&last=${chosen.range[1]}` : question);

/** The answers of all runs to a question about the chosen symmetry. */
const forChosen = (question) => forRuns((run, i) => {
  const law = chosenIn(run);
  if (!law) return { missing: `${run.label} has no symmetry of this name` };
  if ((law.kind === "balance") !== isBalance()) return { missing: `in ${run.label} it is a ${law.kind}` };
  return question(`run=${i}&symmetry=${indexIn(run)}`, law);
});
