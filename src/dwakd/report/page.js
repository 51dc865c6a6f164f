"use strict";
const root = document.documentElement;

// The theme is that of the system until the reader switches it.
{
  const button = document.getElementById("theme"), preferred = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.style.colorScheme || (preferred.matches ? "dark" : "light");
  const other = () => theme() === "dark" ? "light" : "dark";
  const label = () => { button.textContent = `${other()} theme`; };
  button.addEventListener("click", () => { root.style.colorScheme = other(); label(); });
  preferred.addEventListener("change", label);
  label();
}

// A click on a heading sorts the rows; empty cells stay last.
for (const heading of document.querySelectorAll("th")) {
  heading.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0], sign = heading.ariaSort === "ascending" ? -1 : 1;
    const key = row => row.cells[heading.cellIndex].dataset.sort ?? row.cells[heading.cellIndex].textContent.trim();
    const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
    const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") : sign * order(a, b);
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.ariaSort = sign > 0 ? "ascending" : "descending";
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}

// A search shows the parts that contain all of its words.
for (const box of document.querySelectorAll(".searchable")) {
  const input = box.querySelector("input"), plain = text => text.normalize("NFKC").toLowerCase();
  const parts = [...box.querySelectorAll(":scope > .part")], texts = parts.map(part => plain(part.textContent));
  const search = () => {
    const words = plain(input.value).split(/\s+/);
    parts.forEach((part, index) => { part.hidden = !words.every(word => texts[index].includes(word)); });
    box.querySelector("output").textContent = `${parts.filter(part => !part.hidden).length} of ${parts.length}`;
  };
  input.addEventListener("input", search);
  search();
}

// Charts have the colour of the page's text, so that the theme and printing change them without drawing them again.
{
  const text = {labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 11, titleFontSize: 12, labelLimit: 220};
  const lines = {domainColor: "currentColor", tickColor: "currentColor", gridColor: "currentColor", gridOpacity: .15};
  const config = {
    background: null, font: "system-ui, sans-serif", view: {stroke: null}, axis: {...text, ...lines, domainOpacity: .4, tickOpacity: .4},
    legend: {...text, orient: "bottom"}, header: text, text: {color: "currentColor"}, rule: {color: "currentColor"},
    title: {color: "currentColor", fontSize: 13, anchor: "start"},
  };
  const options = {config, actions: false, ast: true, renderer: "svg", tooltip: {theme: "page", disableDefaultStyle: true}};
  const draw = figure => vegaEmbed(figure.lastElementChild, JSON.parse(figure.firstElementChild.textContent), options);
  const figures = [...document.querySelectorAll("figure.chart")];
  Promise.all(figures.map(draw)).then(() => { root.dataset.charts = figures.length; });
  // a chart in a closed part has no width until the part is opened
  const resize = () => window.dispatchEvent(new Event("resize"));
  document.querySelectorAll("details").forEach(part => part.addEventListener("toggle", resize));
}
