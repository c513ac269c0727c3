// The page: what is drawn when, light and dark, and news of a run that is followed.

const POLL_SECONDS = 3;
const THEMES = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" };
const reader = new Reader(byId("reader"));

function render(data) {
  renderOverview(data);
  renderCharts(data.charts);
  reader.update(data);
  renderTables(byId("score-tables"), data.scores, "No evaluation yet: switchkd eval scores a run's model, and its eval.json is shown here.", () => true);
  renderTables(byId("settings-tables"), data.settings, "No run.yaml is here.", (table) => table.title === "Chosen");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = THEMES[theme];
  byId("theme").setAttribute("aria-label", `Colors: ${theme}`);
  byId("theme").dataset.theme = theme;
  try {
    localStorage.setItem("switchkd-theme", theme);
  } catch {
    // A page from a file may have no storage; then the choice lasts as long as the page.
  }
}

function storedTheme() {
  try {
    return localStorage.getItem("switchkd-theme");
  } catch {
    return null;
  }
}

function redrawPlots() {
  drawCharts();
  for (const item of document.querySelectorAll(".legend")) {
    item.querySelectorAll("line").forEach((line, index) => line.setAttribute("stroke", lineStyle(index).color));
  }
  reader.redraw();
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(byId("theme").dataset.theme) + 1) % names.length]);
  redrawPlots();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawPlots);

async function poll(state) {
  let next = state;
  try {
    const answer = await fetch("data.json", { headers: state ? { "If-None-Match": state } : {}, cache: "no-store" });
    if (answer.ok) {
      next = answer.headers.get("ETag");
      render(await answer.json());
    }
    byId("live").textContent = answer.ok || answer.status === 304 ? "● following" : `no news (${answer.status})`;
  } catch {
    byId("live").textContent = "○ the server has stopped";
  }
  setTimeout(poll, 1000 * POLL_SECONDS, next);
}

const stored = storedTheme();
setTheme(stored in THEMES ? stored : "auto");
const initial = JSON.parse(byId("data").textContent);
render(initial);
if (initial.follow) poll(null);
