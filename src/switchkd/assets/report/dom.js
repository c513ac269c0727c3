"use strict";
// Elements and numbers. Text from the data becomes text nodes and attribute values only, never markup.

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  if (Math.abs(value) < 0.0001) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

function percent(share, digits = 0) {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  if (digits > 0 && value > 0 && value < 0.01) return "< 0.01 %";
  return `${value.toFixed(digits)} %`;
}

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

// A token's text with its blanks to be seen; what cannot be seen at all is named by its code.
function shown(text) {
  if (text === "") return "∅";
  return Array.from(text, (c) => {
    if (c === " ") return "␣";
    if (c === "\n") return "↵";
    if (c === "\t") return "⇥";
    return unseen(c) ? `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}` : c;
  }).join("");
}

// Control characters, and those that turn the direction of the text around them.
function unseen(c) {
  return /[\p{Cc}\p{Cs}\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/u.test(c);
}

// A color of the style sheet as a canvas takes it: a variable alone would still say light-dark(...).
function color(name) {
  const probe = h("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function empty(message) {
  return h("p", { class: "empty" }, message);
}
