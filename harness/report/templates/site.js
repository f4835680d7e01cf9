(() => {
  // Search: every word must stand in a page's title or words; titles count more. The question stands in the URL: ?q=noise.
  const data = document.querySelector("#index"), search = document.querySelector("#q"), found = document.querySelector("#found");
  if (!data) return;
  const pages = JSON.parse(data.textContent).map((page) => ({ ...page, title: page.t.toLowerCase(), all: `${page.t} ${page.k} ${page.w}`.toLowerCase() }));
  const ask = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const score = (page) => words.reduce((sum, word) => sum + (page.title.includes(word) ? 2 : 1), 0);
    const hits = words.length ? pages.filter((page) => words.every((word) => page.all.includes(word))) : [];
    hits.sort((a, b) => score(b) - score(a));
    found.replaceChildren(...hits.slice(0, 30).map((page) => {
      const item = document.createElement("li"), link = document.createElement("a"), kind = document.createElement("span");
      Object.assign(link, { href: page.u, textContent: page.t });
      Object.assign(kind, { className: "faint", textContent: ` ${page.k}` });
      item.append(link, kind);
      return item;
    }));
    if (words.length && !hits.length) found.append(Object.assign(document.createElement("li"), { textContent: "nothing found" }));
    found.hidden = !words.length;
  };
  const asked = new URLSearchParams(location.search).get("q");
  if (asked) { search.value = asked; ask(); }
  search.addEventListener("input", () => {
    ask();
    try { history.replaceState(null, "", search.value.trim() ? `?q=${encodeURIComponent(search.value.trim())}` : location.pathname); } catch { /* file:// in a sandbox */ }
  });
})();
