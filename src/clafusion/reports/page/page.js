"use strict";
// Sorting, filtering, copying, and pairs in detail. All that it shows is in the page's tables or data.
(() => {
  document.documentElement.classList.add("scripted");
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const FORBIDDEN = 4095, COLOURS = 10, MOST_NUMBERS = 200;

  const make = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const draw = (parent, tag, attributes, words) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (words !== undefined) made.textContent = words;
    parent.append(made);
    return made;
  };

  // --- tables ---

  const valueOf = (cell) => {
    const words = cell.dataset.v ?? cell.textContent.trim();
    return words === "" ? null : cell.classList.contains("number") ? parseFloat(words) : words;
  };
  const compare = (one, other) =>
    typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });

  for (const table of document.querySelectorAll(".sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const isNumber = body.rows[0]?.cells[column].classList.contains("number");
        const down = before === "none" ? isNumber : before === "ascending";
        for (const one of heads) one.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
        rows.sort(([one], [other]) => {
          if (one === null || other === null) return (one === null) - (other === null);
          return down ? compare(other, one) : compare(one, other);
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  const board = document.getElementById("board-table");
  if (board) {
    const input = make("input", { type: "search", id: "filter", placeholder: "names, parts of names" });
    const count = make("span", { role: "status", class: "note" });
    const tools = make("div", { class: "tools" },
      make("label", { for: "filter" }, "Only pairs with"), input, count);
    board.closest(".scroll").before(tools);
    const filter = () => {
      const words = input.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
      let shown = 0;
      for (const row of board.tBodies[0].rows) {
        const names = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
        row.hidden = !words.every((word) => names.includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${board.tBodies[0].rows.length} pairs shown`;
    };
    input.addEventListener("input", filter);
    filter();
  }

  // --- copying ---

  const copied = async (words, near) => {
    try {
      await navigator.clipboard.writeText(words);
    } catch {  // not allowed for files in some browsers
      const area = make("textarea", {}, words);
      near.after(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  const withCopy = (code) => {
    const button = make("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      await copied(code.textContent, button);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    code.after(button);
  };
  document.querySelectorAll("code.line").forEach(withCopy);
  for (const hash of document.querySelectorAll("code.hash")) {
    hash.title = hash.textContent;
    if (hash.textContent) withCopy(hash);
  }

  // --- the picture of an alignment ---

  const costsOf = (pair) => {
    if (!pair.costs) return null;
    const [low, high] = pair.ends, width = data.layers[pair.layers[1]].length;
    const rows = data.layers[pair.layers[0]].map(() => []);
    for (let i = 0; i < pair.costs.length; i += 2) {
      const number = 64 * DIGITS.indexOf(pair.costs[i]) + DIGITS.indexOf(pair.costs[i + 1]);
      const share = number / (FORBIDDEN - 1);
      rows[Math.floor(i / 2 / width)].push(number === FORBIDDEN ? null
        : { share, value: low + share * (high - low) });
    }
    return rows;
  };
  const short = (name, most) => name.length <= most ? name
    : `${name.slice(0, Math.ceil(most / 2) - 1)}…${name.slice(1 - Math.floor(most / 2))}`;
  const sized = (width, height, label) => {
    const made = document.createElementNS(SVG, "svg");
    const attributes = { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label };
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const titled = (words, drawing) => make("div", {}, make("h4", {}, words), drawing);

  const drawCosts = (pair, deep, shallow) => {
    const costs = costsOf(pair);
    if (!costs) return make("p", { class: "note" },
      "The costs of all pairs of layers are left out of this page: they would be too many.");
    const many = deep.length * shallow.length;
    const side = Math.max(5, Math.min(many <= MOST_NUMBERS ? 38 : 22, 620 / shallow.length, 700 / deep.length));
    const tall = many <= MOST_NUMBERS ? Math.min(side, 26) : side;
    const names = side >= 9 && tall >= 9;
    const longest = (list) => names ? Math.max(...list.map((one) => short(one, 22).length)) : 0;
    const left = 6.4 * longest(deep) + 10, top = 6.4 * longest(shallow) + 10;
    const drawing = sized(left + side * shallow.length + 4, top + tall * deep.length + 4,
      `Costs of matching layers of ${pair.sides[0]} and ${pair.sides[1]}`);
    costs.forEach((row, i) => row.forEach((cost, k) => {
      const at = { x: left + k * side, y: top + i * tall, width: side + 0.3, height: tall + 0.3 };
      if (cost === null) { draw(drawing, "rect", { ...at, class: "cell never" }); return; }
      const colour = Math.max(0, Math.min(COLOURS - 1, Math.floor((1 - cost.share) * COLOURS)));
      draw(drawing, "rect", { ...at, class: `cell c${colour}` });
      if (many <= MOST_NUMBERS) draw(drawing, "text",
        { x: at.x + side / 2, y: at.y + tall / 2 + 4, "text-anchor": "middle",
          class: colour > 5 ? "on-dark" : "on-light" }, cost.value.toFixed(2));
    }));
    const matched = pair.steps.filter(([i, k]) => i >= 0 && k >= 0);
    draw(drawing, "polyline", { class: "path", points: matched.map(([i, k]) =>
      `${left + (k + 0.5) * side},${top + (i + 0.5) * tall}`).join(" ") });
    for (const [i, k] of matched) draw(drawing, "rect", { class: "matched", x: left + k * side + 1,
      y: top + i * tall + 1, width: side - 2, height: tall - 2 });
    if (names) {
      deep.forEach((name, i) => draw(drawing, "text", { x: left - 6, "text-anchor": "end",
        y: top + (i + 0.5) * tall + 4 }, short(name, 22)));
      shallow.forEach((name, k) => draw(drawing, "text", {
        transform: `translate(${left + (k + 0.5) * side + 4} ${top - 6}) rotate(-90)` }, short(name, 22)));
    }
    return titled(`Cost of matching a layer of ${pair.sides[0]} (rows) with one of ${pair.sides[1]}: dark is close`, drawing);
  };

  const drawLayers = (pair, deep, shallow) => {
    const step = 27, longest = Math.max(8, ...[...deep, ...shallow, ...pair.sides].map((one) => short(one, 22).length));
    const box = 6.6 * longest + 16, gap = 96, width = 2 * box + gap + 4;
    const drawing = sized(width, step * pair.steps.length + 26,
      `Which layers of ${pair.sides[0]} and ${pair.sides[1]} are matched`);
    pair.sides.forEach((name, side) => draw(drawing, "text",
      { x: 2 + box / 2 + side * (box + gap), y: 14, "text-anchor": "middle", "font-weight": 600 },
      short(name, Math.floor(longest))));
    pair.steps.forEach(([i, k], row) => {
      const y = 24 + row * step, middle = y + 11;
      [[i, deep, 2], [k, shallow, 2 + box + gap]].forEach(([place, names, x]) => {
        draw(drawing, "rect", { x, y, width: box, height: 22, rx: 5, class: place < 0 ? "lacking" : "box" });
        draw(drawing, "text", { x: x + box / 2, y: middle + 4, "text-anchor": "middle" },
          place < 0 ? "none" : short(names[place], 22));
      });
      if (i < 0 || k < 0) return;
      draw(drawing, "line", { class: "link", x1: box + 2, x2: box + gap + 2, y1: middle, y2: middle });
      draw(drawing, "rect", { class: "back", x: box + gap / 2 - 22, y: middle - 8, width: 48, height: 16 });
      draw(drawing, "text", { x: box + gap / 2 + 2, y: middle + 4, "text-anchor": "middle" }, pair.matched[row]);
    });
    return titled("Matched layers and their cost", drawing);
  };

  const illustrate = (place, target) => {
    const pair = data.pairs[place];
    const [deep, shallow] = pair.layers.map((i) => data.layers[i]);
    target.replaceChildren(drawCosts(pair, deep, shallow), drawLayers(pair, deep, shallow));
  };
  for (const target of document.querySelectorAll("[data-draw]")) illustrate(target.dataset.draw, target);

  // --- one pair, on click ---

  const opened = document.getElementById("opened");
  const build = (place) => {
    const pair = data.pairs[place];
    const facts = make("dl");
    for (const [name, words] of pair.facts) facts.append(make("dt", {}, name), make("dd", {}, words));
    const code = make("code", { class: "line" }, pair.line);
    const drawing = make("div", { class: "drawing", tabindex: "0", role: "region",
      "aria-label": "picture of the alignment" });
    const made = make("article", { class: "pair open", tabindex: "-1" },
      make("h3", {}, `${pair.names[0]} and ${pair.names[1]}`), facts,
      make("p", { class: "load" }, code), drawing);
    withCopy(code);
    illustrate(place, drawing);
    return made;
  };
  const follow = () => {
    const place = /^#pair-(\d+)$/.exec(location.hash)?.[1];
    if (place === undefined || !(place in data.pairs)) return;
    let target = document.getElementById(`pair-${place}`);
    if (!target) opened.replaceChildren(target = build(place));
    target.scrollIntoView({ block: "start" });
    target.focus({ preventScroll: true });
  };
  const open = (place) => {
    if (!(place in data.pairs)) return;
    if (location.hash === `#pair-${place}`) follow();
    else location.hash = `pair-${place}`;
  };
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const place = event.target.closest("[data-p]")?.dataset.p;
    if (place === undefined || event.target.closest("a, button") || String(getSelection())) return;
    open(place);
  });
  document.addEventListener("pointerover", (event) => {
    const cell = event.target.closest?.(".heat td");
    if (!cell) return;
    const table = cell.closest("table"), map = cell.closest(".map");
    const row = cell.parentElement.cells[0].textContent;
    const column = table.rows[0].cells[cell.cellIndex].textContent;
    map.querySelector(".readout").textContent = !cell.textContent ? ""
      : `${row === column ? `${row} alone` : `${row} and ${column}`}: ${cell.textContent}`;
  });
  follow();
})();
