// The queue: one job runs, the others wait.

import { ask, show } from "./api.js";
import { byId, make, quoted, say, seconds, shown, tried } from "./dom.js";

/** The list of jobs. */
export class Queue {
  /**
   * @param {object} calls
   * @param {function(string): void} calls.open opens a picture
   * @param {function(): void} calls.review opens the review
   */
  constructor(calls) {
    this.calls = calls;
    this.cards = new Map(); // by the job's id
    this.changes = 0; // events that came
    this.ids = []; // of the jobs that run or wait, in order
    byId("queue-clear").onclick = () => this.clear();
  }

  /** Reads the whole list again. */
  async read() {
    const { changes } = this;
    const { jobs } = await ask("GET", "/api/queue");
    if (changes !== this.changes) return this.read(); // an event came meanwhile
    const known = new Set(jobs.map((job) => job.id));
    for (const id of this.cards.keys()) if (!known.has(id)) this.remove(id);
    jobs.forEach((job) => this.update(job));
    byId("queue").append(...jobs.map((job) => this.cards.get(job.id).element));
    this.order(jobs.filter((job) => job.ended === null).map((job) => job.id));
    return this.count();
  }

  /** Takes an event `job`. */
  change(job) {
    this.changes += 1;
    this.update(job);
  }

  update(job) {
    if (job.removed) return this.remove(job.id);
    let card = this.cards.get(job.id);
    if (!card) {
      card = { element: make("li.job"), preview: make("img", { alt: "Preview" }) };
      this.cards.set(job.id, card);
      byId("queue").append(card.element); // its place follows as an event `queue`
    }
    const hasEnded = card.job && card.job.ended === null && job.ended !== null;
    card.job = job;
    this.draw(card);
    if (hasEnded) this.tellEnd(job);
    if (job.preview) this.preview({ job: job.id, ...job.preview });
    return this.count();
  }

  /** Takes an event `queue`: the order of the jobs that run or wait. */
  order(ids) {
    const first = ids.map((id) => this.cards.get(id)?.element).filter(Boolean);
    const focus = document.activeElement;
    byId("queue").prepend(...first);
    if (focus?.closest("#queue") && focus.isConnected) focus.focus();
    this.ids = ids;
    for (const card of this.cards.values()) this.drawMoves(card);
  }

  /** Takes an event `progress`. */
  progress(id, progress) {
    const card = this.cards.get(id);
    if (!card?.bar || !progress) return;
    const { done, total, label, unit, picture } = progress;
    const left = done > 0 && total ? (progress.seconds / done) * (total - done) : null;
    const text = [
      card.job.count > 1 && picture && `picture ${picture} of ${card.job.count}`,
      total ? `${shown(label)}: ${shown(unit)} ${done} of ${total}` : shown(label),
      left && `${seconds(left)} left`,
    ];
    card.bar.max = total || 1;
    if (total) card.bar.value = done;
    else card.bar.removeAttribute("value");
    card.about.textContent = text.filter(Boolean).join(" · ");
  }

  /** Takes an event `preview`. */
  async preview({ job: id, step, steps }) {
    const card = this.cards.get(id);
    if (!card || card.isLoading) return; // the next one comes soon
    card.isLoading = true;
    const isShown = await show(card.preview, `/api/queue/${id}/preview`);
    card.isLoading = false;
    if (!isShown || card.job.state !== "running") return;
    card.preview.alt = `Preview at step ${step} of ${steps}`;
    if (!card.preview.isConnected) card.element.append(card.preview);
  }

  draw(card) {
    const { job, element } = card;
    const isOpen = job.ended === null;
    const prompt = make("span.prompt", {}, quoted(job.request.prompt || "(no prompt)"));
    card.about = make("span.hint", {}, job.state);
    card.bar = job.state === "running" ? make("progress", { "aria-label": "Progress" }) : null;
    card.moves = make("span.row");
    const cancel = make("button", { type: "button", onclick: () => this.drop(job) }, isOpen ? "Cancel" : "Remove");
    cancel.setAttribute("aria-label", `${isOpen ? "Cancel" : "Remove"}: ${shown(job.request.prompt)}`);
    const hadFocus = element.contains(document.activeElement);
    element.replaceChildren(prompt, card.about, ...(card.bar ? [card.bar] : []), ...this.outcomes(job), ...this.words(job),
      make("div.row.spread", {}, card.moves, cancel));
    element.dataset.state = job.state;
    this.drawMoves(card);
    if (hadFocus) cancel.focus();
    if (job.state === "running") this.progress(job.id, job.progress);
    if (card.preview.src && job.state === "running") element.append(card.preview);
  }

  /** Returns what a job says: its error, and its notes. */
  words(job) {
    const notes = job.notes.map((note) => make("p.hint", {}, shown(note)));
    return job.error ? [...notes, make("p.hint.error", {}, shown(job.error.message))] : notes;
  }

  outcomes(job) {
    const thumbs = job.pictures.filter((one) => one.outcome === "released").map((one) => {
      const image = make("img", { alt: `Picture ${one.number}, seed ${one.seed}` });
      show(image, `/api/pictures/${one.picture}/thumbnail?side=128`);
      return make("button", { type: "button", onclick: () => this.calls.open(one.picture) }, image);
    });
    const waiting = job.pictures.filter((one) => one.outcome === "waiting").length;
    const withheld = job.pictures.filter((one) => one.outcome === "withheld");
    return [
      ...(thumbs.length ? [make("div.thumbs", {}, ...thumbs)] : []),
      ...(waiting ? [make("button", { type: "button", onclick: this.calls.review }, `${waiting} to review`)] : []),
      ...withheld.map((one) => make("p.hint.warning", {}, `Picture ${one.number} is withheld: ${shown(one.reason)}`)),
    ];
  }

  /** Draws the buttons that move a waiting job. */
  drawMoves({ job, moves }) {
    const at = this.ids.indexOf(job.id);
    const first = this.ids.findIndex((id) => this.cards.get(id)?.job.state === "waiting");
    if (at < 0 || job.state !== "waiting") return moves.replaceChildren();
    const button = (text, label, to) =>
      make("button", { type: "button", disabled: to < first || to >= this.ids.length, onclick: () => this.move(job.id, to), "aria-label": `${label}: ${shown(job.request.prompt)}` }, text);
    moves.replaceChildren(button("↑", "Earlier", at - 1), button("↓", "Later", at + 1));
  }

  move(id, to) {
    const ids = this.ids.filter((one) => one !== id);
    ids.splice(to, 0, id);
    return tried(() => ask("PUT", "/api/queue/order", { ids: ids.filter((one) => this.cards.get(one)?.job.state === "waiting") }));
  }

  drop(job) {
    return tried(async () => {
      const answer = await ask("DELETE", `/api/queue/${job.id}`);
      if (job.ended === null) say(answer.state === "running" ? "It stops" : "Cancelled");
    });
  }

  clear() {
    const ended = [...this.cards.values()].filter(({ job }) => job.ended !== null);
    return tried(() => Promise.all(ended.map(({ job }) => ask("DELETE", `/api/queue/${job.id}`))));
  }

  remove(id) {
    this.cards.get(id)?.element.remove();
    this.cards.delete(id);
    this.count();
  }

  count() {
    const jobs = [...this.cards.values()].map((card) => card.job);
    byId("queue-empty").hidden = jobs.length > 0;
    byId("queue-clear").hidden = !jobs.some((job) => job.ended !== null);
    const open = jobs.filter((job) => job.ended === null).length;
    document.title = open ? `(${open}) flux-krea` : "flux-krea";
  }

  tellEnd(job) {
    const prompt = job.request.prompt.slice(0, 60);
    if (job.state === "failed") say(`Failed: ${prompt}. ${job.error?.message ?? ""}`, { isError: true });
    if (job.state === "done") say(`Done: ${prompt}`);
  }
}
