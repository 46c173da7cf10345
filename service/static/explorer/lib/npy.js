// NumPy's .npy format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

import { UserError } from "./errors.js";

const MAGIC = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // "\x93NUMPY"
const PREAMBLE = 10; // bytes before the header text in format 1.0: magic, version, length
const READERS = {
  f4: ["getFloat32", 4],
  f8: ["getFloat64", 8],
  u1: ["getUint8", 1],
  i1: ["getInt8", 1],
  u2: ["getUint16", 2],
  i2: ["getInt16", 2],
  i4: ["getInt32", 4],
  u4: ["getUint32", 4],
};

/**
 * Rows of numbers as a .npy file of float32; null becomes NaN. If `windowRows` is above 1, each row becomes a window of
 * that many rows, of which the others are NaN.
 */
export function toNpy(rows, windowRows = 1) {
  const width = rows[0].length;
  const header = paddedHeader(windowRows > 1 ? [rows.length, windowRows, width] : [rows.length, width]);
  const start = PREAMBLE + header.length;
  const bytes = new Uint8Array(start + 4 * rows.length * windowRows * width);
  bytes.set([...MAGIC, 1, 0, header.length & 255, header.length >> 8]);
  bytes.set(new TextEncoder().encode(header), PREAMBLE);
  const view = new DataView(bytes.buffer, start);
  const absent = (windowRows - 1) * width; // the numbers of a window before its newest row
  rows.forEach((row, i) => {
    const place = i * windowRows * width;
    for (let j = 0; j < absent; j++) view.setFloat32(4 * (place + j), Number.NaN, true);
    for (let j = 0; j < width; j++) view.setFloat32(4 * (place + absent + j), row[j] ?? Number.NaN, true);
  });
  return bytes;
}

/** The header, padded so that the data start at a multiple of 64 bytes. */
function paddedHeader(shape) {
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const total = Math.ceil((PREAMBLE + header.length + 1) / 64) * 64;
  return `${header.padEnd(total - PREAMBLE - 1)}\n`;
}

/** The rows of a .npy file, each flattened to a Float32Array. Throws UserError for an unsupported file. */
export function fromNpy(buffer) {
  const { start, count, width, read, size, littleEndian } = parseHeader(buffer);
  const bytes = new DataView(buffer);
  return Array.from({ length: count }, (_, i) => {
    const row = new Float32Array(width);
    for (let j = 0; j < width; j++) row[j] = bytes[read](start + (i * width + j) * size, littleEndian);
    return row;
  });
}

function parseHeader(buffer) {
  const bytes = new DataView(buffer);
  if (buffer.byteLength < 12 || bytes.getUint32(0) !== 0x934e554d) throw unreadable("it is not in the .npy format");
  const isVersion1 = bytes.getUint8(6) === 1;
  const headerStart = isVersion1 ? PREAMBLE : PREAMBLE + 2;
  const length = isVersion1 ? bytes.getUint16(8, true) : bytes.getUint32(8, true);
  const available = Math.min(length, buffer.byteLength - headerStart);
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, headerStart, available));
  const [, byteOrder, dtype] = header.match(/'descr': '([<>|=])(\w+)'/) ?? [];
  const shape = parseShape(header);
  if (!READERS[dtype] || header.includes("'fortran_order': True") || !shape.length) {
    throw unreadable(`its header is ${header.trim().slice(0, 80)}`);
  }
  const [read, size] = READERS[dtype];
  const [count, ...rest] = shape.length > 1 ? shape : [1, ...shape];
  const width = rest.reduce((a, b) => a * b, 1);
  const start = headerStart + length;
  if (start + count * width * size > buffer.byteLength) throw unreadable("it is truncated");
  return { start, count, width, read, size, littleEndian: byteOrder !== ">" };
}

function parseShape(header) {
  const text = header.match(/'shape': \(([^)]*)\)/)?.[1] ?? "";
  return text
    .split(",")
    .filter((part) => part.trim())
    .map(Number);
}

const unreadable = (reason) =>
  new UserError(
    `Cannot read this .npy file: ${reason}. Expected numbers of 1 to 8 bytes in C order (fortran_order: False).`,
  );
