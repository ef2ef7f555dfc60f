"use strict";
{
  const {runs, figures} = JSON.parse(document.getElementById("figures").textContent);
  const alone = runs.length === 1;
  const HEIGHT = 300;  // pixels
  const MARGIN = {l: 56, r: 62, t: 26, b: 44};
  const LABEL_GAP = 13;  // pixels between the centres of two labels
  const HEADROOM = 0.9;  // above levels and final values: the first loss would hide all that follows
  const DASHES = ["solid", "dot", "dashdot", "longdash"];

  const levelColour = (name) => name === "limit" ? "var(--good)" : "var(--muted)";

  // Plotly renders a few tags in its texts.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text) => text.length > 22 ? "…" + text.slice(-21) : text;
  const colourOf = (figure, run) => alone ? `var(--${figure.colour})` : `var(--run-${run % 8})`;
  const dashOf = (run) => alone ? "solid" : runs[run].control ? "dash" : DASHES[Math.floor(run / 8) % DASHES.length];

  // Each type of figure: its data to Plotly's traces and layout. Colours are CSS variables; draw()
  // looks up their values, so that figures follow the theme. A trace names its layer in `meta`, a
  // shape and a label in `name`.
  const plots = {
    curve(figure) {
      const range = rangeOf(figure);
      const number = figure.share ? "%{y:.1%}" : "%{y:.4~g}";
      const place = alone ? `${number} at %{x:.3~s} tokens<extra></extra>` : `%{fullData.name}: ${number}<extra></extra>`;
      const markers = (x, y, marker, hovertemplate, meta, more) => ({type: "scatter", mode: "markers", x, y, marker, hovertemplate, meta, ...more});
      const data = [];
      if (figure.points) {
        const faint = {color: colourOf(figure, 0), size: 4, opacity: 0.35};
        data.push(markers(figure.points.x, figure.points.y, faint, place, "points"));
      }
      for (const {run, lines} of figure.series) {
        const color = colourOf(figure, run);
        for (const {x, y} of lines) {
          data.push({
            type: "scatter", mode: x.length > 1 ? "lines" : "markers", x, y, name: safe(runs[run].name),
            line: {color, width: 2.5, dash: dashOf(run)}, marker: {color, size: 7},
            hovertemplate: figure.points ? "mean " + place : place, ...(alone ? {} : {meta: "run-" + run}),
          });
        }
      }
      if (figure.flatlines?.length) {
        const bottom = range[0] + 0.03 * (range[1] - range[0]);
        const cross = {color: "var(--bad)", size: 7, symbol: "x"};
        data.push(markers(figure.flatlines.map((mark) => mark.x), figure.flatlines.map(() => bottom), cross,
          "flatlines: %{text}<extra></extra>", "points", {text: figure.flatlines.map((mark) => safe(mark.text))}));
      }
      if (figure.commits?.length && !figure.noisy) {
        const diamond = {color: "var(--surgeon)", size: 11, symbol: "diamond", line: {color: "var(--paper)", width: 1.5}};
        const heights = figure.commits.map((x) => heightAt(x, figure.series[0].lines[0]));
        data.push(markers(figure.commits, heights, diamond, "an operation was kept here<extra></extra>", "commits"));
      }
      return {data, layout: curveLayout(figure, range)};
    },

    effect(figure) {
      const policies = ["surgeon", "random", "zero"];
      const distance = (low, high) => low === null || high === null ? null : high - low;
      const data = policies.map((policy, place) => {
        const gains = figure.rows.map((row) => row[policy]);
        const color = `var(--${policy})`;
        return {
          type: "scatter", mode: "markers", name: policy, marker: {color, size: 9},
          x: gains.map((gain) => gain.mean),
          y: gains.map((_, index) => 0.25 * (1 - place) - index),  // the first row on top
          error_x: {
            type: "data", symmetric: false, color, thickness: 2, width: 5,
            array: gains.map((gain) => distance(gain.mean, gain.high)),
            arrayminus: gains.map((gain) => distance(gain.low, gain.mean)),
          },
          hovertemplate: `${policy}: %{x:.4f}<extra></extra>`,
        };
      });
      const labels = figure.rows.map((row) => short(row.label));
      const longest = Math.max(...labels.map((label) => label.length));
      return {data, layout: {
        height: 110 + 90 * labels.length,
        margin: {l: Math.min(Math.max(90, 24 + 7 * longest), 190), r: 16, t: 34, b: 44, autoexpand: false},
        legend: {orientation: "h", x: 0, xref: "container", y: 1, yanchor: "bottom", font: {size: 11}},
        xaxis: {title: {text: safe(figure.unit)}, zeroline: true, zerolinewidth: 2},
        yaxis: {tickvals: labels.map((_, index) => -index), ticktext: labels.map(safe), range: [0.6 - labels.length, 0.6], showgrid: false, zeroline: false},
      }};
    },

    heat(figure) {
      const y = figure.z.map((_, index) => index + 1);
      return {
        data: [{
          type: "heatmap", x: figure.x, y, z: figure.z, zmin: -1, zmax: 1,
          colorscale: [[0, "var(--surgeon)"], [0.5, "var(--paper)"], [1, "var(--model)"]],
          colorbar: {thickness: 10, outlinewidth: 0, tickvals: [-1, 0, 1]},
          hovertemplate: "coefficient %{y}, up to operation %{x}: %{z:.2f}<extra></extra>",
        }],
        layout: {
          height: Math.min(Math.max(220, 90 + 22 * y.length), 460), margin: {...MARGIN, r: 16},
          xaxis: {title: {text: "operations so far"}, showgrid: false},
          yaxis: {title: {text: "coefficient"}, autorange: "reversed", showgrid: false, zeroline: false},
        },
      };
    },

    plotly: (figure) => figure,  // for figures that are given as Plotly's data and layout
  };

  // The part of the vertical axis to show: all values and levels, with a margin.
  function rangeOf(figure) {
    const lines = figure.series.flatMap((series) => series.lines);
    const levels = Object.values(figure.levels);
    const values = [...lines.flatMap((line) => line.y), ...levels, ...(figure.points?.y ?? [])];
    const low = values.reduce((a, b) => Math.min(a, b));
    let high = values.reduce((a, b) => Math.max(a, b));
    if (levels.length) {
      high = Math.min(high, Math.max(...levels, ...lines.map((line) => line.y.at(-1))) + HEADROOM);
    }
    const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 0.5;
    return [low - pad, high + pad];
  }

  function curveLayout(figure, range) {
    const phases = figure.phases ?? [];
    const end = figure.end || 1;
    const band = {xref: "x", yref: "paper", y0: 0, y1: 1};
    const shapes = [
      ...phases.map(({start, end}, index) => ({name: "phases", type: "rect", ...band, x0: start, x1: end, fillcolor: `var(--phase-${index % 3})`, line: {width: 0}, layer: "below"})),
      ...Object.entries(figure.levels).map(([name, level]) => ({name: "levels", type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: level, y1: level, line: {color: levelColour(name), width: 1.2, dash: "dash"}})),
      ...(figure.commits ?? []).map((x) => ({name: "commits", type: "line", ...band, x0: x, x1: x, line: {color: "var(--surgeon)", width: 1, dash: "dot"}})),
    ];
    const wide = phases.filter((phase) => (phase.end - phase.start) / end > 0.15);  // a name fits
    const annotations = [
      ...wide.map((phase) => ({name: "phases", text: safe(phase.name), xref: "x", yref: "paper", x: (phase.start + phase.end) / 2, y: 1, yanchor: "bottom", showarrow: false, font: {size: 11, color: "var(--muted)"}})),
      ...levelLabels(figure.levels, range),
    ];
    return {
      height: HEIGHT, margin: MARGIN, showlegend: false, shapes, annotations,
      // A line is read anywhere above or below it, one of many points only at the point.
      ...(alone ? figure.noisy ? {} : {hovermode: "x", hoverdistance: -1} : {hovermode: "x unified", hoverdistance: -1}),
      xaxis: {title: {text: "compute, in forward tokens"}, hoverformat: ".3~s", range: [0, end], exponentformat: "SI"},
      yaxis: {title: {text: safe(figure.unit)}, range, tickformat: figure.share ? ".0%" : ""},
    };
  }


  // The names of the levels, moved apart where they would touch.
  function levelLabels(levels, [low, high]) {
    const scale = (HEIGHT - MARGIN.t - MARGIN.b) / (high - low);
    const sorted = Object.entries(levels).sort((a, b) => a[1] - b[1]);
    const places = spread(sorted.map(([, level]) => level * scale), LABEL_GAP);
    return sorted.map(([name, level], index) => ({
      name: "levels", text: safe(name), xref: "paper", yref: "y", x: 1, y: level, xanchor: "left", xshift: 4,
      yshift: places[index] - level * scale, showarrow: false, font: {size: 11, color: levelColour(name)},
    }));
  }

  // Moves sorted points apart until neighbours have the gap: groups that touch are centred on their mean.
  function spread(points, gap) {
    const groups = [];
    const mean = (group) => group.reduce((a, b) => a + b) / group.length;
    const touch = (a, b) => mean(b) - mean(a) < gap * (a.length + b.length) / 2;
    for (const point of points) {
      groups.push([point]);
      while (groups.length > 1 && touch(groups.at(-2), groups.at(-1))) groups.push([...groups.splice(-2).flat()]);
    }
    return groups.flatMap((group) => group.map((_, index) => mean(group) + gap * (index - (group.length - 1) / 2)));
  }

  // Reads a line between its points; flat beyond them.
  function heightAt(place, {x, y}) {
    const found = x.findIndex((value) => value >= place);
    const after = found < 0 ? x.length - 1 : found;
    const before = Math.max(after - 1, 0);
    const width = x[after] - x[before];
    const share = width ? Math.min(Math.max((place - x[before]) / width, 0), 1) : 1;
    return y[before] + share * (y[after] - y[before]);
  }

  // Replaces CSS variables by their values in the current theme.
  function paint(value, style) {
    if (typeof value === "string" && value.startsWith("var(")) return style.getPropertyValue(value.slice(4, -1)).trim();
    if (Array.isArray(value)) return value.map((item) => paint(item, style));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, style)]));
    }
    return value;
  }

  function axis(own) {
    return {
      gridcolor: "var(--rule)", zerolinecolor: "var(--rule)", linecolor: "var(--rule)",
      tickfont: {color: "var(--muted)", size: 11}, automargin: false, fixedrange: false, ...own,
      title: {standoff: 8, ...own?.title, font: {color: "var(--muted)", size: 12}},
    };
  }

  const hidden = new Set();  // layers that the reader has switched off
  const shown = (items, field) => (items ?? []).filter((item) => !hidden.has(item[field]));
  // Dragging a finger over a figure has to scroll the page.
  const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const built = Object.entries(figures).map(([key, figure]) => [document.getElementById("plot-" + key), plots[figure.type](figure)]);

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [node, {data, layout}] of built) {
      if (node.closest("details:not([open])")) continue;  // drawn when it is unfolded
      const full = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: {family: "var(--sans)", color: "var(--ink)", size: 12},
        hoverlabel: {bgcolor: "var(--raised)", bordercolor: "var(--rule)", font: {family: "var(--sans)", color: "var(--ink)"}},
        dragmode, uirevision: "zoom", ...layout,
        shapes: shown(layout.shapes, "name"), annotations: shown(layout.annotations, "name"),
        xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
      };
      Plotly.react(node, paint(shown(data, "meta"), style), paint(full, style), {responsive: true, displayModeBar: false, doubleClick: "reset"});
    }
  }

  for (const box of document.querySelectorAll("input[data-layer]")) {
    const apply = () => hidden[box.checked ? "delete" : "add"](box.dataset.layer);
    apply();  // a browser may restore boxes when it reloads a page
    box.addEventListener("change", () => { apply(); draw(); });
  }
  draw();
  for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
