// Installed models, what they take on this machine, and the filters.

import { ask } from "./api.js";
import { byId, bytes, make, quoted, say, seconds, shown, size, tried } from "./dom.js";

/** Draws the view of models. Plans come one by one. */
export async function drawModels({ models, filters, check, components }) {
  const settings = await ask("GET", "/api/settings");
  const status = await ask("GET", "/api/status");
  const cards = models.map((one) => card(one));
  byId("models").replaceChildren(make("h2", {}, "Models"), ...cards.map(({ element }) => element),
    make("p.hint", {}, "Add one with: flux-krea convert FOLDER, or flux-krea models add FILE"),
    make("h2", {}, "Checks"), checks(filters, check, components), make("h2", {}, "This machine"), machine(settings, status));
  for (const { model, place } of cards) if (!model.problem) place.textContent = await planned(model);
}

function card(model) {
  const place = make("p.hint", {}, model.problem ? "" : "…");
  const about = [model.base, model.precision, bytes(model.bytes), model.task, model.kind, model.loaded && "in memory"].filter(Boolean).map(shown).join(" · ");
  const makeUsual = () => tried(async () => (await ask("PUT", "/api/models/default", { name: model.name }), say("It is used where no other is named")));
  const choice = model.problem ? make("p.error", {}, shown(model.problem)) : make("button", { type: "button", disabled: model.default, onclick: makeUsual }, model.default ? "Used by default" : "Use by default");
  const duty = model.requires_filters ? "Its licence asks for filters or review." : "It requires no filters.";
  return { model, place, element: make("article.card", {}, make("h3", {}, quoted(model.name)), make("p", {}, about), make("p.hint", {}, duty), place, choice) };
}

async function planned({ name }) {
  try {
    const found = await ask("POST", "/api/plan", { model: name, prompt: "a" });
    const blocks = found.resident_blocks < found.total_blocks ? `, ${found.resident_blocks} of ${found.total_blocks} blocks kept in it` : "";
    const time = found.seconds.picture === null ? "" : `; about ${seconds(found.seconds.picture)} a picture on ${found.chip}`;
    return shown(`Plan for this machine: ${size(found.width, found.height)}, ${found.steps} steps, ${bytes(found.peak)} of memory${blocks}${time}`);
  } catch (error) {
    return shown(error.message);
  }
}

function checks(filters, check, components) {
  const state = (name, problem) => make("li", {}, `${name}: `, problem ? make("span.warning", {}, shown(problem)) : "ready");
  const parts = Object.entries(components).map(([name, isThere]) => make("li", {}, `${name}: ${isThere ? "installed" : "not installed"}`));
  return make("div.card", {}, make("p", {}, `Pictures are checked by ${check === "review" ? "a person" : "filters"}.`),
    make("ul", {}, ...Object.entries(filters).map(([name, problem]) => state(`Filter ${name}`, problem)), ...parts));
}

function machine(settings, status) {
  const minutes = make("input", { type: "number", min: 0, value: settings.idle_minutes });
  minutes.onchange = () => tried(async () => (await ask("PUT", "/api/settings", { idle_minutes: Number(minutes.value) }), say("Kept")));
  const model = status.model ? `${status.model} is in memory` : "no model is in memory";
  return make("div.card", {}, make("p", {}, shown(`flux-krea ${status.version}; ${model}; ${bytes(status.memory)} in use; ${bytes(status.home_free)} free on the disk.`)),
    make("label.field", {}, "Minutes without a job after which the model leaves the memory", minutes));
}
