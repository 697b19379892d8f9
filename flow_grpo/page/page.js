"use strict";
/* The rest of the page: first screen, the bar that stays, the table of prompts; and the start. Texts of others, such as
   prompts, are only ever set as text. */

// --- first screen -----------------------------------------------------------------------------------------

function drawFirstScreen() {
  const run = RUNS[state.run];
  const { model } = rightModel();
  const repeated = model.name.startsWith(run.name) && !run.trained;
  byId("run-name").textContent = repeated ? "" : run.name;
  byId("models").textContent = `${model.name}${model.epoch && run.base ? `, compared with ${run.base.name}` : ""}${RUNS.length > 1 ? `, ${fill(WORDS.one_of, { number: state.run + 1, runs: RUNS.length })}` : ""}`;
  document.title = `${run.name}, ${model.name}`;
  drawVerdict("diversity", model.diversity, false);
  drawVerdict("exploitation", model.epoch ? model.exploitation : "", true);
  drawSentence(run, model);
  const measured = DATA.figures.filter((name) => run.evaluations.some((evaluation) => name in evaluation.figures));
  byId("figures").replaceChildren(...measured.map((name) => figureCard(name, run, model)));
  const missing = DATA.figures.filter((name) => !measured.includes(name)).map((name) => WORDS.figures[name].short);
  byId("figures-note").textContent = missing.length && run.evaluations.length > 1 ? `Not measured: ${missing.join(", ")}.` : "";
}

function drawVerdict(kind, key, second) {
  const found = WORDS[kind][key];
  const line = byId(`${kind}-verdict`);
  line.hidden = !found;
  line.className = found ? `${found.tone}${second && found.tone !== "worse" ? " second" : ""}` : "";
  line.textContent = found ? found.words : "";
  line.title = found ? found.why : "";
}

/** "Of 16 images of one prompt the base makes about 3.3 different ones, this checkpoint 1.1." */
function drawSentence(run, model) {
  const change = model.changes.vendi;
  const old = change?.old ?? run.base?.figures.vendi;
  const line = byId("sentence");
  line.hidden = !Number.isFinite(old) || !run.n;
  if (line.hidden) return;
  const values = { n: run.n, old: old.toFixed(1), new: model.figures.vendi?.toFixed(1), base: run.base?.name, name: model.name };
  const [both, one] = run.trained ? [WORDS.sentence, WORDS.sentence_base] : [WORDS.sentence_other, WORDS.sentence_alone];
  line.textContent = [fill(model.epoch && values.new ? both : one, values), keptWords(run, model)].filter(Boolean).join(" ");
}

/** How much of the exact law's diversity a checkpoint keeps, where the run was held against it. */
function keptWords(run, model) {
  const name = "diversity/kept_of_exact";
  if (!model.epoch || !run.evaluations.some((one) => name in one.extra)) return "";
  if (model.extra["diversity/off_support"]) return WORDS.off_support;
  const [kept, low, high] = ["", "_low", "_high"].map((end) => model.extra[name + end]);
  if (!Number.isFinite(kept)) return WORDS.beyond;
  const percent = (share) => Math.round(100 * share);
  const words = Number.isFinite(low) ? WORDS.kept_between : WORDS.kept;
  return fill(words, { kept: percent(kept), low: percent(low), high: percent(high) });
}

/** A figure: old -> new, how it differs, and what that means. */
function figureCard(name, run, model) {
  const words = WORDS.figures[name];
  const change = model.changes[name];
  const direction = model.directions[name];
  const old = change?.old ?? run.base?.figures[name];
  const now = model.figures[name];
  const places = decimals([old ?? 0, now ?? 0], change ? change.high - change.low : 0);
  const counts = { n: run.n || "n", images: change?.images ?? model.images };
  const values = make("div", { className: "values" });
  if (model.epoch && Number.isFinite(old)) values.append(make("span", { className: "old", textContent: `${shown(old, words.unit, places)} → ` }));
  values.append(shown(now, words.unit, places));
  const line = make("p", {}, make("span", { className: `tone ${direction}`, textContent: WORDS.direction[direction] }));
  if (change) {
    const [difference, interval] = differenceWords(change, words.unit, places);
    line.append(` ${difference}`, make("br"), interval);
  }
  const card = make("div", { className: `figure ${direction}`, data: { figure: name } });
  card.append(make("h3", { textContent: fill(words.title, counts) }), values, line);
  if (counts.images || !words.of.includes("{images}")) card.append(make("p", { textContent: fill(words.of, counts) }));
  return card;
}

/** "+0.053" and "95 %: +0.047 to +0.060". */
function differenceWords(change, unit, decimalPlaces) {
  const hidden = [change.low, change.high].some((value) => value !== 0 && Math.abs(value) < 0.01); // "−7 to 0" would deny it
  const places = unit === "share" ? Number(hidden) : decimalPlaces;
  const [difference, low, high] = [change.difference, change.low, change.high].map((value) => signed(value, unit, places));
  const points = unit === "share" ? " points" : "";
  return [`${difference}${points}`, `${Math.round(100 * change.level)} %: ${low} to ${high}${change.paired ? "" : ", unpaired"}`];
}

// --- the bar that stays -----------------------------------------------------------------------------------

function fillBar() {
  byId("run").replaceChildren(...RUNS.map((run, i) => new Option(run.name, i)));
  byId("run-choice").hidden = RUNS.length < 2;
  const choices = RUNS.map((run, r) => run.checkpoints.map((checkpoint, i) => new Option(checkpoint.model.name, `${r}/${i}`)));
  byId("left").replaceChildren(...(RUNS.length < 2 ? choices[0] : choices.map((options, r) => make("optgroup", { label: RUNS[r].name }, ...options))));
  byId("run").addEventListener("change", (event) => {
    const run = Number(event.target.value);
    change({ run, right: RUNS[run].checkpoints.length - 1, leftRun: run, left: 0, image: null });
    requestAnimationFrame(drawCharts);
  });
  byId("left").addEventListener("change", (event) => {
    const [leftRun, left] = event.target.value.split("/").map(Number);
    change({ leftRun, left });
  });
  byId("right").addEventListener("input", (event) => goTo(Number(event.target.value)));
  byId("previous").addEventListener("click", () => goTo(state.right - 1));
  byId("next").addEventListener("click", () => goTo(state.right + 1));
  byId("filter").addEventListener("input", (event) => change({ filter: event.target.value }));
  byId("axis").addEventListener("change", (event) => {
    change({ axis: event.target.value });
    requestAnimationFrame(drawCharts);
  });
}

function drawBar() {
  const last = RUNS[state.run].checkpoints.length - 1;
  const { name } = rightModel().model;
  const slider = byId("right");
  slider.max = last;
  slider.value = state.right;
  slider.disabled = !last;
  slider.setAttribute("aria-valuetext", name);
  byId("right-name").textContent = name;
  byId("run").value = state.run;
  byId("left").value = `${state.leftRun}/${state.left}`;
  byId("axis").value = state.axis;
  byId("previous").disabled = state.right === 0;
  byId("next").disabled = state.right === last;
  if (byId("filter").value !== state.filter) byId("filter").value = state.filter;
}

/** Arrow keys move the checkpoint wherever they have no meaning of their own. */
function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented) return;
  if (byId("dialog").open) return onDialogKey(event);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.target.closest("input, select, summary, .strip, .wide")) return;
  event.preventDefault();
  goTo(state.right + step);
}

// --- tables -----------------------------------------------------------------------------------------------

function table(className, heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col", textContent: text })));
  return make("table", { className }, make("thead", {}, head), make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells))));
}

const cell = (text) => make("td", { textContent: text });

/** Prompts by the share of their different images that is lost. */
function drawPrompts() {
  const right = rightModel();
  const base = right.run.baseCheckpoint;
  byId("prompts").hidden = !right.model.alike || !right.vendi || !base?.vendi || right === base;
  if (byId("prompts").hidden) return;
  const both = Object.keys(right.vendi).filter((p) => p in base.vendi && matches(right.run.prompts[p]));
  const rows = both.map((p) => ({ prompt: right.run.prompts[p], old: base.vendi[p], now: right.vendi[p] })).sort((a, b) => a.now / a.old - b.now / b.old);
  const most = Math.max(...rows.map((row) => Math.max(row.old, row.now)));
  byId("prompt-table").replaceChildren(table("numeric losses", ["prompt", base.model.name, right.model.name, "change", ""], rows.map((row) => promptCells(row, most))));
}

function promptCells({ prompt, old, now }, most) {
  const filter = make("button", { type: "button", className: "link", textContent: prompt, title: "show the prompts that contain this", data: { key: prompt } });
  filter.addEventListener("click", () => change({ filter: state.filter === prompt ? "" : prompt }));
  const bar = make("div");
  const track = make("div", { className: "track" }, bar);
  track.style.width = `${(100 * old) / most}%`;
  bar.style.width = `${Math.min(100, (100 * now) / old)}%`;
  return [make("th", { scope: "row" }, filter), cell(old.toFixed(2)), cell(now.toFixed(2)), cell(`${signed(now / old - 1, "share", 0)} %`), make("td", { "aria-hidden": "true" }, track)];
}

// --- start ------------------------------------------------------------------------------------------------

/** Load the page of a run that goes on again, unless the reader is in the middle of something. */
function keepFresh() {
  byId("status").hidden = !DATA.refresh;
  byId("status").textContent = `training: epoch ${RUNS[0].epoch}, at ${DATA.written}`;
  if (!DATA.refresh) return;
  setInterval(() => {
    const busy = byId("dialog").open || document.hidden || document.activeElement === byId("filter");
    if (!busy) location.reload();
  }, 1000 * DATA.refresh);
}

function preparePrinting() {
  const closed = [];
  addEventListener("beforeprint", () => {
    closed.push(...folds.filter((fold) => !fold.open));
    for (const fold of closed) fold.open = true;
    drawCharts();
  });
  addEventListener("afterprint", () => closed.splice(0).forEach((fold) => (fold.open = false)));
}

function listen() {
  document.addEventListener("keydown", onKey);
  byId("grids").addEventListener("keydown", onGridKey);
  for (const kind of ["pointerover", "pointerout"]) byId("grids").addEventListener(kind, onGridPointer);
  byId("more-prompts").addEventListener("click", () => change({ allPrompts: true }));
  byId("more-suspects").addEventListener("click", () => change({ allSuspects: true }));
  for (const fold of folds) fold.addEventListener("toggle", () => { writeAddress(); drawCharts(); });
  addEventListener("hashchange", () => { readAddress(); update(); drawCharts(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; requestAnimationFrame(drawCharts); } });
}

/** Tell when the first images are there: for tests, and for the measure of the opening time. */
async function announce() {
  await Promise.allSettled([leftModel(), rightModel()].map((checkpoint) => checkpoint.decoded));
  requestAnimationFrame(() => {
    performance.mark("first-grid");
    document.documentElement.dataset.ready = "yes";
  });
}

readAddress();
fillBar();
prepareDialog();
preparePrinting();
listen();
update();
announce();
drawCharts();
keepFresh();
