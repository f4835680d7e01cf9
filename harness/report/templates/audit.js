(() => {
  // Rows as `audit_page.py` writes them: a string is said once, later its number stands for it.
  const one = (selector) => document.querySelector(selector);
  const strings = [], MOST = 60000;
  const read = (value) => {
    if (typeof value === "number") return strings[value];
    if (strings.length < MOST) strings.push(value);
    return value;
  };
  const rowOf = ([name, folder, verdict, hazards, format, modules, ranks, alphas, trained, base, trainer, size, findings, more]) => {
    const row = { name, folder: read(folder) };
    const [grave, look, code, ...word] = read(verdict).split("|");
    Object.assign(row, { grave: Number(grave), look, code, word: word.join("|") });
    row.hazards = (hazards || []).map(([code, what]) => [read(code), read(what)]);
    Object.assign(row, { format: read(format), modules, ranks: read(ranks), alphas: read(alphas), trained: read(trained) });
    return Object.assign(row, { base: read(base), trainer: read(trainer), size, findings: (findings || []).map(read), more: more || [] });
  };
  const rows = JSON.parse(one("#rows").textContent).map(rowOf);
  const path = (row) => row.folder === "." ? row.name : `${row.folder}/${row.name}`;
  const textOf = (row) => row.text ??= [path(row), row.word, ...row.hazards.flat(), row.format, row.base, row.trainer, ...row.findings, ...row.more].join(" ").toLowerCase();
  const FACETS = ["code", "folder", "base", "trainer", "finding"];
  const values = { code: (row) => row.hazards.map(([code]) => code), finding: (row) => row.findings,
                   folder: (row) => [row.folder], base: (row) => [row.base], trainer: (row) => [row.trainer] };
  const search = one("#q"), by = one("#by"), shown = one("#shown"), chips = one("#facets"), more = one("#more");
  const body = one(".files tbody");
  let facets = {}, waiting = [], left = 0;

  const make = (tag, text = "", look = "") => Object.assign(document.createElement(tag), { textContent: text, className: look });
  const put = (parent, ...children) => { parent.append(...children); return parent; };
  const signs = { errored: "!", failed: "✕", refused: "⊘", xpassed: "↑", xfailed: "≈", skipped: "–", passed: "✓" };
  const mark = (look, word) => put(make("span", "", `mark ${look}`), Object.assign(make("span", signs[look] || "", "sign"), { ariaHidden: "true" }), ` ${word}`);
  const codeLink = (code) => {
    const known = one(`tr[data-code="${CSS.escape(code)}"] a.code`);
    return known ? known.cloneNode(true) : make("code", code);
  };

  const drawRow = (row, said) => {
    const line = make("tr"), head = make("th", path(row)), verdict = make("td");
    head.scope = "row";
    put(head, make("span", row.size ? `${row.size.toLocaleString("en")} MiB` : "", "faint fix"));
    put(verdict, mark(row.look, row.word));
    for (const [code, what] of row.hazards) put(verdict, put(make("span", "", "fix"), codeLink(code), said === what ? "" : ` ${what}`));
    for (const text of row.more) put(verdict, make("span", text, "fix"));
    put(line, head, verdict);
    if (!row.format) return put(line, Object.assign(make("td", "not read", "faint"), { colSpan: 6 }));
    const cells = [row.format, row.modules, row.ranks, row.alphas, row.trained, row.trainer];
    return put(line, ...cells.map((text, index) => make("td", String(text), index === 1 ? "num" : "")));
  };
  // The head of a group says once what its files share.
  const drawGroup = ({ key, rows: own, said }) => {
    const line = make("tr", "", "group"), head = Object.assign(make("th"), { scope: "rowgroup", colSpan: 8 });
    const about = by.value === "code" && key ? one(`tr[data-code="${CSS.escape(key)}"]`) : null;
    put(head, about ? codeLink(key) : make("b", by.value === "code" ? "no hazard" : key), " ");
    if (about) put(head, make("b", about.querySelector(".title").textContent), said ? `: ${said}` : "");
    put(head, make("span", ` ${own.length.toLocaleString("en")} file${own.length === 1 ? "" : "s"}`, "faint"));
    if (about) put(head, make("span", about.querySelector(".todo").textContent, "fix"));
    return put(line, head);
  };

  const grouped = (some) => {
    if (!by.value) return [{ key: null, rows: some }];
    const found = new Map();
    for (const row of some) {
      const key = row[by.value];
      if (!found.has(key)) found.set(key, { key, rows: [], worst: row.grave });
      found.get(key).rows.push(row);
    }
    for (const group of found.values()) {
      const said = by.value === "code" && group.key ? new Set(group.rows.map((row) => row.hazards.find(([code]) => code === group.key)[1])) : [];
      group.said = said.size === 1 ? [...said][0] : null;
    }
    return [...found.values()].sort((a, b) => a.worst - b.worst || b.rows.length - a.rows.length);
  };

  const draw = () => {
    for (let room = 60; room > 0 && waiting.length; room--) body.append(waiting.pop()());
    more.hidden = !waiting.length;
  };
  const filter = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const kept = rows.filter((row) => FACETS.every((facet) => !facets[facet] || values[facet](row).includes(facets[facet]))
      && words.every((word) => textOf(row).includes(word))).sort((a, b) => a.grave - b.grave);
    waiting = [];
    for (const group of grouped(kept)) {
      if (group.key !== null) waiting.push(() => drawGroup(group));
      for (const row of group.rows) waiting.push(() => drawRow(row, group.said));
    }
    waiting.reverse();
    body.replaceChildren();
    left = kept.length;
    shown.textContent = `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} files`;
    chips.replaceChildren(...FACETS.filter((facet) => facets[facet]).map((facet) => {
      const button = make("button", `${facet}: ${facets[facet]} ✕`);
      button.type = "button";
      button.addEventListener("click", () => { delete facets[facet]; changed(); });
      return button;
    }));
    draw();
  };

  // The hash holds the filter: #q=words&code=LH701&folder=a/b&by=folder.
  const write = () => {
    const said = new URLSearchParams();
    if (search.value.trim()) said.set("q", search.value.trim());
    for (const facet of FACETS) if (facets[facet]) said.set(facet, facets[facet]);
    if (by.value !== "code") said.set("by", by.value);
    history.replaceState(null, "", [...said.keys()].length ? `#${said}` : location.pathname + location.search);
  };
  const follow = () => {
    if (location.hash && !location.hash.includes("=")) return filter();
    const said = new URLSearchParams(location.hash.slice(1));
    search.value = said.get("q") || "";
    facets = Object.fromEntries(FACETS.filter((facet) => said.get(facet)).map((facet) => [facet, said.get(facet)]));
    by.value = [...by.options].some((option) => option.value === said.get("by")) ? said.get("by") : "code";
    filter();
    if (location.hash.length > 1) one("#files").scrollIntoView({ behavior: "instant" });
  };
  const changed = () => { filter(); write(); };
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(changed, 80); });
  by.addEventListener("change", changed);
  one(".find").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-facet]");
    if (!link) return;
    event.preventDefault();
    facets = { [link.dataset.facet]: link.dataset.value };
    search.value = "";
    changed();
    one("#files").scrollIntoView({ behavior: "instant" });
  });
  addEventListener("hashchange", follow);
  more.firstElementChild.addEventListener("click", draw);
  new IntersectionObserver((seen) => { if (seen.some((entry) => entry.isIntersecting)) draw(); }, { rootMargin: "1200px" }).observe(more);
  follow();
})();
