// The reader of rollouts: filters, the list, one text or two side by side, and the token that is looked at.

class Reader {
  constructor(place) {
    this.place = place;
    this.texts = [];
    this.selected = null;
    this.compared = null;
  }

  // Gives each rollout a key that names it for as long as the page lives, through every update.
  giveKeys(rollouts) {
    this.byKey = new Map();
    for (const each of rollouts) {
      each.key = [each.run, each.stage, each.step, each.prompt_key, each.prompt_id, each.sample_id].join("|");
      while (this.byKey.has(each.key)) each.key += "+";
      this.byKey.set(each.key, each);
    }
  }

  nameOf(rollout, withRun = this.data.runs.length > 1) {
    const parts = [withRun ? this.data.runs[rollout.run].name : null, rollout.stage || null,
      rollout.step === null ? null : `step ${rollout.step}`, `prompt ${rollout.prompt_id}`];
    return parts.filter(Boolean).join(" · ");
  }

  update(data) {
    const kept = this.filters ? this.values() : {};
    this.data = data;
    if (!data.rollouts.length) {
      this.clearTexts();
      this.place.replaceChildren(empty("No rollout has been kept yet. A run keeps some at its first step and then every show_rollouts_every steps; switchkd rollout writes a file of them."));
      this.filters = null;
      return;
    }
    this.giveKeys(data.rollouts);
    this.template = sharedEnds([...new Set(data.rollouts.map((rollout) => rollout.prompt))]);
    const first = !this.filters;
    if (first) this.build();
    this.fillChoices(kept);
    const gone = !this.byKey.has(this.selected) || (this.compared && !this.byKey.has(this.compared));
    this.filter();
    if (first || gone) this.select(this.byKey.has(this.selected) ? this.selected : this.firstKey());
    else this.fillCompared();
    const beyond = data.rollouts_beyond ? ` ${plural(data.rollouts_beyond, "more rollout")} in the files: --rollouts takes more.` : "";
    const broken = data.lines_left_out ? ` ${plural(data.lines_left_out, "line")} could not be read as rollouts.` : "";
    this.note.textContent = beyond + broken;
  }

  // The first whose prompt was written more than once, so that there is something to set beside it.
  firstKey() {
    const choice = this.shown.length ? this.shown : this.data.rollouts;
    const times = new Map();
    for (const each of this.data.rollouts) times.set(each.prompt_key, (times.get(each.prompt_key) || 0) + 1);
    return (choice.find((each) => times.get(each.prompt_key) > 1) || choice[0]).key;
  }

  build() {
    this.clearTexts();
    const choose = (label, name) => h("label", {}, label, h("select", { name }));
    const range = (label, name, step) => h("label", {}, label, h("input", { name, type: "number", min: "0", step, inputmode: "decimal" }));
    const isWide = matchMedia("(min-width: 801px)").matches;
    this.filters = h("form", { class: "filters", "aria-label": "Filter the rollouts" },
      choose("Run", "run"), choose("Step", "step"),
      h("fieldset", {}, h("legend", {}, "Teacher's share, %"), range("from", "shareFrom", "any"), range("to", "shareTo", "any")),
      h("fieldset", {}, h("legend", {}, "Tokens"), range("from", "lengthFrom", "1"), range("to", "lengthTo", "1")),
      h("fieldset", {}, h("legend", {}, "Mean divergence"), range("from", "divergenceFrom", "any"), range("to", "divergenceTo", "any")),
      choose("Ended", "ended"),
      h("button", { type: "reset" }, "Reset"));
    for (const event of ["input", "change"]) this.filters.addEventListener(event, () => this.filter());
    this.filters.addEventListener("submit", (event) => event.preventDefault());
    this.filters.addEventListener("reset", () => setTimeout(() => this.filter()));
    this.count = h("p", { class: "muted", role: "status", id: "rollout-count" });
    this.note = h("p", { class: "muted" });
    this.list = h("ul", { class: "rollout-list", "aria-label": "Rollouts" });
    this.pair = h("div", { class: "pair" });
    this.inspector = h("div", { class: "inspector card", role: "status", "aria-label": "The token looked at" });
    this.hint();
    this.place.replaceChildren(legendOfTokens(), h("details", { class: "filter-box", open: isWide }, h("summary", {}, "Filter"), this.filters), h("div", { class: "reading" },
      h("div", { class: "choice" }, this.count, this.list, this.note),
      h("div", { class: "texts" }, this.pair, this.inspector)));
  }

  fillChoices(kept) {
    const { rollouts, runs } = this.data;
    const steps = [...new Set(rollouts.map((each) => each.step).filter((each) => each !== null))].sort((a, b) => a - b);
    const ends = [...new Set(rollouts.map((each) => each.ended))];
    const used = runs.map((run, index) => [String(index), run.name]).filter(([index]) => rollouts.some((each) => each.run === Number(index)));
    this.choices("run", [["", "all"], ...used], used.length < 2);
    this.choices("step", [["", "all"], ...steps.map((step) => [String(step), String(step)])], steps.length < 2);
    this.choices("ended", [["", "any way"], ...ends.map((end) => [end, this.endingOf(end)])], false);
    for (const [name, value] of Object.entries(kept)) this.filters.elements[name].value = value;
  }

  choices(name, options, hidden) {
    const select = this.filters.elements[name];
    select.replaceChildren(...options.map(([value, label]) => h("option", { value }, label)));
    select.closest("label").hidden = hidden;
  }

  endingOf(reason) {
    return { end_of_text: "by end of text", length: "by its length" }[reason] || reason;
  }

  values() {
    return Object.fromEntries(new FormData(this.filters));
  }

  filter() {
    const wanted = this.values();
    const within = (value, from, to, scale = 1) =>
      (from === "" || (value !== null && value * scale >= Number(from))) && (to === "" || (value !== null && value * scale <= Number(to)));
    this.shown = this.data.rollouts.filter((each) =>
      (wanted.run === "" || each.run === Number(wanted.run)) &&
      (wanted.step === "" || each.step === Number(wanted.step)) &&
      (wanted.ended === "" || each.ended === wanted.ended) &&
      within(each.share, wanted.shareFrom, wanted.shareTo, 100) &&
      within(each.texts.length, wanted.lengthFrom, wanted.lengthTo) &&
      within(each.mean_divergence, wanted.divergenceFrom, wanted.divergenceTo));
    this.count.textContent = this.shown.length === this.data.rollouts.length
      ? plural(this.shown.length, "rollout") : `${this.shown.length} of ${plural(this.data.rollouts.length, "rollout")}`;
    this.list.replaceChildren(...(this.shown.length ? this.shown.map((each) => this.entry(each)) : [h("li", {}, empty("No rollout fits these filters."))]));
  }

  // What sets a prompt apart from the others: most of each is often the same template.
  excerpt(prompt) {
    const [start, end] = this.template;
    const own = prompt.slice(start, prompt.length - end).trim().slice(0, 160);
    return Array.from(own || prompt.slice(0, 160), (c) => (unseen(c) ? " " : c)).join("");
  }

  entry(rollout) {
    const { key } = rollout;
    const bar = h("span", { class: "share-bar teacher" });
    bar.style.width = `${100 * rollout.share}%`;
    const button = h("button", { type: "button", "aria-current": String(key === this.selected), "data-key": key },
      h("span", { class: "entry-name" }, this.nameOf(rollout)),
      h("span", { class: "entry-prompt" }, this.excerpt(rollout.prompt)),
      h("span", { class: "entry-facts" }, `teacher ${percent(rollout.share)} · ${plural(rollout.texts.length, "token")}${rollout.ended === "length" ? " · cut" : ""}`),
      h("span", { class: "bar-frame", "aria-hidden": "true" }, bar));
    button.addEventListener("click", () => {
      this.select(key);
      // On a phone the text stands below the list.
      if (!matchMedia("(min-width: 801px)").matches) this.pair.scrollIntoView({ block: "start" });
    });
    return h("li", {}, button);
  }

  select(key) {
    this.selected = key;
    for (const button of this.list.querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.key === key));
    }
    const before = this.compared && this.byKey.get(this.compared);
    const keeps = before && this.others().includes(before);
    this.compare(keeps ? this.compared : null);
  }

  // The other rollouts of the same prompt, in all runs and steps.
  others() {
    const rollout = this.byKey.get(this.selected);
    return this.data.rollouts.filter((each) => each !== rollout && each.prompt_key === rollout.prompt_key);
  }

  compare(key) {
    this.compared = key;
    this.clearTexts();
    const both = [this.selected, key].filter(Boolean).map((each) => this.byKey.get(each));
    this.pair.classList.toggle("two", both.length === 2);
    this.pair.replaceChildren(...both.map((rollout, place) => this.panel(rollout, place)));
    this.texts.forEach((text) => text.draw());
    this.fillCompared();
    this.hint();
  }

  panel(rollout, place) {
    const text = new TokenText(rollout, this.data, this.nameOf(rollout, true), (from, index) => this.inspect(from, index));
    this.texts.push(text);
    const facts = [`teacher ${percent(rollout.share)}`, plural(rollout.texts.length, "token"),
      rollout.mean_divergence === null ? null : `mean divergence ${number(rollout.mean_divergence)} nats`, `ended ${this.endingOf(rollout.ended)}`];
    const chooser = place === 0 ? h("label", { class: "beside" }, "Beside it ", h("select", { id: "beside" })) : null;
    if (chooser) {
      this.beside = chooser.querySelector("select");
      this.beside.addEventListener("change", () => {
        this.compare(this.beside.value || null);
        this.beside.focus();
      });
    }
    return h("article", { class: "card panel" },
      h("div", { class: "panel-head" }, h("h3", {}, this.nameOf(rollout, true)), chooser),
      h("p", { class: "muted" }, facts.filter(Boolean).join(" · ")),
      place === 0 ? h("details", { class: "prompt", open: rollout.prompt.length < 700 }, h("summary", {}, "Prompt"), h("div", { class: "prompt-text", dir: "auto", tabindex: "0", role: "region", "aria-label": "Prompt" }, rollout.prompt)) : null,
      text.element);
  }

  fillCompared() {
    const others = this.others();
    this.beside.replaceChildren(h("option", { value: "" }, others.length ? `nothing (${others.length} more of this prompt)` : "no other rollout of this prompt"),
      ...others.map((each) => h("option", { value: each.key }, this.nameOf(each))));
    this.beside.disabled = others.length === 0;
    this.beside.value = this.compared || "";
  }

  hint() {
    this.inspector.classList.remove("full");
    this.inspector.replaceChildren(h("p", { class: "muted" }, "Point at a token, tap it, or move through the text with the arrow keys; T goes to the teacher's next one."));
  }

  // A token that is left stays shown: a panel that shrank under the pointer would let go of the next one at once.
  inspect(text, index) {
    if (index === null) return;
    const close = h("button", { type: "button", class: "quiet close", "aria-label": "Close" }, "×");
    close.addEventListener("click", () => {
      text.pin(null);
      this.hint();
    });
    this.inspector.classList.add("full");
    this.inspector.replaceChildren(close, ...inspection(text, index));
  }

  clearTexts() {
    for (const text of this.texts.splice(0)) text.remove();
  }

  redraw() {
    for (const text of this.texts) {
      text.remove();
      text.draw();
    }
  }
}

// How many characters all of these texts begin with, and how many they end with; none where there is one text alone.
function sharedEnds(texts) {
  if (texts.length < 2) return [0, 0];
  const shortest = Math.min(...texts.map((text) => text.length));
  let start = 0;
  while (start < shortest && texts.every((text) => text[start] === texts[0][start])) start += 1;
  let end = 0;
  while (end < shortest - start && texts.every((text) => text[text.length - 1 - end] === texts[0][texts[0].length - 1 - end])) end += 1;
  return [start, end];
}
