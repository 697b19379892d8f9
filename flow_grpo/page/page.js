"use strict";
/* Fills the page from the data in it, and follows the reader. Everything shown is a function of `state`, which the
   address keeps; `update` draws all of it again. Texts of others, such as prompts, are only ever set as text. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const { runs: RUNS, words: WORDS } = DATA;
const MOST_SUSPECTS = 12;
const MOST_THUMBNAILS = 18;
const SMALL = 64; // pixels: cells up to here are magnified without smoothing, and the judge's frame is enough to tell

// --- small helpers ----------------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

/** An element with properties and children; `data` of the properties goes to its dataset, `aria-...` to attributes. */
function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "data") Object.assign(element.dataset, value);
    else if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** "Of {n} images" with its gaps filled. */
function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (gap, name) => (name in values ? values[name] : gap));
}

const minus = (text) => text.replaceAll("-", "−");
const exponent = (value) => (value ? Math.floor(Math.log10(Math.abs(value))) : -9);

/** Decimals that show three digits of the larger value, and the width of the interval if there is one. */
function decimals(values, width = 0) {
  const largest = Math.max(...values.map((value) => exponent(value)));
  return Math.min(6, Math.max(0, 2 - largest, width ? -exponent(width) : 0));
}

/** A value of a figure: a share in per cent. */
function shown(value, unit, places) {
  if (!Number.isFinite(value)) return "–";
  if (unit === "share") return `${Math.round(100 * value)} %`;
  return minus(value.toFixed(places ?? decimals([value])));
}

/** A number with its sign; differences of shares are in points. */
function signed(value, unit, places) {
  const number = unit === "share" ? (100 * value).toFixed(0) : value.toFixed(places);
  return `${Number(number) > 0 ? "+" : ""}${minus(Number(number) === 0 ? number.replace("-", "") : number)}`;
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const plainNumber = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

/** A tick of an axis. */
function tick(unit) {
  if (unit === "share") return (value) => `${Number((100 * value).toPrecision(4))} %`;
  return (value) => minus((Math.abs(value) >= 1000 ? compact : plainNumber).format(value));
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// --- runs, checkpoints, images ----------------------------------------------------------------------------

const SEPARATOR = "\u0000"; // in no prompt that a browser shows: the HTML parser replaces it

for (const run of RUNS) {
  for (const checkpoint of run.checkpoints) {
    checkpoint.run = run;
    checkpoint.model = run.evaluations[checkpoint.evaluation];
    // (prompt, noise) -> place in the sprite and in the lists of scores
    checkpoint.places = new Map(checkpoint.prompt.map((p, i) => [imageKey(run.prompts[p], checkpoint.noise[i]), i]));
  }
}

function imageKey(prompt, noise) {
  return `${prompt}${SEPARATOR}${noise}`;
}

/** The sprite as a picture; it is decoded once. */
function spriteOf(checkpoint) {
  if (!checkpoint.picture_element) {
    checkpoint.picture_element = new Image();
    checkpoint.picture_element.src = checkpoint.sprite.data;
    checkpoint.decoded = checkpoint.picture_element.decode();
  }
  return checkpoint.picture_element;
}

/** What the judge makes of an image: whether it disagrees with the prompt, and a word on it. */
function judgement(checkpoint, place) {
  if (!checkpoint.guess) return { disagrees: false, words: "" };
  const guess = checkpoint.guess[place];
  const disagrees = guess !== checkpoint.prompt[place];
  if (guess === null) return { disagrees, words: "not a finite image" };
  return { disagrees, words: `${disagrees ? "judge sees" : "judge agrees:"} ${checkpoint.run.prompts[guess]}` };
}

const rewardOf = (checkpoint, place) => checkpoint.rewards?.total?.[place];

/** All that is known of an image, in one line. */
function describe(checkpoint, place) {
  const parts = [`${checkpoint.run.prompts[checkpoint.prompt[place]]}, noise ${checkpoint.noise[place]}, ${checkpoint.model.name}`];
  for (const [name, values] of Object.entries(checkpoint.rewards ?? {})) {
    if (name === "total" || Object.keys(checkpoint.rewards).length > 2) {
      parts.push(`${name === "total" ? "reward" : name} ${shown(values[place], "number")}`);
    }
  }
  const { words } = judgement(checkpoint, place);
  if (words) parts.push(`${words}${Number.isFinite(checkpoint.probability[place]) ? ` (own prompt ${Math.round(100 * checkpoint.probability[place])} %)` : ""}`);
  return parts.join("; ");
}

/** A canvas with one image of a sprite. */
function drawn(checkpoint, place) {
  const { cell, columns } = checkpoint.sprite;
  const canvas = make("canvas", { width: cell[0], height: cell[1] });
  const picture = spriteOf(checkpoint);
  const draw = () => {
    const [x, y] = [(place % columns) * cell[0], Math.floor(place / columns) * cell[1]];
    canvas.getContext("2d").drawImage(picture, x, y, cell[0], cell[1], 0, 0, cell[0], cell[1]);
  };
  if (picture.complete && picture.naturalWidth) draw();
  else checkpoint.decoded.then(draw, () => canvas.remove());
  return canvas;
}

/** An image as a button that opens it at every checkpoint; an empty box where there is none. */
function tile(checkpoint, prompt, noise, onClick = () => openImage(prompt, noise)) {
  const place = checkpoint.places.get(imageKey(prompt, noise));
  if (place === undefined || !checkpoint.sprite) return make("span", { className: "empty" });
  const words = describe(checkpoint, place);
  const small = Math.max(...checkpoint.sprite.cell) <= SMALL;
  const classes = ["tile", small ? "pixels" : "", judgement(checkpoint, place).disagrees ? "disagrees" : ""];
  const button = make("button", { type: "button", className: classes.join(" ").trim(), title: words, "aria-label": words }, drawn(checkpoint, place));
  button.dataset.image = imageKey(prompt, noise);
  button.addEventListener("click", onClick);
  return button;
}

// --- state, and the address that keeps it -----------------------------------------------------------------

const state = { run: 0, right: 0, leftRun: 0, left: 0, filter: "", axis: "epoch", image: null, allSuspects: false };
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

function update() {
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

// --- first screen -----------------------------------------------------------------------------------------

function drawFirstScreen() {
  const run = RUNS[state.run];
  const { model } = rightModel();
  byId("run-name").textContent = run.name;
  byId("models").textContent = `${model.name}${model.epoch ? `, against the ${run.evaluations[0].name}` : ""}`;
  document.title = `${run.name}, ${model.name}`;
  drawVerdict("diversity", model.epoch ? model.diversity : "base", false);
  drawVerdict("exploitation", model.epoch ? model.exploitation : "", true);
  drawSentence(run, model);
  const measured = DATA.figures.filter((name) => run.evaluations.some((evaluation) => name in evaluation.figures));
  byId("figures").replaceChildren(...measured.map((name) => figureCard(name, run, model)));
  const missing = DATA.figures.filter((name) => !measured.includes(name)).map((name) => WORDS.figures[name].short);
  byId("figures-note").textContent = missing.length ? `Not measured: ${missing.join(", ")}.` : "";
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
  const old = change?.old ?? run.evaluations[0].figures.vendi;
  const line = byId("sentence");
  line.hidden = !Number.isFinite(old) || !run.n;
  if (line.hidden) return;
  const values = { n: run.n, old: old.toFixed(1), new: model.figures.vendi?.toFixed(1) };
  line.textContent = fill(model.epoch && values.new ? WORDS.sentence : WORDS.sentence_base, values);
}

/** A figure: old -> new, how it differs, and what that means. */
function figureCard(name, run, model) {
  const words = WORDS.figures[name];
  const change = model.changes[name];
  const direction = model.directions[name];
  const old = change?.old ?? run.evaluations[0].figures[name];
  const now = model.figures[name];
  const places = decimals([old ?? 0, now ?? 0], change ? change.high - change.low : 0);
  const counts = { n: run.n || "n", images: change?.images ?? model.images };
  const values = make("div", { className: "values" });
  if (model.epoch) values.append(make("span", { className: "old", textContent: `${shown(old, words.unit, places)} → ` }));
  values.append(shown(now, words.unit, places));
  const line = make("p", {}, make("span", { className: `tone ${direction}`, textContent: WORDS.direction[direction] }));
  if (change) line.append(` ${differenceWords(change, words.unit, places)}`);
  const card = make("div", { className: `figure ${direction}`, data: { figure: name } });
  card.append(make("h3", { textContent: fill(words.title, counts) }), values, line);
  if (counts.images || !words.of.includes("{images}")) card.append(make("p", { textContent: fill(words.of, counts) }));
  return card;
}

/** "+0.053, 95 %: +0.047 to +0.060". */
function differenceWords(change, unit, places) {
  const [difference, low, high] = [change.difference, change.low, change.high].map((value) => signed(value, unit, places));
  const points = unit === "share" ? " points" : "";
  return `${difference}${points}, ${Math.round(100 * change.level)} %: ${low} to ${high}${change.paired ? "" : " (unpaired)"}`;
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

// --- two grids of the same prompts and noises -------------------------------------------------------------

function drawGrids() {
  const [left, right] = [leftModel(), rightModel()];
  const grids = byId("grids");
  byId("images-note").textContent = imagesNote(left, right);
  if (left.picture || right.picture) return drawPictures(grids, [left, right]);
  if (!left.sprite && !right.sprite) return grids.replaceChildren();
  const prompts = promptsShown(right);
  const noises = [...new Set(right.noise)].sort((a, b) => a - b);
  const cells = right.sprite?.cell ?? left.sprite.cell;
  const above = prompts.some((prompt) => prompt.length > 14) || Math.max(...cells) > SMALL;
  grids.className = above ? "above" : "";
  grids.style.setProperty("--columns", noises.length);
  grids.style.setProperty("--narrow", Math.min(noises.length, 8));
  const head = make("div", { className: "row head" }, make("span", { className: "prompt" }), make("span", { textContent: sideName(left) }), make("span", { textContent: sideName(right) }));
  grids.replaceChildren(head, ...prompts.map((prompt) => promptRow(prompt, noises, left, right)));
  grids.querySelector(".tile")?.setAttribute("tabindex", "0");
}

const sideName = (checkpoint) => `${RUNS.length > 1 ? `${checkpoint.run.name}: ` : ""}${checkpoint.model.name}`;

function imagesNote(left, right) {
  if (!left.sprite && !right.sprite && !left.picture && !right.picture) return "No images were kept.";
  const parts = [right.guess ? "Framed: the judge takes the image for another prompt's." : "No judge was asked."];
  const all = new Set(right.prompt).size;
  const found = promptsShown(right).length;
  if (right.sprite && found < all) parts.push(`${found} of ${all} prompts.`);
  if (right.sprite) parts.push("Click on an image to see it at every checkpoint.");
  return (right.picture ? [] : parts).join(" ");
}

function promptRow(prompt, noises, left, right) {
  const sides = [["on-the-left", left], ["on-the-right", right]];
  const strips = sides.map(([side, checkpoint]) => {
    const tiles = noises.map((noise) => tile(checkpoint, prompt, noise));
    for (const one of tiles) one.tabIndex = -1; // one stop for the Tab key; arrow keys go on from there
    return make("div", { className: `strip ${side}`, role: "group", "aria-label": `${prompt}, ${sideName(checkpoint)}` }, ...tiles);
  });
  return make("div", { className: "row" }, make("span", { className: "prompt", textContent: prompt, title: prompt }), ...strips);
}

/** Of runs of before there were records: the picture of the first images, whole. */
function drawPictures(grids, checkpoints) {
  const figures = checkpoints.map((checkpoint) => {
    const picture = checkpoint.picture ? make("img", { src: checkpoint.picture, alt: `images of ${checkpoint.model.name}` }) : "no picture";
    return make("figure", {}, make("figcaption", { textContent: sideName(checkpoint) }), picture);
  });
  grids.replaceChildren(make("div", { className: "pictures" }, ...figures));
}

/** Arrow keys among the tiles. */
function onGridKey(event) {
  const tiles = [...byId("grids").querySelectorAll(".tile")];
  const here = event.target.closest(".tile");
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step || !here) return;
  event.preventDefault();
  const box = (element) => element.getBoundingClientRect();
  const from = box(here);
  const ahead = tiles.filter((other) => {
    const to = box(other);
    const [across, down] = [to.left - from.left, to.top - from.top];
    return step[0] ? Math.abs(down) < 2 && across * step[0] > 1 : down * step[1] > 1;
  });
  nearest(ahead, (other) => Math.hypot(box(other).left - from.left, box(other).top - from.top))?.focus();
}

/** The other side's image of the same noise is framed while one is pointed at. */
function onGridPointer(event) {
  const image = event.target.closest?.(".tile")?.dataset.image;
  for (const other of byId("grids").querySelectorAll(".tile")) other.classList.toggle("twin", event.type === "pointerover" && other.dataset.image === image);
}

// --- one image at every checkpoint ------------------------------------------------------------------------

const openImage = (prompt, noise) => change({ image: { prompt, noise } });

function drawDialog() {
  const dialog = byId("dialog");
  const right = rightModel();
  if (!state.image || !right.sprite) return dialog.open ? dialog.close() : undefined;
  const { prompt, noise } = state.image;
  byId("dialog-title").textContent = `${prompt}, noise ${noise}`;
  const pair = left0(right.run) === right ? [right] : [left0(right.run), right];
  byId("pair").replaceChildren(...pair.map((checkpoint) => imageFigure(checkpoint, prompt, noise, true)));
  byId("film").replaceChildren(...right.run.checkpoints.map((checkpoint, i) => {
    const figure = imageFigure(checkpoint, prompt, noise, false, () => goTo(i));
    figure.classList.toggle("current", checkpoint === right);
    return figure;
  }));
  byId("dialog-previous").disabled = state.right === 0;
  byId("dialog-next").disabled = state.right === right.run.checkpoints.length - 1;
  if (!dialog.open) dialog.showModal();
}

/** A run's base. */
const left0 = (run) => run.checkpoints[0];

function imageFigure(checkpoint, prompt, noise, large, onClick = () => {}) {
  const place = checkpoint.places.get(imageKey(prompt, noise));
  const caption = make("figcaption", {}, make("b", { textContent: checkpoint.model.name }));
  if (place !== undefined) {
    const parts = Number.isFinite(rewardOf(checkpoint, place)) ? [`reward ${shown(rewardOf(checkpoint, place), "number")}`] : [];
    const { words, disagrees } = judgement(checkpoint, place);
    if (words && (large || disagrees)) parts.push(words);
    for (const part of parts) caption.append(make("br"), part);
  }
  return make("figure", {}, tile(checkpoint, prompt, noise, onClick), caption);
}

function moveNoise(step) {
  const right = rightModel();
  const noises = right.noise.filter((_, i) => right.run.prompts[right.prompt[i]] === state.image.prompt).sort((a, b) => a - b);
  const place = clamp(noises.indexOf(state.image.noise) + step, 0, noises.length - 1);
  openImage(state.image.prompt, noises[place]);
}

function onDialogKey(event) {
  const moves = { ArrowLeft: () => goTo(state.right - 1), ArrowRight: () => goTo(state.right + 1), ArrowUp: () => moveNoise(-1), ArrowDown: () => moveNoise(1) };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
}

function prepareDialog() {
  const dialog = byId("dialog");
  byId("close").addEventListener("click", () => dialog.close());
  byId("dialog-previous").addEventListener("click", () => goTo(state.right - 1));
  byId("dialog-next").addEventListener("click", () => goTo(state.right + 1));
  byId("noise-up").addEventListener("click", () => moveNoise(-1));
  byId("noise-down").addEventListener("click", () => moveNoise(1));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  dialog.addEventListener("close", () => {
    const image = state.image && imageKey(state.image.prompt, state.image.noise);
    state.image = null;
    writeAddress();
    [...byId("grids").querySelectorAll(".on-the-right .tile")].find((one) => one.dataset.image === image)?.focus();
  });
}

// --- charts -----------------------------------------------------------------------------------------------

let charts = []; // {mark(index), hover(index), read(index)} of the current run
let scatter = null;

/** The points of one metric of a run, where it was measured. */
function pointsOf(run, valueOf, intervalOf = () => ({})) {
  const large = new Set(run.checkpoints.map((checkpoint) => checkpoint.evaluation));
  const points = run.evaluations.map((model, index) => {
    return { x: model[state.axis], y: valueOf(model), ...intervalOf(model), index, large: large.has(index) };
  });
  return points.filter((point) => Number.isFinite(point.y));
}

/** The paired interval of the difference, laid on the base's value. */
function aroundBase(name) {
  return ({ changes }) => (changes[name] ? { low: changes[name].old + changes[name].low, high: changes[name].old + changes[name].high } : {});
}

/** The lines of a figure: each group of seeds as its mean, other runs as they are, and the current run with its dots. */
function seriesOf(name) {
  const current = RUNS[state.run];
  const found = DATA.groups.flatMap((group, number) => {
    const points = group.curves[name]?.map((point) => ({ x: point[state.axis], y: point.value, low: point.low, high: point.high }));
    const single = RUNS[group.runs[0]];
    if (points || single !== current) return [{ colour: number % 8, points: points ?? pointsOf(single, (model) => model.figures[name], aroundBase(name)) }];
    return [];
  });
  const alone = DATA.groups[current.group].runs.length === 1;
  const own = pointsOf(current, (model) => model.figures[name], alone ? aroundBase(name) : undefined);
  return [...found, { colour: current.group % 8, points: own, dots: true, thin: !alone }].filter((one) => one.points.length);
}

function chartWidth(container) {
  const columns = getComputedStyle(container).gridTemplateColumns.split(" ");
  return Math.max(200, Math.round(parseFloat(columns[0])) || 280);
}

/** A chart with its title and a line that reads the value under the pointer. */
function chartFigure(container, title, unit, series, base) {
  const readout = make("span", { className: "readout" });
  const figure = make("figure", { className: "chart" }, make("figcaption", {}, make("span", { textContent: title }), readout));
  const own = series.find((one) => one.dots)?.points ?? [];
  const label = own.length ? `${title}, from ${shown(own[0].y, unit)} at ${own[0].x} to ${shown(own.at(-1).y, unit)} at ${own.at(-1).x} ${byId("axis").selectedOptions[0].text}` : title;
  const chart = lineChart({
    label, width: chartWidth(container), height: 190, series, base, formatX: tick("number"), formatY: tick(unit),
    onHover: (point) => hoverCharts(point?.index), onPick: (point) => point && goToEvaluation(point.index),
  });
  figure.append(chart.element);
  const read = (index) => {
    const point = own.find((one) => one.index === index);
    readout.textContent = point ? `${RUNS[state.run].evaluations[index].name}: ${shown(point.y, unit)}` : "";
  };
  charts.push({ ...chart, read });
  return figure;
}

function drawCharts() {
  charts = [];
  const run = RUNS[state.run];
  const names = DATA.figures.filter((name) => run.evaluations.some((model) => name in model.figures));
  byId("along").hidden = !names.length || Math.max(...RUNS.map((one) => one.evaluations.length)) < 2;
  byId("charts").replaceChildren(...names.map((name) => {
    const { title, unit } = WORDS.figures[name];
    return chartFigure(byId("charts"), fill(title, { n: run.n || "n" }), unit, seriesOf(name), run.evaluations[0].figures[name]);
  }));
  drawLegend();
  drawScatter();
  drawExtra();
  markCharts();
}

function drawLegend() {
  const items = DATA.groups.map((group, i) => {
    const seeds = group.runs.length > 1 ? ` (mean of ${group.runs.length} seeds, 95 % interval)` : "";
    return make("span", {}, make("span", { className: `key c${i % 8}` }), `${group.name}${seeds}`);
  });
  byId("legend").hidden = items.length < 2 && RUNS.length < 2;
  byId("legend").replaceChildren(...items, ...(RUNS.length > 1 ? [make("span", { className: "quiet", textContent: `with dots: ${RUNS[state.run].name}` })] : []));
}

/** Point out an evaluation in every chart; without one, the chosen checkpoint is read. */
function hoverCharts(index) {
  for (const chart of charts) {
    chart.hover(index);
    chart.read(index ?? rightModel().evaluation);
  }
}

function markCharts() {
  for (const chart of charts) chart.mark(rightModel().evaluation);
  hoverCharts();
  scatter?.mark((point) => point.run === RUNS[state.run] && point.index === rightModel().evaluation);
  drawThumbnails(rightModel());
}

/** Reward against different images: every run, a dot for each evaluation that has both. */
function drawScatter() {
  const series = RUNS.map((run) => {
    const shownOnes = new Set(run.checkpoints.map((checkpoint) => checkpoint.evaluation));
    const points = run.evaluations.map((model, index) => ({
      x: model.figures.reward, y: model.figures.vendi, index, run, large: shownOnes.has(index),
      name: `${run.name}, ${model.name}: reward ${shown(model.figures.reward, "number")}, different images ${shown(model.figures.vendi, "number")}`,
      caption: run === RUNS[state.run] && [0, run.best, run.evaluations.length - 1].includes(index) ? `${model.name}${index === run.best ? " (best by the judge)" : ""}` : "",
    }));
    return { colour: run.group % 8, points: points.filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y)) };
  }).filter((one) => one.points.length);
  byId("kept").hidden = series.every((one) => one.points.length < 2);
  scatter = null;
  if (byId("kept").hidden) return;
  const width = Math.max(260, Math.round(byId("scatter").clientWidth) || 600);
  scatter = scatterChart({
    label: "reward against different images", width, height: Math.round(clamp(width * 0.6, 240, 380)), series,
    titles: { x: "reward", y: "different images" }, formatX: tick("number"), formatY: tick("number"),
    onHover: (point) => drawThumbnails(point ? checkpointNear(point) : rightModel()),
    onPick: (point) => point && pickPoint(point),
  });
  byId("scatter").replaceChildren(scatter.element);
}

const checkpointNear = ({ run, index }) => run.checkpoints[nearestCheckpoint(run, run.evaluations[index].epoch, 0)];

function pickPoint({ run, index }) {
  const number = RUNS.indexOf(run);
  const moved = number !== state.run;
  change({ run: number, right: nearestCheckpoint(run, run.evaluations[index].epoch, 0), ...(moved ? { leftRun: number, left: 0 } : {}) });
  if (moved) requestAnimationFrame(drawCharts);
}

/** A few images of a checkpoint, of as many prompts as there are. */
function drawThumbnails(checkpoint) {
  const { model } = checkpoint;
  const facts = DATA.figures.filter((name) => name in model.figures).map((name) => `${WORDS.figures[name].short} ${shown(model.figures[name], WORDS.figures[name].unit)}`);
  const prompts = promptsShown(checkpoint);
  const noises = [...new Set(checkpoint.noise)];
  const wanted = noises.flatMap((noise) => prompts.map((prompt) => [prompt, noise])).slice(0, MOST_THUMBNAILS);
  const tiles = checkpoint.sprite ? wanted.map(([prompt, noise]) => tile(checkpoint, prompt, noise)) : [];
  byId("thumbnails").replaceChildren(make("h3", { textContent: sideName(checkpoint) }), make("p", { className: "quiet", textContent: facts.join(" · ") }), make("div", { className: "thumbs" }, ...tiles));
}

/** Charts of whatever else an evaluation logged; `name_low` and `name_high` are the band of `name`. */
function drawExtra() {
  const run = RUNS[state.run];
  const names = [...new Set(run.evaluations.flatMap((model) => Object.keys(model.extra)))].filter((name) => !/_(low|high)$/.test(name)).sort();
  byId("fold-extra").hidden = !names.length;
  if (!byId("fold-extra").open) return;
  byId("extra").replaceChildren(...names.map((name) => {
    const band = ({ extra }) => ({ low: extra[`${name}_low`], high: extra[`${name}_high`] });
    const points = pointsOf(run, (model) => model.extra[name], band);
    return chartFigure(byId("extra"), name.replaceAll("_", " ").replace("/", ": "), "number", [{ colour: run.group % 8, points, dots: true }]);
  }));
}

// --- images that the reward likes and the judge does not --------------------------------------------------

/** Images whose prompt the judge recognised at the base and does not now, though their reward rose; most gain first. */
function suspectsOf(checkpoint) {
  const base = left0(checkpoint.run);
  if (!checkpoint.guess || !base.guess || !checkpoint.rewards.total || !base.rewards.total || checkpoint === base) return null;
  const found = [];
  for (const [key, place] of checkpoint.places) {
    const before = base.places.get(key);
    const prompt = checkpoint.run.prompts[checkpoint.prompt[place]];
    if (before === undefined || !matches(prompt)) continue;
    const gain = rewardOf(checkpoint, place) - rewardOf(base, before);
    const lost = judgement(checkpoint, place).disagrees && !judgement(base, before).disagrees;
    if (lost && gain > 0) found.push({ prompt, noise: checkpoint.noise[place], place, before, gain });
  }
  return found.sort((a, b) => b.gain - a.gain);
}

function drawSuspects() {
  const right = rightModel();
  const base = left0(right.run);
  const found = suspectsOf(right);
  byId("suspects").hidden = !right.sprite || (found === null && right !== base);
  if (byId("suspects").hidden) return;
  byId("suspects-note").textContent = found === null
    ? "This is the base: nothing was gained yet."
    : `${found.length} of ${right.prompt.length} images: recognised at the base and not at ${right.model.name}, though their reward rose. ${found.length ? "Base beside now, greatest gain first." : ""}`;
  const cards = (found ?? []).slice(0, state.allSuspects ? undefined : MOST_SUSPECTS).map((one) => suspectCard(one, base, right));
  byId("suspect-cards").replaceChildren(...cards);
  byId("more-suspects").hidden = state.allSuspects || (found ?? []).length <= MOST_SUSPECTS;
}

function suspectCard({ prompt, noise, place, before }, base, now) {
  const pair = make("div", { className: "two" }, tile(base, prompt, noise), tile(now, prompt, noise));
  const places = decimals([rewardOf(base, before), rewardOf(now, place)]);
  const rewards = [rewardOf(base, before), rewardOf(now, place)].map((value) => shown(value, "number", places));
  return make("div", { className: "card" }, pair, make("b", { textContent: prompt }), make("br"), judgement(now, place).words, make("br"), `reward ${rewards.join(" → ")}`);
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
  const base = left0(right.run);
  const both = Object.keys(right.vendi ?? {}).filter((p) => p in (base.vendi ?? {}) && matches(right.run.prompts[p]));
  byId("prompts").hidden = !right.vendi || !base.vendi || right === base;
  if (byId("prompts").hidden) return;
  const rows = both.map((p) => ({ prompt: right.run.prompts[p], old: base.vendi[p], now: right.vendi[p] })).sort((a, b) => a.now / a.old - b.now / b.old);
  const most = Math.max(...rows.map((row) => Math.max(row.old, row.now)));
  byId("prompt-table").replaceChildren(table("numeric losses", ["prompt", base.model.name, right.model.name, "change", ""], rows.map((row) => promptCells(row, most))));
}

function promptCells({ prompt, old, now }, most) {
  const filter = make("button", { type: "button", className: "link", textContent: prompt, title: "show this prompt alone" });
  filter.addEventListener("click", () => change({ filter: state.filter === prompt ? "" : prompt }));
  const bar = make("div");
  bar.style.width = `${(100 * now) / most}%`;
  const track = make("div", { className: "track" }, bar);
  track.style.width = `${(100 * old) / most}%`;
  bar.style.width = `${Math.min(100, (100 * now) / old)}%`;
  const change_ = `${signed(now / old - 1, "share")} %`;
  return [make("th", { scope: "row" }, filter), cell(old.toFixed(2)), cell(now.toFixed(2)), cell(change_), make("td", { "aria-hidden": "true" }, track)];
}

/** Every evaluation of the current run. */
function drawNumbers() {
  const run = RUNS[state.run];
  const names = DATA.figures.filter((name) => run.evaluations.some((model) => name in model.figures));
  const rows = run.evaluations.map((model) => {
    const values = names.map((name) => {
      const { unit } = WORDS.figures[name];
      const found = model.changes[name];
      const places = decimals([model.figures[name] ?? 0], found ? found.high - found.low : 0);
      return cell(`${shown(model.figures[name], unit, places)}${found ? ` (${differenceWords(found, unit, places)})` : ""}`);
    });
    return [make("th", { scope: "row", textContent: model.name }), cell(plainNumber.format(model.seconds)), cell(model.network_evaluations.toLocaleString("en")), ...values];
  });
  byId("numbers").replaceChildren(table("numeric", ["", "seconds", "network evaluations", ...names.map((name) => WORDS.figures[name].short)], rows));
}

function drawStrips() {
  const { strips } = RUNS[state.run];
  byId("fold-strips").hidden = !strips.length;
  byId("strips").replaceChildren(...strips.map(({ name, data }) => make("figure", {}, make("figcaption", { textContent: name }), make("img", { src: data, alt: `film strip of ${name}`, loading: "lazy" }))));
}

// --- start ------------------------------------------------------------------------------------------------

/** Load the page of a run that goes on again, unless the reader is in the middle of something. */
function keepFresh() {
  byId("status").hidden = !DATA.refresh;
  byId("status").textContent = `training: epoch ${RUNS[0].epoch}`;
  if (!DATA.refresh) return;
  setInterval(() => {
    const busy = byId("dialog").open || document.hidden || document.activeElement === byId("filter");
    if (!busy) location.reload();
  }, 1000 * DATA.refresh);
}

function preparePrinting() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = folds.filter((fold) => !fold.open);
    for (const fold of closed) fold.open = true;
    drawCharts();
  });
  addEventListener("afterprint", () => closed.forEach((fold) => (fold.open = false)));
}

function listen() {
  document.addEventListener("keydown", onKey);
  byId("grids").addEventListener("keydown", onGridKey);
  for (const kind of ["pointerover", "pointerout"]) byId("grids").addEventListener(kind, onGridPointer);
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
drawNumbers();
drawStrips();
keepFresh();
