// One rollout: its prompt, its tokens by writer and divergence, the threshold's curve under them, and what a token is.

// Upper ends of the shades, in nats. Divergences are small more often than not, so the steps grow.
const SHADES = [0.01, 0.03, 0.1, 0.3, Infinity];
const LN2 = Math.log(2);

function shadeOf(divergence) {
  return divergence === null || divergence === undefined ? 0 : SHADES.findIndex((end) => divergence < end);
}

function legendOfTokens() {
  const shades = (writer) => h("span", { class: "shades", "aria-hidden": "true" },
    SHADES.map((_, shade) => h("span", { class: `token ${writer} shade-${shade}` }, "a")));
  const ends = SHADES.slice(0, -1).map((end) => number(end)).join(", ");
  return h("p", { class: "token-legend" },
    h("span", {}, shades("student"), " written by the student"),
    h("span", {}, shades("teacher"), " written by the teacher (underlined)"),
    h("span", { class: "muted" }, `The darker, the further apart the two models: steps at ${ends} nats.`));
}

class TokenText {
  // `onActive` is told the token that the reader looks at: its number, or null.
  constructor(rollout, data, name, onActive) {
    this.rollout = rollout;
    this.data = data;
    this.onActive = onActive;
    this.active = null;
    this.pinned = null;
    this.id = `tokens-${(TokenText.count = (TokenText.count || 0) + 1)}`;
    this.texts = rollout.texts.map((place) => data.strings[place]);
    this.spans = this.texts.map((text, index) => this.span(text, index));
    this.list = h("div", {
      class: "tokens", id: this.id, dir: "auto", tabindex: "0", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": `Tokens of ${name}. Arrow keys move, T goes to the teacher's next token.`,
    }, this.spans);
    this.listen();
    this.curve = h("div", { class: "plot curve", role: "img", "aria-label": this.curveSummary() });
    this.element = h("div", { class: "text" }, this.list, this.curveTitle(), this.curve);
  }

  byTeacher(index) {
    return this.rollout.by_teacher[index] === "1";
  }

  span(text, index) {
    const writer = this.byTeacher(index) ? "teacher" : "student";
    const divergence = this.rollout.divergence[index];
    const apart = divergence === null || divergence === undefined ? "" : `, divergence ${number(divergence)}`;
    const visible = text === "" ? "∅" : text.replace(/\n/g, "↵\n");
    const clean = Array.from(visible, (c) => (c !== "\n" && c !== "\t" && unseen(c) ? shown(c) : c)).join("");
    return h("span", {
      class: `token ${writer} shade-${shadeOf(divergence)}`, role: "option", id: `${this.id}-${index}`,
      "aria-selected": "false", "aria-label": `${shown(text)}, ${writer}${apart}`, "data-index": index,
    }, clean);
  }

  listen() {
    const indexOf = (event) => {
      const token = event.target.closest(".token");
      return token ? Number(token.dataset.index) : null;
    };
    this.list.addEventListener("pointerover", (event) => {
      const index = event.pointerType === "touch" ? null : indexOf(event);
      if (index !== null) this.show(index);
    });
    this.list.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") this.show(this.pinned);
    });
    this.list.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index !== null) this.pin(index);
    });
    this.list.addEventListener("focus", () => {
      if (this.active === null) this.pin(0);
    });
    this.list.addEventListener("keydown", (event) => {
      const to = this.keyTarget(event);
      if (to === undefined) return;
      event.preventDefault();
      this.pin(to);
      if (to !== null) this.spans[to].scrollIntoView({ block: "nearest" });
    });
  }

  // Where a key leads from the pinned token; undefined for a key that means nothing here.
  keyTarget(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return undefined;
    const last = this.spans.length - 1;
    const at = this.pinned === null ? -1 : this.pinned;
    const line = () => this.lineNeighbor(Math.max(at, 0), event.key === "ArrowDown" ? 1 : -1);
    switch (event.key) {
      case "ArrowRight": return Math.min(at + 1, last);
      case "ArrowLeft": return Math.max(at - 1, 0);
      case "ArrowDown":
      case "ArrowUp": return line();
      case "Home": return 0;
      case "End": return last;
      case "Escape": return null;
      case "t": return this.nextOfTeacher(at, 1);
      case "T": return this.nextOfTeacher(at, -1);
      default: return undefined;
    }
  }

  nextOfTeacher(at, direction) {
    for (let index = at + direction; index >= 0 && index < this.spans.length; index += direction) {
      if (this.byTeacher(index)) return index;
    }
    return Math.max(at, 0);
  }

  // The nearest token on the next or the previous line.
  lineNeighbor(at, direction) {
    const here = this.spans[at].getBoundingClientRect();
    let best = at;
    let distance = Infinity;
    let top = null;
    for (let index = at + direction; index >= 0 && index < this.spans.length; index += direction) {
      const box = this.spans[index].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < here.height / 2) continue;
      if (top !== null && Math.abs(box.top - top) > here.height / 2) break;
      top = box.top;
      if (Math.abs(box.left - here.left) < distance) [best, distance] = [index, Math.abs(box.left - here.left)];
    }
    return best;
  }

  pin(index) {
    this.pinned = index;
    this.show(index);
  }

  show(index) {
    if (index === this.active) return;
    if (this.active !== null) this.mark(this.active, false);
    this.active = index;
    if (index === null) {
      this.list.removeAttribute("aria-activedescendant");
    } else {
      this.mark(index, true);
      this.list.setAttribute("aria-activedescendant", this.spans[index].id);
    }
    if (this.plot) this.moveCursor();
    this.onActive(this, index);
  }

  mark(index, isActive) {
    this.spans[index].classList.toggle("active", isActive);
    this.spans[index].setAttribute("aria-selected", String(isActive));
  }

  curveTitle() {
    if (!this.rollout.divergence.length) return h("p", { class: "muted" }, "No teacher took part, so no divergence was measured.");
    const bar = (writer) => h("span", { class: `bar-key ${writer}`, "aria-hidden": "true" });
    const line = this.rollout.threshold.length ? [swatch({ color: "currentColor", dash: [5, 3] }), "threshold"] : [];
    return h("p", { class: "curve-title" }, h("span", {}, "Divergence by position (nats)"),
      h("span", {}, bar("student"), "student's"), h("span", {}, bar("teacher"), "teacher's, with a dot"), h("span", {}, ...line));
  }

  curveSummary() {
    const known = this.rollout.divergence.filter((each) => each !== null);
    if (!known.length) return "No divergence was measured.";
    const thresholds = this.rollout.threshold.filter((each) => each !== null);
    const threshold = thresholds.length
      ? ` The threshold goes from ${number(thresholds[0])} to ${number(thresholds[thresholds.length - 1])} nats.` : "";
    return `Divergence at each of ${known.length} tokens, at most ${number(Math.max(...known))} nats.${threshold}`;
  }

  draw() {
    if (!this.rollout.divergence.length) {
      this.curve.hidden = true;
      return;
    }
    const { divergence, threshold } = this.rollout;
    const positions = divergence.map((_, index) => index);
    const of = (teacher) => divergence.map((value, index) => (this.byTeacher(index) === teacher ? value : null));
    const highest = Math.max(0.02, ...divergence.filter((each) => each !== null), ...threshold.filter((each) => each !== null));
    const bars = uPlot.paths.bars({ size: [0.8, 12] });
    const [student, teacher] = [color("--student-strong"), color("--teacher-strong")];
    this.plot = new uPlot({
      width: Math.max(200, Math.floor(this.curve.clientWidth)),
      height: 150,
      legend: { show: false },
      // Small divergences decide as often as large ones: the axis is even near 0 and logarithmic above.
      scales: { x: { time: false, range: [-0.5, positions.length - 0.5] }, y: { distr: 4, asinh: 0.01, range: [0, Math.min(highest * 1.3, LN2 * 1.3)] } },
      axes: axes("position in the response", (value) => number(value), () => [0, ...SHADES.slice(0, -1), 0.69]),
      cursor: { y: false, drag: { x: false, y: false } },
      series: [{},
        { fill: student, stroke: student, width: 0, paths: bars, points: { show: false } },
        { fill: teacher, stroke: teacher, width: 0, paths: bars, points: { show: true, size: 6, fill: teacher } },
        { stroke: color("--text"), width: 1.5, dash: [5, 3], points: { show: false } }],
    }, [positions, of(false), of(true), threshold.length ? threshold : positions.map(() => null)], this.curve);
    this.plot.over.addEventListener("pointermove", () => {
      if (this.plot.cursor.idx !== null && this.plot.cursor.idx !== undefined) this.show(this.plot.cursor.idx);
    });
    this.plot.over.addEventListener("pointerleave", () => this.show(this.pinned));
    this.plot.over.addEventListener("click", () => this.pin(this.active));
    this.observer = keepWidth(this.curve, this.plot);
    this.moveCursor();
  }

  moveCursor() {
    const left = this.active === null ? -10 : this.plot.valToPos(this.active, "x");
    this.plot.setCursor({ left, top: this.active === null ? -10 : 10 }, false);
  }

  remove() {
    if (this.observer) this.observer.disconnect();
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }
}

// What both models said at a token.
function inspection(text, index) {
  const { rollout, data, texts } = text;
  const writer = text.byTeacher(index) ? "teacher" : "student";
  const divergence = rollout.divergence.length ? rollout.divergence[index] : null;
  const threshold = rollout.threshold.length ? rollout.threshold[index] : null;
  const facts = [`position ${index}`, divergence === null ? null : `divergence ${number(divergence)} nats`,
    threshold === null ? null : `threshold ${number(threshold)}`].filter(Boolean).join(" · ");
  return [
    h("p", { class: "inspected" }, h("span", { class: `token ${writer} shade-${shadeOf(divergence)}` }, shown(texts[index])),
      h("span", {}, ` written by the ${writer}`), h("span", { class: "muted" }, facts)),
    h("div", { class: "models" },
      favorites("Student", rollout.student_p[index], rollout.student_favorites[index], data, texts[index]),
      favorites("Teacher", rollout.teacher_p[index], rollout.teacher_favorites[index], data, texts[index])),
  ];
}

function favorites(model, p, packed, data, written) {
  const own = p === null || p === undefined ? "–" : percent(p, 2);
  const rows = [];
  for (let at = 0; packed && at < packed.length; at += 2) {
    const share = packed[at + 1] / 10000;
    const text = data.strings[packed[at]];
    const bar = h("span", { class: `share-bar ${model.toLowerCase()}` });
    bar.style.width = `${100 * share}%`;
    const isWritten = text === written;
    rows.push(h("tr", { class: isWritten ? "is-written" : null },
      h("th", { scope: "row" }, isWritten ? "▸ " : "", shown(text)), h("td", { class: "number" }, share === 0 ? "< 0.01 %" : percent(share, 2)),
      h("td", { class: "bar-cell", "aria-hidden": "true" }, bar)));
  }
  return h("div", { class: "model" },
    h("p", {}, h("strong", {}, model), `: ${own} for the written token`),
    rows.length ? h("table", {}, h("tbody", {}, rows)) : h("p", { class: "muted" }, "Its alternatives were not kept."));
}
