// Charts, drawn by Bokeh in the colours of the page.

let views = [];

/** The colour that a variable of the style sheet has now. */
function ink(name) {
  const probe = element("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

/** An empty chart in the colours of the page. */
function emptyChart(options) {
  const plot = Bokeh.Plotting.figure({
    sizing_mode: "stretch_width",
    tools: "pan,box_zoom,reset,save",
    background_fill_color: ink("paper"),
    border_fill_color: ink("paper"),
    outline_line_color: ink("faint"),
    ...options,
  });
  plot.toolbar.logo = null; // it would be a link out of the page
  for (const axis of [plot.xaxis, plot.yaxis].flat()) {
    axis.axis_label_text_color = axis.major_label_text_color = ink("ink");
    axis.axis_line_color = axis.major_tick_line_color = ink("faint");
    axis.minor_tick_line_color = null;
    axis.axis_label_text_font_style = "normal";
  }
  for (const grid of [plot.xgrid, plot.ygrid].flat()) grid.grid_line_color = ink("line");
  return plot;
}

/** What the marks of a chart mean, in a line above it. */
function addLegend(plot, renderers) {
  const items = renderers.map(([label, renderer]) => new Bokeh.LegendItem({ label, renderers: [renderer] }));
  const legend = new Bokeh.Legend({
    items,
    orientation: "horizontal",
    padding: 2,
    background_fill_color: null,
    border_line_color: null,
    label_text_color: ink("ink"),
  });
  plot.add_layout(legend, "above");
}

async function show(plot, place) {
  place.replaceChildren();
  return Bokeh.Plotting.show(plot, place);
}

/** Draw both charts of the whole comparison for the metric and the threshold that are chosen. */
async function drawCharts(openRow) {
  const old = views;
  views = [];
  for (const view of old) view.remove();
  const { metric, threshold } = chosen;
  if (!rowCount || !metric) return;
  byId("depth-title").textContent = `${metrics.get(metric).title} over the depth of the network`;
  views.push(await show(depthChart(metric, threshold, openRow), byId("depth")));
  const heat = heatChart(metric, threshold, openRow);
  byId("heat-section").hidden = heat === null;
  if (heat !== null) views.push(await show(heat, byId("heat")));
}

/** Whether a logarithmic axis suits: errors and ratios, no decibels and no signed numbers. */
function isLogarithmic(metric) {
  const { unit, name } = metrics.get(metric);
  return unit === "" && !["cosine", "mean_error", "mismatches"].includes(name);
}

const looks = {
  within: ["circle", "within"],
  beyond: ["triangle", "beyond"],
  equal: ["square", "good"],
  "equal up to a factor": ["diamond", "quiet"],
  "not measured": ["x", "warning"],
};

function depthChart(metric, threshold, openRow) {
  const logarithmic = isLogarithmic(metric);
  const rows = allRows.filter((row) => applies(metric, row));
  const measured = rows
    .map((row) => cell(metric, row))
    .filter((value) => value !== null && (!logarithmic || value > 0));
  const limits = gateLimits(metric);
  const range = padded([...measured, ...limits, ...(threshold === null ? [] : [threshold])], logarithmic);
  const plot = emptyChart({
    height: 300,
    y_axis_type: logarithmic ? "log" : "linear",
    y_range: padded(range, logarithmic),
    x_axis_label: "call, in order of execution",
    y_axis_label: metrics.get(metric).title + metrics.get(metric).unit,
  });
  const groups = new Map(Object.keys(looks).map((name) => [name, []]));
  for (const row of rows) groups.get(groupOf(metric, row, threshold, logarithmic)).push(row);
  // What has no place on the axis stands at its ends: equal pairs at the good one.
  const ends = metrics.get(metric).higher_is_better ? [...range].reverse() : range;
  const place = { equal: ends[0], "not measured": ends[1] };
  const legend = [];
  for (const [name, members] of groups) {
    if (!members.length) continue;
    const [marker, colour] = looks[name];
    const source = new Bokeh.ColumnDataSource({
      data: {
        row: members,
        x: members.map((row) => cell("order", row)),
        y: members.map((row) => (name in place ? place[name] : cell(metric, row))),
        name: members.map((row) => cell("name", row)),
        text: members.map((row) => metricText(metric, row)),
      },
    });
    const renderer = plot.scatter({ field: "x" }, { field: "y" }, {
      source,
      marker,
      size: 7,
      fill_color: ink(colour),
      line_color: ink(colour),
      fill_alpha: 0.7,
    });
    legend.push([name === "beyond" ? "beyond the threshold" : name, renderer]);
    opensRows(source, openRow);
  }
  for (const limit of limits) plot.add_layout(levelLine(limit, "beyond", "solid"));
  if (threshold !== null && !limits.includes(threshold)) {
    plot.add_layout(levelLine(threshold, "beyond", "dashed"));
  }
  addLegend(plot, legend);
  addHover(plot);
  return plot;
}

function groupOf(metric, row, threshold, logarithmic) {
  const value = cell(metric, row);
  if (value === null) return undefinedMetric(metric, row).rank === -1 ? "equal" : "not measured";
  if (logarithmic && value === 0) return "equal";
  if (cell("made_up_for", row)) return "equal up to a factor";
  return isBeyond(metric, row, threshold) ? "beyond" : "within";
}

function applies(metric, row) {
  return cell(metric, row) !== null || undefinedMetric(metric, row).rank !== -2;
}

/** The smallest and the largest of values. */
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** A range around values, with room at both ends. */
function padded(values, logarithmic) {
  if (!values.length) return logarithmic ? [0.1, 10] : [-1, 1];
  const [low, high] = extent(values);
  if (logarithmic) return [low / 1.4, high * 1.4];
  const room = (high - low || Math.abs(high) || 1) * 0.05;
  return [low - room, high + room];
}

function levelLine(limit, colour, dash) {
  return new Bokeh.Span({
    location: limit,
    dimension: "width",
    line_color: ink(colour),
    line_dash: dash,
    line_width: 1.5,
  });
}

/** The worst row of each layer and kind of module. */
function heatCells(metric) {
  const worst = new Map();
  for (let row = 0; row < rowCount; row++) {
    const layer = cell("layer", row);
    if (layer === null || !applies(metric, row) || cell("made_up_for", row)) continue;
    const key = JSON.stringify([layer, cell("kind", row)]);
    if (!worst.has(key) || badness(metric, row) > badness(metric, worst.get(key))) {
      worst.set(key, row);
    }
  }
  return [...worst.values()];
}

function heatChart(metric, threshold, openRow) {
  const rows = heatCells(metric);
  if (!rows.length) return null;
  const layers = new Set(rows.map((row) => cell("layer", row)));
  const [first, last] = extent(layers);
  const kinds = [...new Set(rows.map((row) => cell("kind", row)))];
  const mapper = colourMapper(metric, threshold, rows);
  const plot = emptyChart({
    height: 90 + 18 * kinds.length,
    x_range: [first - 0.5, last + 0.5],
    y_range: new Bokeh.FactorRange({ factors: [...kinds].reverse() }),
    x_axis_label: "layer",
  });
  plot.xaxis.ticker = new Bokeh.BasicTicker({ min_interval: 1, num_minor_ticks: 0 });
  const source = new Bokeh.ColumnDataSource({
    data: {
      row: rows,
      x: rows.map((row) => cell("layer", row)),
      y: rows.map((row) => cell("kind", row)),
      value: rows.map((row) => heatValue(metric, row)),
      name: rows.map((row) => cell("name", row)),
      text: rows.map((row) => metricText(metric, row)),
    },
  });
  plot.rect({ field: "x" }, { field: "y" }, 0.94, 0.9, {
    source,
    fill_color: { field: "value", transform: mapper },
    line_color: null,
  });
  plot.add_layout(colourBar(mapper), "right");
  opensRows(source, openRow);
  addHover(plot);
  const outside = allRows.filter((row) => cell("layer", row) === null).length;
  const excused = allRows.filter((row) => cell("made_up_for", row)).length;
  const factors = excused ? `, rows that are equal up to a factor (${excused})` : "";
  byId("heat-note").textContent =
    `${kinds.length} kinds in ${layers.size} layers. Not in it: rows outside of numbered layers (${outside})${factors}. ` +
    "Grey: the metric is undefined. Several calls or outputs of one module: the worst.";
  return plot;
}

/** What colours a cell: a number; an equal pair is as good as the best, NaN is undefined. */
function heatValue(metric, row) {
  const value = cell(metric, row);
  if (value !== null) return metric === "mean_error" ? Math.abs(value) : value;
  return undefinedMetric(metric, row).rank === -1 ? Infinity : NaN;
}

/** From good to bad; what is not within the threshold has a colour of its own. */
function colourMapper(metric, threshold, rows) {
  const higher = metrics.get(metric).higher_is_better;
  const values = rows.map((row) => heatValue(metric, row)).filter(Number.isFinite);
  const usable = isLogarithmic(metric) ? values.filter((value) => value > 0) : values;
  let [low, high] = extent(usable);
  if (threshold !== null && Number.isFinite(threshold)) {
    if (higher) low = threshold;
    else high = threshold;
  }
  if (!(low < high)) [low, high] = usable.length ? around(higher ? low : high) : [0.1, 1];
  const palette = [...Bokeh.Palettes.Blues9].slice(0, 7); // from dark to light
  const dark = document.documentElement.classList.contains("dark");
  if (higher === dark) palette.reverse();
  const marked = threshold === null ? null : ink("beyond");
  const ends = higher ? { low_color: marked } : { high_color: marked };
  const Mapper = isLogarithmic(metric) ? Bokeh.LogColorMapper : Bokeh.LinearColorMapper;
  return new Mapper({ palette, low, high, nan_color: ink("faint"), ...ends });
}

function around(value) {
  return value > 0 ? [value / 10, value] : [value - 1, value + 1];
}

function colourBar(mapper) {
  return new Bokeh.ColorBar({
    color_mapper: mapper,
    width: 10,
    background_fill_color: ink("paper"),
    major_label_text_color: ink("ink"),
  });
}

function addHover(plot) {
  plot.add_tools(
    new Bokeh.HoverTool({ tooltips: [["", "@name"], ["", "@text"]] }),
    new Bokeh.TapTool(),
  );
}

/** A click on a mark opens the details of its row. */
function opensRows(source, openRow) {
  const { selected } = source;
  selected.connect(selected.properties.indices.change, () => {
    if (!selected.indices.length) return;
    const row = source.data.row[selected.indices[0]];
    selected.indices = [];
    openRow(row);
  });
}

/** Limits of gates on a metric, which lines show. */
function gateLimits(metric) {
  return data.gates.filter((gate) => gate.metric === metric).map((gate) => gate.limit);
}

/** Reference and candidate in the same bins, and the error beside them. */
async function drawHistograms(found, place) {
  const [, , , reference, candidate, error] = found;
  const drawn = [];
  if (reference !== null && candidate !== null) {
    const plot = histogramChart("value");
    addLegend(plot, [
      ["reference", bars(plot, reference, "within", 0.45)],
      ["candidate", bars(plot, candidate, "beyond", 0)],
    ]);
    drawn.push(await show(plot, place.appendChild(element("div"))));
  }
  if (error !== null && error[0] < error[1]) {
    const plot = histogramChart("candidate - reference");
    addLegend(plot, [["error", bars(plot, error, "warning", 0.45)]]);
    drawn.push(await show(plot, place.appendChild(element("div"))));
  } else if (error !== null) {
    place.append(element("p", `The error is ${number(error[0])} at every one of these elements.`));
  }
  return drawn;
}

function histogramChart(label) {
  return emptyChart({
    height: 240,
    y_axis_type: "log",
    x_axis_label: label,
    y_axis_label: "elements",
  });
}

function bars(plot, [low, high, counts], colour, alpha) {
  const width = (high - low) / counts.length || Math.abs(low) / 10 || 1;
  const filled = counts.map((count, bin) => [count, bin]).filter(([count]) => count > 0);
  const source = new Bokeh.ColumnDataSource({
    data: {
      left: filled.map(([, bin]) => low + bin * width),
      right: filled.map(([, bin]) => low + (bin + 1) * width),
      top: filled.map(([count]) => count),
    },
  });
  return plot.quad({ field: "left" }, { field: "right" }, { field: "top" }, 0.5, {
    source,
    fill_color: ink(colour),
    fill_alpha: alpha,
    line_color: ink(colour),
  });
}
