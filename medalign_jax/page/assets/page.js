"use strict";
// Draws the figures of the page with Plotly, plays sounds, sorts and filters tables.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const plots = [...document.querySelectorAll(".plot")];

  // The names of a map's points are on the page once.
  for (const { traces } of page.figures)
    for (const trace of traces)
      if (trace.customdata) trace.text = trace.customdata.map((point) => page.names[point]);

  // "$name" as a colour is the page's own of that name, in light or in dark.
  const colours = (value, key, style) => {
    if (Array.isArray(value)) return value.map((each) => colours(each, key, style));
    if (value && typeof value === "object")
      return Object.fromEntries(
        Object.entries(value).map(([name, each]) => [name, colours(each, name, style)]),
      );
    const named = /color$/.test(key) && typeof value === "string" && value.startsWith("$");
    return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const family = getComputedStyle(document.body).fontFamily;
    for (const place of plots) {
      const { traces, layout } = colours(page.figures[place.dataset.figure], "", style);
      layout.font.family = family;
      Plotly.react(place, traces, layout, { displayModeBar: false, responsive: true });
    }
  };

  // The chosen point: a ring around it in every map, and its sound.
  const maps = () => plots.filter((place) => place.data?.some((trace) => trace.customdata));
  const choose = (point) => {
    for (const place of maps()) {
      const last = place.data.length - 1;
      const at = { x: [[]], y: [[]] };
      for (const trace of place.data.slice(0, last)) {
        const n = trace.customdata?.indexOf(point) ?? -1;
        if (n >= 0) Object.assign(at, { x: [[trace.x[n]]], y: [[trace.y[n]]] });
      }
      Plotly.restyle(place, at, [last]);
    }
    const player = document.getElementById("player");
    const sound = page.heard[point];
    if (sound === undefined) return;
    document.getElementById("sound").value = sound;
    player.src = page.sounds[sound];
    player.play();
  };

  const listen = () => {
    for (const place of maps())
      place.on("plotly_click", (event) => choose(event.points[0].customdata));
    const select = document.getElementById("sound");
    if (!select) return;
    document.getElementById("player").src = page.sounds[0];
    const points = Object.keys(page.heard).map(Number);
    select.addEventListener("change", () => {
      choose(points.find((point) => page.heard[point] === Number(select.value)));
    });
  };

  // A click on a column's name sorts by it, a second one the other way round.
  const value = (row, column) => row.cells[column].textContent.trim();
  const byValue = (column, sign) => (a, b) => {
    const [one, other] = [value(a, column), value(b, column)];
    const [x, y] = [parseFloat(one), parseFloat(other)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return sign * (x - y);
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // empty ones last
    return sign * one.localeCompare(other);
  };
  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        body.append(...[...body.rows].sort(byValue(column, down ? -1 : 1)));
      });
    });
  };

  // Rows that hold all words of the box above a long table.
  const filterable = (box) => {
    const rows = [...box.querySelector("table").tBodies[0].rows];
    if (rows.length < 9) return;
    const label = document.createElement("label");
    label.className = "filter";
    const input = Object.assign(document.createElement("input"), { type: "search" });
    const count = document.createElement("span");
    count.setAttribute("role", "status");
    label.append("Rows with ", input, " ", count);
    box.prepend(label);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length}`;
    });
  };

  if (plots.length) {
    draw();
    listen();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }
  for (const box of document.querySelectorAll(".table")) {
    sortable(box.querySelector("table"));
    filterable(box);
  }
})();
