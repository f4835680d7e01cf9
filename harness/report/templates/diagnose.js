(() => {
  // The page of one file: it is handed to Python in a worker, whose answer is shown as text.
  const form = document.querySelector("#ask");
  if (!form) return;
  const input = form.querySelector("input[type=file]"), drop = document.querySelector("#drop"), said = document.querySelector("#said");
  const say = (label, text) => {
    const name = document.createElement("dt"), what = document.createElement("dd");
    name.textContent = label;
    what.textContent = text;
    said.append(name, what);
  };
  const only = (label, text) => { said.replaceChildren(); say(label, text); };
  let worker, files = [], number = 0;
  const start = () => {
    worker = new Worker("diagnose/worker.mjs", { type: "module" });
    worker.addEventListener("error", () => only("error", "Python does not start here: a browser needs this page from a server (python -m http.server), not from the disk"));
    worker.addEventListener("message", ({ data }) => {
      if (data.failed) only("error", `Python does not start here: ${data.failed}`);
      if (data.answer && data.id === number) show(data.answer);
    });
  };
  const show = ({ error, lines, unseen }) => {
    said.replaceChildren();
    if (error) { say("error", error); return; }
    for (const line of lines) { const [label, ...rest] = line.split(": "); say(label.trim(), rest.join(": ")); }
    say("not judged", unseen);
  };
  const ask = () => {
    if (!files.length) return;
    if (!worker) start();
    const { tool, saw, alpha } = form.elements, given = alpha.value.trim();
    const size = files.reduce((sum, file) => sum + file.size, 0);
    only("reading", `${files.map((file) => file.name).join(", ")} (${(size / 1e6).toFixed(1)} MB): the first time, Python starts, which takes some seconds`);
    worker.postMessage({ id: ++number, files, tool: tool.value, saw: saw.value, alpha: given === "" ? null : Number(given) });
  };
  const take = (list) => { if (list.length) { files = [...list]; ask(); } };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => { if (event.target === input) take(input.files); else ask(); });
  input.addEventListener("click", () => { input.value = ""; }); // the same file, changed meanwhile, can be chosen again
  for (const name of ["dragover", "dragleave", "drop"]) drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
})();
