"use strict";
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).json();
  const text = number => data.texts[number];
  const make = (tag, content, name) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (content !== undefined) element.append(...[content].flat().filter(one => one !== ""));
    return element;
  };
  const red = cell => data.marks[cell.v][1] !== "blocked" && data.marks[cell.v][1] !== "kept";
  const title = cell => cell.n ? `${cell.n}, after ${cell.a}` : cell.a;
  const key = cell => [cell.d, cell.n, cell.a].join("/");

  for (const card of document.querySelectorAll("#summary li"))
    card.classList.toggle("promised", card.dataset.design === data.promised);

  // ------------------------------------------------------------------------------------------------------- the grid
  const moves = [...new Set(data.cells.map(cell => cell.a))].sort((a, b) => (b === data.boot) - (a === data.boot));
  const columns = data.designs.flatMap(design => moves
    .filter(move => data.cells.some(cell => cell.d === design && cell.a === move)).map(move => [design, move]));
  const names = ["", ...new Set(data.cells.filter(cell => cell.n).map(cell => cell.n))];
  const byKey = new Map(data.cells.map(cell => [key(cell), cell]));
  const grid = document.getElementById("grid");
  const marks = [];  // [row][column] -> element or undefined
  const gaps = (row, tag) => design => { if (design !== data.designs[0]) row.append(make(tag, "", "gap")); };

  const head = make("thead"), bands = make("tr"), labels = make("tr", undefined, "moves");
  bands.append(make("th", "", "corner"));
  labels.append(make("th", "", "corner"));
  for (const design of data.designs) {
    gaps(bands, "th")(design);
    gaps(labels, "th")(design);
    const own = columns.filter(([one]) => one === design);
    const band = make("th", design);
    band.colSpan = own.length;
    band.scope = "colgroup";
    bands.append(band);
    for (const [, move] of own) {
      const label = make("th", make("span", move));
      label.scope = "col";
      label.title = (data.about[move] || ["the machine's first start"])[0];
      labels.append(label);
    }
  }
  head.append(bands, labels);
  const body = make("tbody");
  names.forEach((name, y) => {
    const row = make("tr", undefined, name ? "" : "itself");
    const label = make("th", name || "the transition itself");
    label.scope = "row";
    label.title = name ? data.about[name][0] : "Whether the guest comes through, and all that worked works on";
    row.append(label);
    marks[y] = [];
    let design = data.designs[0];
    columns.forEach(([of, move], x) => {
      if (of !== design) gaps(row, "td")(design = of);
      const cell = byKey.get([of, name, move].join("/"));
      const place = make("td");
      if (cell) {
        const [symbol, kind] = data.marks[cell.v];
        const mark = make("span", symbol, `mark ${kind}`);
        if (red(cell) && !cell.h) mark.classList.add("bare");
        mark.tabIndex = -1;
        mark.setAttribute("role", "gridcell");
        mark.setAttribute("aria-label", `${cell.d}: ${title(cell)}: ${cell.v}`);
        mark.title = `${cell.d}: ${title(cell)}: ${cell.v}`;
        mark.cell = cell;
        mark.at = [y, x];
        place.append(mark);
        marks[y][x] = mark;
      }
      row.append(place);
    });
    body.append(row);
  });
  grid.append(head, body);

  // -------------------------------------------------------------------------------------------- what is shown of it
  const shown = new Set(Object.keys(data.marks));
  const search = document.getElementById("search");
  const legend = document.getElementById("legend");
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    body.querySelectorAll("tr").forEach((row, y) => {
      row.hidden = Boolean(names[y]) && Boolean(wanted) && !names[y].includes(wanted);
    });
    for (const mark of body.querySelectorAll(".mark")) mark.classList.toggle("off", !shown.has(mark.cell.v));
  };
  for (const [verdict, [symbol, kind]] of Object.entries(data.marks)) {
    const button = make("button", [make("span", symbol, `mark ${kind}`), verdict]);
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      if (!shown.delete(verdict)) shown.add(verdict);
      button.setAttribute("aria-pressed", String(shown.has(verdict)));
      filter();
    };
    legend.append(button);
  }
  if (data.cells.some(cell => red(cell) && !cell.h)) {
    const bare = make("span", [make("span", "✘", "mark succeeded bare"), "nothing explains it"], "bare-legend");
    legend.append(bare);
  }
  search.oninput = filter;

  // ------------------------------------------------------------------------------------------------------ one cell
  const detail = document.getElementById("detail");
  const state = ([what, before, after, denial, error]) => {
    const parts = [];
    if (text(what)) {
      parts.push(make("p", text(what), "what"));
      parts.push(make("div", [
        make("div", [make("small", "before"), make("code", text(before))]), make("span", "→", "arrow"),
        make("div", [make("small", "after"), make("code", text(after))])], "states"));
    }
    if (text(denial)) parts.push(make("p", make("code", text(denial)), "denial"));
    if (text(error)) parts.push(make("p", text(error), "error"));
    return parts;
  };
  const timeline = rows => {
    const table = make("table", undefined, "timeline");
    for (const [at, kind, vtl, vp, said, times] of rows) {
      const row = make("tr");
      if (text(kind) === "mark") {
        const place = make("td", text(said));
        place.colSpan = 3;
        row.className = "mark-row";
        row.append(place);
      } else {
        row.className = `${text(kind)} v${vtl}${/^deny/.test(text(said)) ? " deny" : ""}`;
        const lane = { verdict: "verdict", protection: "pages", state: "machine", device: "device", serial: "guest" };
        const where = lane[text(kind)] || `VTL${vtl}${vp ? ` cpu${vp}` : ""}`;
        const line = [text(said)];
        if (times > 1) line.push(make("em", ` ×${times}`));
        row.append(make("td", `${at} ms`, "time"), make("td", where, "lane"), make("td", line, "text"));
      }
      table.append(row);
    }
    return table;
  };
  const hole = name => {
    const [sentence, source, cause, where] = data.holes[name];
    const link = make("a", where);
    link.href = where;
    return make("div", [
      make("p", [make("b", source ? "" : "Found here. "), sentence]),
      make("small", [source || cause, " · ", link])], source ? "hole" : "hole here");
  };
  const section = (name, ...content) => [make("h3", name), ...content];
  const fill = cell => {
    const [sentence, source] = data.about[cell.n || cell.a] || ["The machine starts for the first time.", ""];
    const [symbol, kind] = data.marks[cell.v];
    const close = make("button", "✕", "close");
    close.setAttribute("aria-label", "Close");
    close.onclick = shut;
    detail.replaceChildren(
      close,
      make("h2", cell.n || cell.a),
      make("p", [cell.d, cell.n ? ` · after ${cell.a}` : " · transition"], "where"),
      make("span", `${symbol} ${cell.v}`, `badge ${kind}`), make("span", `${cell.s.toFixed(2)} s`, "seconds"),
      ...section("What it does", make("div", sentence), make("p", source, "source")),
      ...section("State of the machine", ...state(cell.e)));
    if (cell.k !== undefined) detail.append(make("p", `${cell.k} legitimate operations work afterwards.`));
    if (cell.h) detail.append(...section("Why", hole(cell.h)));
    else if (red(cell) && cell.d !== data.promised) detail.append(...section("Why", make("p", "No known hole explains it.", "error")));
    if (cell.b) detail.append(...section("Works no more", ...cell.b.flatMap(([name, ...one]) => [make("b", text(name)), ...state(one)])));
    if (cell.m) detail.append(...section(`Transition before it: ${cell.a}`, ...state(cell.m)));
    if (cell.r) detail.append(...section("Refused by rule", make("ul", cell.r.map(rule => make("li", make("code", text(rule)))))));
    if (cell.t.length) detail.append(...section("Exits and decisions", timeline(cell.t)));
    if (cell.l.length) {
      const log = make("details", [make("summary", `${cell.l.length} lines of the guest's kernel`), make("pre", cell.l.map(text).join("\n"))]);
      detail.append(...section("Guest log", log));
    }
    detail.scrollTop = 0;
  };

  // ------------------------------------------------------------------------------------------------------- the keys
  let current;
  const go = (mark, open) => {
    if (!mark) return;
    if (current) { current.tabIndex = -1; current.removeAttribute("aria-selected"); }
    current = mark;
    mark.tabIndex = 0;
    if (open || !detail.hidden) {
      mark.setAttribute("aria-selected", "true");
      detail.hidden = false;
      fill(mark.cell);
      history.replaceState(null, "", `#${encodeURIComponent(key(mark.cell))}`);
    }
    mark.focus({ preventScroll: true });
    mark.scrollIntoView({ block: "center", inline: "center" });
  };
  const shut = () => {
    detail.hidden = true;
    history.replaceState(null, "", location.pathname);
    if (current) { current.removeAttribute("aria-selected"); current.focus(); }
  };
  const visible = mark => mark && !mark.closest("tr").hidden;
  const step = (dy, dx) => {
    let [y, x] = current.at;
    do { y += dy; x += dx; } while (marks[y] && x >= 0 && x < columns.length && !visible(marks[y][x]));
    go(marks[y] && marks[y][x]);
  };
  const nextRed = () => {
    const all = [...body.querySelectorAll(".mark")].filter(visible);
    const from = all.indexOf(current) + 1;
    go([...all.slice(from), ...all.slice(0, from)].find(mark => red(mark.cell)), true);
  };
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") { if (event.target === search) { search.value = ""; filter(); search.blur(); } shut(); return; }
    if (event.target === search) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); return; }
    if (event.key === "n") { nextRed(); return; }
    if (event.target.closest && event.target.closest("#legend, #detail")) return;
    if (arrows[event.key] && current) { event.preventDefault(); step(...arrows[event.key]); }
    if ((event.key === "Enter" || event.key === " ") && current) { event.preventDefault(); go(current, true); }
  });
  grid.addEventListener("click", event => { const mark = event.target.closest(".mark"); if (mark) go(mark, true); });
  const first = body.querySelector(".mark");
  if (first) { current = first; first.tabIndex = 0; }
  const asked = byKey.get(decodeURIComponent(location.hash.slice(1)));
  if (asked) go([...body.querySelectorAll(".mark")].find(mark => mark.cell === asked), true);
})();
