// Train with a file of `gradctl export --graph train-step`: onnxruntime-web (WebAssembly) under Node.
//
// `node run.mjs step.onnx [STEPS]` makes steps on the example batch, and prints the loss of each.
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";
import { readValues } from "./safetensors.mjs";

const [path, steps = "20"] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
const { values, feeds } = readValues(await readFile(path.replace(/\.onnx$/, ".safetensors")), ort.Tensor);
const session = await ort.InferenceSession.create(await readFile(path));
for (let number = 1; number <= Number(steps); number++) {
  const found = await session.run(values);
  for (const [output, name] of Object.entries(feeds)) values[name] = found[output];
  console.log(`step ${String(number).padStart(3)}  loss ${found.loss.data[0].toFixed(6)}`);
}
