// Requests to the server: JSON, images, uploads, and the stream of events.

const KEY = "flux-krea-token";
let token = null;

/** The answer of the server where it refuses; `code` and `param` are those of docs/http.md. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    Object.assign(this, { status, code: error.code, param: error.param, review: error.review });
  }
}

/**
 * Takes the token out of the link's fragment, which is then cleared, or the one that this tab had before a reload.
 * @returns {boolean} there is one
 */
export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(KEY, given);
    history.replaceState(null, "", location.pathname);
  }
  token = sessionStorage.getItem(KEY);
  return Boolean(token);
}

// Seeds have up to 64 bits: where a number of JSON is no safe integer, it is a BigInt here, and is written back in full.
const whole = (key, value, context) =>
  Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source ? BigInt(context.source) : value;
const written = (key, value) => (typeof value === "bigint" ? (JSON.rawJSON?.(String(value)) ?? Number(value)) : value);

async function send(method, path, body, headers = {}) {
  let answer;
  try {
    answer = await fetch(path, { method, body, headers: { Authorization: `Bearer ${token}`, ...headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { message: "the server does not answer; is flux-krea ui still running?", code: "no_answer" });
  }
  if (answer.ok) return answer;
  const known = await answer.json().catch(() => null);
  throw new Refused(answer.status, known?.error ?? { message: `the server answered ${answer.status}`, code: "unknown" });
}

/**
 * Sends a request and returns the JSON of its answer.
 * @throws {Refused}
 */
export async function ask(method, path, value) {
  const body = value === undefined ? undefined : JSON.stringify(value, written);
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  return JSON.parse(await (await send(method, path, body, headers)).text(), whole);
}

/**
 * Returns the bytes at a path, as a Blob, and the name that the server gives them ("" where it gives none).
 * @throws {Refused}
 */
export async function file(path) {
  const answer = await send("GET", path);
  const [, name = ""] = /filename="([^"]*)"/.exec(answer.headers.get("Content-Disposition") ?? "") ?? [];
  return { blob: await answer.blob(), name };
}

/**
 * Uploads an image.
 * @param {Blob} blob
 * @throws {Refused}
 */
export async function upload(blob) {
  const answer = await send("POST", "/api/uploads", blob, { "Content-Type": blob.type || "application/octet-stream" });
  return JSON.parse(await answer.text(), whole);
}

/**
 * Shows the image at a path in an element, which alone keeps it: its memory is free when the element goes.
 * @param {HTMLImageElement} image
 * @param {string} path
 * @returns {Promise<boolean>} it is shown
 */
export async function show(image, path) {
  image.dataset.path = path;
  try {
    const { blob } = await file(path);
    if (image.dataset.path !== path) return false; // another one was asked for meanwhile
    const url = URL.createObjectURL(blob);
    await new Promise((done) => {
      image.onload = image.onerror = done;
      image.src = url;
    });
    URL.revokeObjectURL(url);
    return image.naturalWidth > 0;
  } catch {
    return false;
  }
}

/** Returns the path of an image that an id names: a picture's, or an upload's. */
export const pathOf = ({ id, isPicture }) => (isPicture ? `/api/pictures/${id}/file` : `/api/uploads/${id}`);

/**
 * Follows the events of the server for as long as the page is open, and connects again after each break.
 * @param {Object<string, function>} handlers by the event's name
 * @param {function(string)} onState called with "open", "broken", or "refused" after which no further try is made
 */
export async function follow(handlers, onState) {
  let last = "";
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    try {
      const answer = await send("GET", "/api/events", undefined, last ? { "Last-Event-ID": last } : {});
      onState("open");
      wait = 250;
      for await (const event of events(answer.body)) {
        last = event.id || last;
        try {
          handlers[event.name]?.(event.data);
        } catch (error) {
          reportError(error); // a fault of one part ends none of the others
        }
      }
    } catch (error) {
      if (error.status === 401) return onState("refused");
    }
    onState("broken");
    await new Promise((done) => setTimeout(done, wait));
  }
}

/** Yields the events of a body as {id, name, data}. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: ?(.*)/s)));
      if (fields.data !== undefined) yield { id: fields.id, name: fields.event, data: JSON.parse(fields.data, whole) };
    }
  }
}
