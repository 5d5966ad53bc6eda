// The table, its filters, and the keys; ties the parts of the page together.

const PAGED_FROM = 2000; // rows; fewer stand in one page
const DRAW_AFTER = 150; // milliseconds without another key

const columns = [
  { title: "#", text: (row) => String(cell("order", row)), key: (row) => cell("order", row) },
  { title: "module", text: (row) => cell("name", row), render: nameCell, className: "name" },
  ...data.metrics.map(({ name, title, shown }) => ({
    title,
    metric: name,
    visible: shown,
    text: (row) => metricText(name, row),
    key: (row) => badness(name, row),
    className: "metric",
  })),
  { title: "worst at", text: (row) => finding(row) || cell("worst_at", row) },
  { title: "status", text: (row) => cell("status", row) },
  { title: "kind", text: (row) => cell("kind", row), className: "name" },
  { title: "class", text: (row) => cell("class", row), className: "name" },
];

const folded = new Map(); // rows under the earlier one that they equal
for (let row = 0; row < rowCount; row++) {
  const first = cell("same_as", row);
  if (first === null) continue;
  if (!folded.has(first)) folded.set(first, []);
  folded.get(first).push(row);
}

function nameCell(row) {
  const lines = [element("span", cell("name", row))];
  if (byId("fold").checked) {
    lines.push(...(folded.get(row) ?? []).map((other) => element("small", `= ${cell("name", other)}`)));
  }
  return element("div", "", ...lines);
}

function columnDefinition({ title, text, key, render, visible = true, className = "" }) {
  return {
    title,
    visible,
    className,
    type: key ? "num" : "string",
    orderSequence: key && title !== "#" ? ["desc", "asc"] : ["asc", "desc"],
    data: null,
    render: (row, type) => {
      if (type === "sort" || type === "type") return key ? key(row) : text(row);
      return type === "display" ? (render ?? plain(text))(row) : text(row);
    },
  };
}

/** A cell is an element, so that no text is taken for HTML. */
const plain = (text) => (row) => element("span", text(row));

function initialOrder() {
  const position = columns.findIndex(({ metric }) => metric === data.sort);
  if (position >= 0) return [[position, "desc"]];
  return data.sort === "name" ? [[1, "asc"]] : [[0, "asc"]];
}

fillControls();
const table = window.jQuery("#rows").DataTable({
  data: allRows,
  columns: columns.map(columnDefinition),
  order: initialOrder(),
  autoWidth: false,
  deferRender: true,
  paging: rowCount > PAGED_FROM,
  pageLength: 500,
  lengthChange: false,
  layout: {
    topStart: { buttons: [{ extend: "colvis", text: "Columns" }] },
    topEnd: null,
    bottomStart: "info",
    bottomEnd: rowCount > PAGED_FROM ? "paging" : null,
  },
  createdRow: (node, row) => {
    node.tabIndex = -1;
    node.dataset.row = row;
    node.setAttribute("aria-haspopup", "dialog");
  },
  drawCallback: () => {
    const nodes = rowNodes();
    for (const node of nodes) mark(node, Number(node.dataset.row));
    if (nodes.length && !nodes.some((node) => node.tabIndex === 0)) nodes[0].tabIndex = 0;
  },
});

function rowNodes() {
  return [...document.querySelectorAll("#rows tbody tr[data-row]")];
}

function mark(node, row) {
  node.classList.toggle("beyond", isBeyond(chosen.metric, row, chosen.threshold));
}

function isListed(row) {
  const name = byId("filter-name").value.toLowerCase();
  const same = cell("same_as", row);
  const names = [row, ...(byId("fold").checked ? (folded.get(row) ?? []) : [])];
  return (
    !(byId("fold").checked && same !== null) &&
    names.some((one) => cell("name", one).toLowerCase().includes(name)) &&
    ["kind", "class", "status"].every((column) =>
      ["", cell(column, row)].includes(byId(`filter-${column}`).value),
    ) &&
    (!byId("only-beyond").checked || isBeyond(chosen.metric, row, chosen.threshold))
  );
}

function refreshTable() {
  table.draw();
  const listed = table.rows({ search: "applied" }).data().toArray();
  const { metric, threshold } = chosen;
  const beyond = listed.filter((row) => isBeyond(metric, row, threshold)).length;
  const marked = threshold === null ? "" : `, ${beyond} beyond ${metrics.get(metric).title} ${threshold}`;
  byId("count").textContent = `${listed.length} of ${rowCount} rows${marked}`;
}

let waiting = 0;
function refreshCharts() {
  clearTimeout(waiting);
  waiting = setTimeout(() => drawCharts(showDetails), DRAW_AFTER);
}

function fillControls() {
  for (const column of ["kind", "class", "status"]) {
    const values = [...new Set(data.rows[column].of)].sort();
    byId(`filter-${column}`).append(...values.map((value) => new Option(value, value)));
  }
  byId("metric").append(...data.metrics.map(({ name, title }) => new Option(title, name)));
  const gate = data.gates.find(({ metric, everywhere }) => everywhere && metrics.has(metric));
  byId("metric").value = gate?.metric ?? (metrics.has("peir") ? "peir" : data.metrics[0].name);
  byId("threshold").value = gate?.limit ?? "";
  const count = [...folded.values()].flat().length;
  byId("fold").checked = data.fold;
  byId("fold").closest("label").hidden = count === 0;
  byId("fold-text").textContent = `fold ${count} ${count === 1 ? "row" : "rows"} equal to an earlier one`;
}

function listenToControls() {
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", ({ target }) => {
    if (target.id === "fold") table.rows().invalidate();
    refreshTable();
    if (["metric", "threshold"].includes(target.id)) refreshCharts();
  });
}

function listenToRows() {
  const body = document.querySelector("#rows tbody");
  const rowOf = ({ target }) => target.closest("tr[data-row]");
  body.addEventListener("click", (event) => {
    const node = rowOf(event);
    if (node === null) return;
    node.focus();
    showDetails(Number(node.dataset.row));
  });
  body.addEventListener("focusin", (event) => {
    for (const node of body.querySelectorAll('tr[tabindex="0"]')) node.tabIndex = -1;
    const node = rowOf(event);
    if (node !== null) node.tabIndex = 0;
  });
  body.addEventListener("keydown", (event) => {
    const node = rowOf(event);
    if (node === null) return;
    const nodes = rowNodes();
    const position = nodes.indexOf(node);
    const targets = { ArrowDown: position + 1, ArrowUp: position - 1, Home: 0, End: nodes.length - 1 };
    if (event.key === "Enter" || event.key === " ") showDetails(Number(node.dataset.row));
    else if (event.key in targets) nodes[targets[event.key]]?.focus();
    else return;
    event.preventDefault();
  });
}

function listenToDialog() {
  const dialog = byId("details");
  const go = (by) => {
    const listed = table.rows({ search: "applied", order: "applied" }).data().toArray();
    const next = listed[listed.indexOf(Number(dialog.dataset.row)) + by];
    if (next !== undefined) showDetails(next);
  };
  byId("previous").addEventListener("click", () => go(-1));
  byId("next").addEventListener("click", () => go(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", ({ target }) => {
    if (target === dialog) dialog.close(); // outside of what it shows
  });
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const THEMES = ["system", "light", "dark"];
let theme = THEMES[0];

function applyTheme() {
  const dark = theme === "dark" || (theme === "system" && darkSystem.matches);
  document.documentElement.classList.toggle("dark", dark);
  byId("theme").textContent = `Colours: ${theme}`;
  refreshCharts();
  const dialog = byId("details");
  if (dialog.open) drawDetailCharts(Number(dialog.dataset.row));
}

function listenToTheme() {
  darkSystem.addEventListener("change", applyTheme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    applyTheme();
  });
}

table.search.fixed("controls", (text, row) => isListed(row));
listenToControls();
listenToRows();
listenToDialog();
listenToTheme();
refreshTable();
applyTheme();
document.documentElement.dataset.ready = "";
