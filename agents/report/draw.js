"use strict";
{
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Figures name their colours by CSS variable; here they get the values of the present theme.
  function paint(value, style) {
    if (typeof value === "string" && value.startsWith("var(")) {
      return style.getPropertyValue(value.slice(4, -1)).trim();
    }
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
      title: {standoff: 8, ...own.title, font: {color: "var(--muted)", size: 12}},
    };
  }

  // Layers that the reader has switched off. A trace tells its own by `meta`, for its name is what
  // a legend says; a shape and a label by `name`.
  const hidden = new Set();
  const kept = (items, field) => (items ?? []).filter((item) => !hidden.has(item[field]));
  // Dragging a finger over a figure has to scroll the page.
  const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [key, figure] of Object.entries(figures)) {
      const node = document.getElementById("plot-" + key);
      if (node.closest("details:not([open])")) continue;  // drawn when it is unfolded
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: {family: "var(--sans)", color: "var(--ink)", size: 12},
        hoverlabel: {bgcolor: "var(--raised)", bordercolor: "var(--rule)", font: {family: "var(--sans)", color: "var(--ink)"}},
        dragmode, uirevision: "zoom", ...figure.layout,
        shapes: kept(figure.layout.shapes, "name"), annotations: kept(figure.layout.annotations, "name"),
        xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
      };
      Plotly.react(node, paint(kept(figure.data, "meta"), style), paint(layout, style), {responsive: true, displayModeBar: false, doubleClick: "reset"});
    }
  }

  for (const box of document.querySelectorAll("input[data-layer]")) {
    const apply = () => hidden[box.checked ? "delete" : "add"](box.dataset.layer);
    apply();  // a browser may restore boxes when it loads a page anew
    box.addEventListener("change", () => { apply(); draw(); });
  }
  draw();
  for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", draw);
  dark.addEventListener("change", draw);
}
