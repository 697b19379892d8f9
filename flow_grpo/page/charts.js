"use strict";
/* Charts as SVG, in the units of the screen: a line chart and a scatter chart. They know nothing of the page: points
   carry an `index` by which they are chosen and hovered, and the colours are classes of page.css, so that they follow
   light and dark. A number is drawn where it is finite; a series may have gaps. */

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 12, bottom: 22, left: 46 }; // pixels, around the plot

/** An SVG element with attributes and children. */
function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Round numbers, about `count` of them, that cover [low, high]: steps of 1, 2 or 5 times a power of ten. */
function ticks(low, high, count, whole = false) {
  const rough = Math.max((high - low) / count, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.9999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** The smallest interval that holds the finite values, a little wider; never empty. */
function extent(values, margin) {
  const known = values.filter(Number.isFinite);
  if (!known.length) return [0, 1];
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const space = (high - low || Math.abs(high) || 1) * margin;
  return high > low ? [low - space, high + space] : [low - (space || 0.5), high + (space || 0.5)];
}

/** A map of the interval [low, high] onto [from, to]. */
function scale([low, high], from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

/** The plot's frame: grid lines, tick labels, and the scales of both axes. */
function frame(root, { width, height, top = MARGIN.top, xs, ys, formatX, formatY, wholeX = false, edge = 0.06 }) {
  const [xRange, yRange] = [extent(xs, edge), extent(ys, 0.06)];
  const x = scale(xRange, MARGIN.left, width - MARGIN.right);
  const y = scale(yRange, height - MARGIN.bottom, top);
  for (const value of ticks(...yRange, 4)) {
    root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { x: MARGIN.left - 7, y: y(value) + 4, "text-anchor": "end" }, formatY(value)));
  }
  for (const value of ticks(...xRange, Math.max(2, Math.floor(width / 80)), wholeX)) {
    const anchor = x(value) > width - 24 ? "end" : "middle";
    const at = anchor === "end" ? width - MARGIN.right + 8 : x(value);
    root.append(svg("text", { x: at, y: height - 5, "text-anchor": anchor }, formatX(value)));
  }
  return { x, y };
}

/** "M x y L x y ..." through the points. */
function path(points, x, y) {
  return points.map((point, i) => `${i ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join("");
}

/** The outline of the intervals of the points that have one. */
function bandPath(points, x, y) {
  const known = points.filter((point) => Number.isFinite(point.low) && Number.isFinite(point.high));
  if (known.length < 2) return "";
  const upper = known.map((point) => ({ x: point.x, y: point.high }));
  const lower = known.map((point) => ({ x: point.x, y: point.low })).reverse();
  return `${path([...upper, ...lower], x, y)}Z`;
}

/**
 * Lines with bands and dots.
 *
 * series: [{colour: 0..7, points: [{x, y, low, high, index, large}], dots, thin}]; only a series with dots is hovered.
 * base: a dashed line at this height. onHover(index or null), onPick(index).
 * Returns the element, and `mark(index)` and `hover(index or null)`, which move the two marks.
 */
function lineChart({ label, width, height, series, base, formatX, formatY, wholeX, onHover, onPick }) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: onPick ? "pick" : "" });
  const all = series.flatMap((one) => one.points);
  const ys = all.flatMap((point) => [point.y, point.low, point.high]).concat(base ?? []);
  const { x, y } = frame(root, { width, height, xs: all.map((point) => point.x), ys, formatX, formatY, wholeX, edge: 0 });
  if (Number.isFinite(base)) {
    root.append(svg("line", { class: "base", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(base), y2: y(base) }));
  }
  for (const one of series) root.append(svg("path", { class: `band c${one.colour}`, d: bandPath(one.points, x, y) }));
  for (const one of series) {
    root.append(svg("path", { class: `line c${one.colour}${one.thin ? " thin" : ""}`, d: path(one.points, x, y) }));
  }
  const points = series.filter((one) => one.dots).flatMap((one) => one.points.map((point) => ({ ...point, colour: one.colour })));
  for (const point of points) {
    root.append(svg("circle", { class: `dot c${point.colour}${point.large ? "" : " small"}`, cx: x(point.x), cy: y(point.y), r: 4 }));
  }
  const rule = svg("line", { class: "hover", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
  const dot = svg("circle", { class: "hover-dot", r: 4, visibility: "hidden" });
  const ring = svg("circle", { class: "chosen", r: 5.5, visibility: "hidden" });
  root.append(rule, ring, dot);
  const place = (index) => points.find((point) => point.index === index);
  const follow = pointerIndex(root, width, (at) => nearest(points, (point) => Math.abs(x(point.x) - at.x)));
  follow(onHover, onPick);
  return {
    element: root,
    mark: (index) => put(ring, place(index), x, y),
    hover: (index) => {
      put(dot, place(index), x, y);
      put(rule, place(index), x, y);
    },
  };
}

/**
 * Dots in a plane, those of a run joined in their order.
 *
 * series: [{colour, points: [{x, y, index, name, run, large}]}]; a point is a button for the keyboard.
 */
function scatterChart({ label, width, height, series, titles, law, formatX, formatY, onHover, onPick }) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label, class: "pick" });
  const all = series.flatMap((one) => one.points.map((point) => ({ ...point, colour: one.colour })));
  const inner = { width, height: height - 18, top: MARGIN.top + 20, xs: all.map((point) => point.x), ys: [...all, ...law.points].map((point) => point.y) };
  const { x, y } = frame(root, { ...inner, formatX, formatY });
  if (law.points.length > 1) {
    const last = law.points.at(-1);
    root.append(svg("path", { class: "line law", d: path(law.points, x, y) }));
    root.append(svg("text", { x: x(last.x) - 6, y: y(last.y) - 8, "text-anchor": "end" }, law.label));
  }
  root.append(svg("text", { x: width - MARGIN.right, y: height - 4, "text-anchor": "end" }, `${titles.x} →`));
  root.append(svg("text", { x: 4, y: MARGIN.top + 4 }, `↑ ${titles.y}`));
  for (const one of series) root.append(svg("path", { class: `line thin c${one.colour}`, d: path(one.points, x, y) }));
  for (const point of all) root.append(scatterDot(point, x, y, onHover, onPick));
  for (const point of all.filter((one) => one.caption)) {
    const left = x(point.x) > width - 90;
    root.append(svg("text", { x: x(point.x) + (left ? -10 : 10), y: y(point.y) - 8, "text-anchor": left ? "end" : "start" }, point.caption));
  }
  const ring = svg("circle", { class: "chosen", r: 6.5, visibility: "hidden", "pointer-events": "none" });
  root.append(ring);
  const distance = (at) => (point) => Math.hypot(x(point.x) - at.x, y(point.y) - at.y);
  pointerIndex(root, width, (at) => nearest(all, distance(at)))(onHover, onPick);
  return { element: root, mark: (test) => put(ring, all.find(test), x, y) };
}

/** A dot that can be reached by the keyboard. */
function scatterDot(point, x, y, onHover, onPick) {
  const dot = svg("circle", {
    class: `dot c${point.colour}${point.large ? "" : " small"}${point.other ? " other" : ""}`, cx: x(point.x), cy: y(point.y), r: 5.5,
    tabindex: 0, role: "button", "aria-label": point.name,
  });
  dot.addEventListener("focus", () => onHover(point));
  dot.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    onPick(point);
  });
  return dot;
}

/** The point of least distance. */
function nearest(points, distance) {
  return points.reduce((best, point) => (best === undefined || distance(point) < distance(best) ? point : best), undefined);
}

/** Tell of the point that the pointer is nearest to, and of a click on it. */
function pointerIndex(root, width, find) {
  return (onHover, onPick) => {
    const at = (event) => {
      const box = root.getBoundingClientRect();
      const zoom = width / box.width;
      return find({ x: (event.clientX - box.left) * zoom, y: (event.clientY - box.top) * zoom });
    };
    root.addEventListener("pointermove", (event) => onHover(at(event)));
    root.addEventListener("pointerleave", () => onHover(undefined));
    root.addEventListener("click", (event) => onPick(at(event)));
  };
}

/** Move a mark to a point; hide it without one. */
function put(mark, point, x, y) {
  mark.setAttribute("visibility", point ? "visible" : "hidden");
  if (!point) return;
  const [across, up] = mark.tagName === "line" ? [["x1", "x2"], []] : [["cx"], ["cy"]];
  for (const name of across) mark.setAttribute(name, x(point.x));
  for (const name of up) mark.setAttribute(name, y(point.y));
}
