// The details of one row, in a dialog: Escape closes it and gives the focus back to the row.

let histogramViews = [];

function showDetails(row) {
  byId("details-title").textContent = cell("name", row);
  byId("details-body").replaceChildren(...detailParts(row));
  const dialog = byId("details");
  dialog.dataset.row = row;
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  drawDetailCharts(row);
}

async function drawDetailCharts(row) {
  for (const view of histogramViews) view.remove();
  histogramViews = [];
  const place = byId("histograms");
  place.replaceChildren();
  const found = detailsOf(row)?.[2] ?? null;
  if (found === null) return;
  const views = await drawHistograms(found, place);
  if (byId("details").dataset.row === String(row)) histogramViews = views;
  else for (const view of views) view.remove();
}

function detailsOf(row) {
  const position = cell("details", row);
  return position === null ? null : data.details[position];
}

function detailParts(row) {
  const parts = [factList(row), element("h3", "Metrics"), metricList(row)];
  const details = detailsOf(row);
  if (details !== null) {
    parts.push(element("h3", "Statistics"), statisticsTable(details));
    if (details[3] !== null) {
      parts.push(element("h3", "Where the error is"));
      parts.push(element("ul", "", ...details[3].texts.map((text) => element("li", text))));
      parts.push(...details[3].profiles.map(profileFigure));
    }
    parts.push(element("h3", "Histograms"), element("p", sampleText(details[2])));
  }
  return parts;
}

function factList(row) {
  const shares = sharing(row);
  const facts = [
    ["status", cell("status", row)],
    ["finding", finding(row)],
    ["notes", cell("notes", row)],
    ["class", cell("class", row)],
    ["dtype", cell("dtype", row)],
    ["shape", cell("shape", row)],
    ["matched by", cell("matched_by", row)],
    ["peak", peakText(row)],
    ["worst token", tokenText(row)],
    ["the same as", shares.join(", ")],
    ["quantization", cell("quantization", row)],
    ...Object.entries(cell("further", row) ?? {}),
  ];
  return definitions(facts.filter(([, text]) => text !== ""));
}

function peakText(row) {
  const peak = cell("peak", row);
  if (peak === null) return "";
  const [index, reference, candidate] = peak;
  const values = `reference ${exact(reference)}, candidate ${exact(candidate)}`;
  return `${cell("worst_at", row)}, at [${index.join(", ")}]: ${values}`;
}

/** Both values of a peak may differ in late digits only. */
function exact(value) {
  return typeof value === "number" ? number(value, 6) : String(value);
}

function tokenText(row) {
  const token = cell("worst_token", row);
  const zeros = cell("zero_tokens", row);
  const texts = token === null ? [] : [`[${token.join(", ")}]`];
  if (zeros) texts.push(`${zeros} left out, all zero in the reference`);
  return texts.join("; ");
}

/** Names of the rows that have the contents of this one on both sides. */
function sharing(row) {
  const first = cell("same_as", row) ?? row;
  const names = [];
  for (let other = 0; other < rowCount; other++) {
    if (other !== row && (other === first || cell("same_as", other) === first)) {
      names.push(cell("name", other));
    }
  }
  return names;
}

function metricList(row) {
  const applying = data.metrics.filter(({ name }) => applies(name, row));
  return definitions(applying.map(({ name, title }) => [title, metricText(name, row)]), "several");
}

function definitions(pairs, className = "") {
  const list = element("dl");
  list.className = className;
  for (const [name, text] of pairs) {
    list.append(element("div", "", element("dt", name), element("dd", text)));
  }
  return list;
}

function statisticsTable(details) {
  const names = ["elements", "min", "max", "mean", "stddev", "zeros", "NaN", "inf", "-inf"];
  const table = element("table");
  const scoped = (tag, text, scope) => {
    const made = element(tag, text);
    made.scope = scope;
    return made;
  };
  table.append(element("tr", "", element("td"), ...names.map((name) => scoped("th", name, "col"))));
  for (const [side, name] of ["reference", "candidate"].entries()) {
    const values = details[side].map((value) => element("td", value === null ? "-" : number(value)));
    table.append(element("tr", "", scoped("th", name, "row"), ...values));
  }
  return table;
}

/** Bars for the shares that runs of tokens or channels have of the error, from first to last. */
function profileFigure([axis, count, thousandths]) {
  const largest = Math.max(...thousandths, 1);
  const figure = element("div");
  figure.className = "profile";
  figure.setAttribute("role", "img");
  const run = Math.ceil(count / thousandths.length);
  const each = run > 1 ? `, ${run} to a bar` : "";
  figure.setAttribute("aria-label", `Error by ${axis}: ${count} ${axis}s${each}`);
  figure.append(
    ...thousandths.map((share, bin) => {
      const bar = element("i");
      bar.style.height = `${(100 * share) / largest}%`;
      const first = Math.floor((bin * count) / thousandths.length);
      bar.title = `${axis} ${first}${run > 1 ? " and on" : ""}: ${share / 10} %`;
      return bar;
    }),
  );
  const caption = element("p", `Error by ${axis}: ${count} ${axis}s${each}; the largest ${largest / 10} %`);
  const both = element("div");
  both.append(caption, figure);
  return both;
}

function sampleText(found) {
  if (found === null) return "None: no elements of the two sides face each other.";
  const [counted, leftOut, step] = found;
  const which = step === 1 ? "all" : `one in ${step}`;
  const rest = leftOut ? `; ${leftOut} left out, masked or not finite` : "";
  return `From ${counted} elements, ${which}${rest}. The scale is logarithmic.`;
}
