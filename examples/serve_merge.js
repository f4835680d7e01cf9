// A server in JavaScript, without packages: kohya files into float32, float16 and bfloat16 weights.
//
//     lora-harness check "serve:node examples/serve_merge.js"

const fs = require("fs");

function serve(answer) {
  console.log(JSON.stringify({ protocol: 1, name: "merge.js", formats: ["kohya"] }));
  require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
    const ask = JSON.parse(line);
    let said;
    try {
      said = answer(ask);
    } catch (error) {
      said = { error: String(error), frames: error.stack.split("\n").slice(1, 4).map((frame) => frame.trim()) };
    }
    console.log(JSON.stringify({ id: ask.id, ...said }));
  });
}

const SIZES = { F32: 4, F16: 2, BF16: 2, I64: 8 }; // alpha may be an integer

function bits(value) {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, value);
  return view.getUint32(0);
}

function float(bits) {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint32(0, bits);
  return view.getFloat32(0);
}

function half(code) {
  const exponent = (code >> 10) & 31, fraction = code & 1023, sign = code >> 15 ? -1 : 1;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

// Round to nearest, ties to even: in units of the last place, whose size the exponent gives.
function toHalf(value) {
  const size = Math.abs(value), sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const exponent = Math.max(-14, Math.floor(Math.log2(size || 1)));
  const units = size / 2 ** (exponent - 10);
  let whole = Math.floor(units);
  whole += units - whole > 0.5 || (units - whole === 0.5 && whole % 2) ? 1 : 0;
  return sign | (whole < 1024 ? whole : ((exponent + 15) << 10) + whole - 1024);
}

function toBfloat(value) {
  const code = bits(value);
  return (code + 0x7fff + ((code >>> 16) & 1)) >>> 16;
}

const READ = {
  F32: (data, at) => data.readFloatLE(at),
  F16: (data, at) => half(data.readUInt16LE(at)),
  BF16: (data, at) => float(data.readUInt16LE(at) * 65536),
  I64: (data, at) => Number(data.readBigInt64LE(at)),
};
const WRITE = {
  F32: (data, at, value) => data.writeFloatLE(value, at),
  F16: (data, at, value) => data.writeUInt16LE(toHalf(value), at),
  BF16: (data, at, value) => data.writeUInt16LE(toBfloat(value), at),
};

function open(path) {
  const file = fs.readFileSync(path), length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, 8 + length));
  delete header.__metadata__;
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [start, end] }]) => {
      if (!SIZES[dtype]) throw new Error(`${name}: dtype ${dtype} is not supported`);
      const data = file.subarray(8 + length + start, 8 + length + end);
      const values = () => Float64Array.from({ length: data.length / SIZES[dtype] }, (_, i) => READ[dtype](data, i * SIZES[dtype]));
      return [name, { dtype, shape, values }];
    })
  );
}

function save(tensors, path) {
  const parts = [], header = {};
  let at = 0;
  for (const [name, { dtype, shape, values }] of Object.entries(tensors)) {
    const data = Buffer.alloc(values.length * SIZES[dtype]);
    values.forEach((value, i) => WRITE[dtype](data, i * SIZES[dtype], value));
    header[name] = { dtype, shape, data_offsets: [at, (at += data.length)] };
    parts.push(data);
  }
  const text = Buffer.from(JSON.stringify(header)), length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(path, Buffer.concat([length, text, ...parts]));
}

serve(({ op, model, lora, strength, out }) => {
  if (op !== "load") return { refused: `${op} is not supported` };
  const base = open(model), file = open(lora), merged = {};
  const names = Object.fromEntries(Object.keys(base).map((key) => ["lora_unet_" + key.replace(".weight", "").replaceAll(".", "_"), key]));
  const known = /^(.+)\.(lora_down\.weight|lora_up\.weight|alpha)$/;
  const strange = Object.keys(file).find((key) => !known.test(key) || !names[key.match(known)[1]]);
  if (strange) return { refused: `the key ${strange} is not supported` };
  for (const name of new Set(Object.keys(file).map((key) => key.match(known)[1]))) {
    const down = file[`${name}.lora_down.weight`], up = file[`${name}.lora_up.weight`], weight = base[names[name]];
    const [rows, columns] = weight.shape, rank = down.shape[0];
    if (`${[rank, columns]} ${[rows, rank]}` !== `${down.shape} ${up.shape}`)
      return { refused: `${name}: [${up.shape}] by [${down.shape}] fits no weight [${weight.shape}]` };
    const a = down.values(), b = up.values(), values = weight.values();
    const scale = (strength * (file[`${name}.alpha`] ? file[`${name}.alpha`].values()[0] : rank)) / rank;
    for (let row = 0; row < rows; row++)
      for (let k = 0; k < rank; k++)
        for (let column = 0; column < columns; column++)
          values[row * columns + column] += scale * b[row * rank + k] * a[k * columns + column];
    merged[names[name]] = { ...weight, values };
  }
  save(merged, out);
  return { done: true };
});
