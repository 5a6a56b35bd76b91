// Places of the form that hold an image: chosen, dropped, or taken from the pictures.

import { pathOf, show, upload } from "./api.js";
import { make, say, size, tried } from "./dom.js";

/**
 * An image that a request names.
 * @typedef {{id: string, isPicture: boolean, width: number, height: number, hasAlpha?: boolean}} Named
 */

/**
 * Uploads an image.
 * @param {Blob} blob
 * @returns {Promise<{named: Named, request: object|null, missing: string[]}>} `request` where it was made here
 */
export async function uploaded(blob) {
  const { id, width, height, has_alpha, request, missing } = await upload(blob);
  return { named: { id, isPicture: false, width, height, hasAlpha: has_alpha }, request, missing };
}

/** A place for one image. */
export class Well {
  /**
   * @param {string} label its accessible name
   * @param {function(): void} onChange called after each change
   * @param {Node[]} beside what stands below the image
   */
  constructor(label, onChange, beside = []) {
    this.value = null;
    this.label = label;
    this.onChange = onChange;
    this.chosen = make("input", { type: "file", accept: "image/*", "aria-label": label, onchange: () => this.take(this.chosen.files[0]) });
    this.image = make("img", { alt: label, hidden: true });
    this.text = make("span.hint");
    this.remove = make("button.plain", { type: "button", hidden: true, "aria-label": `Remove: ${label}`, onclick: () => this.set(null) }, "Remove");
    this.element = make("div.well", {}, this.chosen, this.image, make("div.row.spread", {}, this.text, this.remove), ...beside);
    acceptDrops(this.element, (file) => this.take(file));
  }

  /** Uploads a file and holds it. */
  async take(file) {
    if (!file) return;
    this.text.textContent = "Uploading …";
    const found = await tried(() => uploaded(file));
    this.text.textContent = "";
    if (found) this.set(found.named);
  }

  /** Holds an image; null: none. */
  async set(value) {
    this.value = value;
    this.image.hidden = this.remove.hidden = !value;
    this.image.removeAttribute("src");
    this.chosen.value = "";
    this.text.textContent = value ? size(value.width, value.height) : "";
    this.onChange();
    if (value && !(await show(this.image, pathOf(value))) && this.value === value) {
      say(`${this.label}: the image is no longer here; choose it again`);
      this.set(null);
    }
  }
}

/** A list of images, each with a weight where `hasWeights` says so. An empty place stands at its end. */
export class Wells {
  /**
   * @param {Element} place
   * @param {string} label of each, before its number
   * @param {function(): void} onChange
   * @param {boolean} hasWeights
   */
  constructor(place, label, onChange, hasWeights) {
    Object.assign(this, { place, label, onChange, hasWeights, rows: [] });
    this.add();
  }

  add() {
    const name = `${this.label} ${this.rows.length + 1}`;
    const weight = make("input", { type: "number", step: 0.05, value: 1, onchange: this.onChange });
    const beside = this.hasWeights ? [make("label.field", {}, `Weight of ${name.toLowerCase()}`, weight)] : [];
    const row = { weight, well: new Well(name, () => this.changed(), beside) };
    this.rows.push(row);
    this.place.append(row.well.element);
    return row;
  }

  changed() {
    for (const row of this.rows.slice(0, -1).filter((one) => !one.well.value)) {
      this.rows.splice(this.rows.indexOf(row), 1);
      row.well.element.remove();
    }
    if (this.rows.at(-1).well.value) this.add();
    this.onChange();
  }

  /** The images: [{image: Named, weight: number}]. */
  get values() {
    return this.rows.filter(({ well }) => well.value).map(({ well, weight }) => ({ image: well.value, weight: Number(weight.value || 1) }));
  }

  /** Holds these images in place of the others. */
  set(values) {
    this.rows.splice(0).forEach(({ well }) => well.element.remove());
    for (const { image, weight } of values) {
      const row = this.add();
      row.weight.value = weight ?? 1;
      row.well.set(image);
    }
    if (!this.rows.length || this.rows.at(-1).well.value) this.add();
  }
}

/** Calls a function with each file that is dropped on an element. */
export function acceptDrops(element, call) {
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  element.addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    event.stopPropagation();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    event.stopPropagation();
    element.classList.remove("over");
    call(event.dataTransfer.files[0]);
  });
}
