// The page: starts its parts, and brings events and keys to them.

import { Refused, ask, follow, takeToken } from "./api.js";
import { byId, moveByArrows, say, tried } from "./dom.js";
import { drawBorders, paintMask } from "./editor.js";
import { Form } from "./form.js";
import { acceptDrops, uploaded } from "./images.js";
import { drawModels } from "./models.js";
import { Pictures } from "./pictures.js";
import { startHistory, watchPrompt } from "./prompt.js";
import { Queue } from "./queue.js";
import { Review } from "./review.js";
import { drawSetup } from "./setup.js";
import { Viewer } from "./viewer.js";

const VIEWS = ["pictures", "review", "models"];

async function generate(request) {
  const job = await ask("POST", "/api/queue", request);
  say("It is in the queue");
  if (getComputedStyle(document.querySelector("main")).display === "block") byId("queue-part").scrollIntoView(); // one column
  return job;
}

async function useAgain(request) {
  await form.write(request);
  byId("prompt").focus();
  say("The form holds the settings of this picture");
}

async function openPicture(id) {
  const at = pictures.list.findIndex((one) => one.id === id);
  if (at >= 0) viewer.open(pictures.list, at);
  else await tried(async () => viewer.open([await ask("GET", `/api/pictures/${id}`)], 0));
}

const form = new Form(generate);
const viewer = new Viewer({ use: useAgain, generate, startFrom: (value) => form.startFrom(value) });
const queue = new Queue({ open: openPicture, review: () => choose("review") });
const pictures = new Pictures({ open: (list, at) => viewer.open(list, at), compare: (both) => viewer.compare(both) });
const review = new Review();
const countTokens = watchPrompt(() => form.model?.name);

/** Shows one of the views; the others are hidden. */
function choose(view) {
  for (const name of VIEWS) {
    const tab = byId(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === view));
    tab.tabIndex = name === view ? 0 : -1;
    byId(`view-${name}`).hidden = name !== view;
  }
  review.show(view === "review");
  if (view === "models") tried(async () => drawModels(await ask("GET", "/api/models")));
}

/** An image that is dropped or pasted: its record fills the form, or it becomes the image to start from. */
async function takeImage(blob) {
  const found = await tried(() => uploaded(blob));
  if (!found) return;
  if (!found.request) return form.startFrom(found.named);
  await useAgain(found.request);
  const lacks = found.missing.length ? ` Not in it: ${found.missing.join(", ")}.` : "";
  say(`Made here: the form holds its settings.${lacks}`, { action: { label: "Use as image", call: () => form.startFrom(found.named) } });
}

async function editImage(edit) {
  if (form.image.value) await tried(edit);
}

/** Reads everything that the page shows. */
async function readAll() {
  const [models, setup] = await Promise.all([ask("GET", "/api/models"), ask("GET", "/api/setup"), queue.read(), pictures.read()]);
  await form.setModels(models);
  drawSetup(setup);
  review.count((await ask("GET", "/api/review")).pictures.length);
}

async function readModels() {
  const models = await ask("GET", "/api/models");
  await form.setModels(models);
  if (!byId("view-models").hidden) await drawModels(models);
}

async function start() {
  const [models, options, settings] = await Promise.all(["models", "options", "settings"].map((name) => ask("GET", `/api/${name}`)));
  await form.start(models, options);
  const isOn = () => (form.model?.previews === "checked" ? "checked_previews" : "previews");
  const showSetting = () => (byId("previews").checked = settings[isOn()]);
  byId("previews").onchange = () => tried(async () => Object.assign(settings, await ask("PUT", "/api/settings", { [isOn()]: byId("previews").checked })));
  byId("model").addEventListener("change", () => (showSetting(), countTokens()));
  showSetting();
  countTokens();
  const handlers = {
    reset: () => tried(readAll),
    queue: ({ order }) => queue.order(order),
    job: (job) => queue.change(job),
    progress: ({ job, progress }) => queue.progress(job, progress),
    preview: (event) => queue.preview(event),
    pictures: (event) => pictures.change(event),
    review: ({ waiting }) => review.count(waiting),
    models: () => tried(readModels),
    setup: drawSetup,
  };
  const states = { open: "", broken: "The server does not answer; trying again …", refused: "This link has expired: open the one that flux-krea ui shows now." };
  follow(handlers, (state) => (byId("connection").textContent = states[state]));
}

for (const name of VIEWS) byId(`tab-${name}`).onclick = () => choose(name);
moveByArrows(byId("tabs"), "[role=tab]");
startHistory();
byId("mask-open").onclick = () => editImage(async () => {
  const mask = await paintMask(form.image.value, form.mask);
  if (mask) form.setMask(mask);
});
byId("expand-open").onclick = () => editImage(async () => {
  const borders = await drawBorders(form.image.value, form.expand);
  if (borders !== undefined) form.setExpand(borders);
});
acceptDrops(document.body, takeImage);
document.addEventListener("paste", (event) => {
  const image = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (image) takeImage(image);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.metaKey || event.ctrlKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
window.addEventListener("hashchange", () => location.hash.includes("token=") && location.reload());

if (takeToken()) {
  start().catch((error) => {
    const isExpired = error instanceof Refused && error.status === 401;
    byId("connection").textContent = isExpired ? "This link has expired: open the one that flux-krea ui shows now." : error.message;
  });
} else byId("connection").textContent = "Open the link that flux-krea ui shows: it holds the key to this page.";
