// The shape of the picture: areas and aspect ratios as buttons, or sides of one's own.

import { byId, make, size } from "./dom.js";

const AS_IMAGE = "image";
const OWN = "own";

/** The choice of a shape. */
export class Shapes {
  /** @param {function(): void} onChange */
  constructor(onChange) {
    this.sizes = [];
    this.hasImage = false;
    for (const id of ["areas", "aspects"]) byId(id).addEventListener("change", () => this.update());
    this.onChange = onChange;
  }

  /** Shows the shapes of a model; the chosen ones stay where it has them. */
  setModel(model) {
    const area = this.chosen("area");
    const aspect = this.chosen("aspect");
    this.sizes = model.sizes;
    const areas = [...new Set(model.sizes.map((one) => one.megapixels))];
    byId("areas").replaceChildren(...areas.map((value, at) => choice("area", String(value), at ? `${value} MP` : "Model's own")));
    const aspects = [...new Set(model.sizes.map((one) => one.aspect))];
    const shapes = aspects.map((name) => choice("aspect", name, name, model.sizes.find((one) => one.aspect === name)));
    byId("aspects").replaceChildren(choice("aspect", AS_IMAGE, "As the image"), ...shapes, choice("aspect", OWN, "Other"));
    this.choose("area", area ?? String(areas[0]));
    this.choose("aspect", aspect ?? "1:1");
  }

  /** Offers the shape of the image, and chooses it, where there is one. */
  setImage(hasImage) {
    if (hasImage !== this.hasImage) {
      this.hasImage = hasImage;
      if (hasImage || this.chosen("aspect") === AS_IMAGE) this.choose("aspect", hasImage ? AS_IMAGE : "1:1");
    }
    this.update();
  }

  /** The fields of a request: width and height, or none where the image decides. */
  get value() {
    const aspect = this.chosen("aspect");
    if (aspect === AS_IMAGE) return {};
    if (aspect === OWN) return Object.fromEntries(["width", "height"].filter((id) => byId(id).value).map((id) => [id, Number(byId(id).value)]));
    const found = this.sizes.find((one) => one.aspect === aspect && String(one.megapixels) === this.chosen("area"));
    return found ? { width: found.width, height: found.height } : {};
  }

  /** Chooses the shape of a request. */
  write({ width, height, aspect, megapixels, image }) {
    const isIt = (one) => (width ? one.width === width && one.height === height : one.aspect === aspect && (!megapixels || one.megapixels === megapixels));
    const found = this.sizes.find(isIt);
    if (found) this.choose("area", String(found.megapixels));
    const other = width || height ? OWN : image ? AS_IMAGE : "1:1";
    [byId("width").value, byId("height").value] = [width ?? "", height ?? ""];
    this.choose("aspect", found?.aspect ?? other);
    this.update();
  }

  chosen(name) {
    return document.querySelector(`input[name="${name}"]:checked`)?.value;
  }

  choose(name, value) {
    const all = [...document.querySelectorAll(`input[name="${name}"]`)];
    (all.find((one) => one.value === value) ?? all.find((one) => one.value !== AS_IMAGE)).checked = true;
    this.update();
  }

  update() {
    const aspect = this.chosen("aspect");
    const asImage = document.querySelector(`input[name="aspect"][value="${AS_IMAGE}"]`);
    if (asImage) asImage.parentElement.hidden = !this.hasImage;
    byId("own-size").hidden = aspect !== OWN;
    const { width, height } = this.value;
    byId("size").value = width && height ? size(width, height) : "as the image";
    this.onChange();
  }
}

function choice(name, value, text, sides = null) {
  const picture = sides && make("i");
  if (picture) {
    const scale = 18 / Math.max(sides.width, sides.height);
    picture.style.width = `${sides.width * scale}px`;
    picture.style.height = `${sides.height * scale}px`;
  }
  return make("label.choice", {}, make("input", { type: "radio", name, value }), picture, text);
}
