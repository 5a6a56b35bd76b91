// Small helpers for elements, texts and numbers. No text ever becomes markup here.

/**
 * Returns an element.
 * @param {string} tag its name, with classes after dots: "li.job"
 * @param {object} properties attributes; a function under "onclick" and the like is a listener, `false` and null are left out
 * @param {...(Node|string|null|false)} children elements, and texts
 */
export function make(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && !key.startsWith("aria") && key !== "list") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Returns the element of the page with this id. */
export const byId = (id) => document.getElementById(id);

// Characters that would move, hide or reorder the text around them: controls, zero widths, and directions.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

/** Returns a text of somebody else with its unseen characters spelled out, such as [U+202E]. */
export function shown(text) {
  return String(text ?? "").replace(UNSEEN, (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
}

/** Returns an element with a text of somebody else, whose direction of writing does not reach the text around it. */
export const quoted = (text) => make("bdi", {}, shown(text));

/** Shows a message at the foot of the page for some seconds; screen readers say it. */
export function say(message, { isError = false, action = null } = {}) {
  const note = make("p.note", { className: isError ? "note error" : "note" }, shown(message));
  const close = () => note.remove();
  if (action) note.append(make("button", { type: "button", onclick: () => (close(), action.call()) }, action.label));
  note.append(make("button.plain", { type: "button", "aria-label": "Close this message", onclick: close }, "×"));
  const place = byId(isError ? "alerts" : "notes");
  place.append(note);
  while (place.children.length > 3) place.firstChild.remove();
  if (!isError) setTimeout(close, 8000);
}

/** Calls an asynchronous function; an error of it is shown as a message. */
export async function tried(call) {
  try {
    return await call();
  } catch (error) {
    say(error.message, { isError: true });
    return undefined;
  }
}

/** Returns a function that calls another once, some milliseconds after its own last call. */
export function later(milliseconds, call) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}

/** Returns a size such as "12.4 GB". */
export function bytes(number) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let power = 0;
  for (; number >= 1000 && power < units.length - 1; power++) number /= 1000;
  return `${number >= 100 || power === 0 ? Math.round(number) : number.toFixed(1)} ${units[power]}`;
}

/** Returns a duration such as "1 min 5 s". */
export function seconds(number) {
  if (number < 10) return `${number.toFixed(1)} s`;
  if (number < 60) return `${Math.round(number)} s`;
  const minutes = Math.floor(number / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(number % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Returns a date and time in the reader's own form. */
export const moment = (time) => new Date(time * 1000).toLocaleString();

/** Returns "1 picture", "2 pictures". */
export const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** Returns "1024 × 768". */
export const size = (width, height) => `${width} × ${height}`;

/** Opens a dialog; when it closes, the focus returns to where it was. */
export function openDialog(dialog) {
  const before = document.activeElement;
  if (!dialog.open) dialog.showModal();
  dialog.addEventListener("close", () => before?.isConnected && before.focus(), { once: true });
}

/**
 * Lets the arrow keys move the focus among the buttons of a list, as one stop of the tab key.
 * @param {Element} list
 * @param {string} selector of what takes the focus
 */
export function moveByArrows(list, selector) {
  const all = () => [...list.querySelectorAll(selector)];
  list.addEventListener("focusin", (event) => {
    const chosen = event.target.closest(selector);
    if (chosen) all().forEach((one) => (one.tabIndex = one === chosen ? 0 : -1));
  });
  list.addEventListener("keydown", (event) => {
    const places = all();
    const at = places.indexOf(event.target);
    if (at < 0) return;
    const top = places[0].getBoundingClientRect().top;
    const columns = places.filter((one) => one.getBoundingClientRect().top === top).length || 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: places.length - 1 - at };
    const next = places[at + steps[event.key]];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}
