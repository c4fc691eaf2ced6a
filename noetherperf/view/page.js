"use strict";

// What happens on the page: a user chooses, a record grows.

// Documents say how far they are: data-drawn counts whole redraws, data-first is when the first picture stood, in ms.
const said = document.documentElement.dataset;
let turn = Promise.resolve();
let waiting = 0;
let failure = ""; // of the last drawing

/** What is wrong: with the records, and with the last drawing. */
function tell() {
  const faults = [...(state?.runs.flatMap((run) => run.faults) ?? []), failure].filter(Boolean);
  element("faults").hidden = faults.length === 0;
  element("faults").textContent = faults.join("\n");
}

/** Run drawing one after the other: a picture is never drawn over by an older one. */
function inTurn(work) {
  said.busy = "true";
  waiting += 1;
  failure = "";
  turn = turn.then(work).catch((error) => { failure = String(error.message ?? error); }).then(() => {
    tell();
    said.drawn = Number(said.drawn ?? 0) + 1;
    waiting -= 1;
    if (waiting === 0) delete said.busy;
  });
  return turn;
}

function drawChosen() {
  describeChosen();
  return Promise.all([drawUnits(), drawCurves(), drawBudget()]);
}

async function drawAll() {
  drawState();
  await Promise.all([drawLayers(), drawLoss()]);
  said.first ??= String(performance.now());
  if (chosen.symmetry !== null) await drawChosen();
  await drawTable();
}

/** A whole number of a unit that there is, the nearest to what was typed. */
const unitOf = (typed) => Math.min(Math.max(0, Math.round(Number(typed)) || 0), Number(element("unit").max));

function choose(changes) {
  const before = { ...chosen };
  Object.assign(chosen, changes);
  element("quantity").value = chosen.quantity;
  element("symmetry").value = chosen.symmetry;
  element("unit").value = chosen.unit;
  return inTurn(async () => {
    if (before.range !== chosen.range) return drawAll();
    if (before.step !== chosen.step) return drawBudget();
    if (before.quantity !== chosen.quantity) await drawLayers();
    if (chosen.symmetry === null) return;
    markChosen();
    if (before.symmetry !== chosen.symmetry) await drawChosen();
    else if (before.quantity !== chosen.quantity) await drawUnits();
    else await Promise.all([drawCurves(), isBalance() ? drawBudget() : null]);
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
  // The server reads while Plotly is compiled.
  forRuns((_, i) => ask(`layers?run=${i}&quantity=${chosen.quantity}`)).catch(() => null);
  await drawable;
  element("quantity").onchange = (event) => choose({ quantity: event.target.value });
  element("symmetry").onchange = (event) => choose({ symmetry: event.target.value, unit: 0 });
  element("unit").onchange = (event) => choose({ unit: unitOf(event.target.value) });
  element("row").onchange = (event) => choose({ step: matrixSteps()[Number(event.target.value)] });
  element("row").oninput = (event) => { element("row-step").value = matrixSteps()[Number(event.target.value)]; };
  element("status").textContent = state.live ? "live" : "saved in one file";
  await inTurn(drawAll);
  if (state.live) follow(JSON.stringify(state.runs.map((run) => run.version)));
}

begin().catch((error) => {
  failure = String(error.message ?? error);
  tell();
});
