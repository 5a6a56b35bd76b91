// The prompt: what of it is read, its alternatives, and the prompts used before.

import { ask } from "./api.js";
import { byId, counted, later, make, moveByArrows, openDialog, quoted, shown, tried } from "./dom.js";

/**
 * Shows the tokens of the prompt while it is typed.
 * @param {function(): string|undefined} model gives the name of the chosen model
 * @returns {function(): void} to be called where the model changed
 */
export function watchPrompt(model) {
  const count = later(200, async () => {
    const prompt = byId("prompt").value;
    if (!prompt || !model()) return draw(null);
    try {
      const found = await ask("POST", "/api/tokens", { model: model(), prompt });
      if (prompt === byId("prompt").value) draw(found);
    } catch (error) {
      draw(null, error.message);
    }
  });
  byId("prompt").addEventListener("input", count);
  return count;
}

function draw(found, problem = "") {
  const longest = (name) => found.prompts.map((one) => one[name]).reduce((most, one) => (one.count > most.count ? one : most));
  const said = (name, label) => `${label} ${longest(name).count} of ${longest(name).length} tokens`;
  const pictures = found && found.pictures > 1 ? [`${counted(found.pictures, "alternative")}: a picture of each`] : [];
  byId("prompt-counts").textContent = found ? [said("clip", "CLIP"), said("t5", "T5"), ...pictures].join(" · ") : "";
  const cut = (name) => found?.prompts.map((one) => one[name].cut).find(Boolean);
  const lost = [["t5", "T5"], ["clip", "CLIP"]].filter(([name]) => cut(name)).map(([name, label]) => `${label} does not read: “${shown(cut(name))}”.`);
  byId("prompt-cut").textContent = [shown(problem), ...lost].filter(Boolean).join(" ");
}

/** Opens the list of prompts used before; the chosen one goes to the form. */
export function startHistory() {
  const dialog = byId("history");
  const read = () => tried(async () => {
    const { prompts } = await ask("GET", `/api/prompts?limit=100&query=${encodeURIComponent(byId("history-search").value)}`);
    const rows = prompts.map(({ prompt }) => make("li", {}, make("button", { type: "button", onclick: () => use(prompt) }, quoted(prompt))));
    byId("history-list").replaceChildren(...(rows.length ? rows : [make("li.hint", {}, "No prompt yet.")]));
  });
  const use = (prompt) => {
    dialog.close();
    byId("prompt").value = prompt;
    byId("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    byId("prompt").focus();
  };
  moveByArrows(byId("history-list"), "button");
  byId("history-search").addEventListener("input", later(200, read));
  byId("history-close").onclick = () => dialog.close();
  byId("history-open").onclick = () => {
    read();
    openDialog(dialog);
  };
}
