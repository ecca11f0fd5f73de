// Copy the files of onnxruntime-web that index.html loads from the npm package to runtime/ beside the page.
import { copyFile, mkdir } from "node:fs/promises";

const from = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const to = new URL("runtime/", import.meta.url);
await mkdir(to, { recursive: true });
for (const name of ["ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  await copyFile(new URL(name, from), new URL(name, to));
}
