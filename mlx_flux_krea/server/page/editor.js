// The dialog in which a mask is painted over an image, or borders are drawn around it.

import { pathOf, show } from "./api.js";
import { byId, make, openDialog, size, tried } from "./dom.js";
import { uploaded } from "./images.js";

const MASK_SIDE = 1024; // pixels of the painted mask's longer side, at most
const INK = [255, 0, 200]; // colour of the mask on the screen, where white would not be seen on a white image
const UNDOS = 10;
const STEP = 16; // pixels by which an arrow key moves a border

/**
 * Opens the dialog.
 * @param {string} title
 * @param {string} help
 * @param {Node[]} tools
 * @param {Node[]} board
 * @returns {Promise<boolean>} "Use" was pressed
 */
function opened(title, help, tools, board) {
  const dialog = byId("editor");
  byId("editor-title").textContent = title;
  byId("editor-help").textContent = help;
  byId("editor-tools").replaceChildren(...tools);
  byId("board").replaceChildren(...board);
  openDialog(dialog);
  return new Promise((done) => {
    let isUsed = false;
    byId("editor-use").onclick = () => ((isUsed = true), dialog.close());
    byId("editor-cancel").onclick = () => dialog.close();
    dialog.addEventListener("close", () => done(isUsed), { once: true });
  });
}

/** Returns sides that fit in a box and keep the shape. */
function fitted(width, height, most) {
  const scale = Math.min(1, most / Math.max(width, height));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** Gives an element of the board the shape of an image, as large as there is room. */
function shape(element, width, height, share = 1) {
  const room = [Math.min(innerWidth - 64, 1080) * share, Math.max(160, innerHeight - 300) * share];
  const scale = Math.min(room[0] / width, room[1] / height);
  element.style.width = `${width * scale}px`;
  element.style.height = `${height * scale}px`;
  return scale;
}

/** A mask that is painted with a brush: white where the image is painted again. */
class Painting {
  constructor(width, height) {
    this.canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": "Mask; arrows move the brush, Space paints, brackets change its size" });
    [this.canvas.width, this.canvas.height] = fitted(width, height, MASK_SIDE);
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.pen.lineCap = this.pen.lineJoin = "round";
    this.brush = make("span.brush");
    this.at = [this.canvas.width / 2, this.canvas.height / 2];
    this.before = [];
    this.isDown = false;
    const most = Math.max(this.canvas.width, this.canvas.height);
    this.size = make("input", { type: "range", min: 1, max: Math.round(most / 2), value: Math.round(most / 10), oninput: () => this.showBrush() });
    this.erase = make("input", { type: "checkbox" });
    const button = (text, call) => make("button", { type: "button", onclick: call }, text);
    this.tools = [
      make("label.field", {}, "Brush", this.size),
      make("label.check", {}, this.erase, "Erase"),
      button("Undo", () => this.undo()),
      button("Invert", () => this.change(() => this.fill("source-out"))),
      button("Everything", () => this.change(() => this.fill())),
      button("Nothing", () => this.change(() => this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height))),
    ];
    this.canvas.addEventListener("pointerdown", (event) => this.down(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (this.isDown = false));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.at = this.place(event);
    this.isDown = true;
    this.change(() => this.line(this.at, this.at));
  }

  move(event) {
    const next = this.place(event);
    if (this.isDown) this.line(this.at, next);
    this.at = next;
    this.showBrush();
  }

  key(event) {
    const step = Math.max(this.canvas.width, this.canvas.height) / (event.shiftKey ? 10 : 50);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      const limits = [this.canvas.width, this.canvas.height];
      const next = this.at.map((value, axis) => Math.min(limits[axis], Math.max(0, value + moves[event.key][axis])));
      if (this.isDown) this.line(this.at, next);
      this.at = next;
    } else if (event.key === " ") {
      this.change(() => this.line(this.at, this.at));
    } else if (event.key === "[" || event.key === "]") {
      this.size.value = Number(this.size.value) * (event.key === "]" ? 1.25 : 0.8);
    } else return;
    event.preventDefault();
    this.showBrush();
  }

  line(from, to) {
    this.pen.globalCompositeOperation = this.erase.checked ? "destination-out" : "source-over";
    this.pen.strokeStyle = `rgb(${INK})`;
    this.pen.lineWidth = Number(this.size.value);
    this.pen.beginPath();
    this.pen.moveTo(...from);
    this.pen.lineTo(to[0] + 0.01, to[1]);
    this.pen.stroke();
  }

  /** Changes the mask in a way that "Undo" takes back. */
  change(call) {
    this.before.push(this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height));
    this.before.splice(0, this.before.length - UNDOS);
    call();
    this.showBrush();
  }

  undo() {
    const last = this.before.pop();
    if (last) this.pen.putImageData(last, 0, 0);
  }

  /** Fills the canvas, by one of its rules of composition. */
  fill(rule = "source-over", colour = `rgb(${INK})`) {
    this.pen.globalCompositeOperation = rule;
    this.pen.fillStyle = colour;
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  showBrush() {
    const scale = this.canvas.clientWidth / this.canvas.width;
    const wide = Number(this.size.value) * scale;
    Object.assign(this.brush.style, { left: `${this.at[0] * scale}px`, top: `${this.at[1] * scale}px`, width: `${wide}px`, height: `${wide}px` });
  }

  /** Loads a mask that was painted before. */
  async load(named) {
    const image = new Image();
    if (!(await show(image, pathOf(named)))) return;
    this.pen.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    const pixels = this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      pixels.data[at + 3] = pixels.data[at];
      INK.forEach((value, channel) => (pixels.data[at + channel] = value));
    }
    this.pen.putImageData(pixels, 0, 0);
  }

  /** Returns the mask as a PNG: white on black. */
  png() {
    this.fill("source-in", "#fff");
    this.fill("destination-over", "#000");
    return new Promise((done) => this.canvas.toBlob(done, "image/png"));
  }
}

/**
 * Lets a mask be painted over an image.
 * @param {Named} image
 * @param {Named|null} mask that is there already
 * @returns {Promise<Named|null>} the uploaded mask; null: none was painted
 */
export async function paintMask(image, mask) {
  const picture = make("img", { alt: "The image under the mask" });
  await show(picture, pathOf(image));
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const painting = new Painting(width, height);
  if (mask) await painting.load(mask);
  const paper = make("div.paper", {}, picture, painting.canvas, painting.brush);
  shape(paper, width, height);
  const help = "Paint over what is to be made again. Keys on the picture: arrows move the brush, Space paints, [ and ] change its size.";
  const done = opened("Mask", help, painting.tools, [paper]);
  painting.showBrush();
  if (!(await done)) return null;
  const blob = await painting.png();
  return (await tried(() => uploaded(blob)))?.named ?? null;
}

const SIDES = ["top", "right", "bottom", "left"];

/**
 * Lets borders be drawn around an image.
 * @param {Named} image
 * @param {string|null} before "T,R,B,L" in pixels
 * @returns {Promise<string|null|undefined>} "T,R,B,L"; null: no border; undefined: nothing was chosen
 */
export async function drawBorders(image, before) {
  const picture = make("img", { alt: "The image inside its new borders" });
  await show(picture, pathOf(image));
  const sides = { width: picture.naturalWidth, height: picture.naturalHeight };
  const given = /^\d+(,\d+){3}$/.test(before ?? "") ? before.split(",").map(Number) : [0, 0, 0, 0];
  const fields = SIDES.map((side, at) => make("input", { type: "number", min: 0, max: 4096, step: STEP, value: given[at], "aria-label": `Border at the ${side}, in pixels` }));
  const result = make("output.hint");
  const paper = make("div.paper", {}, picture);
  const scale = shape(paper, sides.width, sides.height, 0.5);
  const border = make("div.border");
  const handles = SIDES.map((side, at) => handle(side, fields[at], at, scale, update));
  paper.append(border, ...handles);

  function update() {
    const [top, right, bottom, left] = fields.map((field) => Math.max(0, Number(field.value)));
    const [width, height] = [left + sides.width + right, top + sides.height + bottom];
    Object.assign(border.style, { left: `${-left * scale}px`, top: `${-top * scale}px`, width: `${width * scale}px`, height: `${height * scale}px` });
    const middle = [width / 2 - left, height / 2 - top];
    const places = [[middle[0], -top], [sides.width + right, middle[1]], [middle[0], sides.height + bottom], [-left, middle[1]]];
    handles.forEach((one, at) => {
      one.setAttribute("aria-valuenow", fields[at].value);
      Object.assign(one.style, { left: `${places[at][0] * scale}px`, top: `${places[at][1] * scale}px` });
    });
    result.value = `${size(sides.width, sides.height)} becomes ${size(width, height)}`;
  }

  fields.forEach((field) => field.addEventListener("input", update));
  update();
  const labels = SIDES.map((side, at) => make("label.field", {}, side[0].toUpperCase() + side.slice(1), fields[at]));
  const help = "Drag the handles outwards, or move them with the arrow keys. The new borders are painted, the image stays as it is.";
  if (!(await opened("Expand", help, [...labels, result], [paper]))) return undefined;
  const values = fields.map((field) => Math.max(0, Math.round(Number(field.value) || 0)));
  return values.some(Boolean) ? values.join(",") : null;
}

/** Returns a handle that sets the border of a side. */
function handle(side, field, at, scale, update) {
  const isVertical = at % 2 === 0;
  const outward = at === 0 || at === 3 ? -1 : 1;
  const set = (value) => ((field.value = Math.min(4096, Math.max(0, Math.round(value / STEP) * STEP))), update());
  const element = make("div.handle", { tabIndex: 0, role: "slider", "aria-label": `Border at the ${side}`, "aria-valuemin": 0, "aria-valuemax": 4096,
    "aria-orientation": isVertical ? "vertical" : "horizontal" });
  let start = null;
  const along = (event) => (isVertical ? event.clientY : event.clientX);
  element.addEventListener("pointerdown", (event) => {
    element.setPointerCapture(event.pointerId);
    start = { at: along(event), value: Number(field.value) };
  });
  element.addEventListener("pointermove", (event) => start && set(start.value + ((along(event) - start.at) * outward) / scale));
  for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, () => (start = null));
  const keys = isVertical ? ["ArrowUp", "ArrowDown"] : ["ArrowLeft", "ArrowRight"];
  element.addEventListener("keydown", (event) => {
    const direction = keys.indexOf(event.key) * 2 - 1;
    if (Math.abs(direction) !== 1 || !keys.includes(event.key)) return;
    event.preventDefault();
    set(Number(field.value) + direction * outward * STEP);
  });
  return element;
}
