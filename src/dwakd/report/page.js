"use strict";
{
  const root = document.documentElement, button = document.getElementById("theme");
  const stored = (...value) => {  // some browsers refuse storage to a file on disk
    try {
      return value.length ? localStorage.setItem("dwakd-theme", value[0]) : localStorage.getItem("dwakd-theme");
    } catch { return null; }
  };
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  let chosen = stored();
  const theme = () => chosen ?? (preferred.matches ? "dark" : "light");
  const show = () => {
    root.style.colorScheme = chosen ?? "";
    root.dataset.theme = theme();
    button.textContent = theme() === "dark" ? "Light theme" : "Dark theme";
  };
  button.addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    stored(chosen);
    show();
  });
  preferred.addEventListener("change", show);
  show();
}

// A click on a heading sorts the rows; empty cells stay last.
for (const heading of document.querySelectorAll("th")) {
  const key = row => row.cells[heading.cellIndex].dataset.sort ?? row.cells[heading.cellIndex].textContent.trim();
  heading.firstElementChild?.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const sign = heading.ariaSort === "ascending" ? -1 : 1;
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.ariaSort = sign > 0 ? "ascending" : "descending";
    const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
    const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") : sign * order(a, b);
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}

// A search shows the parts that contain all of its words.
for (const box of document.querySelectorAll(".searchable")) {
  const input = box.querySelector("input"), output = box.querySelector("output");
  const plain = text => text.normalize("NFKC").toLowerCase();
  const parts = [...box.querySelectorAll(":scope > .part")], texts = parts.map(part => plain(part.textContent));
  const search = () => {
    const words = plain(input.value).split(/\s+/).filter(Boolean);
    parts.forEach((part, index) => { part.hidden = !words.every(word => texts[index].includes(word)); });
    output.textContent = `${parts.filter(part => !part.hidden).length} of ${parts.length}`;
  };
  input.addEventListener("input", search);
  search();
}

// Text and axes of charts have the colour of the page's text, so that the theme and printing change them without drawing.
{
  const line = {domainColor: "currentColor", tickColor: "currentColor", gridColor: "currentColor"};
  const text = {labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 11, titleFontSize: 12};
  const config = {
    background: null, font: "system-ui, sans-serif", view: {stroke: null},
    axis: {...line, ...text, gridOpacity: .15, domainOpacity: .4, tickOpacity: .4, titleFontWeight: 500, labelLimit: 220},
    legend: {...text, orient: "bottom", labelLimit: 220},
    title: {color: "currentColor", fontSize: 13, fontWeight: 600, anchor: "start"},
    header: text, text: {color: "currentColor"}, rule: {color: "currentColor"},
  };
  const options = {config, actions: false, ast: true, renderer: "svg", tooltip: {theme: "page", disableDefaultStyle: true}};
  const draw = figure => vegaEmbed(figure.lastElementChild, JSON.parse(figure.firstElementChild.textContent), options);
  const figures = [...document.querySelectorAll("figure.chart")];
  Promise.all(figures.map(draw)).then(() => { document.documentElement.dataset.charts = figures.length; });
  // a chart in a closed part has no width until the part is opened
  for (const part of document.querySelectorAll("details")) {
    part.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")));
  }
}
