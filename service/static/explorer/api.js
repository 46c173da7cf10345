// The service's public endpoints: what is asked, what is answered, and errors as sentences.

const NPY = "application/x-npy";
const PIECE = 4000; // rows a request, unless the service takes fewer
const TOO_MUCH = ["too_many_rows", "body_too_large"];
const LATE = 250; // ms: an answer that is awaited longer than this is given up for what is wanted now

/** What went wrong, in a sentence, with the request's id where there is one. */
export class Problem extends Error {
  constructor(sentence, code = "", id = "") {
    super(sentence);
    Object.assign(this, { code, id });
  }
}

/** The response of `path`. Raises Problem, and AbortError where `signal` says so. */
export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. It may be stopped or restarting; try again in a moment.", "unreachable");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: `The server answered ${response.status}`, request_id: response.headers.get("x-request-id") }));
  const sentence = [problem.detail, problem.hint].filter(Boolean).join(": ");
  throw new Problem(`${sentence[0].toUpperCase()}${sentence.slice(1)}.`, problem.code, problem.request_id);
}

/** POST JSON to an endpoint of `model`; gives JSON. */
export async function post(endpoint, model, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(`${endpoint}?model=${of(model)}`, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}

/** POST rows of numbers to `endpoint` as npy; gives rows of numbers (Float32Array). `query` are options. */
export async function postRows(endpoint, model, rows, signal, query = "") {
  const headers = { "Content-Type": NPY, Accept: NPY };
  const response = await ask(`${endpoint}?model=${of(model)}${query}`, { method: "POST", headers, body: toNpy(rows), signal });
  return fromNpy(await response.arrayBuffer());
}

/** The codes of many rows, in as many requests as the service wants: a piece that has too many rows for it is halved. */
export async function encodeAll(model, rows, tell) {
  const codes = [];
  let piece = PIECE;
  while (codes.length < rows.length) {
    tell(codes.length);
    try {
      for (const z of await postRows("/encode", model, rows.slice(codes.length, codes.length + piece))) codes.push(z);
    } catch (error) {
      if (!TOO_MUCH.includes(error.code) || piece === 1) throw error;
      piece = Math.ceil(Math.min(piece, rows.length - codes.length) / 2);
    }
  }
  return codes;
}

export const decode = (model, latents, signal) => postRows("/decode", model, latents, signal);

const of = (model) => encodeURIComponent(`${model.name}@${model.version}`);
const remembered = new Map();

/** GET, once: what a version of a model is does not change. */
export function once(path) {
  if (!remembered.has(path)) {
    const answer = ask(path).then((response) => (response.headers.get("content-type").startsWith("application/json") ? response.json() : response.text()));
    remembered.set(path, answer);
    answer.catch(() => remembered.delete(path));
  }
  return remembered.get(path);
}

export const catalogue = async () => (await ask("/models")).json();
export const detail = (model) => once(`/models/${of(model)}`);

/** What the artifact shows as `name`: held-out, calibration or card. Null where it carries none. */
export async function exhibit(model, name) {
  if (!model.exhibits?.includes(name)) return null; // an artifact of an earlier Elbo, or a private one
  return once(`/models/${of(model)}/${name}`);
}

/** Rows as a .npy file of float32. */
export function toNpy(rows) {
  const width = rows[0].length;
  const head = `{'descr': '<f4', 'fortran_order': False, 'shape': (${rows.length}, ${width}), }`;
  const padded = head.padEnd(Math.ceil((head.length + 11) / 64) * 64 - 11) + "\n";
  const bytes = new Uint8Array(10 + padded.length + 4 * rows.length * width);
  bytes.set([0x93, 78, 85, 77, 80, 89, 1, 0, padded.length & 255, padded.length >> 8]);
  bytes.set(new TextEncoder().encode(padded), 10);
  const view = new DataView(bytes.buffer, 10 + padded.length);
  rows.forEach((row, i) => {
    for (let j = 0; j < width; j++) view.setFloat32(4 * (i * width + j), row[j] ?? NaN, true);
  });
  return bytes;
}

const READERS = { f4: ["getFloat32", 4], f8: ["getFloat64", 8], u1: ["getUint8", 1], i1: ["getInt8", 1], u2: ["getUint16", 2], i2: ["getInt16", 2], i4: ["getInt32", 4], u4: ["getUint32", 4] };

/** The rows of a .npy file, each flat. Raises Problem for one that it cannot read. */
export function fromNpy(buffer) {
  const bytes = new DataView(buffer);
  const refuse = (why) => { throw new Problem(`This .npy file cannot be read here: ${why}. Numbers of 1 to 8 bytes, rows first, are expected.`); };
  if (buffer.byteLength < 12 || bytes.getUint32(0) !== 0x934e554d) refuse("it does not begin as one");
  const start = bytes.getUint8(6) === 1 ? 10 : 12;
  const length = start === 10 ? bytes.getUint16(8, true) : bytes.getUint32(8, true);
  const head = new TextDecoder("latin1").decode(new Uint8Array(buffer, start, Math.min(length, buffer.byteLength - start)));
  const [, order, kind] = head.match(/'descr': '([<>|=])(\w+)'/) ?? [];
  const shape = (head.match(/'shape': \(([^)]*)\)/)?.[1] ?? "").split(",").filter((n) => n.trim()).map(Number);
  if (!READERS[kind] || head.includes("'fortran_order': True") || !shape.length) refuse(`its header says ${head.trim().slice(0, 80)}`);
  const [read, size] = READERS[kind];
  const [count, width] = [shape.length > 1 ? shape[0] : 1, shape.slice(shape.length > 1 ? 1 : 0).reduce((a, b) => a * b, 1)];
  if (start + length + count * width * size > buffer.byteLength) refuse("it is cut off");
  return Array.from({ length: count }, (_, i) => {
    const row = new Float32Array(width);
    for (let j = 0; j < width; j++) row[j] = bytes[read](start + length + (i * width + j) * size, order !== ">");
    return row;
  });
}

/** Runs one thing at a time: what is begun anew aborts what went before. Gives undefined for what was aborted. */
export class Latest {
  async run(work) {
    this.stop();
    const own = (this.controller = new AbortController());
    try {
      const result = await work(own.signal);
      return own.signal.aborted ? undefined : result;
    } catch (error) {
      if (own.signal.aborted) return undefined;
      throw error;
    }
  }

  stop() {
    this.controller?.abort();
  }
}

/** For what follows the pointer: one request under way, the newest wish after it, one that is late given up. */
export class Following extends Latest {
  constructor(work) {
    super();
    Object.assign(this, { work, busy: false, wish: null, began: 0 });
  }

  want(...wish) {
    this.wish = wish;
    if (this.busy && performance.now() - this.began > LATE) this.stop();
    if (!this.busy) this.next();
  }

  async next() {
    const wish = this.wish;
    Object.assign(this, { wish: null, busy: true, began: performance.now() });
    await this.run((signal) => this.work(signal, ...wish));
    this.busy = false;
    if (this.wish) this.next();
  }
}
