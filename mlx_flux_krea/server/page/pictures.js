// The list of pictures, newest first.

import { ask, show } from "./api.js";
import { byId, counted, later, make, moveByArrows, quoted, shown, tried } from "./dom.js";

const PAGE = 60; // pictures read at a time
const MOST = 600; // pictures listed at once; older ones are a search away

/** The list. */
export class Pictures {
  /**
   * @param {object} calls
   * @param {function(object[], number): void} calls.open shows the picture at a place of a list
   * @param {function(object[]): void} calls.compare shows two pictures side by side
   */
  constructor(calls) {
    this.calls = calls;
    this.list = []; // of GET /api/pictures
    this.items = new Map(); // elements by id
    this.chosen = new Set(); // ids of the selected ones, at most two
    this.next = null;
    this.total = 0;
    this.changes = 0; // events that came
    byId("search").addEventListener("input", later(250, () => tried(() => this.read())));
    byId("older").onclick = () => tried(() => this.older());
    byId("compare").onclick = () => calls.compare(this.list.filter((one) => this.chosen.has(one.id)));
    byId("deselect").onclick = () => this.select([]);
    moveByArrows(byId("pictures"), ".picture > button");
    // Thumbnails are read as they come into view, and their memory is given back out of it.
    this.watcher = new IntersectionObserver((seen) => seen.forEach((one) => this.see(one)), { rootMargin: "600px" });
  }

  /** Reads the newest pictures that fit the search. */
  async read() {
    const { query, changes } = this;
    const found = await this.page();
    if (query !== this.query) return undefined;
    if (changes !== this.changes) return this.read(); // an event came meanwhile
    this.list = [];
    this.items.forEach((element) => this.watcher.unobserve(element));
    this.items.clear();
    byId("pictures").replaceChildren();
    this.select([]);
    return this.add(found);
  }

  /** The words that are searched. */
  get query() {
    return byId("search").value.trim();
  }

  page(before = "") {
    return ask("GET", `/api/pictures?${new URLSearchParams({ limit: PAGE, query: this.query, before })}`);
  }

  async older() {
    this.add(await this.page(this.next));
  }

  add({ pictures, next, total }) {
    this.list.push(...pictures);
    byId("pictures").append(...pictures.map((one) => this.item(one)));
    this.next = this.list.length < MOST ? next : null;
    this.total = total;
    this.count();
  }

  /** Takes an event `pictures`. */
  change({ added, removed }) {
    this.changes += 1;
    for (const id of removed) this.remove(id);
    const words = this.query.toLowerCase().split(/\s+/);
    for (const one of added) {
      if (this.items.has(one.id) || !words.every((word) => (one.prompt ?? "").toLowerCase().includes(word))) continue;
      this.total += 1;
      const at = this.list.findIndex((other) => other.created <= one.created);
      if (at < 0 && this.next) continue; // older than what is listed
      this.list.splice(at < 0 ? this.list.length : at, 0, one);
      byId("pictures").insertBefore(this.item(one), byId("pictures").children[at < 0 ? this.list.length : at] ?? null);
    }
    for (const one of this.list.slice(MOST)) this.forget(one.id);
    this.list.length = Math.min(this.list.length, MOST);
    this.count();
  }

  remove(id) {
    if (!this.items.has(id)) return;
    this.total -= 1;
    const isFocused = this.items.get(id).contains(document.activeElement);
    const at = this.list.findIndex((one) => one.id === id);
    this.forget(id);
    this.list.splice(at, 1);
    if (isFocused) (byId("pictures").children[Math.min(at, this.list.length - 1)]?.querySelector("button") ?? byId("search")).focus();
    this.select([...this.chosen].filter((one) => one !== id));
  }

  forget(id) {
    this.watcher.unobserve(this.items.get(id));
    this.items.get(id).remove();
    this.items.delete(id);
  }

  item(one) {
    const image = make("img", { alt: "", width: 256, height: 256 });
    const name = `${shown(one.prompt) || "Picture"}, ${one.width} by ${one.height}${one.signed ? ", signed" : ""}`;
    const open = () => this.calls.open(this.list, this.list.findIndex((other) => other.id === one.id));
    const mark = make("input", { type: "checkbox", "aria-label": `Select: ${shown(one.prompt)}`, onchange: () => this.mark(one.id, mark.checked) });
    const element = make("li.picture", {},
      make("button", { type: "button", "aria-label": name, title: shown(one.prompt), onclick: open, tabIndex: this.items.size ? -1 : 0 }, image, make("span.prompt", {}, quoted(one.prompt))),
      make("span.select", {}, mark), ...(one.signed ? [make("span.badge.signed", { "aria-hidden": "true", title: "It has content credentials (C2PA)" }, "signed")] : []));
    Object.assign(element, { image, mark, picture: one });
    this.items.set(one.id, element);
    this.watcher.observe(element);
    return element;
  }

  see({ target, isIntersecting }) {
    if (isIntersecting && !target.image.hasAttribute("src")) show(target.image, `/api/pictures/${target.picture.id}/thumbnail?side=384`);
    if (!isIntersecting) {
      target.image.removeAttribute("src");
      delete target.image.dataset.path;
    }
  }

  mark(id, isChosen) {
    const others = [...this.chosen].filter((one) => one !== id);
    this.select(isChosen ? [...others.slice(-1), id] : others);
  }

  select(ids) {
    this.chosen = new Set(ids);
    for (const [id, element] of this.items) element.mark.checked = this.chosen.has(id);
    byId("selection").hidden = !ids.length;
    byId("selected").value = `${ids.length} selected`;
    byId("compare").disabled = ids.length !== 2;
  }

  count() {
    byId("pictures-empty").hidden = this.list.length > 0;
    byId("pictures-empty").textContent = this.query ? "No prompt has these words." : "No picture yet. Write a prompt and press Generate.";
    byId("older").hidden = !this.next;
    byId("total").value = counted(this.total, "picture");
    const first = byId("pictures").querySelector(".picture > button");
    if (first && !byId("pictures").querySelector('.picture > button[tabindex="0"]')) first.tabIndex = 0;
  }
}
