// The file beside a training step: the first value of each input, and which output is which input of the next step.

const types = {
  F32: ["float32", Float32Array],
  F64: ["float64", Float64Array],
  I64: ["int64", BigInt64Array],
  I32: ["int32", Int32Array],
  BOOL: ["bool", Uint8Array],
};

/** Return the tensors of a safetensors file by name, and `feeds` of its metadata. */
export function readValues(content, Tensor) {
  const bytes = content.buffer.slice(content.byteOffset, content.byteOffset + content.byteLength);
  const end = 8 + Number(new DataView(bytes).getBigUint64(0, true));
  const { __metadata__: metadata, ...header } = JSON.parse(new TextDecoder().decode(bytes.slice(8, end)));
  const values = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    const [type, Numbers] = types[dtype];
    const data = new Numbers(bytes.slice(end + offsets[0], end + offsets[1]));
    values[name] = new Tensor(type, data, shape);
  }
  return { values, feeds: JSON.parse(metadata.train_step).feeds };
}
