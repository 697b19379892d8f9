"use strict";
/* The data of the page, and small helpers: elements, and numbers as people read them. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const { runs: RUNS, words: WORDS } = DATA;

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
  const largest = Math.max(...values.map(exponent));
  if (values.every((value) => value === 0)) return 0;
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
  const number = unit === "share" ? (100 * value).toFixed(places) : value.toFixed(places);
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
