"use strict";
(() => {
  // Theme: the system's choice until the button is pressed; shared with the report.
  const root = document.documentElement, name = "lora-harness-theme";
  root.classList.add("js");
  try { const saved = localStorage.getItem(name); if (saved === "dark" || saved === "light") root.dataset.theme = saved; } catch { /* no storage from file:// */ }
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.querySelector("#theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem(name, root.dataset.theme); } catch { /* no storage from file:// */ }
  });
})();
