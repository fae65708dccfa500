"use strict";
const NAME_PX = 12;
const PAPER_PX = { layers: 640, step: 296 };

function fitted(figure, width) {
  const axis = figure.layout.xaxis;
  if (!axis.ticktext || axis.ticktext.length * NAME_PX + 70 < width) return figure.layout;
  const numbered = { ...axis, tickmode: "auto", nticks: 10, title: { text: "layer number, as in the table", standoff: 8 } };
  delete numbered.ticktext;
  delete numbered.tickvals;
  delete numbered.tickangle;
  const spare = figure.layout.margin.b - 50;
  const layout = { ...figure.layout, xaxis: numbered, margin: { ...figure.layout.margin, b: 50 } };
  layout.height -= spare;
  return layout;
}

function draw(element, width = element.clientWidth) {
  const figure = JSON.parse(document.getElementById(element.dataset.figure).textContent);
  Plotly.react(element, figure.data, { ...fitted(figure, width), width }, { displayModeBar: false });
}

function drawPlots() {
  const plots = [...document.querySelectorAll(".plot")];
  const watch = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      if (Math.round(contentRect.width) === Number(target.dataset.width)) continue;
      target.dataset.width = Math.round(contentRect.width);
      draw(target);
    }
  });
  for (const element of plots) {
    element.dataset.width = Math.round(element.clientWidth);
    draw(element);
    watch.observe(element);
  }
  // A page is laid out for paper only after this event, too late for the observer.
  addEventListener("beforeprint", () => {
    for (const element of plots) draw(element, element.id === "plot-layers" ? PAPER_PX.layers : PAPER_PX.step);
  });
  addEventListener("afterprint", () => plots.forEach((element) => draw(element)));
}

function compare(one, other) {
  if (one === "" || other === "") return (one === "") - (other === "");
  const difference = Number(one) - Number(other);
  return Number.isNaN(difference) ? one.localeCompare(other, "en", { numeric: true }) : difference;
}

function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const key = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows];
  const empty = rows.filter((row) => key(row) === "");
  const filled = rows.filter((row) => key(row) !== "").sort((a, b) => compare(key(a), key(b)) * (descending ? -1 : 1));
  body.append(...filled, ...empty);
}

function sortTables() {
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.firstElementChild.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = head.classList.contains("number") && column > 0 ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = before === first ? other : first;
        heads.forEach((cell) => cell.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        sortBy(table, column, order === "descending");
      });
    });
  }
}

function copyText(source) {
  if (navigator.clipboard) return navigator.clipboard.writeText(source.textContent);
  getSelection().selectAllChildren(source);
  return document.execCommand("copy") ? Promise.resolve() : Promise.reject(new Error("copy"));
}

function copyButtons() {
  for (const button of document.querySelectorAll("[data-copy]")) {
    const say = (text) => {
      button.textContent = text;
      setTimeout(() => (button.textContent = "Copy"), 1600);
    };
    button.addEventListener("click", () =>
      copyText(document.getElementById(button.dataset.copy)).then(() => say("Copied"), () => say("Press Ctrl+C")),
    );
  }
}

sortTables();
copyButtons();
drawPlots();
