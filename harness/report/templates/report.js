"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Theme: the system's choice until the button is pressed.
  const store = { get() { try { return localStorage.getItem("lora-harness-theme"); } catch { return null; } },
                  set(value) { try { localStorage.setItem("lora-harness-theme", value); } catch { /* no storage from file:// */ } } };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const saved = store.get();
  if (saved === "dark" || saved === "light") root.dataset.theme = saved;
  const switchTheme = () => { root.dataset.theme = dark() ? "light" : "dark"; store.set(root.dataset.theme); };
  one("#theme").addEventListener("click", switchTheme);

  for (const button of all(".copy")) button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try { await navigator.clipboard.writeText(source.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(source); button.textContent = "selected"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });

  // Filters: what can be hidden, with its text read once and only when somebody searches.
  const filter = one("#filter"), search = one("#q"), loader = one("#l"), format = one("#f"), shown = one("#shown");
  const boxes = all("input[name=s]", filter);
  const groups = all(".cell, .cause, .law, .known tbody tr").map((element) => ({
    element, loaders: element.dataset.l.split("\n"), formats: element.dataset.f.split("\n"), outcome: element.dataset.o,
    rows: all(".checks li", element),
  }));
  const cells = all(".matrix .c").map((element) => ({ element, loader: element.closest("tr").dataset.l }));
  const files = all("#files tbody tr[data-o]");
  const texts = new WeakMap();
  const textOf = (element) => {
    let text = texts.get(element);
    if (text === undefined) texts.set(element, text = element.textContent.toLowerCase());
    return text;
  };
  const options = (select, values) => {
    for (const value of [...new Set(values)].filter(Boolean).sort()) select.append(new Option(value, value));
  };
  options(loader, groups.flatMap((group) => group.loaders));
  options(format, groups.flatMap((group) => group.formats));

  const wanted = () => ({ q: search.value.trim().toLowerCase(), s: boxes.filter((box) => box.checked).map((box) => box.value),
                          l: loader.value, f: format.value });
  const has = (text, words) => words.every((word) => text.includes(word));
  const outcomeFits = (want, outcome) => !want.s.length || want.s.includes(outcome);
  // The checks that a row stands for: itself, or each of the names of those that passed.
  const counted = (row, words) => {
    const names = one(".names", row);
    return names ? textOf(names).split(", ").filter((name) => has(name, words)).length : Number(has(textOf(row), words));
  };
  const sizes = new Map(groups.map((group) => [group, group.rows.reduce((sum, row) => sum + counted(row, []), 0)]));
  const apply = () => {
    const want = wanted(), words = want.q.split(/\s+/).filter(Boolean);
    const active = Boolean(words.length || want.s.length || want.l || want.f);
    let count = 0, total = 0;
    for (const group of groups) {
      const place = (!want.l || group.loaders.includes(want.l)) && (!want.f || group.formats.includes(want.f));
      let fits = place;
      if (group.rows.length) {
        const summary = words.length ? textOf(one("summary", group.element)) : "";
        const rest = words.filter((word) => !summary.includes(word));
        let visible = 0;
        for (const row of group.rows) {
          const here = place && outcomeFits(want, row.dataset.o) ? counted(row, rest) : 0;
          if (row.hidden !== !here) row.hidden = !here;
          visible += here;
        }
        total += sizes.get(group); count += visible;
        fits = visible > 0;
      } else if (place) {
        fits = (!group.outcome || outcomeFits(want, group.outcome)) && has(words.length ? textOf(group.element) : "", words);
      }
      group.element.hidden = !fits;
    }
    for (const row of files) row.hidden = !(outcomeFits(want, row.dataset.o) && has(textOf(row), words));
    for (const { element, loader: name } of cells) {
      const fits = (!want.l || name === want.l) && (!want.f || element.dataset.f === want.f) && outcomeFits(want, element.dataset.o);
      element.classList.toggle("dim", !fits);
    }
    shown.textContent = active ? `${count} of ${total} checks` : "";
    const folded = one("#checks > .fold");
    if (folded && active) folded.open = true;
  };

  // The hash holds the filters and the place: #s=failed&l=peft&q=qkv&at=v-1234, or plainly #v-1234.
  const read = () => {
    const hash = decodeURIComponent(location.hash.slice(1));
    if (hash && !hash.includes("=")) return { at: hash };
    const values = new URLSearchParams(location.hash.slice(1));
    return { at: values.get("at"), q: values.get("q") || "", s: values.getAll("s"), l: values.get("l") || "", f: values.get("f") || "" };
  };
  const write = (at) => {
    const values = new URLSearchParams(), want = wanted();
    if (search.value.trim()) values.set("q", search.value.trim());
    for (const value of want.s) values.append("s", value);
    if (want.l) values.set("l", want.l);
    if (want.f) values.set("f", want.f);
    const alone = ![...values.keys()].length;
    if (at && !alone) values.set("at", at);
    const hash = at && alone ? at : values.toString();
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  };
  const set = (state) => {
    search.value = state.q; loader.value = state.l; format.value = state.f;
    for (const box of boxes) box.checked = state.s.includes(box.value);
  };
  const none = { q: "", s: [], l: "", f: "" };
  // Open every fold that a target lies in, and its own when it is a section or a fold itself.
  const unfold = (target) => {
    const own = target.matches("details") ? target : one(":scope > .fold", target);
    if (own) own.open = true;
    for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  };
  const go = (id) => {
    const target = id && document.getElementById(id);
    if (!target) return;
    if (target.closest("[hidden]")) { set(none); apply(); }
    unfold(target);
    for (const other of all(".lit")) if (!other.classList.contains("tile")) other.classList.remove("lit");
    target.classList.add("lit");
    target.scrollIntoView({ block: target.offsetHeight < innerHeight * 0.6 ? "center" : "start", behavior: "instant" });
    if (!target.matches("a,button,input")) { target.tabIndex = -1; target.focus({ preventScroll: true }); }
  };
  // After a filter: the list that shows what was asked for.
  const lists = Object.fromEntries(all(".counts a").map((link) => [link.dataset.s, link.hash.slice(1)]));
  const showList = () => {
    const { s } = wanted();
    const target = document.getElementById(s.length === 1 && lists[s[0]] || "checks") || filter;
    unfold(target);
    target.scrollIntoView({ behavior: "instant" });
  };
  for (const link of all(".counts a")) link.addEventListener("click", (event) => {
    event.preventDefault();
    set({ ...none, s: [link.dataset.s] }); apply(); write(); showList();
  });
  const follow = () => {
    const state = read();
    if (state.q !== undefined) { set(state); apply(); }
    go(state.at);
    if (state.at && wanted().s.length + wanted().l.length + wanted().f.length + wanted().q.length) write(state.at);
    if (state.q !== undefined && !state.at && location.hash.length > 1) showList();
  };
  let timer = 0;
  const changed = () => { clearTimeout(timer); timer = setTimeout(() => { apply(); write(); }, 80); };
  filter.addEventListener("input", changed);
  filter.addEventListener("submit", (event) => event.preventDefault());
  const clear = () => { set(none); apply(); write(); };
  one("#clear").addEventListener("click", clear);
  addEventListener("hashchange", follow);

  // What a cell of the matrix says: beside it when it is pointed at or focused, at the first tap instead of the jump.
  const matrix = one(".matrix"), tip = one("#tip");
  let pointed = null;
  const hide = () => { tip.hidden = true; pointed = null; };
  const tell = (cell) => {
    pointed = cell;
    tip.textContent = one("i", cell).textContent;
    tip.hidden = false;
    const box = cell.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 16))}px`;
    tip.style.top = `${box.bottom + own.height + 8 < innerHeight ? box.bottom + 4 : box.top - own.height - 4}px`;
  };
  if (matrix) {
    const of = (event) => one("#words").checked ? null : event.target.closest(".c");
    let told = null, finger = false;
    for (const name of ["mouseover", "focusin"]) matrix.addEventListener(name, (event) => { if (of(event)) tell(of(event)); });
    for (const name of ["mouseout", "focusout"]) matrix.addEventListener(name, hide);
    addEventListener("scroll", () => { if (pointed) tell(pointed); }, { passive: true });
    matrix.addEventListener("pointerdown", (event) => { finger = event.pointerType === "touch"; });
    matrix.addEventListener("click", (event) => {
      const cell = of(event), again = cell === told;
      told = cell;
      if (!cell || !finger || again) return;
      event.preventDefault();
      tell(cell);
    });
  }

  // Before and after: the range cuts the upper picture; a picture of the strip can be chosen.
  for (const figure of all(".compare")) {
    const pair = one(".pair", figure), left = one(".left", figure), right = one(".right", figure);
    one("input", figure).addEventListener("input", (event) => pair.style.setProperty("--cut", event.target.value + "%"));
    for (const tile of all(`.tile[data-strip="${CSS.escape(figure.dataset.for)}"][data-strength]`)) tile.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      right.src = one("img", tile).src; right.alt = one("img", tile).alt;
      left.src = document.getElementById(tile.dataset.left).src;
      one("output", figure).textContent = tile.dataset.strength;
      for (const other of all(".tile.lit", tile.closest("table"))) other.classList.remove("lit");
      tile.classList.add("lit");
    });
  }

  // Keys.
  const next = (step) => {
    const causes = all(".cause:not([hidden]) > .target");
    const here = causes.findIndex((target) => target.classList.contains("lit"));
    const target = causes[here < 0 ? (step > 0 ? 0 : causes.length - 1) : here + step];
    if (target) { write(target.id); go(target.id); }
  };
  const keys = { "/": () => search.focus(), j: () => next(1), k: () => next(-1), t: switchTheme };
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.blur(); clear(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });

  // Print the environment; folded repetitions stay folded.
  let folded = [];
  addEventListener("beforeprint", () => { folded = all("details.environment:not([open])"); for (const box of folded) box.open = true; });
  addEventListener("afterprint", () => { for (const box of folded) box.open = false; });

  apply();
  follow();
})();
