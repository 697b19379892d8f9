"use strict";
/* What the reader has chosen, and the address that keeps it. Everything shown is a function of `state`. */

const state = { run: 0, right: 0, leftRun: 0, left: 0, filter: "", axis: "epoch", image: null, allSuspects: false, allPrompts: false };
const folds = [...document.querySelectorAll("details")];

const rightModel = () => RUNS[state.run].checkpoints[state.right];
const leftModel = () => RUNS[state.leftRun].checkpoints[state.left];
const matches = (prompt) => prompt.toLowerCase().includes(state.filter.trim().toLowerCase());
const promptsShown = (checkpoint) => [...new Set(checkpoint.prompt)].map((p) => checkpoint.run.prompts[p]).filter(matches);

/** The checkpoint of a run that is nearest to an epoch; the last for no number. */
function nearestCheckpoint(run, epoch, otherwise) {
  if (!Number.isFinite(epoch)) return otherwise;
  const away = run.checkpoints.map((checkpoint) => Math.abs(checkpoint.model.epoch - epoch));
  return away.indexOf(Math.min(...away));
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (given.get(name) ? Number(given.get(name)) : NaN);
  const named = (name, otherwise) => Math.max(RUNS.findIndex((run) => run.name === given.get(name)), given.has(name) ? 0 : otherwise);
  state.run = named("run", 0);
  state.leftRun = named("leftrun", state.run);
  state.right = nearestCheckpoint(RUNS[state.run], number("right"), RUNS[state.run].checkpoints.length - 1);
  state.left = nearestCheckpoint(RUNS[state.leftRun], number("left"), 0);
  state.filter = given.get("filter") ?? "";
  state.axis = [...byId("axis").options].some((option) => option.value === given.get("axis")) ? given.get("axis") : "epoch";
  state.image = given.has("prompt") ? { prompt: given.get("prompt"), noise: number("noise") || 0 } : null;
  const open = (given.get("open") ?? "").split(",");
  for (const fold of folds) fold.open = open.includes(fold.id.replace("fold-", ""));
}

/** Only what differs from a fresh page: a page of a run that goes on then opens at its newest checkpoint. */
function writeAddress() {
  const run = RUNS[state.run];
  const open = folds.filter((fold) => fold.open).map((fold) => fold.id.replace("fold-", ""));
  const entries = {
    run: state.run ? run.name : "",
    leftrun: state.leftRun !== state.run ? RUNS[state.leftRun].name : "",
    left: state.left ? String(leftModel().model.epoch) : "",
    right: state.right < run.checkpoints.length - 1 ? String(rightModel().model.epoch) : "",
    filter: state.filter,
    axis: state.axis === "epoch" ? "" : state.axis,
    prompt: state.image?.prompt ?? "",
    noise: state.image ? String(state.image.noise) : "",
    open: open.join(","),
  };
  const hash = new URLSearchParams(Object.entries(entries).filter(([, value]) => value !== "")).toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

let due = false;

/** Change the state, and draw the page again with the next frame. */
function change(values) {
  Object.assign(state, values);
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    update();
  });
}

/** Draw again; what had the focus and was made anew has it again. */
function update() {
  const focused = document.activeElement;
  const container = focused?.closest("[id]");
  drawAll();
  if (!focused?.dataset.key || focused.isConnected) return;
  [...container.querySelectorAll("[data-key]")].find((one) => one.dataset.key === focused.dataset.key)?.focus();
}

function drawAll() {
  drawFirstScreen();
  drawBar();
  drawGrids();
  markCharts();
  drawSuspects();
  drawPrompts();
  drawDialog();
  writeAddress();
}

const goTo = (right) => change({ right: clamp(right, 0, RUNS[state.run].checkpoints.length - 1) });
const goToEvaluation = (index) => goTo(nearestCheckpoint(RUNS[state.run], RUNS[state.run].evaluations[index].epoch, 0));
