// The form: what the user says, as a request of docs/http.md, and back.

import { ask, pathOf, show } from "./api.js";
import { byId, later, make, quoted, say, seconds, shown, size, tried, bytes, counted } from "./dom.js";
import { Well, Wells } from "./images.js";
import { Shapes } from "./shapes.js";

const KEPT = "flux-krea-form"; // of the browser's storage for this address
// Fields whose elements have their names: numbers that are sent where they differ from the model's own, others where set.
const OF_MODEL = ["steps", "guidance"];
const NUMBERS = ["strength", "upscale", "true_cfg_scale", "quality"];
const TEXTS = ["negative_prompt", "solver", "schedule", "format", "metadata", "credentials", "style_rule", "fit", "control"];
const MARKS = ["fast", "crop_to_mask", "soft_mask", "watermark"];
// Fields of a request for which the form has no element; they are kept from "Use again" until "Start over".
const CARRIED = ["cache", "noise", "like", "no_paste", "no_auto_resize"];
// Fields that say nothing without an image, a mask, a control image, style images.
const NEEDS = { fit: "image", crop_to_mask: "mask", soft_mask: "mask", control: "control_image", style_rule: "styles" };
const CHOICES = { solver: "solvers", schedule: "schedules", fit: "fits", control: "controls", style_rule: "style_rules" };
const WORDS = {
  solver: { "": "Euler", dpmpp_2m: "DPM++ 2M", heun: "Heun: twice the time" },
  schedule: { "": "the model's" },
  fit: { "": "usual" },
  control: { "": "a finished map", canny: "a photo; make its Canny edges", depth: "a photo; make its depth map" },
  style_rule: { "": "grid: the prompt keeps its say" },
};

/** The form of the page. */
export class Form {
  /** @param {function(object): Promise<object>} generate puts a request into the queue, and returns the job */
  constructor(generate) {
    this.models = [];
    this.adapters = [];
    this.carried = {};
    this.lastSeed = null; // of the newest job
    this.mask = null;
    this.expand = null;
    this.changed = later(250, () => this.plan());
    const change = () => this.onChange();
    this.image = new Well("Image to start from", () => this.onImage());
    byId("image-well").replaceWith(this.image.element);
    this.controlImage = new Well("Control image file", change);
    byId("control-well").replaceWith(this.controlImage.element);
    this.references = new Wells(byId("references"), "Reference", change, false);
    this.styles = new Wells(byId("styles"), "Style image", change, true);
    this.shapes = new Shapes(change);
    for (let number = 1; number <= 4; number++) {
      const press = () => ((byId("num_images").value = number), change());
      byId("numbers").append(make("button", { type: "button", onclick: press, "aria-pressed": "false" }, String(number)));
    }
    byId("dice").onclick = () => this.setSeed(randomSeed());
    byId("seed").oninput = () => (byId("seed-lock").checked = byId("seed").value !== "");
    byId("seed-lock").onchange = () => this.setSeed(byId("seed-lock").checked ? (this.lastSeed ?? randomSeed()) : "");
    byId("model").onchange = () => this.chooseModel();
    byId("mask-remove").onclick = () => this.setMask(null);
    byId("clear").onclick = () => this.write({});
    byId("form").addEventListener("input", change);
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(generate);
    });
  }

  /** Takes the models, and what a request may hold. Restores what stood in the form before a reload. */
  async start(models, options) {
    for (const [name, list] of Object.entries(CHOICES)) {
      const others = options[list].filter((value) => value !== "euler" && value !== "grid");
      byId(name).replaceChildren(...["", ...others].map((value) => make("option", { value }, WORDS[name][value] ?? value)));
    }
    byId("format").replaceChildren(...[["", "PNG"], ["jpeg", "JPEG"], ["webp", "WebP"]].map(([value, text]) => make("option", { value }, text)));
    byId("metadata").replaceChildren(make("option", { value: "" }, "all settings"), make("option", { value: "minimal" }, "only that an AI made it"));
    byId("credentials").replaceChildren(...[["", "usual"], ["off", "no"], ["on", "yes (C2PA)"], ["require", "yes, or keep none"]].map(([value, text]) => make("option", { value }, text)));
    const kept = restored();
    await this.setModels(models);
    await this.write(kept);
  }

  /** Takes the list of `GET /api/models`. */
  setModels({ models, components }) {
    const before = byId("model").value;
    this.models = models;
    this.components = components;
    const usable = models.filter((one) => !one.problem);
    const text = (one) => shown(one.problem ? `${one.name} (cannot be used; see Models)` : one.name);
    byId("model").replaceChildren(...models.map((one) => make("option", { value: one.name, disabled: Boolean(one.problem) }, text(one))));
    const usual = usable.find((one) => one.default) ?? usable[0];
    byId("model").value = usable.some((one) => one.name === before) ? before : (usual?.name ?? "");
    return this.chooseModel();
  }

  /** The model that is chosen, of `GET /api/models`. */
  get model() {
    return this.models.find((one) => one.name === byId("model").value);
  }

  /** Brings the form to the chosen model: its own numbers, its shapes, what it takes. Its adapters follow. */
  chooseModel() {
    const { model } = this;
    if (!model) return undefined;
    for (const name of OF_MODEL) {
      const field = byId(name);
      if (field.value === "" || field.value === field.dataset.own) field.value = model.defaults[name] ?? "";
      field.dataset.own = model.defaults[name] ?? "";
    }
    byId("guidance-field").hidden = !model.takes.guidance;
    this.shapes.setModel(model);
    byId("image-part").hidden = !model.takes.image;
    byId("mask-open").hidden = !model.takes.mask;
    byId("expand-open").hidden = !model.takes.expand;
    byId("references-part").hidden = !model.takes.references;
    byId("control-part").hidden = !model.takes.control_image;
    byId("styles-part").hidden = !model.takes.styles || !this.components.redux;
    byId("previews-field").hidden = model.previews === "none";
    byId("upscale-field").hidden = !model.takes.upscale;
    this.tellPreviews(0);
    this.onChange();
    return this.readAdapters();
  }

  async readAdapters() {
    const name = this.model?.name;
    const found = await tried(() => ask("GET", `/api/adapters?model=${encodeURIComponent(name)}`));
    if (!found || this.model?.name !== name) return;
    const before = this.loras;
    this.adapters = found.adapters.map((one, number) => this.adapterRow(one, number));
    const empty = make("p.hint", {}, "None is installed. Add one with: flux-krea models add FILE");
    byId("loras").replaceChildren(...(this.adapters.length ? this.adapters.map((one) => one.element) : [empty]));
    this.setLoras(before);
    this.onChange();
  }

  adapterRow(one, number) {
    const mark = make("input", { type: "checkbox", disabled: Boolean(one.problem) });
    const weight = make("input", { type: "number", step: 0.05, value: one.weight, "aria-label": `Weight of ${shown(one.name)}` });
    const triggers = one.triggers.map((word) => make("button", { type: "button", onclick: () => this.addWord(word) }, quoted(word)));
    const about = one.problem ?? [one.steps && counted(one.steps, "step"), bytes(one.bytes)].filter(Boolean).join(", ");
    const element = make("div.adapter", {}, make("label.check", { id: `adapter-${number}` }, mark, quoted(one.name)), weight,
      make("div.triggers.row.hint", {}, shown(about), ...(triggers.length ? ["Words:", ...triggers] : [])));
    return { name: one.name, mark, weight, element };
  }

  /** Adds a trigger word to the end of the prompt. */
  addWord(word) {
    const prompt = byId("prompt");
    prompt.value = prompt.value ? `${prompt.value.trimEnd()}, ${word}` : word;
    prompt.dispatchEvent(new Event("input", { bubbles: true }));
  }

  get loras() {
    return this.adapters.filter((one) => one.mark.checked).map(({ name, weight }) => ({ name, ...(weight.value && { weight: Number(weight.value) }) }));
  }

  setLoras(chosen) {
    for (const row of this.adapters) {
      const found = chosen.find((one) => one.name === row.name);
      row.mark.checked = Boolean(found) && !row.mark.disabled;
      if (found?.weight !== undefined) row.weight.value = found.weight;
    }
  }

  onImage() {
    const isThere = Boolean(this.image.value);
    byId("image-options").hidden = !isThere;
    this.shapes.setImage(isThere);
    this.setMask(null);
    this.setExpand(null);
  }

  /** Holds a mask that is painted over the image; null: none. */
  setMask(value) {
    this.mask = value;
    byId("mask-state").hidden = !value;
    byId("crop-field").hidden = byId("soft-field").hidden = !value;
    if (value) show(byId("mask-image"), pathOf(value));
    this.onChange();
  }

  /** Holds the borders to paint around the image, "T,R,B,L"; null: none. */
  setExpand(value) {
    this.expand = value;
    byId("expand-state").textContent = value ? `Borders to paint (top, right, bottom, left): ${value}` : "";
    this.onChange();
  }

  /** The form as a request. */
  get request() {
    const request = { ...this.carried, prompt: byId("prompt").value, model: byId("model").value, ...this.shapes.value };
    const number = (name) => Number(byId(name).value);
    for (const name of OF_MODEL) if (byId(name).value !== "" && byId(name).value !== byId(name).dataset.own) request[name] = number(name);
    for (const name of NUMBERS) if (byId(name).value !== "") request[name] = number(name);
    for (const name of TEXTS) if (byId(name).value !== "") request[name] = byId(name).value;
    for (const name of MARKS) if (byId(name).checked) request[name] = true;
    if (number("num_images") !== 1) request.num_images = number("num_images");
    const seed = byId("seed").value.trim();
    if (seed) request.seed = /^\d+$/.test(seed) ? (Number.isSafeInteger(Number(seed)) ? Number(seed) : BigInt(seed)) : seed;
    if (this.loras.length) request.loras = this.loras;
    const takes = this.model?.takes ?? {};
    if (takes.image && this.image.value) request.image = this.image.value.id;
    if (request.image && takes.mask && this.mask) request.mask = this.mask.id;
    if (request.image && takes.expand && this.expand) request.expand = this.expand;
    if (takes.control_image && this.controlImage.value) request.control_image = this.controlImage.value.id;
    if (takes.references && this.references.values.length) request.references = this.references.values.map((one) => one.image.id);
    if (!byId("styles-part").hidden && this.styles.values.length) {
      request.styles = this.styles.values.map(({ image, weight }) => ({ image: image.id, weight }));
    }
    for (const name of ["guidance", "upscale"]) if (!takes[name]) delete request[name];
    for (const [name, needed] of Object.entries(NEEDS)) if (!(needed in request)) delete request[name];
    if (!("image" in request || "upscale" in request)) delete request.strength;
    return request;
  }

  /**
   * Fills the form with a request; what it does not name is as at first.
   * @param {object} request of docs/http.md, and `images`: {id: Named} for the images that it names
   */
  async write({ images = {}, ...request }) {
    const named = (id) => images[id] ?? { id, isPicture: false, width: 0, height: 0 };
    this.carried = Object.fromEntries(CARRIED.filter((name) => name in request).map((name) => [name, request[name]]));
    if (this.models.some((one) => one.name === request.model && !one.problem)) byId("model").value = request.model;
    for (const name of OF_MODEL) byId(name).value = request[name] ?? "";
    const adapters = this.chooseModel();
    byId("prompt").value = request.prompt ?? "";
    for (const name of [...NUMBERS, ...TEXTS]) byId(name).value = request[name] ?? "";
    for (const name of TEXTS) if (byId(name).value === "" && byId(name).options) byId(name).selectedIndex = 0;
    for (const name of MARKS) byId(name).checked = Boolean(request[name]);
    byId("num_images").value = request.num_images ?? 1;
    const seed = Array.isArray(request.seed) ? request.seed[0] : request.seed;
    this.setSeed(seed ?? "");
    this.image.set(request.image ? named(request.image) : null);
    this.shapes.write(request);
    if (request.mask) this.setMask(named(request.mask));
    if (request.expand) this.setExpand(request.expand);
    this.controlImage.set(request.control_image ? named(request.control_image) : null);
    this.references.set((request.references ?? []).map((id) => ({ image: named(id) })));
    this.styles.set((request.styles ?? []).map((one) => ({ image: named(one.image), weight: one.weight })));
    const isSet = { "image-part": request.image, "control-part": request.control_image, "references-part": request.references, "styles-part": request.styles,
      "loras-part": request.loras?.length, "more-part": ["negative_prompt", "true_cfg_scale", "solver", "schedule"].some((name) => name in request) };
    for (const [id, value] of Object.entries(isSet)) if (value) byId(id).open = true;
    this.onChange();
    await adapters;
    this.setLoras(request.loras ?? []);
    this.onChange();
  }

  /** Keeps a seed for the next pictures; "": each gets a new one. */
  setSeed(seed) {
    byId("seed").value = String(seed);
    byId("seed-lock").checked = seed !== "";
    this.onChange();
  }

  /** Uses a picture as the image to start from. */
  startFrom(value) {
    this.image.set(value);
    byId("image-part").open = true;
    say("The picture is the image to start from");
    byId("prompt").focus();
  }

  /** Keeps what stands in the form over a reload, and asks what it takes. */
  onChange() {
    if (!this.model) return;
    byId("numbers").childNodes.forEach((one, at) => one.setAttribute("aria-pressed", String(byId("num_images").value === String(at + 1))));
    const images = {};
    const all = [this.image.value, this.mask, this.controlImage.value, ...[...this.references.values, ...this.styles.values].map((one) => one.image)];
    for (const one of all) if (one) images[one.id] = one;
    const seed = String(this.request.seed ?? "");
    localStorage.setItem(KEPT, JSON.stringify({ ...this.request, ...(seed && { seed }), images }));
    this.changed();
  }

  /** Shows what the request takes, or why it cannot be made. */
  async plan() {
    const request = this.request;
    if (!request.prompt) return this.tell("", "");
    try {
      const found = await ask("POST", "/api/plan", request);
      byId("size").value = size(found.width, found.height);
      const steps = found.evaluations === found.steps ? counted(found.steps, "step") : `${found.steps} steps, ${found.evaluations} computed`;
      const each = found.seconds.picture === null ? null : `about ${seconds(found.seconds.picture + (found.seconds.filters ?? 0))} each`;
      const parts = [counted(found.pictures, "picture"), size(found.width, found.height), steps, each, `${bytes(found.peak)} of memory`];
      this.tell([parts.filter(Boolean).join(" · "), ...found.notes].join(". "), "");
      this.tellPreviews(found.seconds.previews);
    } catch (error) {
      this.tell("", error.message, error.param);
    }
  }

  tell(plan, problem, param = null) {
    byId("plan").textContent = shown(plan);
    byId("problem").textContent = shown(problem);
    for (const field of byId("form").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    if (param && byId(param)?.closest("#form")) byId(param).setAttribute("aria-invalid", "true");
  }

  tellPreviews(cost) {
    const each = cost ? `; they take ${seconds(cost)} more` : "";
    const text = this.model.previews === "checked" ? `Show up to two previews, each through both filters first${each}` : "Show previews";
    byId("previews-label").textContent = text;
  }

  async submit(generate) {
    const request = this.request;
    if (!request.prompt.trim() && !request.styles) {
      this.tell("", "Write a prompt first", "prompt");
      return byId("prompt").focus();
    }
    byId("generate").disabled = true;
    try {
      this.lastSeed = (await generate(request)).seeds[0];
      this.tell(byId("plan").textContent, "");
    } catch (error) {
      this.tell("", error.message, error.param);
    } finally {
      byId("generate").disabled = false;
    }
  }
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Returns what stood in the form before a reload. */
function restored() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {}; // nothing that this page wrote
  }
}
