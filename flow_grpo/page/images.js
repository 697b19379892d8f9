"use strict";
/* Images: tiles cut from the sprites, two grids of the same noises, one noise at every checkpoint, and the suspects. */

const MOST_SUSPECTS = 12;
const MOST_TILES = 640; // of a grid, so that the slider stays quick; a button shows the rest
const SMALL = 64; // pixels: cells up to here are magnified without smoothing

// --- runs, checkpoints, images ----------------------------------------------------------------------------

for (const run of RUNS) {
  const [first] = run.evaluations;
  run.base = first.epoch === 0 ? first : undefined; // a run that lost its first evaluation has nothing to compare with
  run.baseCheckpoint = run.base && run.checkpoints.find((checkpoint) => checkpoint.evaluation === 0); // none without images
  run.isTraining = run.evaluations.some((model) => model.seconds > 0 || model.network_evaluations > 0);
  for (const checkpoint of run.checkpoints) {
    checkpoint.run = run;
    checkpoint.model = run.evaluations[checkpoint.evaluation];
    // (prompt, noise) -> place in the sprite and in the lists of scores
    checkpoint.places = new Map(checkpoint.prompt.map((p, i) => [imageKey(run.prompts[p], checkpoint.noise[i]), i]));
  }
}

function imageKey(prompt, noise) {
  return `${noise} ${prompt}`;
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
  if (guess === null) return { disagrees: false, words: "not judged" };
  if (guess < 0) return { disagrees: true, words: "judge: something else" };
  const disagrees = guess !== checkpoint.prompt[place];
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
  button.dataset.key = `${checkpoint.run.name}/${checkpoint.model.epoch}/${button.dataset.image}`;
  button.addEventListener("click", onClick);
  return button;
}

// --- two grids of the same prompts and noises -------------------------------------------------------------

function drawGrids() {
  const [left, right] = [leftModel(), rightModel()];
  const grids = byId("grids");
  byId("images-note").textContent = imagesNote(left, right);
  if (left.picture || right.picture) return drawPictures(grids, [left, right]);
  if (!left.sprite && !right.sprite) return grids.replaceChildren();
  const noises = [...new Set(right.noise)].sort((a, b) => a - b);
  const found = promptsShown(right);
  const prompts = state.allPrompts ? found : found.slice(0, Math.ceil(MOST_TILES / noises.length));
  byId("more-prompts").hidden = prompts.length === found.length;
  byId("more-prompts").textContent = `show all ${found.length} prompts`;
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
  if (right.picture) return "As the run kept them: it has no scores of single images.";
  const parts = left.model.alike && right.model.alike ? [] : ["One side was drawn or measured otherwise: its noises are others."];
  parts.push(right.guess ? "Framed: the judge does not see what the prompt says." : "No judge was asked.");
  const all = new Set(right.prompt).size;
  const found = promptsShown(right).length;
  if (right.sprite && found < all) parts.push(`${found} of ${all} prompts.`);
  if (right.sprite) parts.push("Click on an image to see it at every checkpoint.");
  return right.sprite ? parts.join(" ") : "";
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
  const pair = [...new Set([right.run.baseCheckpoint ?? right, right])];
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

// --- images that the reward likes and the judge does not --------------------------------------------------

/** Images whose prompt the judge recognised at the base and does not now, though their reward rose; most gain first. */
function suspectsOf(checkpoint) {
  const base = checkpoint.run.baseCheckpoint;
  if (!checkpoint.model.alike || !checkpoint.guess || !base?.guess || !checkpoint.rewards.total || !base.rewards.total || checkpoint === base) return null;
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
  const base = right.run.baseCheckpoint;
  const found = suspectsOf(right);
  byId("suspects").hidden = !right.sprite || found === null;
  if (byId("suspects").hidden) return;
  const how = found.length ? " Base beside now, greatest gain first." : "";
  byId("suspects-note").textContent = `${found.length} of ${right.prompt.length} images: recognised at the base and not at ${right.model.name}, though their reward rose.${how}`;
  const cards = found.slice(0, state.allSuspects ? undefined : MOST_SUSPECTS).map((one) => suspectCard(one, base, right));
  byId("suspect-cards").replaceChildren(...cards);
  byId("more-suspects").textContent = `show all ${found.length}`;
  byId("more-suspects").hidden = state.allSuspects || found.length <= MOST_SUSPECTS;
}

function suspectCard({ prompt, noise, place, before }, base, now) {
  const pair = make("div", { className: "two" }, tile(base, prompt, noise), tile(now, prompt, noise));
  const places = decimals([rewardOf(base, before), rewardOf(now, place)]);
  const rewards = [rewardOf(base, before), rewardOf(now, place)].map((value) => shown(value, "number", places));
  return make("div", { className: "card" }, pair, make("b", { textContent: prompt }), make("br"), judgement(now, place).words, make("br"), `reward ${rewards.join(" → ")}`);
}
