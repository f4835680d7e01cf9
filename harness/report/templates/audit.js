(() => {
  // Filter: every word must stand somewhere in the row; a hazard of the list above is put in by a click.
  const search = document.querySelector("#q"), shown = document.querySelector("#shown");
  const rows = [...document.querySelectorAll("#files tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  const filter = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const [row, text] of rows) left += !(row.hidden = !words.every((word) => text.includes(word)));
    shown.textContent = `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} files`;
  };
  search.addEventListener("input", filter);
  for (const button of document.querySelectorAll("button[data-code]"))
    button.addEventListener("click", () => { search.value = button.dataset.code; filter(); search.scrollIntoView(); });
  filter();
})();
