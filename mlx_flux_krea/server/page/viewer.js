// The full view of a picture, with zoom, or of two side by side.

import { ask, file, show } from "./api.js";
import { byId, bytes, make, moment, openDialog, quoted, say, shown, size, tried } from "./dom.js";

const MOST_ZOOM = 16;
// Names of a record that people look for first.
const FIRST = ["prompt", "negative_prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale", "true_cfg_scale", "model", "loras"];
const MOST_FIT = 4; // a small picture is enlarged so much to fit

/** The full view. */
export class Viewer {
  /**
   * @param {object} calls
   * @param {function(object): void} calls.use fills the form with a request
   * @param {function(object): void} calls.generate puts a request into the queue
   * @param {function(object): void} calls.startFrom takes a picture as the image to start from
   */
  constructor(calls) {
    this.calls = calls;
    this.list = [];
    this.at = -1;
    this.dialog = byId("viewer");
    this.view = { scale: null, x: 0, y: 0 }; // scale null: fits
    byId("viewer-close").onclick = () => this.dialog.close();
    byId("viewer-before").onclick = () => this.step(-1);
    byId("viewer-after").onclick = () => this.step(1);
    byId("zoom-in").onclick = () => this.zoom(1.5);
    byId("zoom-out").onclick = () => this.zoom(1 / 1.5);
    byId("zoom-fit").onclick = () => this.fit();
    byId("zoom-full").onclick = () => this.setScale(1);
    this.dialog.addEventListener("keydown", (event) => this.key(event));
    this.dialog.addEventListener("close", () => {
      byId("stage").replaceChildren();
      byId("facts").replaceChildren();
      this.list = [];
    });
    new ResizeObserver(() => this.draw()).observe(byId("stage"));
    this.listen(byId("stage"));
  }

  /** Shows the picture at a place of a list. */
  open(list, at) {
    this.list = [...list];
    this.at = at;
    this.present([list[at]]);
  }

  /** Shows two pictures side by side, which zoom and move together. */
  compare(pictures) {
    this.list = [];
    this.present(pictures);
  }

  present(pictures) {
    this.showAll(pictures);
    openDialog(this.dialog);
    byId("stage").focus();
  }

  step(by) {
    const next = this.at + by;
    if (next < 0 || next >= this.list.length) return;
    this.at = next;
    this.showAll([this.list[next]]);
  }

  async showAll(pictures) {
    this.pictures = pictures;
    this.view = { scale: null, x: 0, y: 0 };
    byId("viewer-title").textContent = pictures.length === 2 ? "Side by side" : "Picture";
    byId("viewer-before").hidden = byId("viewer-after").hidden = !this.list.length;
    byId("viewer-before").disabled = this.at <= 0;
    byId("viewer-after").disabled = this.at >= this.list.length - 1;
    this.images = pictures.map((one) => make("img", { alt: shown(one.prompt) || "Picture", width: one.width, height: one.height }));
    byId("stage").replaceChildren(...this.images.map((image) => make("figure", {}, image)));
    byId("facts").replaceChildren();
    this.draw();
    const shows = pictures.map((one, at) => show(this.images[at], `/api/pictures/${one.id}/file`));
    const facts = await tried(() => Promise.all(pictures.map((one) => ask("GET", `/api/pictures/${one.id}`))));
    if (facts && this.pictures === pictures) byId("facts").replaceChildren(...facts.map((one) => this.about(one)));
    await Promise.all(shows);
  }

  // --- what is said beside it ---

  about(picture) {
    const { request, missing } = picture;
    const button = (text, call, properties = {}) => make("button", { type: "button", onclick: () => tried(call), ...properties }, text);
    const again = { disabled: !request, title: request ? "" : "The file does not say how it was made" };
    const lacks = missing?.length ? make("p.hint.warning", {}, `Not here, and so not filled in: ${shown(missing.join(", "))}`) : null;
    return make("div", {}, make("h3", {}, quoted(picture.prompt || "No prompt")), lacks,
      make("div.row", {},
        button("Use again", () => this.leave(() => this.calls.use({ model: picture.model, ...request })), again),
        button("New seed", () => this.newSeed(request), again),
        button("Start from this", () => this.leave(() => this.calls.startFrom({ id: picture.id, isPicture: true, width: picture.width, height: picture.height }))),
        button("Copy", () => this.copy(picture)),
        button("Copy prompt", async () => (await navigator.clipboard.writeText(picture.prompt ?? ""), say("The prompt is copied"))),
        button("Download", () => this.download(picture)),
        button("Delete", () => this.delete(picture), { className: "danger" })),
      facts({ Size: size(picture.width, picture.height), File: `${picture.format.toUpperCase()}, ${bytes(picture.bytes)}`, Made: moment(picture.created), Credentials: picture.signed ? "signed (C2PA); flux-krea inspect checks the file" : "" }),
      make("h3", {}, "Settings"), facts(picture.record ?? { Settings: "none in the file" }));
  }

  leave(call) {
    this.dialog.close();
    return call();
  }

  async newSeed(request) {
    const { seed, ...others } = request;
    await this.calls.generate(others);
  }

  async copy(picture) {
    // Safari lets a page write to the clipboard only at once, so what is written follows as a promise.
    const png = file(`/api/pictures/${picture.id}/file`).then(({ blob }) => (blob.type === "image/png" ? blob : asPNG(blob)));
    await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
    say("The picture is copied");
  }

  async download(picture) {
    const { blob, name } = await file(`/api/pictures/${picture.id}/file?download=1`);
    const url = URL.createObjectURL(blob);
    make("a", { href: url, download: name || "picture" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  async delete(picture) {
    await ask("DELETE", `/api/pictures/${picture.id}`);
    say("The picture is in the Trash");
    this.list = this.list.filter((one) => one.id !== picture.id);
    this.at = Math.min(this.at, this.list.length - 1);
    if (this.pictures.length === 1 && this.list.length) return this.showAll([this.list[this.at]]);
    this.dialog.close();
  }

  // --- zoom ---

  key(event) {
    if (event.target.matches("input, textarea, select") || event.metaKey || event.ctrlKey || event.altKey) return;
    const keys = { "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(), 1: () => this.setScale(1),
      ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1) };
    if (this.view.scale !== null && event.target === byId("stage") && event.shiftKey) {
      const pan = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] }[event.key];
      if (pan) return event.preventDefault(), this.pan(...pan);
    }
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  listen(stage) {
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 300));
    }, { passive: false });
    stage.addEventListener("dblclick", () => (this.view.scale === null ? this.setScale(1) : this.fit()));
    stage.addEventListener("pointerdown", (event) => stage.setPointerCapture(event.pointerId));
    stage.addEventListener("pointermove", (event) => event.buttons === 1 && this.pan(event.movementX, event.movementY));
  }

  fitting(image) {
    const { clientWidth, clientHeight } = image.parentElement;
    return Math.min(MOST_FIT, clientWidth / image.width, clientHeight / image.height) || 1;
  }

  zoom(factor) {
    this.setScale((this.view.scale ?? this.fitting(this.images[0])) * factor);
  }

  setScale(scale) {
    const before = this.view.scale ?? this.fitting(this.images[0]);
    const next = Math.min(MOST_ZOOM, Math.max(0.05, scale));
    this.view = { scale: next, x: (this.view.x * next) / before, y: (this.view.y * next) / before };
    this.draw();
  }

  fit() {
    this.view = { scale: null, x: 0, y: 0 };
    this.draw();
  }

  pan(x, y) {
    if (this.view.scale === null) return;
    this.view.x += x;
    this.view.y += y;
    this.draw();
  }

  draw() {
    for (const image of this.images ?? []) {
      if (!image.isConnected) continue;
      const scale = this.view.scale ?? this.fitting(image);
      image.style.transform = `translate(-50%, -50%) translate(${this.view.x}px, ${this.view.y}px) scale(${scale})`;
      image.classList.toggle("pixels", scale > 2);
    }
    if (this.images?.[0]?.isConnected) byId("zoom-level").value = `${Math.round((this.view.scale ?? this.fitting(this.images[0])) * 100)} %`;
  }
}

/** Returns a list of names and values; those that people ask for first stand first. */
function facts(record) {
  const names = Object.keys(record).filter((name) => said(record[name]) !== "");
  const first = FIRST.filter((name) => names.includes(name));
  const row = (name) => [make("dt", {}, shown(name).replaceAll("_", " ")), make("dd", {}, quoted(said(record[name])))];
  return make("dl", {}, ...[...first, ...names.filter((name) => !first.includes(name))].flatMap(row));
}

/** Returns a value of a record as text: "" for none, lists and objects with their parts. */
function said(value) {
  if (value === null || value === undefined) return "";
  if (Array.isArray(value)) return value.map(said).join(", ");
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, inner]) => `${name.replaceAll("_", " ")} ${said(inner)}`).join(", ");
}

async function asPNG(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = make("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
