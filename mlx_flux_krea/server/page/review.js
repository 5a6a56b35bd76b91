// Review by a person: the quarantine, the questions and the log of `flux-krea review`.

import { ask, show } from "./api.js";
import { byId, counted, make, moment, quoted, say, shown, size, tried } from "./dom.js";

/** The view of what waits for a person. */
export class Review {
  constructor() {
    this.waiting = null; // answer of GET /api/review
    this.id = null; // of the picture that is open
    this.isOpen = false;
  }

  /** Takes an event `review`. */
  count(waiting) {
    byId("review-count").hidden = !waiting;
    byId("review-count").textContent = ` ${waiting} `;
    const isKnown = this.waiting?.pictures.length === waiting;
    if (this.isOpen && !isKnown) tried(() => this.read());
  }

  /** Opens or closes the view. */
  show(isOpen) {
    this.isOpen = isOpen;
    if (isOpen) return tried(() => this.read());
    this.id = null;
    byId("review").replaceChildren();
  }

  async read() {
    this.waiting = await ask("GET", "/api/review");
    const { pictures } = this.waiting;
    this.count(pictures.length);
    if (!pictures.length) {
      this.id = null;
      byId("review").replaceChildren(make("h2", {}, "Review"), make("p", {}, "Nothing waits for review."));
    } else if (!pictures.some((one) => one.id === this.id)) this.draw(pictures[0]);
    else byId("review-place").textContent = this.place();
  }

  place() {
    const at = this.waiting.pictures.findIndex((one) => one.id === this.id);
    return `${at + 1} of ${counted(this.waiting.pictures.length, "picture")}`;
  }

  draw(picture) {
    this.id = picture.id;
    const image = make("img", { alt: "The picture to review", width: picture.width, height: picture.height });
    const sheet = make("div.sheet", { tabIndex: 0, role: "region", "aria-label": "The picture at full size" }, image);
    const whole = make("input", { type: "checkbox", onchange: () => sheet.classList.toggle("whole", whole.checked) });
    const form = this.form(picture);
    const verdict = form.querySelector("button");
    verdict.disabled = true;
    show(image, `/api/review/${picture.id}/file`).then((isShown) => {
      if (!isShown) say("The picture could not be shown; it stays where it is", { isError: true });
      verdict.disabled = !isShown;
    });
    const { pictures } = this.waiting;
    const other = (by) => () => this.draw(pictures[(pictures.findIndex((one) => one.id === this.id) + by + pictures.length) % pictures.length]);
    byId("review").replaceChildren(
      make("div.row.spread", {}, make("h2", {}, "Review"), make("span.hint", { id: "review-place" }, this.place()),
        make("div.row", {}, make("button", { type: "button", onclick: other(-1), disabled: pictures.length < 2 }, "Before"),
          make("button", { type: "button", onclick: other(1), disabled: pictures.length < 2 }, "Next"))),
      make("p.hint", {}, "Nobody but you has seen this picture. It becomes one of your pictures only if you answer both questions with no."),
      make("div.review", {}, make("div", {}, sheet, make("label.check", {}, whole, "Show each pixel")), form));
  }

  form(picture) {
    const { questions, reviewer } = this.waiting;
    const answers = {};
    const name = make("input", { type: "text", value: reviewer, autocomplete: "name" });
    const reason = make("textarea", { rows: 2 });
    const confirm = make("input", { type: "text", autocomplete: "off" });
    const button = make("button.primary", { type: "submit" }, "Release");
    const confirmField = make("label.field", { hidden: true }, `Type “${this.waiting.delete}”: it is deleted for good`, confirm);
    const update = () => {
      const isRejected = Object.values(answers).some(Boolean);
      button.textContent = isRejected ? "Reject and delete" : "Release";
      confirmField.hidden = !isRejected;
    };
    const asked = questions.map(({ name: key, text }) => {
      const radio = (value, label) => make("label.check", {}, make("input", { type: "radio", name: key, onchange: () => ((answers[key] = value), update()) }), label);
      return make("fieldset", {}, make("legend", {}, text), radio(false, "No"), radio(true, "Yes"));
    });
    const scores = Object.entries(picture.scores).filter(([, value]) => value !== null).map(([key, value]) => `${key} ${Number(value).toFixed(3)}`);
    const submit = async (event) => {
      event.preventDefault();
      if (Object.keys(answers).length < questions.length) return say("Answer both questions", { isError: true });
      const verdict = { reviewer: name.value, answers, ...(reason.value && { reason: reason.value }), ...(confirm.value && { confirm: confirm.value }) };
      button.disabled = true;
      await tried(() => this.send(picture.id, verdict));
      button.disabled = false;
    };
    return make("form", { onsubmit: submit, noValidate: true, "aria-label": "Verdict" },
      make("p", {}, quoted(picture.prompt)),
      make("p.hint", {}, [picture.model, picture.seed !== null && `seed ${picture.seed}`, size(picture.width, picture.height), moment(picture.made)].filter(Boolean).map(shown).join(" · ")),
      scores.length ? make("p.hint", {}, `Filters' scores: ${scores.join(", ")}`) : null,
      ...picture.reasons.map((text) => make("p.warning", {}, shown(text))),
      ...asked, make("label.field", {}, "Your name", name),
      make("label.field", {}, picture.needs_reason ? "Reason (needed: a filter objected)" : "Reason", reason), confirmField, button);
  }

  async send(id, verdict) {
    const answer = await ask("POST", `/api/review/${id}`, verdict);
    say(answer.outcome === "released" ? "Released: it is one of your pictures" : "Rejected and deleted");
    this.id = null;
    await this.read();
    (byId("review").querySelector(".sheet") ?? byId("tab-review")).focus();
  }
}
