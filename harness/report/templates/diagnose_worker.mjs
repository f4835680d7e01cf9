// Python in WebAssembly, with the package that `lora-harness diagnose` is. It asks for nothing but what lies beside it.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const beside = (name) => new URL(name, import.meta.url).href;
const bytes = async (name) => {
  const answer = await fetch(beside(name));
  if (!answer.ok) throw new Error(`${name} is not beside the page (${answer.status})`);
  return new Uint8Array(await answer.arrayBuffer());
};
const begin = async () => {
  const python = await loadPyodide({ indexURL: beside("pyodide/") });
  for (const name of await (await fetch(beside("wheels.json"))).json()) python.unpackArchive(await bytes(`wheels/${name}`), "wheel");
  python.unpackArchive(await bytes("harness.zip"), "zip", { extractDir: "/site" });
  python.runPython("import sys; sys.path.insert(0, '/site'); import harness.doctor.in_browser as asked");
  python.FS.mkdir("/files");
  return python;
};
const begun = begin();
begun.then(() => postMessage({ ready: true }), (error) => postMessage({ failed: String(error.message ?? error).slice(-400) }));

// The files are mounted and not copied: what is not read, the weights, never leaves the disk.
const answer = (python, { files, tool, saw, alpha }) => {
  python.FS.mount(python.FS.filesystems.WORKERFS, { files }, "/files");
  const asked = python.globals.get("asked"), names = python.toPy(files.map((file) => file.name));
  try { return JSON.parse(asked.answer("/files", names, tool, saw || undefined, alpha ?? undefined)); }
  finally { names.destroy(); asked.destroy(); python.FS.unmount("/files"); }
};
onmessage = async ({ data }) => {
  try { postMessage({ id: data.id, answer: answer(await begun, data) }); }
  catch (error) { postMessage({ id: data.id, answer: { error: `this page failed: ${String(error.message ?? error).trim().split("\n").at(-1)}` } }); }
};
