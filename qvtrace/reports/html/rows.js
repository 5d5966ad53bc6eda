// The rows of the comparison, as the page's data has them, and how their numbers are written.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const metrics = new Map(data.metrics.map((metric) => [metric.name, metric]));
const rowCount = data.rows.order.length;
const allRows = [...Array(rowCount).keys()];
const byId = (id) => document.getElementById(id);

/** What a column says of a row; texts that rows share stand once. */
function cell(column, row) {
  const values = data.rows[column];
  return Array.isArray(values) ? values[row] : values.of[values.at[row]];
}

/** Three significant digits, as in the table of the terminal; integers below a million whole. */
function number(value, digits = 3) {
  if (value === 0 || (Number.isInteger(value) && Math.abs(value) < 1e6)) return String(value);
  const [mantissa, power] = value.toExponential(digits - 1).split("e");
  const exponent = Number(power);
  if (exponent < -4 || exponent > 5) return `${mantissa}e${exponent}`;
  return value.toFixed(Math.max(0, digits - 1 - exponent));
}

/** A metric of a row with its unit, or a dash and the reason. */
function metricText(name, row) {
  const value = cell(name, row);
  if (value === null) return `- ${undefinedMetric(name, row).reason}`.trim();
  if (name === "cosine") return value.toFixed(6); // close to 1, where three digits say nothing
  const { unit, is_power: isPower } = metrics.get(name);
  if (isPower) return value ? `${(10 * Math.log10(value)).toFixed(0)} dB` : "none";
  return number(value) + unit;
}

/** Why a metric is undefined, and how that ranks: 1 is worse than any number, -1 as good as can be,
 * -2 does not apply. */
function undefinedMetric(name, row) {
  const found = cell("undefined", row).find(([metric]) => metric === name);
  return found ? { reason: found[1], rank: found[2] } : { reason: "", rank: -2 };
}

/** A number that is the larger the worse a row is. */
function badness(name, row) {
  const value = cell(name, row);
  if (value !== null) return metrics.get(name).higher_is_better ? -value : Math.abs(value);
  return [-Infinity, -1e308, 0, Infinity][undefinedMetric(name, row).rank + 2];
}

/** Whether a row is not within a threshold: an undefined metric never is; a row that equals the
 * reference up to a factor that is made up for is no fault. */
function isBeyond(name, row, threshold) {
  if (threshold === null || cell("made_up_for", row)) return false;
  const limit = metrics.get(name).higher_is_better ? -threshold : threshold;
  return badness(name, row) > limit || cell("status", row) === "nonfinite";
}

/** What is said in place of numbers, where that is more than the status. */
function finding(row) {
  const message = cell("message", row);
  return message === cell("status", row) ? "" : message;
}

/** A new element with a text; a child for each further argument. */
function element(tag, text = "", ...children) {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  made.append(...children);
  return made;
}

/** What is chosen in the controls. */
const chosen = {
  get metric() {
    return byId("metric").value;
  },
  get threshold() {
    const text = byId("threshold").value;
    return text === "" ? null : Number(text);
  },
};
