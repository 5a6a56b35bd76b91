// The first run: what is missing, and `flux-krea setup` with its progress.

import { ask } from "./api.js";
import { byId, bytes, make, seconds, shown, tried } from "./dom.js";

const MISSING = { model: "FLUX.1 Krea [dev] is not installed", filters: "the filters are not installed", licence: "nobody has agreed to the licence" };
const WORDS = { filters: "Filters check each picture", review: "I review each picture myself" };
const PRECISIONS = { none: "as published, 16 bits", 8: "8 bits (recommended)", 6: "6 bits", 5: "5 bits", 4: "4 bits: the smallest" };

/** Draws an answer of `GET /api/setup`. */
export function drawSetup(found) {
  byId("setup").hidden = found.ready && !found.running;
  if (byId("setup").hidden) return byId("setup-body").replaceChildren();
  const isChoosing = byId("setup-body").contains(document.activeElement) && !found.running && !found.licence;
  if (isChoosing && byId("setup-body").dataset.choosing) return undefined; // somebody is choosing
  const missing = found.missing.map((name) => MISSING[name] ?? shown(name));
  const small = found.models.includes("nano") ? " Meanwhile the small model, nano, works." : "";
  const parts = [make("p", {}, `${missing.join("; ") || "Nothing is missing"}.${small}`)];
  if (found.error) parts.push(make("p.error", { role: "alert" }, shown(found.error.message)));
  if (found.licence) parts.push(licence(found));
  else if (found.running) parts.push(running(found));
  else parts.push(choices(found));
  byId("setup-body").dataset.choosing = found.running || found.licence ? "" : "yes";
  byId("setup-body").replaceChildren(make("div.card", {}, ...parts));
  return undefined;
}

const start = (value) => tried(async () => drawSetup(await ask("POST", "/api/setup", value)));

function choices(found) {
  const about = ({ download, disk, seconds: time }) => [download && `${bytes(download)} to download`, disk && `${bytes(disk)} on disk`, time && `${seconds(time)} a picture`].filter(Boolean).join(", ");
  const checks = found.choices.checks.map((one, at) => make("label.check", {}, make("input", { type: "radio", name: "setup-check", value: one.name, checked: at === 0 }), `${WORDS[one.name] ?? one.name} ${about(one) && `(${about(one)})`}`));
  const precision = make("select", { id: "setup-precision" }, ...found.choices.precisions.map((value) => make("option", { value, selected: value === "8" }, PRECISIONS[value] ?? value)));
  const isNew = found.missing.includes("model"); // an installed one has its precision
  const submit = (event) => {
    event.preventDefault();
    start({ check: new FormData(event.target).get("setup-check"), ...(isNew && { quantize: precision.value }) });
  };
  return make("form", { onsubmit: submit, "aria-label": "Set up FLUX.1 Krea" }, make("fieldset", {}, make("legend", {}, "Checks, which the licence asks for"), ...checks),
    make("div.row", {}, isNew && make("div.field", {}, make("label", { htmlFor: "setup-precision" }, "Precision of the model"), precision), make("button.primary", { type: "submit" }, "Set up")));
}

function running(found) {
  const stop = make("button", { type: "button", onclick: () => tried(async () => drawSetup(await ask("DELETE", "/api/setup"))) }, "Stop; it continues later");
  const steps = found.steps.map((one) => make("li", { className: one.state }, `${shown(one.name)} `, make("span.hint", {}, shown(one.text || one.state))));
  return make("div", {}, make("ul.steps", { "aria-label": "Steps of the set-up" }, ...steps), make("p", { role: "status" }, shown(found.progress ?? "")),
    found.log.length ? make("details", {}, make("summary", {}, "What it says"), make("pre", { tabIndex: 0 }, shown(found.log.join("\n")))) : null, stop);
}

function licence({ licence: { text, sha256, page } }) {
  const agreed = make("input", { type: "checkbox", onchange: () => (go.disabled = !agreed.checked) });
  const go = make("button.primary", { type: "button", disabled: true, onclick: () => start({ accept_licence: sha256 }) }, "Continue");
  const link = /^https:/.test(page ?? "") ? make("a", { href: page, rel: "noreferrer noopener", target: "_blank" }, "The licence on its own page") : null;
  return make("div", {}, make("h3", {}, "The licence of FLUX.1 [dev]"), make("div.licence", { tabIndex: 0, role: "region", "aria-label": "Text of the licence" }, shown(text)),
    link, make("label.check", {}, agreed, "I have read it and agree"), go);
}
