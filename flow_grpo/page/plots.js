"use strict";
/* The charts of the page, all of the current run: hovering marks one evaluation in all of them, a click goes there. */

const MOST_THUMBNAILS = 18;

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

/** The paired interval of the difference, laid on the base's value, within what the figure can be. */
function aroundBase(name) {
  const [least, most] = WORDS.figures[name].range;
  return ({ changes }) => {
    if (!changes[name]) return {};
    const { old, low, high } = changes[name];
    return { low: Math.max(old + low, least ?? -Infinity), high: Math.min(old + high, most ?? Infinity) };
  };
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
    label, width: chartWidth(container), height: 190, series, base, formatX: tick("number"), formatY: tick(unit), wholeX: state.axis !== "seconds",
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
  byId("along").hidden = !names.length || !run.isTraining;
  byId("charts").replaceChildren(...names.map((name) => {
    const { title, unit } = WORDS.figures[name];
    return chartFigure(byId("charts"), fill(title, { n: run.n || "n" }), unit, seriesOf(name), run.base?.figures[name]);
  }));
  byId("note-interval").hidden = DATA.groups.every((group) => group.runs.length > 1) || !run.evaluations.some((model) => Object.keys(model.changes).length);
  byId("note-seeds").hidden = DATA.groups.every((group) => group.runs.length < 2);
  drawLegend();
  drawScatter();
  drawExtra();
  markCharts();
}

function drawLegend() {
  const items = DATA.groups.map((group, i) => {
    const seeds = group.runs.length > 1 ? `, mean of ${group.runs.length} seeds` : "";
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
      other: run !== RUNS[state.run],
      name: `${run.name}, ${model.name}: reward ${shown(model.figures.reward, "number")}, different images ${shown(model.figures.vendi, "number")}`,
      caption: run === RUNS[state.run] && [0, run.best, run.evaluations.length - 1].includes(index) ? `${model.name}${index === run.best ? " (best)" : ""}` : "",
    }));
    return { colour: run.group % 8, points: points.filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y)) };
  }).filter((one) => one.points.length);
  byId("kept").hidden = series.every((one) => one.points.length < 2);
  scatter = null;
  if (byId("kept").hidden) return;
  const width = Math.max(260, Math.round(byId("scatter").clientWidth) || 600);
  scatter = scatterChart({
    label: "reward against different images", width, height: Math.round(clamp(width * 0.6, 240, 380)), series,
    titles: { x: "reward", y: "different images" }, law: { points: lawPoints(series), label: WORDS.law }, formatX: tick("number"), formatY: tick("number"),
    onHover: (point) => {
      if (!point && document.activeElement.closest("#scatter")) return; // the dot that has the focus goes on being told of
      drawThumbnails(point ? checkpointNear(point) : rightModel());
    },
    onPick: (point) => point && pickPoint(point),
  });
  byId("scatter").replaceChildren(scatter.element);
}

/** The exact law of the run that is shown, as far as any dot goes. */
function lawPoints(series) {
  const most = Math.max(...series.flatMap((one) => one.points.map((point) => point.x)));
  const points = RUNS[state.run].curve.map(([x, y]) => ({ x, y }));
  const end = points.findIndex((point) => point.x > most);
  if (end < 1) return points;
  const [before, after] = points.slice(end - 1, end + 1);
  const share = (most - before.x) / (after.x - before.x);
  return [...points.slice(0, end), { x: most, y: before.y + share * (after.y - before.y) }];
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
