// Client of the service's public HTTP endpoints.

import { isAbort, UserError } from "./errors.js";
import { withKey } from "./key.js";
import { fromNpy, toNpy } from "./npy.js";

const NPY = "application/x-npy";
const ROWS_PER_REQUEST = 4000;
const TOO_LARGE = ["too_many_rows", "body_too_large"];

/** The response of `path` if its status is 2xx. Throws UserError otherwise, and AbortError when `signal` aborts. */
export async function request(path, options = {}) {
  const response = await fetchOrExplain(path, options);
  if (response.ok) return response;
  throw await errorOf(response);
}

async function fetchOrExplain(path, options) {
  try {
    // The address is relative to the page, which a proxy may publish under a prefix.
    return await fetch(`.${path}`, { ...options, headers: withKey(options.headers) });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new UserError(
      "Cannot reach the server. It may be stopped or restarting. Try again in a moment.",
      "unreachable",
    );
  }
}

/** A UserError with the content of an error response. */
async function errorOf(response) {
  const problem = await response.json().catch(() => ({
    detail: `The server responded with status ${response.status}`,
    request_id: response.headers.get("x-request-id"),
  }));
  const text = [problem.detail, problem.hint].filter(Boolean).join(": ");
  return new UserError(`${text[0].toUpperCase()}${text.slice(1)}.`, problem.code, problem.request_id);
}

const reference = (model) => encodeURIComponent(`${model.name}@${model.version}`);

/** The query that selects `model`, with the condition for which its view shows rows, if one is chosen. */
function selection(model) {
  const query = `model=${reference(model)}`;
  return model.condition ? `${query}&condition=${encodeURIComponent(JSON.stringify(model.condition))}` : query;
}

/** POST JSON to an endpoint of `model` and return the JSON response. */
export async function postJson(endpoint, model, body, signal) {
  const response = await request(`${endpoint}?${selection(model)}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  return response.json();
}

/** The response of /anomaly. The rows are not live traffic: a visitor who looks at rows must not raise an alert. */
export const scoreRows = (model, body, signal) => postJson("/anomaly", model, { ...body, observe: false }, signal);

/** How the groups of `model` differ from their peers at this moment. */
export async function comparePeers(model, signal) {
  return (await request(`/models/${reference(model)}/peers`, { signal })).json();
}

/** The response of /backtest for a file of rows with times. An option that is empty is left to the server. */
export async function rehearse(model, file, type, options, signal) {
  const given = Object.entries(options).filter(([, value]) => value);
  const query = new URLSearchParams([["drawings", "true"], ...given]);
  const response = await request(`/backtest?model=${reference(model)}&${query}`, {
    method: "POST",
    headers: { "Content-Type": type },
    body: file,
    signal,
  });
  return response.json();
}

/** `rows` as JSON inputs of `model`. If the model has a window, each row is the only one in its window. */
export function toInputs(model, rows) {
  if (!model.window) return rows;
  const absent = Array.from({ length: model.window.rows - 1 }, () => Array(model.width).fill(null));
  return rows.map((row) => [...absent, Array.from(row)]);
}

/**
 * POST rows of numbers as npy and return the rows of the response, each a Float32Array. `windowRows` is the number of
 * rows of a window, in which each row is the only one.
 */
async function postNpy(endpoint, model, rows, signal, windowRows = 1) {
  const response = await request(`${endpoint}?${selection(model)}`, {
    method: "POST",
    headers: { "Content-Type": NPY, Accept: NPY },
    body: toNpy(rows, windowRows),
    signal,
  });
  return fromNpy(await response.arrayBuffer());
}

/** The rows that `latents` decode to. */
export const decode = (model, latents, signal) => postNpy("/decode", model, latents, signal);

/** The latents of many rows. Halves a batch that is too large. `onProgress` gets the number of rows already encoded. */
export async function encodeInBatches(model, rows, onProgress) {
  const latents = [];
  let batchSize = ROWS_PER_REQUEST;
  while (latents.length < rows.length) {
    onProgress(latents.length);
    const batch = rows.slice(latents.length, latents.length + batchSize);
    try {
      for (const z of await postNpy("/encode", model, batch, undefined, model.window?.rows)) latents.push(z);
    } catch (error) {
      if (!TOO_LARGE.includes(error.code) || batchSize === 1) throw error;
      batchSize = Math.ceil(batch.length / 2);
    }
  }
  return latents;
}

/** `count` sampled images, each a Float32Array, and the seed that gives them again. */
export async function sampleImages(model, count) {
  const seed = Math.floor(Math.random() * 10000);
  const response = await request(`/sample?model=${reference(model)}&n=${count}&seed=${seed}`, {
    method: "POST",
    headers: { Accept: NPY },
  });
  return { images: fromNpy(await response.arrayBuffer()), seed };
}

/** `count` sampled rows and the seed that gives them again. */
export async function sampleRows(model, count) {
  const seed = Math.floor(Math.random() * 10000);
  return postJson("/sample", model, { n: count, seed });
}

const cache = new Map();

/** GET `path` and cache the result: a published model version never changes. */
function getCached(path) {
  if (!cache.has(path)) {
    const result = request(path).then(parseByContentType);
    cache.set(path, result);
    result.catch(() => cache.delete(path));
  }
  return cache.get(path);
}

function parseByContentType(response) {
  const isJson = response.headers.get("content-type").startsWith("application/json");
  return isJson ? response.json() : response.text();
}

export const listModels = async () => (await request("/models")).json();

/** The full description of `model`, of which GET /models gives only a part. */
export async function describeModel(model) {
  return { ...(await getCached(`/models/${reference(model)}`)), exhibits: model.exhibits };
}

/**
 * The exhibit `name` of an artifact (held-out, calibration or card). Null if the artifact has no such exhibit, or if
 * the API key may not read it.
 */
export async function getExhibit(model, name) {
  if (!model.exhibits?.includes(name)) return null;
  try {
    return await getCached(`/models/${reference(model)}/${name}`);
  } catch (error) {
    if (error.code === "forbidden") return null;
    throw error;
  }
}
